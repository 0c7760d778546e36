//! Guest memory: RAM image, cache slots, dirty bitmap, flush, commit. Knows nothing of the wire.
//!
//! # What it holds
//! * The **RAM image**: the guest's RAM as of the last committed checkpoint, in files that a QEMU can map.
//! * The **cache**: slots in which received pages wait for their commit, and in [`CommitMode::Deferred`] from there to
//!   their flush ([`CacheKind`]).
//! * The **dirty bitmap**: the pages received since the last commit.
//! * The **commit record**: number and device state of the last committed checkpoint.
//!
//! # Phases
//! In **precopy** nothing is committed that could be torn: pages land in the image, and in a mirror are copied to their
//! slots, and are not marked dirty. With [`Store::begin_colo`] that ends. From then on pages land in slots and are marked,
//! and the image changes by a commit alone:
//!
//! ```text
//!  receiving ── commit (sync: copies, then the record) ──────────────────────────────► receiving
//!      └─────── commit (deferred: the record) ──► flushing ── the last flush step ─────────┘
//! ```
//!
//! While it is **flushing**, the last committed checkpoint is in image and slots together, and no page is received: a
//! correct primary is quiet between a commit and CHECKPOINT_REPLY, which the session holds back until then. So
//! whoever wants the checkpoint in the image calls [`Store::finish_flush`], at any time.
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
//! Where slots are is the matter of `cache::Cache`; when dirty slots are copied is decided in [`Store::commit`] alone.

mod cache;
mod checkpoint_view;
mod commit;
mod committed;
mod dump;
mod durable;
mod error;
mod memory;
mod options;
mod receive;

#[cfg(all(test, not(loom), not(miri)))]
mod tests;

pub use cache::extents::{PoolTask, PoolUse};
pub use cache::landing::Landing;
pub use cache::pool_buffer::PoolBuffer;
pub use checkpoint_view::CheckpointView;
pub use commit::bitmap::DirtyBitmap;
pub use commit::flusher::{FlushReport, FlushStep, Flusher, FlusherError};
pub use commit::plan::{PageRun, Plan};
pub use dump::{DEVICE_STATE_FILE, DumpReport, DumpedBlock, RESERVED_FILES};
pub use durable::recovery::{Recoverable, RecoverableCheckpoint, labels_in};
pub use error::StoreError;
pub use memory::copy::CopyMethod;
pub use memory::huge::{Fallback, HugePages};
pub use memory::map::LandingRun;
pub use memory::slab::{HEADER_BYTES, Slab, SlabId};
pub use options::{CacheKind, CommitMode, StoreOptions};

use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::units::CheckpointId;
use cache::Cache;
use cache::extents::{Extents, PoolLayout};
use cache::mirror::{self, Mirror};
use cache::pool::Pool;
use commit::bitmap::PageSet;
use commit::flusher::Flush;
use committed::CommittedImage;
use durable::record::{self, DurableRecord};
use memory::image::RamImage;
use memory::map::{self, Mapping, Words};
use memory::mlock;
use memory::numa::NumaNodes;
use memory::ram_dir::{RamDirectory, RamFiles};
use memory::slab::{self, SlabMemory};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

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
    cache: Cache,
    colo: AtomicBool,
    dirty: DirtyBitmap,
    running_guest: Option<Arc<DirtyBitmap>>,
    received: PageSet,
    flush: Arc<Flush>,
    flushed: OnceLock<Box<dyn Fn() + Send + Sync>>,
    mode: CommitMode,
    /// Where a checkpoint outlives this process.
    durable: Option<Arc<DurableRecord>>,
    files: Option<Arc<RamFiles>>,
}

/// How finely a cache divides its memory: fixed but for tests.
#[derive(Clone, Copy)]
pub(crate) struct Granularity {
    pub(crate) mirror_slab_pages: u64,
    pub(crate) pool_slab_extents: Option<u32>,
    /// Bytes that are there for a device state before there is one, in a RAM directory.
    pub(crate) area_bytes: u64,
}

const GRANULARITY: Granularity = Granularity {
    mirror_slab_pages: mirror::SLAB_PAGES,
    pool_slab_extents: None,
    area_bytes: 2 << 20,
};

