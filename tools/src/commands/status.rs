//! `colo-ring status`: the state of a running receiver and its sessions.

use crate::control::ask;
use crate::options::{ControlAddress, Size};
use crate::output::{CommandError, mebibytes, print, print_json, table};
use crate::session_text::end;
use clap::Args;
use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::{Request, SessionState, SessionStatus, StatusReport};
use std::process::ExitCode;

/// Options of `colo-ring status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Print the whole status as JSON (schema colo-ring.status, version 1)
    #[arg(long)]
    json: bool,
}

/// Prints the state of a receiver and its sessions.
///
/// # Errors
/// If the receiver does not answer.
pub fn run(args: &StatusArgs) -> Result<ExitCode, CommandError> {
    let status: StatusReport = ask(&args.control, &Request::Status)?;
    if args.json {
        print_json(&status)?;
    } else {
        print(&render(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn render(status: &StatusReport) -> String {
    let ring = status
        .ring
        .as_deref()
        .map(|ring| format!(" ({ring})"))
        .unwrap_or_default();
    let mut text = format!(
        "listening on {}\n{}{ring} on {}; up {} s, guest RAM {:.0} MiB of at most {}\n\n",
        status.listen.join(", "),
        status.backend,
        status.placement,
        status.uptime_ms / 1000,
        mebibytes(status.ram_held_bytes),
        Size(status.ram_limit_bytes),
    );
    if status.sessions.is_empty() {
        text.push_str("no session\n");
        return text;
    }
    let head = [
        "session",
        "state",
        "checkpoint",
        "age",
        "RAM",
        "pause p50",
        "p99",
        "machine",
        "peer",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(status.sessions.iter().map(session_row));
    text.push_str(&table(&rows));
    for session in &status.sessions {
        if matches!(session.state, SessionState::Ended | SessionState::Recovered) {
            let state = state(session);
            text.push_str(&format!(
                "session {} {state}: {}\n",
                session.session,
                end(session)
            ));
        }
        let largest = session.blocks.iter().max_by_key(|block| block.used_length);
        if let Some((block, file)) = largest.and_then(|block| Some((block, block.file.as_ref()?))) {
            let (number, name) = (session.session, &block.name);
            text.push_str(&format!(
                "session {number}: ram block {name} is {}\n",
                file.display()
            ));
        }
        if let Some(promotion) = &session.promotion {
            text.push_str(&format!("session {}: {promotion}\n", session.session));
        }
        for fallback in &session.fallbacks {
            text.push_str(&format!("session {}: {fallback}\n", session.session));
        }
    }
    text
}

fn state(session: &SessionStatus) -> &'static str {
    match session.state {
        SessionState::Precopy => "precopy",
        SessionState::Protected => "protected",
        SessionState::Ended => "ended",
        SessionState::Promoted => "promoted",
        SessionState::Recovered => "recovered",
    }
}

fn session_row(session: &SessionStatus) -> Vec<String> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let pause = session.summary.phase(Phase::Pause);
    let measured = |nanoseconds| (pause.count > 0).then(|| display_nanoseconds(nanoseconds));
    vec![
        session.session.to_string(),
        state(session).to_owned(),
        or_dash(session.checkpoint.map(|checkpoint| checkpoint.to_string())),
        or_dash(
            session
                .checkpoint_age_ms
                .map(|ms| format!("{}.{} s", ms / 1000, ms % 1000 / 100)),
        ),
        or_dash(
            session
                .ram_bytes
                .map(|bytes| format!("{:.0} MiB", mebibytes(bytes))),
        ),
        or_dash(measured(pause.p50_ns)),
        or_dash(measured(pause.p99_ns)),
        or_dash(session.machine.clone()),
        session.peer.clone(),
    ]
}
