//! A session's status in words.

use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::{SessionState, SessionStatus};
use colo_ring::text::{mebibytes, seconds};

/// How a session ended, or that it runs, in words.
pub(crate) fn end(session: &SessionStatus) -> String {
    let end = session.end.as_deref().unwrap_or("it runs");
    let Some(checkpoint) = session.checkpoint else {
        return format!("{end}; nothing was committed");
    };
    match (session.state, session.checkpoint_age_ms) {
        (SessionState::Promoted, _) => {
            format!("{end}; its guest went on elsewhere, from checkpoint {checkpoint}")
        }
        (SessionState::Discarded, _) => format!("{end}; checkpoint {checkpoint} was given up"),
        (_, Some(age)) if session.end.is_some() => {
            format!("{end}; checkpoint {checkpoint}, {} old, is kept", seconds(age))
        }
        (_, _) => format!("{end}; checkpoint {checkpoint} is kept"),
    }
}

/// How a session of a receiver that has ended ended itself. `in_files`: its checkpoint is kept for the next receiver.
pub(crate) fn at_the_end(session: &SessionStatus, in_files: bool) -> String {
    let is_kept = matches!(session.state, SessionState::Ended | SessionState::Recovered);
    match (session.checkpoint, &session.end) {
        (Some(checkpoint), Some(why)) if is_kept && !in_files => {
            format!("{why}; checkpoint {checkpoint} was the last, and ended with this receiver")
        }
        _ => end(session),
    }
}

/// A session on part of a line.
pub(crate) fn brief(session: &SessionStatus) -> String {
    let title = session.title();
    let Some(checkpoint) = session.checkpoint else {
        return format!("session {title}: precopy, {}", mebibytes(session.bytes));
    };
    let pause = session.summary.phase(Phase::Pause);
    format!(
        "session {title}: checkpoint {checkpoint}, pause {} (p50 {}, p99 {})",
        display_nanoseconds(session.last_pause_ns),
        display_nanoseconds(pause.p50_ns),
        display_nanoseconds(pause.p99_ns),
    )
}