impl Store {
    /// Maps memory for the guest of `table` and makes sure that it is there: the image, and what the cache begins with.
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
    /// Without a shard, or with nodes for other than all shards.
    pub fn create(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        Self::with_granularity(table, label, options, GRANULARITY)
    }

    /// As [`Store::create`], with memory divided otherwise: for tests, whose guests are small.
    pub(crate) fn with_granularity(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
        granularity: Granularity,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        let restores = (options.cache, options.commit) == (CacheKind::Mirror, CommitMode::Sync);
        if options.running_guest.is_some() && !restores {
            return Err(StoreError::RunningGuest);
        }
        let (pages, bytes) = (table.total_pages(), table.total_bytes());
        let mut notes = Vec::new();
        let files = match options.ram_dir.as_deref() {
            Some(directory) => Some(Arc::new(RamFiles::new(RamDirectory::open(directory)?, label))),
            None => None,
        };
        let is_pool = matches!(options.cache, CacheKind::Pool { .. });
        let lasting = files.as_ref().filter(|files| is_pool && files.is_fine_grained());
        if let (Some(directory), None) = (&options.ram_dir, lasting) {
            let reason = if is_pool {
                "its huge pages are larger than 2 MiB"
            } else {
                "its cache is a mirror"
            };
            notes.push(Fallback::NotDurable {
                directory: directory.display().to_string(),
                reason,
            });
        }
        let image = Arc::new(RamImage::map(
            table,
            options.hugepages,
            files.as_deref(),
            lasting.is_some(),
            &mut notes,
        )?);
        let nodes = place_image(&image, options, &mut notes);
        let refused = |errno: nix::errno::Errno| StoreError::NoMemory {
            bytes,
            source: errno.into(),
        };
        let populate = |cache: Vec<&Mapping>| {
            let mappings: Vec<&Mapping> = image.mappings().iter().chain(cache).collect();
            map::populate(&mappings).map_err(refused)?;
            Ok(mlock::lock(mappings.into_iter()))
        };
        let memory = SlabMemory::new(options.hugepages, nodes.clone());
        let mut durable = None;
        let cache = match options.cache {
            CacheKind::Mirror => {
                let mirror = Mirror::map(pages, granularity.mirror_slab_pages, memory, &mut notes)?;
                notes.extend(populate(mirror.mappings().collect())?);
                Cache::Mirror(Arc::new(mirror))
            }
            CacheKind::Pool { max } => {
                let shape = match granularity.pool_slab_extents {
                    None => PoolLayout::of_guest(pages, max),
                    Some(extents) => PoolLayout::with_slabs(pages, max, extents),
                };
                let (memory, places) = match lasting {
                    None => (memory, Words::zeroed(map::index(pages))),
                    Some(files) => {
                        let shape = record::GuestShape {
                            pages,
                            slab_extents: u64::from(shape.slab_extents),
                        };
                        let (made, places) =
                            DurableRecord::create(files.clone(), shape, granularity.area_bytes)?;
                        durable = Some(Arc::new(made));
                        (memory.in_files(files.clone()), places)
                    }
                };
                let extents = Extents::map(shape, memory, &mut notes)?;
                notes.extend(populate(extents.slabs().map(Slab::memory).collect())?);
                Cache::Pool(Arc::new(Pool::new(extents, nodes, places, options.shards)))
            }
        };
        let store = Self {
            flush: Flush::new(image.clone(), cache.clone(), durable.clone()),
            committed: CommittedImage::new(image),
            cache,
            colo: AtomicBool::new(false),
            dirty: DirtyBitmap::new(pages, options.shards),
            running_guest: options.running_guest.clone(),
            received: PageSet::new(pages),
            flushed: OnceLock::new(),
            mode: options.commit,
            durable,
            files,
        };
        Ok((store, notes))
    }

    /// The guest's RAM blocks.
    pub fn table(&self) -> &Arc<BlockTable> {
        self.committed.table()
    }

    /// Most slabs that slots can ever lie in.
    pub fn slab_limit(&self) -> usize {
        self.cache.slab_limit()
    }

