//! Guest memory: RAM image, cache slots, dirty bitmap, flush, commit. Knows nothing of the wire.
//!
//! # What it holds
//! * The **RAM image**: the guest's RAM as of the last committed checkpoint, in files that a QEMU can map.
//! * The **cache**: slots in which received pages wait for their commit ([`CacheKind`]).
//! * The **dirty bitmap**: the pages received since the last commit.
//! * The **commit record**: number and device state of the last committed checkpoint.
//!
//! # Phases
//! In **precopy** nothing is committed that could be torn: pages land in the image, are copied to their cache slots
//! once they are there, and are not marked dirty. With [`Store::begin_colo`] image and cache are equal. From then
//! on pages land in slots and are marked, and the image changes in [`Store::commit`] alone.
//!
//! # Who may do what, until when
//! * Receiving threads call [`Store::place`], let the kernel fill the places, then call [`Store::landed`]; or
//!   [`Store::zero`] and [`Store::write`]. Each uses its own shard of the bitmap. They may do so at the same time, and
//!   even with the same page: the result is then one of the contents or a mix of both (spec §10, "the same page twice").
//! * The session makes sure that they have returned, and that the kernel has ended all reads, before it calls
//!   [`Store::begin_colo`] or [`Store::commit`]. If a hostile primary finds a way around that, the page in question holds
//!   a mix of its old and new bytes; nothing else is harmed.
//! * A store is shared in an [`Arc`]; every ring that has an address of it (a [`Landing`], a [`Slab`]) holds a
//!   clone until its last operation has ended. The memory goes when the last clone goes.
//! * [`Store::committed`] and [`Store::dump`] see a checkpoint whole or not at all, at any time.
//!
//! # Later placements and commit modes
//! Where slots are is the matter of `cache::Cache`; when dirty slots are copied is decided in [`Store::commit`] alone.

mod bitmap;
mod cache;
mod committed;
mod copy;
mod dump;
mod error;
mod flusher;
mod handover;
mod held;
mod huge;
mod image;
mod landing;
mod map;
mod names;
mod plan;

#[cfg(all(test, not(loom), not(miri)))]
mod tests;

pub use bitmap::DirtyBitmap;
pub use cache::{HEADER_BYTES, Slab, SlabId};
pub use copy::CopyMethod;
pub use dump::{DEVICE_STATE_FILE, DumpReport, DumpedBlock, RESERVED_FILES};
pub use error::StoreError;
pub use flusher::{FlushReport, Flusher, FlusherError};
pub use held::HeldCheckpoint;
pub use huge::{Fallback, HugePages};
pub use landing::Landing;
pub use map::LandingRun;
pub use plan::{PageRun, Plan};

use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::units::{CheckpointId, PAGE_SIZE, PageIndex};
use bitmap::PageSet;
use cache::{Cache, Mirror};
use committed::CommittedImage;
use flusher::Flush;
use image::RamImage;
use map::Mapping;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Which placement of cache slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// A slot for every page of guest RAM: memory doubles.
    Mirror,
}

/// When dirty slots are copied to the RAM image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitMode {
    /// Inside of the commit: the image is complete when it returns.
    Sync,
}

/// How a store is made.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Which pages its memory is made of.
    pub hugepages: HugePages,
    /// Directory for the RAM image's files, on tmpfs or hugetlbfs; without one they are memfds.
    pub ram_dir: Option<PathBuf>,
    /// Placement of cache slots.
    pub cache: CacheKind,
    /// When dirty slots are copied.
    pub commit: CommitMode,
    /// Threads that receive pages: each marks in its own shard of the dirty bitmap. At least 1.
    pub shards: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            hugepages: HugePages::Huge2M,
            ram_dir: None,
            cache: CacheKind::Mirror,
            commit: CommitMode::Sync,
            shards: 1,
        }
    }
}

/// Where received pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// To the RAM image, and from there to the cache.
    Precopy,
    /// To the cache, until they are committed.
    Colo,
}

/// The memory of one guest. See the module.
pub struct Store {
    committed: CommittedImage,
    cache: Arc<dyn Cache>,
    colo: AtomicBool,
    dirty: DirtyBitmap,
    received: PageSet,
    flush: Arc<Flush>,
    mode: CommitMode,
}

