//! A session's status in words.

use crate::output::mebibytes;
use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::SessionStatus;

/// How a session ended, or that it runs, in words.
pub(crate) fn end(session: &SessionStatus) -> String {
    let end = session.end.as_deref().unwrap_or("it runs");
    match (session.checkpoint, session.checkpoint_age_ms) {
        (Some(checkpoint), Some(age)) if session.end.is_some() => {
            let (seconds, tenths) = (age / 1000, age % 1000 / 100);
            format!("{end}; checkpoint {checkpoint}, {seconds}.{tenths} s old, is kept")
        }
        (Some(checkpoint), _) => format!("{end}; checkpoint {checkpoint} is kept"),
        (None, _) => format!("{end}; nothing was committed"),
    }
}

/// A session on part of a line.
pub(crate) fn brief(session: &SessionStatus) -> String {
    let number = session.session;
    let Some(checkpoint) = session.checkpoint else {
        return format!("session {number}: precopy, {:.0} MiB", mebibytes(session.bytes));
    };
    let pause = session.summary.phase(Phase::Pause);
    format!(
        "session {number}: checkpoint {checkpoint}, pause {} (p50 {}, p99 {})",
        display_nanoseconds(session.last_pause_ns),
        display_nanoseconds(pause.p50_ns),
        display_nanoseconds(pause.p99_ns),
    )
}
