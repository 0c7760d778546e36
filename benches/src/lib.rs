//! What the micro-benchmarks beside `src/` share, and the comparison with QEMU's own secondary.
#![forbid(unsafe_code)]

pub mod versus;

use colo_ring::blocks::BlockTable;
use colo_ring::units::{BlockId, PAGE_BYTES, PageIndex};

/// The same random numbers each time: a linear congruential generator, of which the high bits are used.
pub struct Numbers(u64);

impl Numbers {
    /// The sequence of that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, below `limit`, which is at most 2³².
    pub fn below(&mut self, limit: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) % limit
    }
}

/// A guest with one block of `pages` pages.
pub fn guest(pages: u64) -> BlockTable {
    let block = (b"pc.ram".as_slice().into(), pages * PAGE_BYTES);
    BlockTable::new(vec![block], pages * PAGE_BYTES).expect("a valid list")
}

/// `count` different pages of the guest, at random.
pub fn random_pages(table: &BlockTable, count: usize, numbers: &mut Numbers) -> Vec<PageIndex> {
    let mut seen = std::collections::HashSet::with_capacity(count);
    let mut pages = Vec::with_capacity(count);
    while pages.len() < count {
        let offset = numbers.below(table.total_pages()) * PAGE_BYTES;
        let page = table.page(BlockId(0), offset).expect("below the block's end");
        if seen.insert(page) {
            pages.push(page);
        }
    }
    pages
}

/// The middle one of some measurements.
///
/// # Panics
/// Without any.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
