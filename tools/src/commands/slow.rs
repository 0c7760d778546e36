//! `colo-ring slow`: the slowest checkpoints of a session, and whose time they were.

use crate::control::Conversation;
use crate::flight::{By, SlowReport, TOP, page};
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json};
use clap::Args;
use colo_ring::files::{self, Readers};
use colo_ring::receiver::{CopiedFlight, Request, SessionTitle, StatusReport};
use colo_ring::store::FlightLog;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `colo-ring slow`.
#[derive(Debug, Args)]
pub struct SlowArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Number of the session, as `colo-ring status` lists it; not needed where there is one
    #[arg(long, value_name = "N", conflicts_with = "guest")]
    session: Option<u32>,

    /// The guest, by its name or its UUID, in place of the session
    #[arg(long, value_name = "NAME")]
    guest: Option<String>,

    /// How many checkpoints to show
    #[arg(long, value_name = "N", default_value_t = TOP)]
    top: usize,

    /// By which phase they are slow
    #[arg(long, value_enum, value_name = "PHASE", default_value = "pause")]
    by: By,

    /// Write the recorder there, for `inspect` and `compare`
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,

    /// Write a page with a timeline of the slowest there
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Print JSON (schema colo-ring.slow, version 1)
    #[arg(long)]
    json: bool,
}

/// Copies a session's flight recorder, and shows what was slow.
///
/// # Errors
/// If the receiver does not answer or refuses, or a file cannot be written.
pub fn run(args: &SlowArgs) -> Result<ExitCode, CommandError> {
    let mut conversation = Conversation::open(&args.control)?;
    let title = find(args, &mut conversation)?;
    let bytes = copy(&mut conversation, title.session)?;
    let log = FlightLog::parse(&bytes);
    let log = log.map_err(|error| CommandError::Failed(format!("what the receiver has copied: {error}")))?;
    let report = SlowReport::of(&log, title.name.map(|name| name.to_string()), args.top, args.by);
    let write = |path: &PathBuf, bytes: &[u8]| {
        files::write(path, bytes, Readers::ByUmask)
            .map_err(|error| CommandError::Failed(format!("cannot write {}: {error}", path.display())))
    };
    if let Some(path) = &args.save {
        write(path, &bytes)?;
    }
    if let Some(path) = &args.html {
        write(path, page(&report).as_bytes())?;
    }
    match args.json {
        true => print_json(&report)?,
        false => print(&report.table())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The session that is meant: the only one with a checkpoint, if none is named.
fn find(args: &SlowArgs, conversation: &mut Conversation) -> Result<SessionTitle, CommandError> {
    #[derive(Deserialize)]
    struct Found {
        found: SessionTitle,
    }
    let named = args.session.map(|session| session.to_string());
    if let Some(guest) = named.or_else(|| args.guest.clone()) {
        let found: Found = conversation.ask(&Request::Find { guest, runs: false })?;
        return Ok(found.found);
    }
    let status: StatusReport = conversation.ask(&Request::Status)?;
    let sessions = status
        .sessions
        .iter()
        .filter(|session| session.checkpoint.is_some());
    let mut titles: Vec<_> = sessions.map(|session| session.title()).collect();
    match titles.len() {
        1 => Ok(titles.swap_remove(0)),
        0 => Err(CommandError::Failed("no session has a checkpoint".to_owned())),
        _ => {
            let names: Vec<_> = titles.iter().map(ToString::to_string).collect();
            Err(CommandError::Usage(format!(
                "there are sessions {}: choose one with --session or --guest",
                names.join(", ")
            )))
        }
    }
}

/// Has the receiver copy a recorder to a file in memory.
fn copy(conversation: &mut Conversation, session: u32) -> Result<Vec<u8>, CommandError> {
    let failed = |error: std::io::Error| CommandError::Failed(format!("a file in memory: {error}"));
    let file = memfd_create("colo-ring-flight", MFdFlags::MFD_CLOEXEC);
    let file = file.map_err(|errno| failed(errno.into()))?;
    let _: CopiedFlight = conversation.ask_with(&Request::Recorder { session }, &[file.as_fd()])?;
    let mut file = File::from(file);
    let mut bytes = Vec::new();
    file.rewind().map_err(failed)?;
    file.read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
