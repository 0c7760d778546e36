//! The events of a receiver as lines of its log. Sessions that protect nothing can be begun by anyone who can connect, so their
//! lines are limited and counted.

use crate::output::{printable, tell};
use crate::session_text;
use colo_ring::rate_limit::RateLimit;
use colo_ring::receiver::Event;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines about sessions that protect nothing: so many at once, and how soon one more.
const UNPROTECTED: (u32, Duration) = (200, Duration::from_millis(500));

/// See the module.
pub(super) struct EventLog {
    unprotected: Mutex<RateLimit>,
}

impl EventLog {
    pub(super) fn new() -> Self {
        let (burst, every) = UNPROTECTED;
        Self {
            unprotected: Mutex::new(RateLimit::new(burst, every, Instant::now())),
        }
    }

    pub(super) fn tell(&self, event: &Event) {
        let is_limited = match event {
            Event::Began { .. } => true,
            Event::Ended(status) => status.checkpoint.is_none(),
            Event::Warning(_) | Event::Note(_) => false,
        };
        if !is_limited || self.limit().admits(Instant::now()) {
            tell(&printable(&describe(event)));
        }
    }

    /// Counts up what was left out, if it is time to. To be called now and then.
    pub(super) fn count_up(&self) {
        let left_out = self.limit().summary(Instant::now());
        if let Some((count, time)) = left_out {
            tell(&format!(
                "{count} more sessions began, or ended without a checkpoint, within {:.0} s; their lines were left out",
                time.as_secs_f64()
            ));
        }
    }

    fn limit(&self) -> MutexGuard<'_, RateLimit> {
        self.unprotected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Warning(text) => format!("warning: {text}"),
        Event::Note(text) => text.clone(),
        Event::Began { session, peer } => format!("session {session} began: {peer}"),
        Event::Ended(status) => format!("session {} ended: {}", status.session, session_text::end(status)),
    }
}
