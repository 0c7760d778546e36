//! `colo-ring status --events`: what changes in a receiver, as lines of JSON.

use crate::control::Conversation;
use crate::options::ControlAddress;
use crate::output::{CommandError, print};
use colo_ring::receiver::{Request, SessionState, SessionStatus, StatusReport};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often the receiver is asked: what changes twice within that is seen once.
const EVERY: Duration = Duration::from_millis(250);

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Change {
    /// There is a session that there was not before, or it has another state.
    State,
    /// It makes no progress.
    Stalled,
    /// It makes progress again.
    Resumed,
    /// It is not in the status any more.
    Gone,
}

/// A line of `status --events`: a session that there is, or what has changed of one.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Event<'a> {
    schema: &'static str,
    schema_version: u32,
    /// When it was seen, in milliseconds since 1970.
    unix_ms: u64,
    /// What has changed.
    change: Change,
    /// The session's number at the receiver.
    session: u32,
    /// Its guest's name; null if it has none.
    guest: Option<&'a str>,
    /// Its guest's UUID; null if it has none.
    uuid: Option<&'a str>,
    /// The address that its primary came to.
    listener: Option<&'a str>,
    /// Where its primary came from.
    peer: &'a str,
    /// The machine type, once known.
    machine: Option<&'a str>,
    /// Where it stands now.
    state: SessionState,
    /// The last committed checkpoint; null if there is none.
    checkpoint: Option<u64>,
    /// Why it ended; null while it runs.
    end: Option<&'a str>,
}

/// Prints a line for each session that there is, and for each change from then on, until the receiver ends.
///
/// # Errors
/// If the receiver does not answer, or standard output cannot be written.
pub(super) fn run(control: &ControlAddress) -> Result<ExitCode, CommandError> {
    let mut known = BTreeMap::new();
    // One connection: it ends with the receiver, and what the next one has are other sessions.
    let mut conversation = Conversation::open(control)?;
    loop {
        let status: StatusReport = conversation.ask(&Request::Status)?;
        let now: BTreeMap<u32, SessionStatus> = (status.sessions.into_iter())
            .map(|session| (session.session, session))
            .collect();
        for (change, session) in changes(&known, &now) {
            print(&line(change, session)?)?;
        }
        known = now;
        std::thread::sleep(EVERY);
    }
}

fn changes<'a>(
    before: &'a BTreeMap<u32, SessionStatus>,
    now: &'a BTreeMap<u32, SessionStatus>,
) -> Vec<(Change, &'a SessionStatus)> {
    let mut changes = Vec::new();
    for (number, session) in now {
        let before = before.get(number);
        if before.is_none_or(|before| before.state != session.state) {
            changes.push((Change::State, session));
        }
        let was_stalled = before.is_some_and(|before| before.stalled_ms.is_some());
        match (was_stalled, session.stalled_ms.is_some()) {
            (false, true) => changes.push((Change::Stalled, session)),
            (true, false) => changes.push((Change::Resumed, session)),
            _ => {}
        }
    }
    let gone = before
        .values()
        .filter(|session| !now.contains_key(&session.session));
    changes.extend(gone.map(|session| (Change::Gone, session)));
    changes
}

fn line(change: Change, session: &SessionStatus) -> Result<String, CommandError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let line = Event {
        schema: "colo-ring.event",
        schema_version: 1,
        unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        change,
        session: session.session,
        guest: session.guest.as_deref(),
        uuid: session.uuid.as_deref(),
        listener: session.listener.as_deref(),
        peer: &session.peer,
        machine: session.machine.as_deref(),
        state: session.state,
        checkpoint: session.checkpoint,
        end: session.end.as_deref(),
    };
    let text = colo_ring::text::json_line(&line).map_err(CommandError::failed)?;
    Ok(text + "\n")
}
