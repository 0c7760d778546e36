//! Where received pages wait for their commit: the placement of cache slots.
//!
//! The store asks a [`Cache`] and nothing else, so that another placement needs no change elsewhere. There is one:
//! [`Mirror`], a slot for every page of the guest.
#![forbid(unsafe_code)]

use super::StoreError;
use super::huge::{self, Fallback, HUGE_2M, HugePages};
use super::landing::Landing;
use super::map::{Mapping, Span, index};
use super::plan::PageRun;
use crate::units::{ChannelId, PAGE_BYTES, PageIndex};

/// A placement. Slots are found without a lock and without an allocation.
pub(super) trait Cache: Send + Sync {
    /// The memory that slots lie in: fixed for the cache's life, so that a ring can register it.
    fn slabs(&self) -> &[Slab];

    /// Says where the pages of a packet are to land.
    fn place(&self, pages: &[PageIndex], landing: &mut Landing);

    /// The slot for new content of one page.
    fn slot(&self, page: PageIndex) -> Span<'_>;

    /// The newest content of the pages of `run`, or of the first of them where they do not lie in one piece.
    fn newest(&self, run: PageRun) -> Span<'_>;
}

/// Position of a slab among the store's slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabId(pub u16);

/// Bytes of the header area of one channel at the end of a slab. A packet header is 320 + 8 · 128 = 1344 bytes (spec §8.2).
pub const HEADER_BYTES: u64 = 2048;

/// Headers that a slab has room for: one for each possible [`ChannelId`].
const HEADERS: u64 = 256;

const HEADER_AREA: u64 = HEADERS * HEADER_BYTES;

/// Pages in a slab: 512 MiB, so that with the header area it stays below 1 GiB, the most that an io_uring takes as
/// one registered buffer. 64 Ki slabs are then 32 TiB.
pub(super) const SLAB_PAGES: u64 = 1 << 17;

/// A piece of cache memory that a ring registers as one buffer: slots, and behind them a header area, so that one
/// read may fill the slots of a packet and take the next packet's header.
pub struct Slab {
    memory: Mapping,
    slot_bytes: u64,
}

impl Slab {
    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    /// Bytes from there on: slots and headers.
    pub fn bytes(&self) -> usize {
        index(self.slot_bytes + HEADER_AREA)
    }

    /// Gives the memory back to the host, as far as it takes it; else it goes with the slab.
    pub(super) fn give_back(&self) {
        let _ = self.memory.give_back();
    }

    /// Copies out what a read has put where [`Self::header`] points.
    ///
    /// # Panics
    /// With more than [`HEADER_BYTES`] bytes.
    pub fn read_header(&self, channel: ChannelId, out: &mut [u8]) {
        assert!(out.len() <= index(HEADER_BYTES), "a header has its own area");
        let offset = self.slot_bytes + u64::from(channel.0) * HEADER_BYTES;
        self.memory.copy_out(index(offset), out);
    }

    /// [`HEADER_BYTES`] bytes for the headers of that channel, aligned to as much. The store never touches them; by
    /// convention the channel's own receiver alone does.
    pub fn header(&self, channel: ChannelId) -> *mut u8 {
        let offset = self.slot_bytes + u64::from(channel.0) * HEADER_BYTES;
        self.memory.bytes(index(offset), index(HEADER_BYTES))
    }
}

/// A slot for every page of the guest: page and slot have the same number.
pub(super) struct Mirror {
    slabs: Vec<Slab>,
    /// Pages in each slab but the last: a power of two, so that a page is found by shift and mask.
    slab_shift: u32,
}

impl Mirror {
    /// Maps slabs of `slab_pages` pages (a power of two, [`SLAB_PAGES`] but for tests) for `pages` pages; their memory
    /// is not yet populated.
    ///
    /// # Errors
    /// If there is not even address space. Too few huge pages are a fallback, noted in `notes`.
    pub(super) fn map(
        pages: u64,
        slab_pages: u64,
        huge: HugePages,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        assert!(slab_pages.is_power_of_two(), "pages are found by shift and mask");
        let mut memory = SlabMemory::new(huge);
        let mut slabs = Vec::with_capacity(index(pages.div_ceil(slab_pages)));
        for first in (0..pages).step_by(index(slab_pages)) {
            let slot_bytes = slab_pages.min(pages - first) * PAGE_BYTES;
            let mapped = memory.map(slot_bytes + HEADER_AREA);
            let memory = mapped.map_err(|errno| StoreError::NoCacheMemory {
                bytes: pages * PAGE_BYTES,
                source: errno.into(),
            })?;
            slabs.push(Slab { memory, slot_bytes });
        }
        notes.extend(memory.note(slabs.len()));
        let slab_shift = slab_pages.trailing_zeros();
        Ok(Self { slabs, slab_shift })
    }

