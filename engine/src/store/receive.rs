//! Receiving pages: where they land, and how they are recorded after they have landed. See the module above for what callers
//! must ensure.

use crate::canary::{self, Canary};
use crate::store::cache::landing::Target;
use crate::store::memory::copy;
use crate::store::memory::index;
use crate::store::{HEADER_BYTES, HeaderSlot, Landing, Phase, PoolBuffer, Store, StoreError};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use std::sync::atomic::Ordering;

impl Store {
    /// Where received pages go now.
    pub fn phase(&self) -> Phase {
        match self.colo.load(Ordering::Acquire) {
            true => Phase::Colo,
            false => Phase::Precopy,
        }
    }

    /// Chooses where the normal pages of a packet land; `landing` has that until its next use. All its places must be filled
    /// before [`Store::landed`]. `shard` is that of the calling thread.
    ///
    /// # Errors
    /// If there is no memory for them: see [`StoreError::PoolFull`].
    ///
    /// # Panics
    /// With more than [`crate::units::PACKET_PAGES`] pages.
    pub fn place(&self, shard: usize, pages: &[PageIndex], landing: &mut Landing) -> Result<(), StoreError> {
        let phase = self.phase();
        landing.begin(pages.len());
        match phase {
            Phase::Precopy => {
                for page in pages {
                    landing.push(*page, None, self.image().span(PageRun::one(*page)));
                }
                Ok(())
            }
            Phase::Colo => self.cache.place(shard, pages, landing),
        }
    }

    /// The places of `landing` have been filled. `shard` is that of the calling thread.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn landed(&self, shard: usize, landing: &mut Landing) {
        match landing.target() {
            Target::Image => {
                if let Some(mirror) = self.cache.mirror() {
                    let pages = landing.pages().iter();
                    pages.for_each(|page| mirror.copy_from_image(*page, self.image()));
                }
                copy::fence();
            }
            target => {
                if let (Target::Pool(slot), Some(pool)) = (target, self.cache.pool()) {
                    pool.landed(landing, slot);
                }
                let lost = usize::from(canary::is_set(Canary::LostMark));
                self.dirty.mark_all(shard, &landing.pages()[lost..]);
            }
        }
        self.received.insert_all(landing.pages());
    }

    /// Reads out a header that came with the pages of a landing of this store ([`Landing::header`]).
    ///
    /// # Panics
    /// With more than [`HEADER_BYTES`] bytes.
    pub fn read_header(&self, slot: HeaderSlot, out: &mut [u8]) {
        assert!(out.len() <= index(HEADER_BYTES), "a header has its own area");
        let slab = self.cache.existing(slot.slab);
        copy::read_bytes(slab.memory(), index(slot.offset), out);
    }

    /// Brings a page that precopy has put into the image to a mirror's slot.
    fn mirror_from_image(&self, page: PageIndex) {
        if let Some(mirror) = self.cache.mirror() {
            mirror.copy_from_image(page, self.image());
        }
    }

    /// A channel will not use its landing any more: its part of the pool is released.
    pub fn release_landing(&self, landing: &mut Landing) {
        if let Some(pool) = self.cache.pool() {
            pool.release_landing(landing);
        }
    }

    /// A page of zeros was received. `shard` is that of the calling thread.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn zero(&self, shard: usize, page: PageIndex) {
        match self.phase() {
            Phase::Precopy => {
                copy::zero(self.image().span(PageRun::one(page)));
                self.mirror_from_image(page);
                copy::fence();
            }
            Phase::Colo => {
                self.cache.zero(page);
                self.dirty.mark(shard, page);
            }
        }
        self.received.insert_all(&[page]);
    }

    /// A page was received whose bytes the caller holds. `shard` is that of the calling thread.
    ///
    /// # Errors
    /// If there is no memory for it: see [`StoreError::PoolFull`].
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn write(&self, shard: usize, page: PageIndex, bytes: &[u8; PAGE_SIZE]) -> Result<(), StoreError> {
        self.write_all(shard, &[page], std::slice::from_ref(bytes))
    }

    /// Pages of one packet were received, whose bytes the caller holds. `shard` is that of the calling thread.
    ///
    /// # Errors
    /// If there is no memory for them: see [`StoreError::PoolFull`].
    ///
    /// # Panics
    /// If there is no such shard; if there are more pages than a packet has, or not as many contents as pages.
    pub fn write_all(
        &self,
        shard: usize,
        pages: &[PageIndex],
        contents: &[[u8; PAGE_SIZE]],
    ) -> Result<(), StoreError> {
        assert_eq!(pages.len(), contents.len(), "a content for each page");
        let to_image = |page: &PageIndex, bytes| copy::fill(self.image().span(PageRun::one(*page)), bytes);
        match self.phase() {
            Phase::Precopy => {
                for (page, bytes) in pages.iter().zip(contents) {
                    to_image(page, bytes);
                    self.mirror_from_image(*page);
                }
                copy::fence();
            }
            Phase::Colo => {
                if canary::is_set(Canary::EarlyImage) {
                    pages
                        .iter()
                        .zip(contents)
                        .for_each(|(page, bytes)| to_image(page, bytes));
                }
                self.cache.write_all(shard, pages, contents)?;
                self.dirty.mark_all(shard, pages);
            }
        }
        self.received.insert_all(pages);
        Ok(())
    }

    /// A receive buffer whose pages can stay where they arrive; none where the cache is a mirror. `shard` is that of the thread
    /// that will fill it.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn pool_buffer(&self, shard: usize) -> Result<Option<PoolBuffer>, StoreError> {
        let pool = self.cache.pool();
        pool.map(|pool| PoolBuffer::open(pool, shard)).transpose()
    }

    /// A page has arrived in `buffer`, and stays there until it is flushed. `shard` is that of the calling thread.
    ///
    /// # Panics
    /// If there is no such shard, or the page does not lie there; in precopy.
    pub fn adopt(&self, shard: usize, page: PageIndex, buffer: &PoolBuffer, bytes: &[u8; PAGE_SIZE]) {
        assert_eq!(self.phase(), Phase::Colo, "in precopy pages belong in the image");
        buffer.adopt(page, bytes);
        self.dirty.mark(shard, page);
        self.received.insert_all(&[page]);
    }

    /// Reads the newest received content of a page, committed or not: what a delta is applied to (spec §7.4).
    pub fn read_newest(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        let in_image = self.phase() == Phase::Precopy || !self.cache.read(page, out);
        if in_image {
            copy::read(self.image().span(PageRun::one(page)), out);
        }
    }

    /// Whether the page was received at least once.
    pub fn was_received(&self, page: PageIndex) -> bool {
        self.received.contains(page)
    }

    /// Pages that were never received: none after a complete precopy (spec §7.3). Counts the whole bitmap.
    pub fn unseen_pages(&self) -> u64 {
        self.table().total_pages() - self.received.count()
    }

    /// Ends precopy. The caller has made sure that no thread is receiving: see the module.
    pub fn begin_colo(&self) {
        self.colo.store(true, Ordering::Release);
    }

    /// Pages received since the last commit.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.count()
    }

    /// A channel may leave its landing unused for some time.
    pub fn idle_landing(&self, landing: &mut Landing) {
        if let Some(pool) = self.cache.pool() {
            pool.idle_landing(landing);
        }
    }

    /// Copies a page of the last committed checkpoint out.
    #[cfg(test)]
    pub(crate) fn read_committed(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        // During a flush the newest content is the committed one: see the module.
        if !self.is_flushing() || !self.cache.read(page, out) {
            copy::read(self.image().span(PageRun::one(page)), out);
        }
    }
}
