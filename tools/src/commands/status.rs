//! `colo-ring status`: the state of a running receiver and its sessions.

use crate::control::ask;
use crate::options::{ControlAddress, Size};
use crate::output::{CommandError, mebibytes, print, print_json, printable, table};
use crate::session_text::end;
use clap::Args;
use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::{
    DiskState, DiskStatus, Request, SessionState, SessionStatus, StatusReport, UnboundDisk,
};
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
        text.push_str(&unbound_disks(status));
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
            let (number, name) = (session.session, printable(&block.name));
            text.push_str(&format!(
                "session {number}: ram block {name} is {}\n",
                file.display()
            ));
        }
        if let Some(ms) = session.stalled_ms {
            let (number, seconds) = (session.session, ms / 1000);
            text.push_str(&format!(
                "session {number} is stalled: nothing has come for {seconds} s\n"
            ));
        }
        text.push_str(&guard(session));
        if let Some(promotion) = &session.promotion {
            text.push_str(&format!("session {}: {promotion}\n", session.session));
        }
        for fallback in &session.fallbacks {
            text.push_str(&format!("session {}: {fallback}\n", session.session));
        }
    }
    text.push_str(&session_disks(status));
    text.push_str(&unbound_disks(status));
    text
}

/// A line about the guard of a session that runs; nothing if it has none.
fn guard(session: &SessionStatus) -> String {
    let runs = session.state == SessionState::Protected;
    let Some(guard) = session.guard.as_ref().filter(|_| runs) else {
        return String::new();
    };
    let link = match guard.linked {
        true => "its output is held until it is committed",
        false => "the link to its guard is lost, which releases no output until it is back",
    };
    format!(
        "session {}: guarded as {}; {link}\n",
        session.session,
        printable(&guard.name)
    )
}

/// The disks of the sessions, in lines of at most 80 columns; nothing if there are none.
fn session_disks(status: &StatusReport) -> String {
    let head = ["disk", "session", "size", "state", "log", "not in base", "epochs"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for session in &status.sessions {
        let is_over = matches!(session.state, SessionState::Ended | SessionState::Recovered);
        let row = |disk: &DiskStatus| {
            let state = match disk.state {
                DiskState::Copying => "copying",
                DiskState::InSync => "in sync",
                // Its session is over as well: what is committed is what is kept.
                DiskState::Lost if is_over => "kept",
                DiskState::Lost => "lost",
            };
            vec![
                shortened(&disk.name),
                session.session.to_string(),
                whole_mebibytes(disk.size_bytes),
                state.to_owned(),
                whole_mebibytes(disk.log_bytes),
                whole_mebibytes(disk.lag_bytes),
                disk.lag_epochs.to_string(),
            ]
        };
        rows.extend(session.disks.iter().map(row));
    }
    match rows.len() {
        1 => String::new(),
        _ => format!("\n{}", table(&rows)),
    }
}

/// Disks that are connected and that no session has yet.
fn unbound_disks(status: &StatusReport) -> String {
    let line = |disk: &UnboundDisk| {
        format!(
            "disk {}: first copy from {}, {} of {} written\n",
            disk.name,
            disk.from,
            whole_mebibytes(disk.written_bytes),
            whole_mebibytes(disk.size_bytes)
        )
    };
    status.disks.iter().map(line).collect()
}

/// A name that leaves room for the rest of its line.
fn shortened(name: &str) -> String {
    const MAX: usize = 22;
    match name.char_indices().nth(MAX) {
        None => name.to_owned(),
        Some(_) => name.chars().take(MAX - 1).chain(['…']).collect(),
    }
}

/// MiB, rounded up: a little is not nothing.
fn whole_mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leave_room_and_little_is_not_nothing() {
        assert_eq!(shortened("web3-root"), "web3-root");
        let long = shortened(&"x".repeat(64));
        assert!(long.ends_with("x…") && long.chars().count() == 22);
        assert_eq!([0, 1, 5 << 20].map(whole_mebibytes), ["0 MiB", "1 MiB", "5 MiB"]);
    }
}
