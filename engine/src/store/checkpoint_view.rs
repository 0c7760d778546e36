//! A read view of the last committed checkpoint, which a failover sends to a QEMU.

use crate::store::committed::{CommittedImage, LastCommit};
use crate::store::memory::copy;
use crate::units::{CheckpointId, PAGE_SIZE, PageIndex, PageRun};
use std::sync::MutexGuard;

/// The last committed checkpoint, whole. While it exists nothing can be committed, so it is for sessions that have ended.
pub struct CheckpointView<'a> {
    committed: &'a CommittedImage,
    last: MutexGuard<'a, LastCommit>,
    checkpoint: CheckpointId,
}

impl CommittedImage {
    /// A view of the last committed checkpoint, which is then whole in the image; `None` before the first, and after a commit
    /// that panicked.
    pub fn checkpoint_view(&self) -> Option<CheckpointView<'_>> {
        self.checkpoint()?;
        let last = self.lock();
        self.finish_flush();
        // None if the flush has failed.
        let checkpoint = self.checkpoint()?;
        Some(CheckpointView {
            committed: self,
            last,
            checkpoint,
        })
    }
}

impl CheckpointView<'_> {
    /// Its number.
    pub fn checkpoint(&self) -> CheckpointId {
        self.checkpoint
    }

    /// Its device state, which ends with its EOF byte.
    pub fn device_state(&self) -> &[u8] {
        &self.last.device_state
    }

    /// Reads one page.
    pub fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) {
        copy::read(self.committed.image().span(PageRun::one(page)), out);
    }
}
