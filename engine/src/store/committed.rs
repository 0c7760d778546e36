//! The last committed checkpoint: the RAM image, the device state and the checkpoint's number, which change together
//! under one lock.
#![forbid(unsafe_code)]

use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::store::commit::bitmap::DirtyBitmap;
use crate::store::memory::image::RamImage;
use crate::units::CheckpointId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What can be asked of a guest's committed state: the part of a [`crate::store::Store`] that outlives the session.
pub(crate) struct CommittedImage {
    pub(crate) image: Arc<RamImage>,
    record: Mutex<Record>,
    /// One more than the number of the last committed checkpoint, 0 before: for those who only ask for it, and must
    /// not wait for a commit or a dump.
    count: AtomicU64,
    /// Held by the one dump there is at a time.
    pub(crate) dumping: Mutex<()>,
}

/// The commit record. Who holds its lock alone may write the image.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) checkpoint: Option<CheckpointId>,
    pub(crate) device_state: Vec<u8>,
    /// The pages that commits have changed, while a dump is under way.
    pub(crate) tracking: Option<DirtyBitmap>,
    /// The session is over: nothing is committed any more.
    pub(crate) ended: bool,
}

impl Record {
    /// Takes the device state of the checkpoint whose pages are in the image now, and gives back the buffer of the
    /// one before, emptied.
    pub(crate) fn adopt(&mut self, id: CheckpointId, device_state: &mut Vec<u8>) {
        if !canary::is_set(Canary::StaleDeviceState) {
            std::mem::swap(&mut self.device_state, device_state);
        }
        device_state.clear();
        self.checkpoint = Some(id);
    }
}

impl CommittedImage {
    pub(crate) fn new(image: Arc<RamImage>) -> Self {
        Self {
            image,
            record: Mutex::default(),
            count: AtomicU64::new(0),
            dumping: Mutex::new(()),
        }
    }

    /// That of a session which has ended with this checkpoint.
    pub(crate) fn of(image: Arc<RamImage>, checkpoint: CheckpointId, device_state: Vec<u8>) -> Self {
        let own = Self::new(image);
        *own.lock() = Record {
            checkpoint: Some(checkpoint),
            device_state,
            tracking: None,
            ended: true,
        };
        own.publish(checkpoint);
        own
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Record> {
        self.record
            .lock()
            .expect("a commit that panicked may have torn the image: nothing may be asked of it")
    }

    /// The guest's RAM blocks.
    pub fn table(&self) -> &Arc<BlockTable> {
        self.image.table()
    }

    /// The checkpoint that `record` has taken is committed.
    pub(crate) fn publish(&self, id: CheckpointId) {
        self.count.store(id.0.saturating_add(1), Ordering::Release);
    }

    /// The last committed checkpoint; `None` in precopy, and after a commit that panicked, which may have torn the
    /// image. Waits for nobody.
    pub fn committed(&self) -> Option<CheckpointId> {
        if self.record.is_poisoned() {
            return None;
        }
        self.count
            .load(Ordering::Acquire)
            .checked_sub(1)
            .map(CheckpointId)
    }
}
