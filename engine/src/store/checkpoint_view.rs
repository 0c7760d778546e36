//! The last committed checkpoint, held still: what a failover reads and gives away.
#![forbid(unsafe_code)]

use crate::store::Store;
use crate::store::commit::plan::PageRun;
use crate::store::committed::Record;
use crate::store::memory::copy;
use crate::units::{BlockId, CheckpointId, PAGE_SIZE, PageIndex};
use std::path::Path;
use std::sync::MutexGuard;

/// The last committed checkpoint, whole. As long as this lives nothing can be committed, so it belongs to sessions
/// that have ended.
pub struct CheckpointView<'a> {
    store: &'a Store,
    record: MutexGuard<'a, Record>,
    checkpoint: CheckpointId,
}

impl Store {
    /// Holds the last committed checkpoint, once the image's files are complete; `None` before the first, and after a commit
    /// that panicked.
    pub fn checkpoint_view(&self) -> Option<CheckpointView<'_>> {
        self.committed()?;
        let record = self.committed.lock();
        self.finish_flush();
        // Not if that has failed.
        let checkpoint = self.committed()?;
        Some(CheckpointView {
            store: self,
            record,
            checkpoint,
        })
    }

    /// The named file that holds a block of the image, if it has one: absolute. A QEMU may map it at any time, and
    /// run on it once the checkpoint was given to it.
    pub fn image_file(&self, id: BlockId) -> Option<&Path> {
        self.image().file(id)
    }
}

impl CheckpointView<'_> {
    /// Its number.
    pub fn checkpoint(&self) -> CheckpointId {
        self.checkpoint
    }

    /// Its device state, which ends with its EOF byte.
    pub fn device_state(&self) -> &[u8] {
        &self.record.device_state
    }

    /// Reads one page.
    pub fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        copy::read(self.store.image().span(PageRun::one(page)), out);
    }
}
