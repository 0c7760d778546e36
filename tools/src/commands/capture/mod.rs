//! `colo-ring capture`: a transparent recorder between a primary and its secondary.
//!
//! ```text
//!   primary ──► listener ──► pair: read ─► write ──────────► secondary      one thread, tokio-uring
//!                                    │  (and back)
//!                                    └► queue (bounded) ─► writer ─► file   another thread
//! ```
//!
//! Whatever becomes of the recording, forwarding goes on: a guest's connection is ended by the guest's host, by the
//! secondary, or by the end of this process, and by nothing else.

mod delay;
mod pair;
mod payload;
mod proxy;
mod recorder;
mod runtime;
mod session;
mod stream;

pub use recorder::WhenBehind;

use crate::capture_file::{CaptureError, CaptureInfo, CaptureWriter, Compression, Totals};
use crate::net::Address;
use crate::options::Size;
use crate::output::{CommandError, ProgressLine, mebibytes, print, print_json, tell};
use crate::{signals, stderr};
use clap::Args;
use colo_ring::host::Machine;
use colo_ring::net::{ListenAddress, Listener};
use colo_ring::wire::codec::Method;
use delay::Added;
use proxy::Outcome;
use recorder::Recorder;
use schemars::JsonSchema;
use serde::Serialize;
use session::{Connection, Progress, Wish};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;

/// Most connections that the report lists.
const LISTED_MAX: usize = 512;

/// Options of `colo-ring capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// Where the primary connects to, instead of to the secondary: tcp:ADDRESS:PORT (IPv6 in brackets, port 0 takes a
    /// free one) or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    listen: ListenAddress,

    /// The secondary: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    to: Address,

    /// The capture file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Replace the file if it exists
    #[arg(long)]
    force: bool,

    /// How the file is compressed
    #[arg(long, value_enum, default_value_t = Compression::Zstd)]
    compress: Compression,

    /// Most memory for what waits to be written, like 256M
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    queue: Size,

    /// What to do when more than that waits
    #[arg(long, value_enum, default_value_t = WhenBehind::End)]
    when_behind: WhenBehind,

    /// Print the report at the end as JSON (schema colo-ring.capture, version 1)
    #[arg(long)]
    json: bool,
}

/// The options in force, as the report and the capture's header echo them.
#[derive(Clone, Serialize, JsonSchema)]
struct Described {
    /// Where the primary connects to.
    listen: String,
    /// The secondary's address.
    to: String,
    /// The capture file.
    out: PathBuf,
    /// How its blocks are compressed.
    compress: Compression,
    /// Most bytes that wait for the disk.
    queue_bytes: u64,
    /// What becomes of the recording when the disk does not keep up.
    when_behind: WhenBehind,
}

/// What was recorded.
#[derive(Serialize, JsonSchema)]
pub(crate) struct CaptureReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: &'a Described,
    /// Where it ran.
    machine: Machine,
    /// io_uring was used.
    uring: bool,
    /// Length of the file; null if it cannot be read.
    file_bytes: Option<u64>,
    /// What is in the file.
    recorded: Totals,
    /// Why the recording ended early; null if it is complete.
    ended_early: Option<&'a str>,
    /// How the multifd channels' pages are compressed, as the session's first payload is; null where there was none.
    compression: Option<Method>,
    /// The first 512.
    connections: &'a [Connection],
    /// By how much forwarding lengthened checkpoints; null where that is not known.
    added: Option<Added>,
    /// Why that is not known.
    added_unknown: Option<&'static str>,
}

/// Forwards and records one session.
///
/// # Errors
/// If it cannot start or go on.
pub fn run(args: &CaptureArgs) -> Result<ExitCode, CommandError> {
    stderr::never_wait(|| ()).map_err(CommandError::failed)?;
    let (wish, wished) = watch::channel(Wish::Record);
    signals::on_each(move || ask_for_the_end(&wish))?;
    signals::survive_file_limit()?;
    let listener = Listener::bind(&args.listen).map_err(CommandError::failed)?;
    let described = args.described(&listener);
    let writer = args.create(&described).map_err(CommandError::failed)?;
    let recorder = Recorder::start(writer, args.queue.0, args.when_behind).map_err(CommandError::failed)?;
    tell(&format!("listening on {}", listener.address()));

    let progress = Arc::new(Progress::default());
    let (to, of_thread) = (args.to.clone(), progress.clone());
    let thread = std::thread::Builder::new().name("capture".to_owned());
    let thread = thread.spawn(move || proxy::run(listener, to, recorder, of_thread, wished));
    let thread = thread.map_err(CommandError::failed)?;
    show(&progress, || thread.is_finished());
    let outcome = thread
        .join()
        .map_err(|_| CommandError::failed("the thread that forwards has panicked"))?
        .map_err(CommandError::failed)?;
    report(args, &described, &outcome)
}

