//! The events of a receiver as lines of its log. Sessions that protect nothing can be begun by anyone who can connect, so their
//! lines are limited and counted.

use crate::log::Fields;
use crate::output::{printable, tell, tell_of};
use crate::session_text;
use colo_ring::rate_limit::RateLimit;
use colo_ring::receiver::{Event, SessionStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines about sessions that protect nothing: so many at once, and how soon one more.
const UNPROTECTED: (u32, Duration) = (200, Duration::from_secs(5));

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
            Event::Began { .. } | Event::Protected { .. } => true,
            Event::Ended(status) => status.checkpoint.is_none(),
            Event::Stall(stall) => stall.status.checkpoint.is_none(),
            Event::Warning(_) | Event::Note(_) | Event::Replaced { .. } | Event::GivenUp { .. } => false,
        };
        if !is_limited || self.limit().admits(Instant::now()) {
            tell_of(&printable(&describe(event)), fields(event));
        }
    }

    /// Counts up what was left out, if it is time to. To be called now and then.
    pub(super) fn count_up(&self) {
        let left_out = self.limit().summary(Instant::now());
        if let Some((count, time)) = left_out {
            tell(&format!(
                "{count} more lines about sessions that began, had their first checkpoint, stood still, or ended without one, were left out \
                 within {:.0} s",
                time.as_secs_f64()
            ));
        }
    }

    fn limit(&self) -> MutexGuard<'_, RateLimit> {
        self.unprotected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fields(event: &Event) -> Fields {
    match event {
        // What they are about, their text says.
        Event::Warning(_) | Event::Note(_) => Fields::default(),
        Event::Began { session, peer, .. } => Fields {
            session: Some(session.session),
            guest: session.name.as_ref().map(ToString::to_string),
            peer: Some(printable(peer)),
            ..Fields::default()
        },
        Event::Replaced { old: session, .. }
        | Event::Protected { session, .. }
        | Event::GivenUp { session, .. } => Fields {
            session: Some(session.session),
            guest: session.name.as_ref().map(ToString::to_string),
            ..Fields::default()
        },
        Event::Stall(stall) => of(&stall.status),
        Event::Ended(status) => of(status),
    }
}

fn of(status: &SessionStatus) -> Fields {
    Fields {
        session: Some(status.session),
        guest: status.guest.clone(),
        peer: Some(printable(&status.peer)),
        checkpoint: status.checkpoint,
    }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Warning(text) => format!("warning: {text}"),
        Event::Note(text) => text.clone(),
        Event::Began {
            session,
            peer,
            listener,
        } => format!("session {session} began: {peer} at {listener}"),
        Event::Protected { session, after } => {
            format!(
                "session {session} is protected: its first checkpoint came after {:.1} s",
                after.as_secs_f64()
            )
        }
        Event::GivenUp { session, is_promoted } => match is_promoted {
            true => format!("session {session} was promoted: its guest runs elsewhere"),
            false => format!("session {session} was discarded"),
        },
        Event::Stall(stall) => {
            let session = stall.status.title();
            let silent = stall.silent.as_secs_f64();
            match stall.during {
                Some(during) => {
                    format!(
                        "warning: session {session} is stalled: next to nothing has come for {silent:.0} s {during}"
                    )
                }
                None => format!("session {session} goes on after {silent:.0} s without progress"),
            }
        }
        Event::Replaced { old, new } => {
            format!(
                "session {old}: its checkpoint is given up, because its guest has a newer one, of session {new}"
            )
        }
        Event::Ended(status) => {
            let session = status.title();
            format!("session {session} ended: {}", session_text::end(status))
        }
    }
}
