//! The mirror: a slot for every page of the guest.

use crate::budget::Account;
use crate::store::StoreError;
use crate::store::cache::landing::{Landing, Target};
use crate::store::cache::plan::FlushPlan;
use crate::store::memory::copy::{self, CopyMethod};
use crate::store::memory::huge::Fallback;
use crate::store::memory::image::RamImage;
use crate::store::memory::index;
use crate::store::memory::slab::{self, Slab, SlabMemory, slab_id};
use crate::store::memory::span::PageSpan;
use crate::units::PageRun;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex};
use std::ops::Range;

/// Pages in a slab: 512 MiB, so that with the header area it stays below 1 GiB, the most that an io_uring takes as
/// one registered buffer. 64 Ki slabs are then 32 TiB.
pub(crate) const SLAB_PAGES: u64 = 1 << 17;

/// Bytes of slots in each slab.
fn slot_bytes(pages: u64, slab_pages: u64) -> impl Iterator<Item = u64> {
    let firsts = (0..pages).step_by(index(slab_pages));
    firsts.map(move |first| slab_pages.min(pages - first) * PAGE_BYTES)
}

/// A slot for every page of the guest: page and slot have the same number.
pub(crate) struct Mirror {
    slabs: Vec<Slab>,
    /// Pages in each slab but the last: a power of two, so that a page is found by shift and mask.
    slab_shift: u32,
    /// What the slabs have of the budget, which is given back after they are freed.
    _account: Account,
}

impl Mirror {
    /// Maps slabs of `slab_pages` pages (a power of two, [`SLAB_PAGES`] but for tests) for `pages` pages; their memory
    /// is not yet populated.
    ///
    /// # Errors
    /// If there is not even address space. Too few huge pages are a fallback, noted in `notes`.
    pub(crate) fn map(
        pages: u64,
        slab_pages: u64,
        mut memory: SlabMemory,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        assert!(slab_pages.is_power_of_two(), "pages are found by shift and mask");
        let count = index(pages.div_ceil(slab_pages));
        let mut slabs = Vec::new();
        let reserved = slabs.try_reserve_exact(count);
        reserved.map_err(|_| StoreError::no_tables::<Slab>(count))?;
        for slot_bytes in slot_bytes(pages, slab_pages) {
            slabs.push(Slab::with_headers(&mut memory, slot_bytes)?);
        }
        notes.extend(memory.notes(slabs.len()));
        Ok(Self {
            slabs,
            slab_shift: slab_pages.trailing_zeros(),
            _account: memory.into_account(),
        })
    }

    /// What [`Self::map`] takes of the budget.
    pub(crate) fn charge(pages: u64, slab_pages: u64) -> u64 {
        // Of any number that a peer announces, so that it is not gone through slab by slab.
        let of_slab = |pages: u64| match pages {
            0 => 0,
            pages => slab::charge(slab::bytes_with_headers(pages * PAGE_BYTES)),
        };
        let whole = (pages / slab_pages).saturating_mul(of_slab(slab_pages));
        whole.saturating_add(of_slab(pages % slab_pages))
    }

    /// The slab of a page, and its byte offset there.
    fn locate(&self, page: PageIndex) -> (usize, u64) {
        let slab = page.get() >> self.slab_shift;
        let slot = page.get() & ((1 << self.slab_shift) - 1);
        (index(slab), slot * PAGE_BYTES)
    }

    /// The slots of the pages of `run`, or of the first of them where they do not lie in one slab.
    fn slots(&self, run: PageRun) -> PageSpan<'_> {
        let (slab, offset) = self.locate(run.first);
        let slab = &self.slabs[slab];
        let left = (slab.slot_bytes() - offset) / PAGE_BYTES;
        slab.memory().span(offset, run.pages.min(left))
    }

    pub(crate) fn slab_limit(&self) -> usize {
        self.slabs.len()
    }

    pub(crate) fn slab(&self, position: usize) -> Option<&Slab> {
        self.slabs.get(position)
    }

    pub(crate) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    pub(crate) fn place(&self, pages: &[PageIndex], landing: &mut Landing) {
        landing.set_target(Target::Mirror);
        for page in pages {
            let (slab, offset) = self.locate(*page);
            let place = self.slabs[slab].memory().span(offset, 1);
            landing.push(*page, Some(slab_id(slab)), place);
        }
        if let Some(slab) = landing.slab() {
            let memory = &self.slabs[usize::from(slab.0)];
            landing.set_header(slab, memory.header(landing.channel()), memory);
        }
    }

    pub(crate) fn zero(&self, page: PageIndex) {
        copy::zero(self.slots(PageRun::one(page)));
    }

    pub(crate) fn write(&self, page: PageIndex, bytes: &[u8; PAGE_SIZE]) {
        copy::fill(self.slots(PageRun::one(page)), bytes);
    }

    pub(crate) fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        copy::read(self.slots(PageRun::one(page)), out);
    }

    /// Copies a page that precopy has put into the image.
    pub(crate) fn copy_from_image(&self, page: PageIndex, image: &RamImage) {
        let run = PageRun::one(page);
        copy::copy(self.slots(run), image.span(run), CopyMethod::NonTemporal);
    }

    /// See [`Cache::flush`](super::Cache::flush).
    pub(crate) fn flush(
        &self,
        plan: &FlushPlan,
        words: Range<usize>,
        image: &RamImage,
        method: CopyMethod,
    ) -> u64 {
        let mut pieces = 0;
        for mut run in plan.runs(words) {
            // It may cross blocks of the image and slabs of the cache.
            while run.pages > 0 {
                let (source, target) = (self.slots(run), image.span(run));
                let pages = source.pages().min(target.pages());
                copy::copy(target.first(pages), source.first(pages), method);
                run = run.skip(pages);
                pieces += 1;
            }
        }
        copy::fence();
        pieces
    }
}