impl Store {
    /// Maps memory for the guest of `table` and makes sure that it is there: image and cache, so twice the guest's RAM.
    /// `label` begins the names of the image's files in a RAM directory; it is the caller's, not the peer's.
    ///
    /// Populating takes about a second per 4 GiB and core on a quiet host; call it where waiting does no harm.
    ///
    /// Returns the notes on what it could not do as asked, and does otherwise.
    ///
    /// # Errors
    /// If the memory is not to be had, or the RAM directory is of no use. See [`StoreError`].
    ///
    /// # Panics
    /// Without a shard.
    pub fn create(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        Self::with_slabs(table, label, options, cache::SLAB_PAGES)
    }

    /// As [`Store::create`], with slabs of another size: for tests, whose guests are small.
    pub(crate) fn with_slabs(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
        slab_pages: u64,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        let (pages, bytes) = (table.total_pages(), table.total_bytes());
        let mut notes = Vec::new();
        let ram_dir = options.ram_dir.as_deref();
        let image = RamImage::map(table, label, options.hugepages, ram_dir, &mut notes)?;
        let cache = match options.cache {
            CacheKind::Mirror => Mirror::map(pages, slab_pages, options.hugepages, &mut notes)?,
        };
        let mappings: Vec<&Mapping> = image.mappings().iter().chain(cache.mappings()).collect();
        map::populate(&mappings).map_err(|errno| StoreError::NoMemory {
            bytes,
            source: errno.into(),
        })?;
        let (image, cache): (_, Arc<dyn Cache>) = (Arc::new(image), Arc::new(cache));
        let store = Self {
            flush: Flush::new(image.clone(), cache.clone()),
            committed: CommittedImage::new(image),
            cache,
            colo: AtomicBool::new(false),
            dirty: DirtyBitmap::new(pages, options.shards),
            received: PageSet::new(pages),
            mode: options.commit,
        };
        Ok((store, notes))
    }

    /// The guest's RAM blocks.
    pub fn table(&self) -> &Arc<BlockTable> {
        self.committed.table()
    }

    /// The memory that slots lie in, for registration: a [`SlabId`] is a position in it.
    pub fn slabs(&self) -> &[Slab] {
        self.cache.slabs()
    }

    /// Where received pages go now.
    pub fn phase(&self) -> Phase {
        match self.colo.load(Ordering::Acquire) {
            true => Phase::Colo,
            false => Phase::Precopy,
        }
    }

    /// Says where the normal pages of a packet are to land; `landing` holds that until its next use. All its places
    /// are to be filled before [`Store::landed`].
    ///
    /// # Panics
    /// With more than [`crate::units::PACKET_PAGES`] pages.
    pub fn place(&self, pages: &[PageIndex], landing: &mut Landing) {
        let phase = self.phase();
        landing.begin(phase, pages.len());
        match phase {
            Phase::Precopy => {
                for page in pages {
                    landing.push(*page, None, self.image().span(PageRun::one(*page)));
                }
            }
            Phase::Colo => self.cache.place(pages, landing),
        }
    }

