//! Guest memory: RAM image, cache slots, dirty bitmap, flush, commit. Knows nothing of the wire.
//!
//! # Parts
//! * The **RAM image**: the guest's RAM as of the last committed checkpoint, in files that a QEMU can map.
//! * The **cache**: slots in which received pages wait for their commit, and in [`CommitMode::Deferred`] from there to
//!   their flush ([`CacheKind`]).
//! * The **dirty bitmap**: the pages received since the last commit.
//! * The **commit record**: number and device state of the last committed checkpoint.
//! * The **flight recorder**: where the time of the last checkpoints went ([`FlightRing`]).
//!
//! Image, commit record and flight recorder are a [`CommittedImage`], which outlives the session. A [`Store`] is its receiving side: it has the
//! cache and the dirty bitmap, and commits to the image.
//!
//! # Phases
//! In **precopy** nothing is committed that could be torn: pages land in the image, and in a mirror are copied to their
//! slots, and are not marked dirty. [`Store::begin_colo`] ends precopy. From then on pages land in slots and are marked, and
//! only a commit changes the image:
//!
//! ```text
//!  receiving ── commit (sync: copies, then the record) ──────────────────────────────► receiving
//!      └─────── commit (deferred: the record) ──► flushing ── the last flush step ─────────┘
//! ```
//!
//! While a store is **flushing**, the last committed checkpoint is in image and slots together, and no page is received: a
//! correct primary is quiet between a commit and CHECKPOINT_REPLY, which the session delays until the flush has ended.
//! [`CommittedImage::finish_flush`] completes the image at any time.
//!
//! # What callers must ensure
//! * Receiving threads call [`Store::place`], let the kernel fill the places, then call [`Store::landed`]; or they call
//!   [`Store::zero`], [`Store::write`] and [`Store::write_all`]. Each uses its own shard of the bitmap. They may do so at the same
//!   time, even with the same page: the result is then one of the contents or a mix of both (spec §10, "the same page twice").
//! * Before it calls [`Store::begin_colo`] or [`Store::commit`], the session makes sure that these calls have returned, and that
//!   the kernel has ended all reads. If a hostile primary gets around that, the page in question is a mix of its old and new
//!   bytes; nothing else is damaged.
//! * A store is shared in an [`Arc`]. Every ring that has an address of it (a [`Landing`], a [`Slab`]) holds a clone until its last
//!   operation has ended. The memory is freed with the last clone.
//! * [`CommittedImage::checkpoint`] and [`CommittedImage::dump`] see a checkpoint whole or not at all, at any time.
//!
//! # Folders
//! `memory` maps, copies and places memory; `flight` has the flight recorder; `cache` decides where slots are, and flushes them by a plan; `commit` has the
//! dirty pages and the threads that flush; `durable` has the record of what outlives the process. Each uses only those before
//! it, and [`StoreError`]; the other files beside the folders put them together.

mod cache;
mod charge;
mod checkpoint_view;
mod commit;
mod committed;
mod create;
mod dump;
mod durable;
mod error;
mod flight;
pub(crate) mod memory;
mod options;
mod receive;
mod recovery;

#[cfg(all(test, not(loom), not(miri)))]
mod tests;

pub use cache::extents::{PoolTask, PoolUse};
pub use cache::landing::{HeaderSlot, Landing, Phase};
pub use cache::plan::FlushPlan;
pub use cache::pool_buffer::PoolBuffer;
pub use checkpoint_view::CheckpointView;
pub use commit::bitmap::DirtyBitmap;
#[cfg(test)]
pub(crate) use commit::flusher::FlushSizes;
pub use commit::flusher::{FlushReport, FlushStep, Flusher, FlusherError};
pub use committed::{CommittedImage, KeptFiles};
pub(crate) use create::DEVICE_FILE_BYTES;
#[cfg(test)]
pub(crate) use create::Granularity;
pub use dump::{DumpReport, DumpTargets};
pub use error::StoreError;
pub use flight::{
    ChannelBytes, ChannelMoments, FLIGHT_CHANNELS, FLIGHT_CHECKPOINTS, FlightError, FlightLog, FlightRecord,
    FlightRing, LastChannel, NoFlight, PauseSplit, SchedulerTimes, Window, ring_bytes,
};
pub use memory::copy::CopyMethod;
pub use memory::directory_lock::RamDirectoryLock;
pub(crate) use memory::file_names::file_names;
pub use memory::huge::{Fallback, HugePages};
pub use memory::slab::{HEADER_BYTES, Slab, SlabId};
pub use memory::span::LandingRun;
pub use options::{CacheKind, CommitMode, StoreOptions};
pub use recovery::{Recoverable, RecoverableCheckpoint, labels_in};

