//! Where the pages of one packet are to land.

use crate::store::cache::cursor::Cursor;
use crate::store::cache::extents::Slot;
use crate::store::memory::index;
use crate::store::memory::slab::{HEADER_BYTES, Slab, SlabId};
use crate::store::memory::span::LandingRun;
use crate::store::memory::span::PageSpan;
use crate::units::{ChannelId, PACKET_PAGES, PageIndex};

/// Where received pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// To the RAM image, and from there to the cache.
    Precopy,
    /// To the cache, until they are committed.
    Colo,
}

/// The landing places of a packet's normal pages, in the packet's order: filled by [`crate::store::Store::place`], handed to
/// the kernel, then given back to [`crate::store::Store::landed`]. A channel owns one and uses it for all its packets:
/// nothing is allocated after it was made.
pub struct Landing {
    pages: Vec<PageIndex>,
    runs: Vec<LandingRun>,
    slab: SlabChoice,
    header: Option<HeaderSlot>,
    channel: ChannelId,
    target: Target,
    /// Where its channel goes on in the pool.
    pub(crate) cursor: Cursor,
}

/// What the pages land in.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// The RAM image: in precopy.
    Image,
    Mirror,
    /// The pool, from this slot on.
    Pool(Slot),
}

/// Where the header of the packet that follows may be read to, with the pages.
#[derive(Clone, Copy, Debug)]
pub struct HeaderSlot {
    pub(crate) slab: SlabId,
    pub(crate) offset: u64,
    /// The address, in the type that carries addresses.
    run: LandingRun,
}

impl HeaderSlot {
    /// Where its [`HEADER_BYTES`] bytes are.
    pub fn address(&self) -> *mut u8 {
        self.run.address
    }
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
            header: None,
            channel: ChannelId(0),
            target: Target::Image,
            cursor: Cursor::default(),
        }
    }
}

impl Landing {
    /// For the packets of `channel`.
    pub fn of(channel: ChannelId) -> Self {
        Self {
            channel,
            ..Self::default()
        }
    }

    pub(crate) fn channel(&self) -> ChannelId {
        self.channel
    }

    /// [`HEADER_BYTES`] bytes in the slab of all pages ([`Self::slab`]), for the header of the packet that follows, so that
    /// one read may fill both. To be read out by [`crate::store::Store::read_header`] before the landing is used again.
    pub fn header(&self) -> Option<HeaderSlot> {
        self.header
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

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

    pub(crate) fn begin(&mut self, pages: usize) {
        assert!(
            pages <= PACKET_PAGES,
            "a packet carries at most {PACKET_PAGES} pages, not {pages}"
        );
        self.pages.clear();
        self.runs.clear();
        self.slab = SlabChoice::NoPageYet;
        self.header = None;
        self.target = Target::Image;
    }

    pub(crate) fn set_target(&mut self, target: Target) {
        self.target = target;
    }

    /// All pages lie in one piece of one slab.
    pub(crate) fn push_all(&mut self, pages: &[PageIndex], slab: SlabId, place: Option<PageSpan<'_>>) {
        self.pages.extend_from_slice(pages);
        self.slab = SlabChoice::All(slab);
        self.runs.extend(place.map(|place| LandingRun {
            address: place.start(),
            length: place.bytes(),
        }));
    }

    pub(crate) fn set_header(&mut self, id: SlabId, offset: u64, slab: &Slab) {
        let address = slab.memory().bytes(index(offset), index(HEADER_BYTES));
        let run = LandingRun {
            address,
            length: index(HEADER_BYTES),
        };
        self.header = Some(HeaderSlot {
            slab: id,
            offset,
            run,
        });
    }

    /// Adds the place of the next page: `slab` is the registered buffer it lies in, if any.
    pub(crate) fn push(&mut self, page: PageIndex, slab: Option<SlabId>, place: PageSpan<'_>) {
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
