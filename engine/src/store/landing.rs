//! Where the pages of one packet are to land.
#![forbid(unsafe_code)]

use super::Phase;
use super::cache::SlabId;
use super::map::{LandingRun, Span};
use crate::units::{PACKET_PAGES, PageIndex};

/// The landing places of a packet's normal pages, in the packet's order: filled by [`super::Store::place`], handed to
/// the kernel, then given back to [`super::Store::landed`]. A channel owns one and uses it for all its packets:
/// nothing is allocated after it was made.
pub struct Landing {
    pages: Vec<PageIndex>,
    runs: Vec<LandingRun>,
    slab: SlabChoice,
    pub(super) phase: Phase,
}

/// In which registered buffer the runs lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SlabChoice {
    NoPageYet,
    All(SlabId),
    NotOne,
}

impl Default for Landing {
    fn default() -> Self {
        Self {
            pages: Vec::with_capacity(PACKET_PAGES),
            runs: Vec::with_capacity(PACKET_PAGES),
            slab: SlabChoice::NoPageYet,
            phase: Phase::Precopy,
        }
    }
}

impl Landing {
    /// The pages, in the packet's order.
    pub fn pages(&self) -> &[PageIndex] {
        &self.pages
    }

    /// Where their bytes go, in the packet's order: pages that are neighbours in memory and packet share a run.
    pub fn runs(&self) -> &[LandingRun] {
        &self.runs
    }

    /// The slab that all runs lie in, if it is one: then they may be read into as one registered buffer.
    pub fn slab(&self) -> Option<SlabId> {
        match self.slab {
            SlabChoice::All(slab) => Some(slab),
            SlabChoice::NoPageYet | SlabChoice::NotOne => None,
        }
    }

    pub(super) fn begin(&mut self, phase: Phase, pages: usize) {
        assert!(
            pages <= PACKET_PAGES,
            "a packet carries at most {PACKET_PAGES} pages, not {pages}"
        );
        self.pages.clear();
        self.runs.clear();
        self.slab = SlabChoice::NoPageYet;
        self.phase = phase;
    }

    /// Adds the place of the next page: `slab` is the registered buffer it lies in, if any.
    pub(super) fn push(&mut self, page: PageIndex, slab: Option<SlabId>, place: Span<'_>) {
        self.slab = match (self.slab, slab) {
            (SlabChoice::NoPageYet, Some(slab)) => SlabChoice::All(slab),
            (SlabChoice::All(all), Some(slab)) if all == slab => SlabChoice::All(slab),
            _ => SlabChoice::NotOne,
        };
        self.pages.push(page);
        let (address, length) = (place.start(), place.bytes());
        match self.runs.last_mut() {
            // Whichever mappings they belong to: the kernel fills addresses.
            Some(last) if last.address.wrapping_add(last.length) == address => last.length += length,
            _ => self.runs.push(LandingRun { address, length }),
        }
    }
}