    /// A slab, for registration: a [`SlabId`] is its position. The next one may come later; one that is there stays.
    pub fn slab(&self, position: usize) -> Option<&Slab> {
        self.cache.slab(position)
    }

    /// Commits checkpoint `id`: all pages received since the last commit, and `device_state`, which is exchanged for
    /// an empty buffer (that of the checkpoint before, so that in the long run none is allocated). The caller has seen
    /// to it that nobody is receiving: see the module.
    ///
    /// Checkpoint 0, the end of precopy, has nothing to flush. In [`CommitMode::Deferred`] nothing is copied here: from
    /// then on the store [`is_flushing`](Self::is_flushing).
    ///
    /// # Panics
    /// If `id` does not follow the last one, or after [`Store::drop_uncommitted`].
    pub fn commit(&self, id: CheckpointId, device_state: &mut Vec<u8>, flusher: &Flusher) -> FlushReport {
        // Done long ago where pages were received in between: see the module.
        self.finish_flush();
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
        if let Some(durable) = &self.durable {
            durable.commit(id, device_state);
        }
        let plan_it = |plan: &mut Plan| {
            if let Some(running_guest) = &self.running_guest {
                running_guest.take(plan);
                self.dirty.mark_plan(0, plan);
            }
            self.dirty.take(plan);
            if let Some(tracking) = &record.tracking {
                tracking.mark_plan(0, plan);
            }
        };
        let report = match self.mode {
            CommitMode::Sync => self.flush.run(flusher, plan_it),
            CommitMode::Deferred => FlushReport {
                pages: self.flush.begin(flusher.method(), plan_it),
                ..FlushReport::default()
            },
        };
        record.adopt(id, device_state);
        self.committed.publish(id);
        report
    }

    /// Whether committed pages wait in their slots for their copying to the image. No page may be received meanwhile.
    pub fn is_flushing(&self) -> bool {
        self.flush.is_open()
    }

    /// Somebody waits for the end of that. If so much is left that several threads should do it, [`Self::help_flush`] does
    /// something from now on, and this returns true.
    pub fn allow_flush_help(&self) -> bool {
        self.flush.allow_help()
    }

    /// Copies a few of them, which takes at most about 0.1 ms. Any thread may, also several at a time.
    pub fn flush_step(&self) -> FlushStep {
        self.notify_if_last(self.flush.small_step())
    }

    /// The same for threads that do so only where it is needed: see [`Self::allow_flush_help`].
    pub fn help_flush(&self) -> FlushStep {
        self.notify_if_last(self.flush.help_step())
    }

    fn notify_if_last(&self, step: FlushStep) -> FlushStep {
        if step == FlushStep::Last {
            self.notify_flushed();
        }
        step
    }

    /// Copies what is left of them and waits for what other threads do of it: the image is the last committed checkpoint
    /// when it returns, until the next commit.
    pub fn finish_flush(&self) {
        if self.flush.finish() && !canary::is_set(Canary::SilentFlushEnd) {
            self.notify_flushed();
        }
    }

    /// Whoever does the last part of a deferred flush, a dump for example, calls `tell` then: somebody may wait for it.
    ///
    /// # Panics
    /// If it is called twice.
    pub fn on_flushed(&self, tell: impl Fn() + Send + Sync + 'static) {
        let set = self.flushed.set(Box::new(tell));
        assert!(set.is_ok(), "there is one who waits");
    }

    fn notify_flushed(&self) {
        if let Some(tell) = self.flushed.get() {
            tell();
        }
    }

    /// What the flush of the last commit took, as far as it has gone.
    pub fn flush_time(&self) -> Duration {
        self.flush.report().busy
    }

    /// The last committed checkpoint; `None` in precopy, and after a commit that panicked. Waits for nobody.
    pub fn committed(&self) -> Option<CheckpointId> {
        self.committed.committed().filter(|_| !self.flush.has_failed())
    }

    /// How a pool stands; `None` for a mirror.
    pub fn pool_use(&self) -> Option<PoolUse> {
        self.extents().map(Extents::used)
    }

    /// What the pool needs done, after the checkpoint that has just been received.
    pub fn pool_task(&self) -> PoolTask {
        self.extents().map_or(PoolTask::Nothing, Extents::task)
    }

