//! The events of a receiver as lines of its log. Sessions that protect nothing can be begun by anyone who can connect, so their
//! lines are limited and counted.

use crate::log::Fields;
use crate::output::{printable, tell, tell_of};
use crate::session_text;
use colo_ring::rate_limit::RateLimit;
use colo_ring::receiver::{Event, SessionState, SessionStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines about sessions that protect nothing: so many at once, and how soon one more.
const UNPROTECTED: (u32, Duration) = (200, Duration::from_secs(5));

/// See the module.
pub(super) struct EventLog {
    unprotected: Mutex<RateLimit>,
    /// Whether there is a directory in which checkpoints outlive this receiver.
    has_ram_dir: bool,
    is_ending: AtomicBool,
}

impl EventLog {
    pub(super) fn new(has_ram_dir: bool) -> Self {
        let (burst, every) = UNPROTECTED;
        Self {
            unprotected: Mutex::new(RateLimit::new(burst, every, Instant::now())),
            has_ram_dir,
            is_ending: AtomicBool::new(false),
        }
    }

    /// The receiver is about to end: what it holds ends with it, or is in files.
    pub(super) fn ending(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn tell(&self, event: &Event) {
        let is_limited = match event {
            Event::Began { .. } | Event::Protected { .. } => true,
            Event::Ended(status) => status.checkpoint.is_none(),
            Event::Stall(stall) => stall.status.checkpoint.is_none(),
            Event::Ending => {
                self.ending();
                false
            }
            Event::Warning(_) | Event::Note(_) | Event::Replaced { .. } | Event::GivenUp { .. } => false,
        };
        if !is_limited || self.limit().admits(Instant::now()) {
            tell_of(
                &printable(&describe(event, self.keeps_checkpoints())),
                fields(event),
            );
        }
    }

    /// Whether a checkpoint outlives its session.
    fn keeps_checkpoints(&self) -> bool {
        self.has_ram_dir || !self.is_ending.load(Ordering::Relaxed)
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
    let in_state = |fields: Fields, state| Fields {
        state: Some(state),
        ..fields
    };
    match event {
        Event::Warning(remark) | Event::Note(remark) => {
            remark.session.as_ref().map(Fields::of).unwrap_or_default()
        }
        Event::Began { session, peer, .. } => Fields {
            peer: Some(printable(peer)),
            ..in_state(Fields::of(session), SessionState::Precopy.name())
        },
        Event::Protected { session, .. } => in_state(Fields::of(session), SessionState::Protected.name()),
        Event::GivenUp { session, is_promoted } => in_state(
            Fields::of(session),
            match is_promoted {
                true => SessionState::Promoted.name(),
                false => SessionState::Discarded.name(),
            },
        ),
        Event::Replaced { old, .. } => in_state(Fields::of(old), SessionState::Discarded.name()),
        Event::Ending => Fields::default(),
        Event::Stall(stall) => in_state(
            of_status(&stall.status),
            match stall.during {
                Some(_) => "stalled",
                None => stall.status.state.name(),
            },
        ),
        Event::Ended(status) => in_state(
            of_status(status),
            match is_loss(status) {
                true => "lost",
                false => status.state.name(),
            },
        ),
    }
}

/// Whether a guest is without its primary that was protected.
fn is_loss(status: &SessionStatus) -> bool {
    status.lost && status.checkpoint.is_some()
}

fn of_status(status: &SessionStatus) -> Fields {
    Fields {
        session: Some(status.session),
        guest: status.guest.clone(),
        peer: Some(printable(&status.peer)),
        checkpoint: status.checkpoint,
        state: None,
    }
}

/// `is_kept`: a checkpoint outlives its session.
fn describe(event: &Event, is_kept: bool) -> String {
    match event {
        Event::Warning(remark) => format!("warning: {remark}"),
        Event::Note(remark) => remark.text.clone(),
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
        Event::Ending => "the receiver ends with its session, as --once says".to_owned(),
        Event::Ended(status) => {
            let session = status.title();
            let severity = if is_loss(status) { "warning: " } else { "" };
            format!(
                "{severity}session {session} ended: {}",
                session_text::at_the_end(status, is_kept)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_status;
    use colo_ring::receiver::{Remark, SessionTitle, Stall};

    const UUID: &str = "6b3fb1c2-0d0b-4e0c-9a54-1f0d5c2e7a10";

    fn web3() -> SessionTitle {
        SessionTitle {
            session: 3,
            name: Some("web3".parse().unwrap()),
            uuid: Some(UUID.parse().unwrap()),
        }
    }

    fn ended(state: SessionState, lost: bool) -> SessionStatus {
        SessionStatus {
            guest: Some("web3".to_owned()),
            state,
            lost,
            checkpoint: Some(7),
            end: Some("the end".to_owned()),
            ..test_status::session(3)
        }
    }

    fn stall(during: Option<&'static str>) -> Event {
        Event::Stall(Box::new(Stall {
            status: ended(SessionState::Protected, false),
            silent: Duration::from_secs(9),
            during,
        }))
    }

    #[test]
    fn every_line_about_a_guest_has_its_name_and_its_state() {
        let remark = || Remark {
            session: Some(web3()),
            text: "session 3 (web3): pages come late".to_owned(),
        };
        let session = web3;
        let after = Duration::from_secs(1);
        let began = Event::Began {
            session: session(),
            peer: "x".to_owned(),
            listener: "y".to_owned(),
        };
        let given_up = |is_promoted| Event::GivenUp {
            session: session(),
            is_promoted,
        };
        let end = |state, lost| Event::Ended(Box::new(ended(state, lost)));
        for (event, state) in [
            (Event::Warning(remark()), None),
            (Event::Note(remark()), None),
            (began, Some("precopy")),
            (
                Event::Protected {
                    session: session(),
                    after,
                },
                Some("protected"),
            ),
            (stall(Some("in a checkpoint")), Some("stalled")),
            (stall(None), Some("protected")),
            (given_up(true), Some("promoted")),
            (given_up(false), Some("discarded")),
            (
                Event::Replaced {
                    old: session(),
                    new: 4,
                },
                Some("discarded"),
            ),
            (end(SessionState::Ended, true), Some("lost")),
            (end(SessionState::Ended, false), Some("ended")),
            (end(SessionState::Promoted, false), Some("promoted")),
        ] {
            let fields = fields(&event);
            assert_eq!(fields.session, Some(3), "{event:?}");
            assert_eq!(fields.guest.as_deref(), Some("web3"), "{event:?}");
            assert_eq!(fields.state, state, "{event:?}");
        }
        let without_name = SessionTitle { name: None, ..web3() };
        assert_eq!(Fields::of(&without_name).guest.as_deref(), Some(UUID));
        let other = Event::Note("listening".to_owned().into());
        assert_eq!(fields(&other), Fields::default());
        // The text is the remark's own.
        assert_eq!(
            describe(&Event::Note(remark()), true),
            "session 3 (web3): pages come late"
        );
    }

    #[test]
    fn the_loss_of_a_protected_guest_is_a_warning() {
        let line = |status: SessionStatus| describe(&Event::Ended(Box::new(status)), true);
        let lost = line(ended(SessionState::Ended, true));
        assert_eq!(
            lost,
            "warning: session 3 (web3) ended: the end; checkpoint 7 is kept"
        );
        assert!(line(ended(SessionState::Ended, false)).starts_with("session 3"));
        // Anyone who can connect can begin and lose one.
        let unprotected = SessionStatus {
            checkpoint: None,
            ..ended(SessionState::Ended, true)
        };
        assert!(line(unprotected).starts_with("session 3"));
    }

    #[test]
    fn with_once_only_files_keep_a_checkpoint() {
        for (has_ram_dir, is_kept) in [(false, false), (true, true)] {
            let log = EventLog::new(has_ram_dir);
            assert!(log.keeps_checkpoints());
            log.tell(&Event::Ending);
            assert_eq!(log.keeps_checkpoints(), is_kept);
        }
    }

    #[test]
    fn what_ends_with_its_receiver_is_not_called_kept() {
        let event = Event::Ended(Box::new(ended(SessionState::Ended, false)));
        let said = describe(&event, false);
        assert!(
            said.ends_with("checkpoint 7 was the last, and ended with this receiver"),
            "{said}"
        );
    }
}
