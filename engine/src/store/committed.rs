//! The last committed checkpoint: RAM image, device state and number, which change together under one lock; and the files in
//! which it outlives the process.
//!
//! A [`CommittedImage`] outlives the session that made it. While the session runs, its [`Store`](super::Store) commits to
//! it; after [`Store::drop_uncommitted`](super::Store::drop_uncommitted) it does not change any more. A recovered checkpoint
//! is a `CommittedImage` without a store from the beginning.
//!
//! # The pending flush
//! After a deferred commit, part of the checkpoint is still in cache slots. As long as the session has not ended, the image
//! holds that flush, so that everything that reads the image ([`CommittedImage::dump`],
//! [`CommittedImage::checkpoint_view`]) can finish it first.

use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::store::commit::bitmap::DirtyBitmap;
use crate::store::commit::flusher::Flush;
use crate::store::durable::record::{self, DurableRecord};
use crate::store::flight::{FlightRing, NoFlight};
use crate::store::memory::image::RamImage;
use crate::store::memory::ram_dir::RamFiles;
use crate::units::{BlockId, CheckpointId};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The last committed checkpoint of a guest. See the module.
pub struct CommittedImage {
    image: Arc<RamImage>,
    last: Mutex<LastCommit>,
    /// One more than the number of the last committed checkpoint, 0 before the first: readable while a commit or a dump holds
    /// the last commit's lock.
    count: AtomicU64,
    /// Locked by the one dump that may run at a time.
    pub(crate) dumping: Mutex<()>,
    /// The flush of the session's commits; none after its end.
    pending: Mutex<Option<Arc<Flush>>>,
    files: CheckpointFiles,
    /// A checkpoint that was recovered may have none.
    flight: Result<FlightRing, NoFlight>,
}

/// The files of a guest in a RAM directory.
#[derive(Clone, Default)]
pub(crate) struct CheckpointFiles {
    /// Those of the image; none if it is in memory without a name.
    pub(crate) image: Option<Arc<RamFiles>>,
    /// The record by which a later receiver finds the checkpoint; none if checkpoints end with this process.
    pub(crate) record: Option<Arc<DurableRecord>>,
}

/// Whether a checkpoint outlives this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptFiles {
    /// A later receiver finds it.
    Kept,
    /// Its files were removed.
    Gone,
    /// There is none that could.
    NoCheckpoint,
}

/// What changes with each commit. Only the holder of its lock may write the image.
#[derive(Default)]
pub(crate) struct LastCommit {
    pub(crate) checkpoint: Option<CheckpointId>,
    pub(crate) device_state: Vec<u8>,
    /// The pages that commits have changed, while a dump is in progress.
    pub(crate) tracking: Option<DirtyBitmap>,
}

impl LastCommit {
    /// Takes the device state of the checkpoint whose pages are committed now, and returns the buffer of the previous one,
    /// emptied.
    pub(crate) fn replace(&mut self, id: CheckpointId, device_state: &mut Vec<u8>) {
        if !canary::is_set(Canary::StaleDeviceState) {
            std::mem::swap(&mut self.device_state, device_state);
        }
        device_state.clear();
        self.checkpoint = Some(id);
    }
}

impl CommittedImage {
    /// Most memory mappings of a recovered image of the guest of `table`.
    pub fn mappings_max(table: &BlockTable) -> u64 {
        RamImage::mappings_max(table, true) as u64 + record::MAPPINGS_MAX
    }

    /// The image of a session that begins, whose commits are flushed by `flush`.
    pub(crate) fn of_session(
        image: Arc<RamImage>,
        files: CheckpointFiles,
        flush: Arc<Flush>,
        flight: FlightRing,
    ) -> Self {
        Self {
            image,
            last: Mutex::default(),
            count: AtomicU64::new(0),
            dumping: Mutex::new(()),
            pending: Mutex::new(Some(flush)),
            files,
            flight: Ok(flight),
        }
    }

