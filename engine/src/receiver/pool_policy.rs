//! When a guest's page pool grows and shrinks: after each checkpoint, by what it needed, on a thread of its own.

use super::live_session::{LiveSession, SessionPart};
use crate::store::{PoolTask, Store};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long not to try again after there was no memory.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct PoolPolicy {
    /// Slabs that receiving threads had to add, as far as the operator was warned.
    inline_growth: u64,
    growth: Arc<Growth>,
}

/// When the pool was last refused the memory to grow, if it has not grown since.
#[derive(Debug, Default)]
struct Growth(Mutex<Option<Instant>>);

impl Growth {
    fn refused_at(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_be_tried(&self) -> bool {
        self.refused_at().is_none_or(|at| at.elapsed() > TRY_AGAIN_AFTER)
    }

    /// It was tried. Returns whether it was refused for the first time in a row.
    fn was_tried(&self, has_grown: bool) -> bool {
        let now = (!has_grown).then(Instant::now);
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *refused, now).is_none() && !has_grown
    }
}

impl PoolPolicy {
    /// A checkpoint is acknowledged: warns if its pages had to wait for new slabs, and starts what the pool needs.
    pub(super) fn after_checkpoint(&mut self, session: &Arc<LiveSession>, store: &Arc<Store>) {
        let task = store.pool_task();
        let inline_growth = store.pool_use().map_or(0, |pool| pool.inline_growth);
        if inline_growth > self.inline_growth {
            let advice = match task {
                PoolTask::Grow => "",
                PoolTask::Nothing | PoolTask::Unregister | PoolTask::Shrink => {
                    ". A larger --pool-max avoids that"
                }
            };
            session.warn(format!(
                "the page pool was {} slabs too small for a checkpoint; receiving waited while they were \
                 added, which made the checkpoint slower{advice}",
                inline_growth - self.inline_growth,
            ));
            self.inline_growth = inline_growth;
        }
        let is_due = match task {
            PoolTask::Nothing => false,
            PoolTask::Unregister => {
                session.wake_all();
                false
            }
            PoolTask::Grow => self.growth.may_be_tried(),
            PoolTask::Shrink => true,
        };
        if is_due && !session.growing.swap(true, Ordering::AcqRel) {
            resize(session, store.clone(), self.growth.clone(), task);
        }
    }
}

/// Resizes the pool in the background, because it takes milliseconds. Without a thread for it the pool stays as it is.
fn resize(session: &Arc<LiveSession>, store: Arc<Store>, growth: Arc<Growth>, task: PoolTask) {
    // The session is over only after this: a slab that is added when the others are given back would stay, and its file.
    let part = SessionPart::new(session);
    let resize = move || {
        let session = part;
        match task {
            PoolTask::Grow => {
                let grown = store.grow();
                if growth.was_tried(grown.is_ok())
                    && let Err(error) = grown
                {
                    session.warn(format!(
                        "its page pool cannot grow ahead of its checkpoints: {error}"
                    ));
                }
            }
            PoolTask::Shrink | PoolTask::Unregister | PoolTask::Nothing => store.shrink(),
        }
        session.growing.store(false, Ordering::Release);
        // Its cores register what was added.
        session.wake_all();
    };
    if session.services.run_in_background(Box::new(resize)).is_err() {
        // The next checkpoint tries again.
        session.growing.store(false, Ordering::Release);
    }
}
