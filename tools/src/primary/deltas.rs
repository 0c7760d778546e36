//! XBZRLE: what the secondary holds of each page, and what the page's next content differs by (spec §7.4).

use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::xbzrle;
use std::collections::HashMap;

/// A cache with room for all pages, so nothing is ever dropped from it.
#[derive(Default)]
pub(super) struct DeltaCache {
    /// By block and offset.
    sent: HashMap<(usize, u64), Box<[u8; PAGE_SIZE]>>,
    delta: Vec<u8>,
}

/// How a page with content is sent.
pub(super) enum Form<'a> {
    /// As it is: for the first time, or because the delta would not be shorter.
    Whole,
    Delta(&'a [u8]),
    /// Not at all: it has the content that it had.
    Unchanged,
}

impl DeltaCache {
    /// A page with content is due to be sent; whatever its form, the secondary has this content then.
    pub(super) fn send(&mut self, block: usize, offset: u64, content: &[u8; PAGE_SIZE]) -> Form<'_> {
        let Some(before) = self.sent.get_mut(&(block, offset)) else {
            self.sent.insert((block, offset), Box::new(*content));
            return Form::Whole;
        };
        self.delta.clear();
        xbzrle::encode(before, content, &mut self.delta);
        **before = *content;
        match self.delta.len() {
            0 => Form::Unchanged,
            1..PAGE_SIZE => Form::Delta(&self.delta),
            _ => Form::Whole,
        }
    }

    /// A page is sent as zero.
    pub(super) fn send_zero(&mut self, block: usize, offset: u64) {
        let page = self.sent.entry((block, offset));
        page.or_insert_with(|| Box::new([0; PAGE_SIZE])).fill(0);
    }
}
