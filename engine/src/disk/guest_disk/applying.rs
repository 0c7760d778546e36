//! The queue of committed epochs: what the thread that applies them (`apply.rs`) takes of it, and callers that wait for its end.

use super::{Disk, Phase};
use crate::disk::DiskError;
use crate::disk::apply::apply_epoch;
use crate::disk::epoch::Epoch;
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long the base has no room before it is written to again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Disk {
    /// Waits until all committed epochs are in the base. What the thread could not apply is tried once more, by the caller.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn wait_drained(&self) -> Result<(), DiskError> {
        let mut state = self.state();
        while !state.committed.is_empty() {
            if state.has_apply_failed {
                drop(state);
                return self.apply_again();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn apply_again(&self) -> Result<(), DiskError> {
        let _turn = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(epoch) = self.oldest() {
            apply_epoch(self, epoch, || {}).map_err(|source| DiskError::Apply {
                disk: self.name.clone(),
                source,
            })?;
        }
        self.state().has_apply_failed = false;
        self.pool.trim_all();
        Ok(())
    }

    /// The oldest epoch that is committed and not in the base.
    pub(in crate::disk) fn oldest(&self) -> Option<Arc<Epoch>> {
        self.state().committed.front().cloned()
    }

    /// Waits for an epoch to apply; none when there will be no more.
    pub(in crate::disk) fn wait_for_epoch(&self) -> Option<Arc<Epoch>> {
        let mut state = self.state();
        loop {
            if state.has_apply_failed {
                return None;
            }
            if let Some(epoch) = state.committed.front() {
                return Some(epoch.clone());
            }
            if state.phase == Phase::Over {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The oldest epoch is in the base, and its segments are free.
    pub(in crate::disk) fn applied(&self, epoch: Arc<Epoch>) {
        let mut state = self.state();
        drop(state.committed.pop_front());
        // The queue's was the other reference. Under the lock: whatever finds the queue empty finds the room, too.
        let mut index = None;
        match Arc::try_unwrap(epoch) {
            Ok(mut epoch) => {
                self.pool.put(std::mem::take(&mut epoch.segments));
                epoch.release_index();
                index = Some(epoch);
            }
            Err(shared) => self.pool.put(shared.segments.clone()),
        }
        drop(state);
        drop(index);
        self.changed.notify_all();
    }

    /// There is no room for what is to be written to the base: warns once, and waits before it is tried again. Returns false
    /// if the session is over: then callers that need the disk try it again.
    pub(in crate::disk) fn wait_for_room(&self, error: &io::Error) -> bool {
        let mut state = self.state();
        if state.phase == Phase::Over {
            return false;
        }
        let is_first = !std::mem::replace(&mut state.has_warned_of_base, true);
        if let Some(binding) = state.binding.clone().filter(|_| is_first) {
            drop(state);
            (binding.on_base_full)(self.name.clone(), error);
            state = self.state();
        }
        let is_on = |state: &mut super::State| state.phase != Phase::Over;
        let waited = self.changed.wait_timeout_while(state, RETRY_AFTER, is_on);
        drop(waited);
        true
    }

    /// The base cannot be written: the thread applies nothing any more.
    pub(in crate::disk) fn apply_failed(&self, error: io::Error) {
        self.state().has_apply_failed = true;
        // What is committed stays in its log.
        self.keep_files();
        self.lose(DiskError::Apply {
            disk: self.name.clone(),
            source: error,
        });
    }
}