use crate::blocks::BlockTable;
use crate::budget::Lease;
use crate::units::CheckpointId;
use cache::Cache;
use cache::extents::Extents;
use commit::bitmap::PageSet;
use commit::flusher::Flush;
use durable::record;
use memory::image::RamImage;
use memory::slab;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// The receiving side of one guest's memory: what a session receives and commits. See the module.
pub struct Store {
    committed: Arc<CommittedImage>,
    cache: Cache,
    colo: AtomicBool,
    dirty: DirtyBitmap,
    running_guest: Option<Arc<DirtyBitmap>>,
    received: PageSet,
    flush: Arc<Flush>,
    mode: CommitMode,
    /// Bytes of the budget that it has as long as its session runs, beside what a pool takes later.
    reserved_bytes: u64,
    /// What the tables have of the budget, which is given back after they are freed.
    _lease: Lease,
}

impl Store {
    /// The last committed checkpoint, which outlives this store.
    pub fn committed(&self) -> &Arc<CommittedImage> {
        &self.committed
    }

    /// Bytes of the budget that it has, with its checkpoint, at least.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    /// The guest's RAM blocks.
    pub fn table(&self) -> &Arc<BlockTable> {
        self.committed.table()
    }

    /// The most slabs that there can ever be.
    pub fn slab_limit(&self) -> usize {
        self.cache.slab_limit()
    }

    /// A slab, for registration; a [`SlabId`] is its position. The next one may be added later; one that exists stays.
    pub fn slab(&self, position: usize) -> Option<&Slab> {
        self.cache.slab(position)
    }