    pub(super) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.slabs.iter().map(|slab| &slab.memory)
    }

    /// The slab of a page, and its byte offset there.
    fn locate(&self, page: PageIndex) -> (usize, u64) {
        let slab = page.get() >> self.slab_shift;
        let slot = page.get() & ((1 << self.slab_shift) - 1);
        (index(slab), slot * PAGE_BYTES)
    }
}

fn slab_id(position: usize) -> SlabId {
    SlabId(u16::try_from(position).expect("64 Ki slabs are 32 TiB"))
}

impl Cache for Mirror {
    fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    fn place(&self, pages: &[PageIndex], landing: &mut Landing) {
        for page in pages {
            let (slab, offset) = self.locate(*page);
            landing.push(
                *page,
                Some(slab_id(slab)),
                self.slabs[slab].memory.span(offset, 1),
            );
        }
    }

    fn slot(&self, page: PageIndex) -> Span<'_> {
        self.newest(PageRun::one(page))
    }

    fn newest(&self, run: PageRun) -> Span<'_> {
        let (slab, offset) = self.locate(run.first);
        let slab = &self.slabs[slab];
        let left = (slab.slot_bytes - offset) / PAGE_BYTES;
        slab.memory.span(offset, run.pages.min(left))
    }
}

/// Where slabs get their memory: from the huge page pool until it is empty, and what comes after that.
struct SlabMemory {
    asked: HugePages,
    transparent: Option<Fallback>,
    /// Why the pool gave nothing, and how many slabs and bytes went without.
    lack: Option<String>,
    slabs_without: usize,
    bytes_without: u64,
}

impl SlabMemory {
    fn new(asked: HugePages) -> Self {
        Self {
            asked,
            transparent: huge::transparent_private(),
            lack: None,
            slabs_without: 0,
            bytes_without: 0,
        }
    }

    fn from_pool(length: u64) -> Result<Mapping, String> {
        huge::default_is_2m()?;
        // Whole huge pages: the kernel takes advice on nothing less.
        let length = length.next_multiple_of(HUGE_2M);
        Mapping::huge(length).map_err(|errno| errno.desc().to_owned())
    }

    fn map(&mut self, length: u64) -> Result<Mapping, nix::errno::Errno> {
        let mapping = match self.asked {
            HugePages::Huge2M | HugePages::Huge1G => match Self::from_pool(length) {
                Ok(mapping) => mapping,
                Err(reason) => {
                    self.lack.get_or_insert(reason);
                    self.slabs_without += 1;
                    self.bytes_without += length;
                    self.map_transparent(length)?
                }
            },
            HugePages::Thp => self.map_transparent(length)?,
            HugePages::Off => Mapping::anonymous(length)?,
        };
        mapping.keep_from_children()?;
        Ok(mapping)
    }

    fn map_transparent(&self, length: u64) -> Result<Mapping, nix::errno::Errno> {
        let mapping = Mapping::anonymous(length)?;
        if self.transparent.is_none() {
            // Advice: where the kernel declines it, pages are ordinary ones, as they would be without it.
            let _ = mapping.advise_huge();
        }
        Ok(mapping)
    }

    fn note(self, slabs_all: usize) -> Option<Fallback> {
        let Some(reason) = self.lack else {
            return self.transparent.filter(|_| self.asked == HugePages::Thp);
        };
        let needed = self.bytes_without.div_ceil(HUGE_2M);
        Some(Fallback::Cache {
            slabs: self.slabs_without,
            slabs_all,
            needed,
            got: huge::instead(&self.transparent),
            reason,
            remedy: huge::pool_remedy(HUGE_2M >> 10, needed),
        })
    }
}
