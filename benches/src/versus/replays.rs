//! Captured sessions, played by `colo-ring replay`.

use super::captures::Captures;
use super::contest::{Play, Session, TurnOf};
use super::decoders;
use super::process::Child;
use super::secondary::StartOptions;
use colo_ring::metrics::with_suffix;
use colo_ring_tests::lab::LabError;
use colo_ring_tests::tls::RECEIVER;
use colo_ring_tools::run_file::{RunFile, RunFileError};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A session that takes longer than that has hung.
const SESSION_LIMIT: Duration = Duration::from_secs(300);

/// Plays captures.
#[derive(Debug)]
pub struct Replays<'a> {
    /// How.
    pub start: StartOptions<'a>,
    /// What.
    pub captures: &'a Captures<'a>,
    /// Where every session's files are kept.
    pub out: &'a Path,
    /// What QEMU's own secondary is called.
    pub qemu: &'a str,
    /// Whether the primary neither holds back what it sends nor delays acknowledgements.
    pub no_stalls: bool,
}

impl Play for Replays<'_> {
    /// By the primary's clock: from VMSTATE_SEND on.
    fn phases(&self) -> &'static [&'static str] {
        &["loaded", "received"]
    }

    fn session(&self, turn: &TurnOf<'_>) -> Result<Session, LabError> {
        let prefix = session_prefix(self.out, turn)?;
        let authority = self.start.authority.filter(|_| turn.secondary.is_over_tls());
        let credentials = authority.map(|authority| authority.directory("primary"));
        let capture = self.captures.file(turn.cell.shape);
        if turn.secondary.is_decoders() {
            return decoders::session(&capture, turn, &prefix);
        }
        let running = turn.secondary.start(&self.start, turn.cell.shape)?;
        let pace = match turn.cell.spacing.as_millis() {
            0 => vec!["--pace".to_owned(), "max".to_owned()],
            // A secondary that needs longer than the spacing is measured, too.
            ms => vec![
                "--closed-loop".to_owned(),
                "--interval".to_owned(),
                ms.to_string(),
            ],
        };
        let options = [
            ("--to", running.address().to_string()),
            ("--pid", running.pid().to_string()),
            ("--checkpoints", turn.checkpoints.to_string()),
            ("--name", turn.secondary.title(self.qemu)),
            ("--out", prefix.display().to_string()),
        ];
        let words = options
            .iter()
            .flat_map(|(name, value)| [*name, value].map(OsStr::new));
        let args = ["replay".as_ref(), capture.as_os_str()].into_iter();
        let no_stalls = self.no_stalls.then_some(OsStr::new("--no-stalls"));
        let tls = credentials.iter().flat_map(|directory| {
            let name = ["--tls-hostname", RECEIVER, "--tls"].map(OsStr::new);
            name.into_iter().chain([directory.as_os_str()])
        });
        let args = args
            .chain(pace.iter().map(OsStr::new))
            .chain(words)
            .chain(no_stalls)
            .chain(tls);
        Child::start(args, &with_suffix(&prefix, ".replay.log"))?.wait(SESSION_LIMIT)?;
        let flushed = running.end()?;
        let run = RunFile::read(&with_suffix(&prefix, ".run.json")).map_err(bad_run)?;
        Ok(Session { run, flushed })
    }
}

/// Where the files of a session go; its directory is made.
///
/// # Errors
/// When it cannot be made.
pub fn session_prefix(out: &Path, turn: &TurnOf<'_>) -> Result<PathBuf, LabError> {
    let directory = out.join(turn.cell.name()).join("sessions");
    fs::create_dir_all(&directory).map_err(LabError::io(format!("create {}", directory.display())))?;
    Ok(directory.join(format!("{}-round{}", turn.secondary.name, turn.round + 1)))
}

/// A run file that cannot be read or written, as an error of the laboratory.
pub fn bad_run(error: RunFileError) -> LabError {
    LabError::Malformed {
        what: "a run file".into(),
        detail: error.to_string(),
    }
}
