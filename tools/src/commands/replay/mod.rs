//! `colo-ring replay`: plays a capture as its primary would, against any secondary, and measures from the primary's side.

mod pace;
mod player;
mod report;
mod sender;
mod session;
mod sink_process;
mod usage;

use crate::net::Address;
use crate::options::CoreList;
use crate::output::{CommandError, ProgressLine, print, print_json, tell};
use crate::run_file::{RunNameError, check_name};
use crate::signals;
use crate::streams::Streams;
use crate::tls::TlsArgs;
use clap::{Args, ValueEnum};
use colo_ring::host::{allowed_cores, pin};
use player::PlayOptions;
pub(crate) use report::Report;
use schemars::JsonSchema;
use serde::Serialize;
use session::{Measured, Sessions};
use sink_process::SinkProcess;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use usage::Secondary;

/// Options of `colo-ring replay`.
#[derive(Debug, Args, Serialize, JsonSchema)]
pub struct ReplayArgs {
    /// The capture file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The secondary's address: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", required_unless_present = "sink")]
    #[serde(serialize_with = "as_text")]
    #[schemars(with = "Option<String>")]
    to: Option<Address>,

    #[command(flatten)]
    #[schemars(description = "TLS of its connections.")]
    tls: TlsArgs,

    /// Start a sink and play against it: the floor of the transport, below which no secondary can get
    #[arg(long, conflicts_with_all = ["to", "pid"])]
    sink: bool,

    /// When checkpoints begin [default: original]
    #[arg(long, value_enum)]
    pace: Option<PaceKind>,

    /// Milliseconds from one checkpoint's request to the next one's, instead of --pace. A checkpoint that is late because
    /// those before it took longer counts its waiting, too
    #[arg(long, value_name = "MS", conflicts_with = "pace", value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(rename = "interval_ms")]
    interval: Option<u64>,

    /// Let a slow checkpoint move those after it instead of making them wait: a secondary that needs longer than the
    /// interval can then be measured, and a stall is counted once, however many checkpoints it delays
    #[arg(long, requires = "interval")]
    closed_loop: bool,

    /// Checkpoints of each session; behind its last one the capture's first one comes again [default: all, once]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoints: Option<u64>,

    /// Play the capture's checkpoints so many times in each session
    #[arg(long = "loop", value_name = "N", conflicts_with = "checkpoints", value_parser = clap::value_parser!(u64).range(1..))]
    #[serde(rename = "loop")]
    passes: Option<u64>,

    /// Sessions, one after the other, each with a precopy of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,

    /// The secondary's process on this machine: its processor time and memory are read, and checkpoints during which
    /// other processes were busy are marked as disturbed
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,

    /// Cores for the threads that send pages, one thread a core, like 2-5,8 [default: half as many threads as cores may
    /// be used, at most one per channel, on any core]
    #[arg(long, value_name = "LIST", value_parser = CoreList::parse)]
    cores: Option<CoreList>,

    /// On TCP, take away what a QEMU's main channel waits for: send at once what Nagle's algorithm would hold back, and
    /// acknowledge answers at once. So secondaries are compared by what they do, and not by their socket options
    #[arg(long)]
    no_stalls: bool,

    /// Seconds to wait for an answer, or for room in a socket, before the session counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    #[serde(rename = "patience_s")]
    patience: u64,

    /// Write PREFIX.run.json and PREFIX.PHASE.hlog
    #[arg(long, value_name = "PREFIX")]
    out: Option<PathBuf>,

    /// What the secondary is called in tables [default: its address, or sink]
    #[arg(long, value_name = "TEXT", value_parser = named)]
    name: Option<String>,

    /// Print JSON (schema colo-ring.replay, version 1)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// Where checkpoints have their times from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum PaceKind {
    /// From the capture: precopy and requests come no earlier than they did there
    Original,
    /// From the answers: nothing waits for anything else
    Max,
}

/// When checkpoints begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Original,
    Max,
    Interval { length: Duration, closed_loop: bool },
}

fn as_text<S: serde::Serializer>(address: &Option<Address>, serializer: S) -> Result<S::Ok, S::Error> {
    match address {
        Some(address) => serializer.collect_str(address),
        None => serializer.serialize_none(),
    }
}

fn named(text: &str) -> Result<String, RunNameError> {
    check_name(text).map(|()| text.to_owned())
}