    /// Adds memory to the pool, which may take tens of milliseconds: for another thread than those that receive.
    ///
    /// # Errors
    /// If there is none.
    pub fn grow(&self) -> Result<(), StoreError> {
        self.extents().map_or(Ok(()), Extents::grow)
    }

    /// Gives memory of the pool back to the host that checkpoints need no more, which may take milliseconds.
    pub fn shrink(&self) {
        if let Some(extents) = self.extents() {
            extents.shrink();
        }
    }

    fn extents(&self) -> Option<&Extents> {
        self.cache.pool().map(|pool| pool.extents())
    }

    /// Ends the session: what was received since the last commit is dropped, nothing can be committed any more, and
    /// the cache's memory goes back to the host, once what was committed is in the image. The caller has seen to it that
    /// nobody is receiving (see the module) and that no ring has a slab registered.
    pub fn drop_uncommitted(&self) {
        self.finish_flush();
        let mut record = self.committed.lock();
        record.ended = true;
        let mut plan = Plan::default();
        self.dirty.take(&mut plan);
        if let Some(pool) = self.cache.pool() {
            pool.drop_pages(&plan, 0..plan.len());
            pool.release_cursors();
        }
        self.cache.give_back();
        if let (Some(files), Some(_)) = (&self.files, &self.durable) {
            files.remove(slab::SLAB_FILES);
            files.remove(record::PLACES_FILE);
        }
    }

    /// What stays the same for the session and is needed to make something of its checkpoints, for a later receiver that
    /// finds them ([`RecoverableCheckpoint::session`]). To be said before the first commit.
    pub fn record_session(&self, session: impl FnOnce() -> Vec<u8>) {
        if let Some(durable) = &self.durable {
            durable.record_session(&session());
        }
    }

    /// Why, from now on, no checkpoint outlives this process, though one should: said once.
    pub fn take_failure(&self) -> Option<StoreError> {
        self.durable.as_ref()?.take_failure()
    }

    /// Whether a guest may run on the image from now on: a later receiver is told.
    pub fn set_given(&self, given: bool) {
        if let Some(durable) = &self.durable {
            durable.set_given(given);
        }
    }

    /// Ends the session as [`Self::drop_uncommitted`] does; the files of its last checkpoint stay in their directory when the
    /// store goes. False if there is none that a later receiver could find.
    pub fn keep_files(&self) -> bool {
        let lasting = self.durable.as_ref().filter(|durable| durable.has_checkpoint());
        let Some(durable) = lasting.filter(|_| !self.flush.has_failed()) else {
            return false;
        };
        self.drop_uncommitted();
        durable.files().keep(true);
        true
    }

    /// Takes the names of its files in a RAM directory away, so that no later receiver finds them.
    pub fn remove_files(&self) {
        if let Some(files) = &self.files {
            files.remove_all();
        }
    }

    /// Dumps the last committed checkpoint into `directory`, which is made if it does not exist: a file per block and
    /// [`DEVICE_STATE_FILE`]. Files of an earlier dump there are replaced once the new one is complete. Checkpoints go
    /// on meanwhile; another dump waits.
    ///
    /// # Errors
    /// Before the first commit, or when a file cannot be written. Then nothing of this dump is left behind.
    pub fn dump(&self, directory: &Path) -> Result<DumpReport, StoreError> {
        self.committed.dump(directory, || self.finish_flush())
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

/// Puts the image on the nodes of all shards, and gives back the nodes of these. Where the kernel refuses, everything lies
/// where it likes, and one note says so.
fn place_image(image: &RamImage, options: &StoreOptions, notes: &mut Vec<Fallback>) -> NumaNodes {
    let all = options.nodes.is_empty() || options.nodes.len() == options.shards;
    assert!(all, "every shard has a node, or none has");
    let nodes = NumaNodes::of(&options.nodes);
    let placed = image.mappings().iter().try_for_each(|block| nodes.spread(block));
    match placed {
        Ok(()) => nodes,
        Err(errno) => {
            notes.push(nodes.refused("guest memory", errno));
            NumaNodes::anywhere()
        }
    }
}