/// What a signal means, the first time and the second.
fn ask_for_the_end(wish: &watch::Sender<Wish>) -> bool {
    let now = *wish.borrow();
    let next = match now {
        Wish::Record => {
            tell(
                "the recording is ended; open connections continue through this process until they end, or until the next signal",
            );
            Wish::StopRecording
        }
        Wish::StopRecording => {
            tell("closing the connections");
            Wish::Cut
        }
        Wish::Cut => return false,
    };
    // Without a receiver it is over already.
    let _ = wish.send(next);
    true
}

/// Shows progress until the session is over.
fn show(progress: &Progress, is_over: impl Fn() -> bool) {
    const REFRESH: Duration = Duration::from_millis(100);
    let mut line = ProgressLine::new(true);
    while !is_over() {
        std::thread::sleep(REFRESH);
        let to_secondary = mebibytes(progress.to_secondary.load(Ordering::Relaxed));
        let checkpoints = progress.checkpoints.load(Ordering::Relaxed);
        line.show(&format!("{to_secondary:.0} MiB, {checkpoints} checkpoints"));
    }
}

impl CaptureArgs {
    fn described(&self, listener: &Listener) -> Described {
        Described {
            listen: listener.address().to_string(),
            to: self.to.to_string(),
            out: self.out.clone(),
            compress: self.compress,
            queue_bytes: self.queue.0,
            when_behind: self.when_behind,
        }
    }

    fn create(&self, described: &Described) -> Result<CaptureWriter<File>, CaptureError> {
        let options =
            serde_json::to_value(described).map_err(|error| CaptureError::Header(error.to_string()))?;
        let info = CaptureInfo {
            secondary: Some(self.to.to_string()),
            ..CaptureInfo::now("proxy", options)
        };
        if !self.force {
            return CaptureWriter::create(&self.out, &info, self.compress);
        }
        CaptureWriter::replace(&self.out, &info, self.compress)
    }
}

fn report(args: &CaptureArgs, described: &Described, outcome: &Outcome) -> Result<ExitCode, CommandError> {
    let listed = outcome.connections.len().min(LISTED_MAX);
    let report = CaptureReport {
        schema: "colo-ring.capture",
        schema_version: 1,
        options: described,
        machine: Machine::read(),
        uring: outcome.uring,
        file_bytes: file_bytes(&args.out),
        recorded: outcome.recorded.totals,
        ended_early: outcome.recorded.ended_early.as_deref(),
        compression: outcome
            .connections
            .iter()
            .find_map(|connection| connection.compression),
        connections: &outcome.connections[..listed],
        added: outcome.added.ok(),
        added_unknown: outcome.added.err(),
    };
    if args.json {
        print_json(&report)?;
    } else {
        print(&render(&report))?;
    }
    if !outcome.had_primary {
        return Err(CommandError::failed(
            "no primary connected: no connection sent a migration stream",
        ));
    }
    Ok(match report.ended_early {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

fn file_bytes(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|file| file.len())
}

fn render(report: &CaptureReport<'_>) -> String {
    let Totals {
        connections,
        bytes_to_secondary,
        bytes_to_primary,
        ..
    } = report.recorded;
    let mut text = format!(
        "{}: {connections} connections, {:.1} MiB to the secondary, {bytes_to_primary} bytes to the primary",
        report.options.out.display(),
        mebibytes(bytes_to_secondary),
    );
    if let Some(bytes) = report.file_bytes {
        text.push_str(&format!(", in {:.1} MiB", mebibytes(bytes)));
    }
    match report.ended_early {
        None => text.push_str("; complete\n"),
        Some(reason) => text.push_str(&format!("\nended early: {reason}\n")),
    }
    if let Some(method) = report.compression {
        text.push_str(&format!(
            "pages of the multifd channels: compression {}\n",
            method.name()
        ));
    }
    match (report.added, report.added_unknown) {
        (Some(added), _) if added.checkpoints > 0 => text.push_str(&format!(
            "{} checkpoints; forwarding lengthened each by {}\n",
            added.checkpoints, added.both
        )),
        (_, Some(why)) => text.push_str(&format!(
            "how much checkpoints were lengthened is not known: {why}\n"
        )),
        _ => text.push_str("no checkpoint\n"),
    }
    text
}