impl ReplayArgs {
    fn pace(&self) -> Pace {
        match (self.interval, self.pace) {
            (Some(milliseconds), _) => Pace::Interval {
                length: Duration::from_millis(milliseconds),
                closed_loop: self.closed_loop,
            },
            (None, None | Some(PaceKind::Original)) => Pace::Original,
            (None, Some(PaceKind::Max)) => Pace::Max,
        }
    }

    /// Checkpoints of a session.
    fn checkpoints_wanted(&self, captured: u64) -> Result<u64, CommandError> {
        if captured == 0 {
            return Err(CommandError::failed(format!(
                "{} has no complete checkpoint",
                self.file.display()
            )));
        }
        let all = captured.saturating_mul(self.passes.unwrap_or(1));
        Ok(self.checkpoints.unwrap_or(all))
    }
}

/// Plays the capture and prints what was measured.
///
/// # Errors
/// If the capture cannot be played, or the secondary fails: what was measured before, if anything, is written and printed.
pub fn run(args: &ReplayArgs) -> Result<ExitCode, CommandError> {
    let stop = Arc::new(AtomicBool::new(false));
    let wish = stop.clone();
    signals::on_end(move || wish.store(true, Ordering::Relaxed))?;
    let streams = Streams::load(&args.file)
        .map_err(|error| CommandError::failed(format!("{}: {error}", args.file.display())))?;
    for note in &streams.notes {
        tell(&format!("{}: {note}", args.file.display()));
    }
    let wanted = args.checkpoints_wanted(streams.checkpoints.len() as u64)?;
    let is_again = wanted > streams.checkpoints.len() as u64;
    let again = is_again.then(|| streams.again()).transpose();
    let again = again
        .map_err(|error| CommandError::Usage(error.to_string()))?
        .flatten();
    let sink = args
        .sink
        .then(|| SinkProcess::start(streams.channels.len(), args.repeat))
        .transpose()?;
    // Later than the sink, which would inherit the cores.
    let (threads, cores) = sender_cores(args, streams.channels.len())?;
    let address = sink.as_ref().map(SinkProcess::address).or(args.to.as_ref());
    let address = address.ok_or_else(|| CommandError::Usage("give --to or --sink".to_owned()))?;
    if args.sink && args.tls.tls.is_some() {
        return Err(CommandError::Usage(
            "a sink has no TLS: give --to instead of --sink".to_owned(),
        ));
    }
    let pid = sink.as_ref().map(SinkProcess::pid).or(args.pid);
    let mut sessions = Sessions {
        streams: &streams,
        again: again.as_ref(),
        options: PlayOptions {
            address: address.clone(),
            tls: args.tls.client(address).map_err(CommandError::failed)?,
            threads,
            cores,
            no_stalls: args.no_stalls,
            patience: Duration::from_secs(args.patience),
        },
        pace: args.pace(),
        wanted,
        secondary: pid
            .map(Secondary::find)
            .transpose()
            .map_err(CommandError::failed)?,
        stop: &stop,
        line: ProgressLine::new(!args.json),
        measured: Measured::default(),
    };
    let played = (0..args.repeat).try_for_each(|round| sessions.play(round));
    sessions.line.clear();
    let measured = std::mem::take(&mut sessions.measured);
    let secondary = sessions.secondary.as_ref().map(Secondary::used);
    drop(sink);
    let error = played.err().map(|error| error.to_string());
    let report = Report::new(args, &streams, measured, secondary, is_again, error);
    if let Some(prefix) = &args.out {
        report
            .run
            .write(prefix)
            .map_err(|error| CommandError::failed(error.to_string()))?;
    }
    if args.json {
        print_json(&report)?;
    } else if report.error.is_none() || report.checkpoints > 0 {
        print(&report.to_string())?;
    }
    match report.error {
        None => Ok(ExitCode::SUCCESS),
        Some(error) => Err(CommandError::failed(error)),
    }
}

/// How many threads send pages, and on which cores, after the calling thread was put on them, too.
fn sender_cores(args: &ReplayArgs, channels: usize) -> Result<(usize, Vec<usize>), CommandError> {
    match &args.cores {
        None => {
            let allowed = allowed_cores().map_or(1, |cores| cores.len());
            Ok(((allowed / 2).clamp(1, channels.max(1)), Vec::new()))
        }
        Some(CoreList(cores)) => {
            pin(cores)
                .map_err(|error| CommandError::Usage(format!("--cores: {error}; is each of them there?")))?;
            Ok((cores.len(), cores.clone()))
        }
    }
}
