//! `colo-ring status`: the state of a running receiver and its sessions.

mod events;
mod watch;

use crate::control::ask;
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json, printable, table};
use crate::session_text::end;
use crate::tls::date;
use clap::Args;
use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::{
    DiskState, DiskStatus, Request, SessionState, SessionStatus, StatusReport, UnboundDisk,
};
use colo_ring::text::{duration, mebibytes, seconds};
pub(crate) use events::Event;
use std::process::ExitCode;

/// Options of `colo-ring status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Print the whole status as JSON (schema colo-ring.status, version 1)
    #[arg(long, conflicts_with_all = ["watch", "events"])]
    json: bool,

    /// Show the sessions and their pauses of the last minutes again every second, also of a receiver that is restarted
    #[arg(long, conflicts_with = "events")]
    watch: bool,

    /// Print a line of JSON for each session, and for each change of one from then on (schema colo-ring.event, version 1)
    #[arg(long)]
    events: bool,
}

/// Prints the state of a receiver and its sessions.
///
/// # Errors
/// If the receiver does not answer.
pub fn run(args: &StatusArgs) -> Result<ExitCode, CommandError> {
    if args.watch {
        return watch::run(&args.control);
    }
    if args.events {
        return events::run(&args.control);
    }
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
        "listening on {}\n{}{ring}\non {}\nup {}, guests' memory {} of at most {}\n\n",
        status.listen.join(", "),
        status.backend,
        status.placement,
        duration(status.uptime_ms / 1000),
        mebibytes(status.ram_held_bytes),
        mebibytes(status.ram_limit_bytes),
    );
    if let Some(tls) = &status.tls {
        text.truncate(text.trim_end().len());
        text.push_str(&format!(
            "\nTLS as {}, until {}{}\n\n",
            tls.validity.subject,
            date(tls.validity.expires_unix_s),
            if tls.verifies_peer {
                ""
            } else {
                "; primaries need no certificate"
            }
        ));
    }
    if status.sessions.is_empty() {
        text.push_str("no session\n");
        text.push_str(&unbound_disks(status));
        return text;
    }
    let head = ["session", "guest", "state", "ckpt", "age", "pause p50", "p99"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(status.sessions.iter().map(session_row));
    text.push_str(&table(&rows));
    text.push('\n');
    for session in &status.sessions {
        text.push_str(&whence(session));
        if matches!(session.state, SessionState::Ended | SessionState::Recovered) {
            let state = state(session);
            text.push_str(&format!(
                "session {} {state}: {}\n",
                session.title(),
                end(session)
            ));
        }
        let largest = session.blocks.iter().max_by_key(|block| block.used_length);
        if let Some((block, file)) = largest.and_then(|block| Some((block, block.file.as_ref()?))) {
            let (title, name) = (session.title(), printable(&block.name));
            text.push_str(&format!(
                "session {title}: ram block {name} is {}\n",
                file.display()
            ));
        }
        if let Some(ms) = session.stalled_ms {
            let (title, time) = (session.title(), seconds(ms));
            text.push_str(&format!(
                "session {title} is stalled: next to nothing has come for {time}\n"
            ));
        }
        text.push_str(&guard(session));
        if let Some(promotion) = &session.promotion {
            text.push_str(&format!("session {}: {promotion}\n", session.title()));
        }
        for fallback in &session.fallbacks {
            text.push_str(&format!("session {}: {fallback}\n", session.title()));
        }
    }
    if status.intervals_lost > 0 {
        text.push_str(&format!(
            "{} intervals of a second are missing in the logs of --hist: they could not be written\n",
            status.intervals_lost
        ));
    }
    text.push_str(&session_disks(status));
    text.push_str(&unbound_disks(status));
    text
}

/// Lines that say who a session's guest is and where it comes from, of at most 80 columns as a rule.
fn whence(session: &SessionStatus) -> String {
    let known = [
        session.uuid.clone().map(|uuid| format!("UUID {uuid}")),
        session.machine.as_deref().map(printable),
        session.ram_bytes.map(mebibytes),
    ];
    let known: Vec<_> = known.into_iter().flatten().collect();
    let mut text = match known.is_empty() {
        true => String::new(),
        false => format!("session {}: {}\n", session.session, known.join(", ")),
    };
    let from = format!("session {}: from {}", session.session, session.peer);
    text.push_str(&match &session.listener {
        // Of a UNIX socket it is in the peer's name.
        Some(listener) if !session.peer.starts_with(listener.as_str()) => format!("{from} to {listener}\n"),
        _ => format!("{from}\n"),
    });
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
        session.title(),
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
                mebibytes(disk.size_bytes),
                state.to_owned(),
                mebibytes(disk.log_bytes),
                mebibytes(disk.lag_bytes),
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
            mebibytes(disk.written_bytes),
            mebibytes(disk.size_bytes)
        )
    };
    status.disks.iter().map(line).collect()
}

/// A name that leaves room for the rest of its line.
fn shortened(name: &str) -> String {
    const MAX: usize = 20;
    match name.char_indices().nth(MAX) {
        None => name.to_owned(),
        Some(_) => name.chars().take(MAX - 1).chain(['…']).collect(),
    }
}

/// The state as people look for it: a session that makes no progress is stalled, whatever else it is.
fn state(session: &SessionStatus) -> &'static str {
    match session.stalled_ms {
        Some(_) => "stalled",
        None => session.state.name(),
    }
}

/// A guest's name in a column: of one that has only a UUID, its beginning.
fn guest(session: &SessionStatus) -> String {
    match &session.guest {
        None => "-".to_owned(),
        Some(name) => shortened(name),
    }
}

fn session_row(session: &SessionStatus) -> Vec<String> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let pause = session.summary.phase(Phase::Pause);
    let measured = |nanoseconds| (pause.count > 0).then(|| display_nanoseconds(nanoseconds));
    vec![
        session.session.to_string(),
        guest(session),
        state(session).to_owned(),
        or_dash(session.checkpoint.map(|checkpoint| checkpoint.to_string())),
        or_dash(session.checkpoint_age_ms.map(seconds)),
        or_dash(measured(pause.p50_ns)),
        or_dash(measured(pause.p99_ns)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leave_room() {
        assert_eq!(shortened("web3-root"), "web3-root");
        let long = shortened(&"x".repeat(64));
        assert!(long.ends_with("x…") && long.chars().count() == 20);
    }
}