    /// The places of `landing` have been filled. `shard` is the calling thread's.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn landed(&self, shard: usize, landing: &Landing) {
        match landing.phase {
            Phase::Precopy => {
                for page in landing.pages() {
                    let source = self.image().span(PageRun::one(*page));
                    copy::copy(self.cache.slot(*page), source, CopyMethod::NonTemporal);
                }
                copy::fence();
            }
            Phase::Colo if canary::is_set(Canary::LostMark) => {
                self.dirty.mark_all(shard, &landing.pages()[1..]);
            }
            Phase::Colo => self.dirty.mark_all(shard, landing.pages()),
        }
        self.received.insert_all(landing.pages());
    }

    /// A page of zeros was received. `shard` is the calling thread's.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn zero(&self, shard: usize, page: PageIndex) {
        self.put(shard, page, copy::zero);
    }

    /// A page was received whose bytes the caller holds. `shard` is the calling thread's.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn write(&self, shard: usize, page: PageIndex, bytes: &[u8; PAGE_SIZE]) {
        self.put(shard, page, |place| copy::fill(place, bytes));
    }

    fn put(&self, shard: usize, page: PageIndex, put: impl Fn(map::Span<'_>)) {
        put(self.cache.slot(page));
        match self.phase() {
            Phase::Precopy => put(self.image().span(PageRun::one(page))),
            Phase::Colo if canary::is_set(Canary::EarlyImage) => {
                put(self.image().span(PageRun::one(page)));
            }
            Phase::Colo => self.dirty.mark(shard, page),
        }
        self.received.insert_all(&[page]);
    }

    /// Reads the newest received content of a page, committed or not: what a delta is applied to (spec §7.4).
    pub fn read_newest(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        let place = match self.phase() {
            Phase::Precopy => self.image().span(PageRun::one(page)),
            Phase::Colo => self.cache.newest(PageRun::one(page)),
        };
        copy::read(place, out);
    }

    /// Whether the page was received at least once.
    pub fn was_received(&self, page: PageIndex) -> bool {
        self.received.contains(page)
    }

    /// Pages that were never received: none after a complete precopy (spec §7.3). Counts the whole bitmap.
    pub fn unseen_pages(&self) -> u64 {
        self.table().total_pages() - self.received.count()
    }

    /// Ends precopy. The caller has seen to it that nobody is receiving: see the module.
    pub fn begin_colo(&self) {
        self.colo.store(true, Ordering::Release);
    }

    /// Pages received since the last commit.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.count()
    }

    /// Commits checkpoint `id`: all pages received since the last commit, and `device_state`, which is exchanged for
    /// an empty buffer (that of the checkpoint before, so that in the long run none is allocated). The caller has seen
    /// to it that nobody is receiving: see the module.
    ///
    /// Checkpoint 0, the end of precopy, has nothing to flush.
    ///
    /// # Panics
    /// If `id` does not follow the last one, or after [`Store::drop_uncommitted`].
    pub fn commit(&self, id: CheckpointId, device_state: &mut Vec<u8>, flusher: &Flusher) -> FlushReport {
        let mut record = self.committed.lock();
        assert!(
            !record.ended,
            "checkpoint {id} cannot be committed: the session was ended"
        );
        let follows = record.checkpoint.is_none_or(|last| last < id);
        assert!(
            follows,
            "checkpoint {id} cannot be committed after {:?}",
            record.checkpoint
        );
        let report = match self.mode {
            CommitMode::Sync => self.flush.run(flusher, |plan| {
                self.dirty.take(plan);
                if let Some(tracking) = &record.tracking {
                    tracking.mark_plan(0, plan);
                }
            }),
        };
        record.adopt(id, device_state);
        self.committed.publish(id);
        report
    }

    /// The last committed checkpoint; `None` in precopy, and after a commit that panicked. Waits for nobody.
    pub fn committed(&self) -> Option<CheckpointId> {
        self.committed.committed()
    }

    /// Ends the session: what was received since the last commit is dropped, nothing can be committed any more, and
    /// the cache's memory goes back to the host. The caller has seen to it that nobody is receiving (see the module) and
    /// that no ring has a slab registered.
    pub fn drop_uncommitted(&self) {
        self.committed.lock().ended = true;
        self.dirty.clear();
        self.cache.slabs().iter().for_each(Slab::give_back);
    }

    /// Dumps the last committed checkpoint into `directory`, which is made if it does not exist: a file per block and
    /// [`DEVICE_STATE_FILE`]. Files of an earlier dump there are replaced once the new one is complete. Checkpoints go
    /// on meanwhile; another dump waits.
    ///
    /// # Errors
    /// Before the first commit, or when a file cannot be written. Then nothing of this dump is left behind.
    pub fn dump(&self, directory: &Path) -> Result<DumpReport, StoreError> {
        self.committed.dump(directory)
    }

    /// Copies a page of the last committed checkpoint out.
    #[cfg(test)]
    pub(crate) fn read_committed(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        copy::read(self.image().span(PageRun::one(page)), out);
    }

    /// The device state of the last committed checkpoint.
    #[cfg(test)]
    pub(crate) fn committed_device_state(&self) -> Vec<u8> {
        self.committed.lock().device_state.clone()
    }

    fn image(&self) -> &RamImage {
        &self.committed.image
    }
}