    /// Commits checkpoint `id`: all pages received since the last commit, and `device_state`, which is exchanged for
    /// an empty buffer (that of the checkpoint before, so that in the long run none is allocated). The caller has made
    /// sure that no thread is receiving: see the module.
    ///
    /// Checkpoint 0, the end of precopy, has nothing to flush. In [`CommitMode::Deferred`] nothing is copied here: from
    /// then on the store [`is_flushing`](Self::is_flushing).
    ///
    /// # Panics
    /// If `id` does not follow the last one, or after [`Store::drop_uncommitted`].
    pub fn commit(&self, id: CheckpointId, device_state: &mut Vec<u8>, flusher: &Flusher) -> FlushReport {
        // It is finished already if pages were received in between: see the module.
        self.finish_flush();
        let mut record = self.committed.lock();
        assert!(
            self.committed.is_of_live_session(),
            "checkpoint {id} cannot be committed: the session was ended"
        );
        let follows = record.checkpoint.is_none_or(|last| last < id);
        assert!(
            follows,
            "checkpoint {id} cannot be committed after {:?}",
            record.checkpoint
        );
        if let Some(durable) = self.committed.durable() {
            durable.commit(id, device_state);
        }
        let plan_it = |plan: &mut FlushPlan| {
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
        record.replace(id, device_state);
        self.committed.publish(id);
        report
    }

    /// Whether checkpoints are written to files that a later receiver finds.
    pub fn outlives_process(&self) -> bool {
        self.committed.durable().is_some()
    }

    /// Writes the device state of the next commit to its file, so that the commit does not: for a large one, which takes
    /// milliseconds. Any thread may call it before that commit. What keeps it from being written is found by the commit.
    pub fn write_device_state(&self, id: CheckpointId, device_state: &[u8]) {
        if let Some(durable) = self.committed.durable() {
            durable.write_ahead(id, device_state);
        }
    }

    /// Whether committed pages are still in their slots. No page may be received meanwhile.
    pub fn is_flushing(&self) -> bool {
        self.flush.is_open()
    }

    /// A caller is waiting for the flush to finish. If so much is left that several threads should copy, [`Self::help_flush`]
    /// copies from now on, and this returns true.
    pub fn allow_flush_help(&self) -> bool {
        self.flush.allow_help()
    }

    /// Copies a few of the pages that wait to be flushed, which takes at most about 0.1 ms. Any thread may call it, several at
    /// the same time.
    pub fn flush_step(&self) -> FlushStep {
        self.flush.small_step()
    }

    /// As [`Self::flush_step`], for threads that help only where that was [allowed](Self::allow_flush_help).
    pub fn help_flush(&self) -> FlushStep {
        self.flush.help_step()
    }

    /// See [`CommittedImage::finish_flush`].
    pub fn finish_flush(&self) {
        self.flush.finish();
    }

    /// Calls `notify` whenever the last part of a deferred flush was copied: by [`Self::flush_step`], [`Self::help_flush`], or
    /// by what reads the committed image, a dump for example.
    ///
    /// # Panics
    /// If it is called twice.
    pub fn on_flushed(&self, notify: impl Fn() + Send + Sync + 'static) {
        self.flush.on_end(Box::new(notify));
    }

    /// What the flush of the last commit took, as far as it has gone.
    pub fn flush_time(&self) -> Duration {
        self.flush.report().busy
    }

    /// How much of a pool is used; `None` for a mirror.
    pub fn pool_use(&self) -> Option<PoolUse> {
        self.extents().map(Extents::used)
    }

    /// What is to be done for the pool, after the checkpoint that has just been received.
    pub fn pool_task(&self) -> PoolTask {
        self.extents().map_or(PoolTask::Nothing, Extents::task)
    }

    /// Adds memory to the pool, which may take tens of milliseconds: not to be called by threads that receive.
    ///
    /// # Errors
    /// If there is none.
    pub fn grow(&self) -> Result<(), StoreError> {
        self.extents().map_or(Ok(()), Extents::grow)
    }

    /// Returns memory of the pool to the host that checkpoints no longer need, which may take milliseconds.
    pub fn shrink(&self) {
        if let Some(extents) = self.extents() {
            extents.shrink();
        }
    }

    fn extents(&self) -> Option<&Extents> {
        self.cache.pool().map(|pool| pool.extents())
    }

    /// Ends the session: what was received since the last commit is dropped, nothing can be committed any more, and the memory
    /// of the cache returns to the host, after what was committed is in the image. The caller has made sure that no thread is
    /// receiving (see the module) and that no ring has a slab registered.
    pub fn drop_uncommitted(&self) {
        let _record = self.committed.end_session();
        self.flush.with_idle_plan(|plan| {
            self.dirty.take(plan);
            if let Some(pool) = self.cache.pool() {
                pool.drop_pages(plan, 0..plan.len());
                pool.release_cursors();
            }
        });
        self.cache.give_back();
        if let Some(durable) = self.committed.durable() {
            durable.files().remove(slab::SLAB_FILES);
            durable.files().remove(record::PLACES_FILE);
        }
    }

    /// Writes down what a later receiver must know of the session to use its checkpoints
    /// ([`RecoverableCheckpoint::session`]). To be called before the first commit.
    pub fn record_session(&self, session: impl FnOnce() -> Result<Vec<u8>, StoreError>) {
        if let Some(durable) = self.committed.durable() {
            durable.record_session(session());
        }
    }

    /// The reason why no checkpoint outlives this process any more, though they should; once.
    pub fn take_failure(&self) -> Option<StoreError> {
        self.committed.durable()?.take_failure()
    }

    /// Why the RAM directory does not say what room it has, so that it may be filled up to its end; once.
    pub fn take_unknown_room(&self) -> Option<StoreError> {
        self.committed.files()?.take_unknown_room()
    }

    fn image(&self) -> &RamImage {
        self.committed.image()
    }
}
