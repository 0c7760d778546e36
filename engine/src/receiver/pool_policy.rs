//! When a guest's page pool grows and shrinks: after each checkpoint, by what it needed, on a thread of its own.

use super::live_session::LiveSession;
use crate::store::{PoolTask, Store};
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[derive(Debug, Default)]
pub(super) struct PoolPolicy {
    /// Slabs that receiving threads had to add, as far as the operator was warned.
    inline_growth: u64,
}

impl PoolPolicy {
    /// A checkpoint is acknowledged: warns if its pages had to wait for new slabs, and starts what the pool needs.
    pub(super) fn after_checkpoint(&mut self, session: &Arc<LiveSession>, store: &Arc<Store>) {
        let task = store.pool_task();
        let inline_growth = store.pool_use().map_or(0, |pool| pool.inline_growth);
        if inline_growth > self.inline_growth {
            let advice = match task {
                PoolTask::Grow => "",
                PoolTask::Nothing | PoolTask::Shrink => ". A larger --pool-max avoids that",
            };
            session.services.warn(format!(
                "session {}: the page pool was {} slabs too small for a checkpoint; receiving waited while they were \
                 added, which made the checkpoint slower{advice}",
                session.id,
                inline_growth - self.inline_growth,
            ));
            self.inline_growth = inline_growth;
        }
        if task != PoolTask::Nothing && !session.growing.swap(true, Ordering::AcqRel) {
            resize(session.clone(), store.clone(), task);
        }
    }
}

/// Resizes the pool in the background, because it takes milliseconds. Without a thread for it the pool stays as it is.
fn resize(session: Arc<LiveSession>, store: Arc<Store>, task: PoolTask) {
    let (services, of_thread) = (session.services.clone(), session.clone());
    let resize = move || {
        let session = of_thread;
        let done = match task {
            PoolTask::Grow => store.grow(),
            PoolTask::Shrink | PoolTask::Nothing => {
                store.shrink();
                Ok(())
            }
        };
        if let Err(error) = done {
            session.services.warn(format!("session {}: {error}", session.id));
        }
        session.growing.store(false, Ordering::Release);
    };
    if services.run_in_background(Box::new(resize)).is_err() {
        // The next checkpoint tries again.
        session.growing.store(false, Ordering::Release);
    }
}
