//! The connections of one core, by slot number.
//!
//! Contract: from the moment a receive is posted until its completion is taken, the kernel may write to the memory that
//! the connection holds. So a slot with a posted receive never gives its connection away, and the table, when it is
//! dropped, leaks such connections instead of dropping them: on every path on which a core ends, also while a panic
//! unwinds.

use super::Connection;
use super::inbox::guarded;
use std::mem::ManuallyDrop;

/// One connection, and the state of its receive.
pub(super) struct Slot {
    pub(super) connection: Box<dyn Connection>,
    /// Its tenant's index.
    pub(super) tenant: Option<usize>,
    /// Whether the kernel has a receive of it.
    pub(super) posted: bool,
    /// Whether it has ended, and is dropped when its receive has completed.
    pub(super) closing: bool,
    /// Bytes that the last receive asked for.
    pub(super) asked: usize,
    /// Whether that receive got less, and none was posted since.
    pub(super) is_drained: bool,
    /// Whether bytes gather in the socket before the next one.
    pub(super) is_coalescing: bool,
    /// Whether it is in the list of those that the next turn resumes.
    pub(super) is_unfinished: bool,
}

/// All slots of a core. A number is used again when its slot has become free.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
}

impl Slots {
    /// One more than the highest number that was ever in use.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots.get_mut(index)?.as_mut()
    }

    /// Takes a free slot for a connection. Returns its number.
    pub(super) fn insert(&mut self, connection: Box<dyn Connection>) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            // So that no connection's end allocates.
            self.free.reserve(self.slots.len());
            self.slots.len() - 1
        });
        self.slots[index] = Some(Slot {
            connection,
            tenant: None,
            posted: false,
            closing: false,
            asked: 0,
            is_drained: false,
            is_coalescing: false,
            is_unfinished: false,
        });
        index
    }

    /// Frees a slot. None if it is free already, or has a receive posted.
    pub(super) fn take(&mut self, index: usize) -> Option<Slot> {
        let taken = self.slots.get_mut(index)?.take_if(|slot| !slot.posted)?;
        self.free.push(index);
        Some(taken)
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // Before any destructor runs: one that panics must not drop a slot that has a receive posted.
        for slot in &mut self.slots {
            if let Some(posted) = slot.take_if(|slot| slot.posted) {
                let mut leaked = ManuallyDrop::new(posted);
                // A panic of one does not keep the others from being leaked.
                let _ = guarded(|| leaked.connection.leaked());
            }
        }
    }
}