    /// A checkpoint that is in the image whole, of a session that has ended.
    pub(crate) fn recovered(
        image: RamImage,
        files: CheckpointFiles,
        checkpoint: CheckpointId,
        device_state: Vec<u8>,
        flight: Result<FlightRing, NoFlight>,
    ) -> Self {
        let last = LastCommit {
            checkpoint: Some(checkpoint),
            device_state,
            tracking: None,
        };
        let own = Self {
            image: Arc::new(image),
            last: Mutex::new(last),
            count: AtomicU64::new(0),
            dumping: Mutex::new(()),
            pending: Mutex::new(None),
            files,
            flight,
        };
        own.publish(checkpoint);
        own
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, LastCommit> {
        self.last
            .lock()
            .expect("a commit that panicked may have torn the image: it must not be used")
    }

    pub(crate) fn image(&self) -> &RamImage {
        &self.image
    }

    /// The guest's RAM blocks.
    pub fn table(&self) -> &Arc<BlockTable> {
        self.image.table()
    }

    /// Makes the number known of the checkpoint that the record has taken.
    pub(crate) fn publish(&self, id: CheckpointId) {
        self.count.store(id.0.saturating_add(1), Ordering::Release);
    }

    /// The number of the last committed checkpoint; `None` in precopy, and after a commit or a flush that panicked, which may
    /// have torn the image. Does not wait for a commit or a dump.
    pub fn checkpoint(&self) -> Option<CheckpointId> {
        if self.last.is_poisoned() || self.flush_has_failed() {
            return None;
        }
        self.count
            .load(Ordering::Acquire)
            .checked_sub(1)
            .map(CheckpointId)
    }

    fn pending(&self) -> MutexGuard<'_, Option<Arc<Flush>>> {
        // Locked to look at it or to replace it, which does not panic.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush_has_failed(&self) -> bool {
        self.pending().as_ref().is_some_and(|flush| flush.has_failed())
    }

    /// Whether its session may still commit.
    pub(crate) fn is_of_live_session(&self) -> bool {
        self.pending().is_some()
    }

    /// Copies what is left in cache slots of the last commit to the image, and waits for the parts that other threads are
    /// copying: the image then is the last committed checkpoint, until the next commit.
    pub fn finish_flush(&self) {
        let flush = self.pending().clone();
        if let Some(flush) = flush {
            flush.finish();
        }
    }

    /// Brings the last checkpoint into the image, after which its session commits no more. The caller drops what was not
    /// committed while it has the lock.
    pub(crate) fn end_session(&self) -> MutexGuard<'_, LastCommit> {
        self.finish_flush();
        let last = self.lock();
        *self.pending() = None;
        last
    }

    /// The named file of a block of the image, absolute, if the block has one. A QEMU may map it at any time, and run on it
    /// after the checkpoint was given to it.
    pub fn image_file(&self, id: BlockId) -> Option<&Path> {
        self.image.file(id)
    }

    /// Where the time of its session's checkpoints went.
    ///
    /// # Errors
    /// If it was recovered without one.
    pub fn flight(&self) -> Result<&FlightRing, NoFlight> {
        self.flight.as_ref().map_err(|none| *none)
    }

    /// Its files in a RAM directory.
    pub(crate) fn files(&self) -> Option<&Arc<RamFiles>> {
        self.files.image.as_ref()
    }

    pub(crate) fn durable(&self) -> Option<&Arc<DurableRecord>> {
        self.files.record.as_ref()
    }

    /// Records for a later receiver whether a guest may run on the image from now on.
    pub fn set_given(&self, given: bool) {
        if let Some(durable) = self.durable() {
            durable.set_given(given);
        }
    }

    /// Keeps the files of the checkpoint in their directory when this is dropped. Its session has ended.
    pub fn keep_files(&self) -> KeptFiles {
        let Some(durable) = self.durable().filter(|_| self.can_keep_files()) else {
            return KeptFiles::NoCheckpoint;
        };
        durable.files().keep(true);
        match durable.files().are_there() {
            true => KeptFiles::Kept,
            false => KeptFiles::Gone,
        }
    }

    pub(crate) fn can_keep_files(&self) -> bool {
        self.durable().is_some_and(|durable| durable.has_checkpoint()) && !self.flush_has_failed()
    }

    /// Removes the names of its files in a RAM directory, so that no later receiver finds them.
    pub fn remove_files(&self) {
        if let Some(durable) = self.durable() {
            durable.forget();
        }
        if let Some(files) = &self.files.image {
            files.remove_all();
        }
    }

    /// The device state of the last committed checkpoint.
    #[cfg(test)]
    pub(crate) fn device_state(&self) -> Vec<u8> {
        self.lock().device_state.clone()
    }
}
