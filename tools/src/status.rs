//! `colo-ring status`, `dump` and `discard`: what can be asked of a running receiver.

use crate::control::ask;
use crate::options::{ControlAddress, Size};
use crate::output::{CommandError, mebibytes, print, print_json, table};
use clap::Args;
use colo_ring::metrics::{Phase, display_nanoseconds};
use colo_ring::receiver::{Dumped, Request, SessionState, SessionStatus, StatusReport};
use serde::Deserialize;
use std::path::{Path, PathBuf};
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

/// Options of `colo-ring dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Number of the session, as `colo-ring status` lists it
    #[arg(long, value_name = "N")]
    session: u32,

    /// Directory for the files; made if it is not there. The receiver's user must be able to write it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Print what was written as JSON, as it also stands in DIR/checkpoint.json
    #[arg(long)]
    json: bool,
}

/// Options of `colo-ring discard`.
#[derive(Debug, Args)]
pub struct DiscardArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Number of the session, which must have ended
    #[arg(long, value_name = "N")]
    session: u32,

    /// Print the number as JSON
    #[arg(long)]
    json: bool,
}

/// Prints how a receiver and its sessions stand.
///
/// # Errors
/// If the receiver does not answer.
pub fn run_status(args: &StatusArgs) -> Result<ExitCode, CommandError> {
    let status: StatusReport = ask(&args.control, &Request::Status)?;
    if args.json {
        print_json(&status)?;
    } else {
        print(&render(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the receiver write a session's last committed checkpoint to files.
///
/// # Errors
/// If the receiver does not answer or refuses, or the directory cannot be made.
pub fn run_dump(args: &DumpArgs) -> Result<ExitCode, CommandError> {
    let failed = |error: std::io::Error| CommandError::Failed(format!("{}: {error}", args.out.display()));
    let is_new = !args.out.exists();
    std::fs::create_dir_all(&args.out).map_err(failed)?;
    // The receiver runs elsewhere: a relative path means nothing to it.
    let directory = args.out.canonicalize().map_err(failed)?;
    let request = Request::Dump {
        session: args.session,
        directory: directory.clone(),
    };
    let dumped: Dumped = ask(&args.control, &request).inspect_err(|_| {
        if is_new {
            // Leaves it if something has been written after all.
            let _ = std::fs::remove_dir(&directory);
        }
    })?;
    if args.json {
        print_json(&dumped)?;
    } else {
        print(&render_dump(&dumped, &directory))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the receiver give up what an ended session left.
///
/// # Errors
/// If the receiver does not answer or refuses.
pub fn run_discard(args: &DiscardArgs) -> Result<ExitCode, CommandError> {
    #[derive(Deserialize, serde::Serialize)]
    struct Discarded {
        discarded: u32,
    }
    let done: Discarded = ask(
        &args.control,
        &Request::Discard {
            session: args.session,
        },
    )?;
    if args.json {
        print_json(&done)?;
    } else {
        print(&format!(
            "session {}: its checkpoint and memory are given up\n",
            done.discarded
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

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

fn render_dump(dumped: &Dumped, directory: &Path) -> String {
    let mut text = format!(
        "checkpoint {} of session {} ({}) is in {}\n",
        dumped.checkpoint,
        dumped.session,
        dumped.machine,
        directory.display()
    );
    let row = |block: &colo_ring::receiver::DumpedBlock| {
        vec![
            block.file.clone(),
            format!("{} bytes", block.used_length),
            block.name.clone(),
        ]
    };
    text.push_str(&table(&dumped.blocks.iter().map(row).collect::<Vec<_>>()));
    text
}
