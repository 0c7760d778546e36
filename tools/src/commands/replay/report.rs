//! What a replay has measured, for people, machines and `compare`.

use super::ReplayArgs;
use super::session::Measured;
use crate::comparison::MeasuredPhase;
use crate::output::table;
use crate::run_file::{Checkpoint, Clock, RunFile, SecondaryUse};
use crate::streams::Streams;
use crate::units::nanoseconds;
use colo_ring::metrics::display_nanoseconds;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Everything a replay found out.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Report {
    schema: &'static str,
    schema_version: u32,
    /// What the secondary is called in tables.
    name: String,
    /// The options in force.
    #[schemars(with = "ReplayArgs")]
    options: serde_json::Value,
    /// Where the replay ran.
    machine: colo_ring::host::Machine,
    /// What was played.
    capture: CaptureSummary,
    /// Sessions that were played.
    sessions: u32,
    /// Checkpoints that were measured.
    pub(super) checkpoints: u64,
    /// Those of them during which other processes were busy. They are in the figures.
    disturbed: u64,
    /// Figures by phase: `received` and `loaded`, by the primary's clock.
    phases: BTreeMap<String, PhaseFigures>,
    /// What the secondary's process used; null if that is not known.
    secondary: Option<SecondaryUse>,
    /// How much of `loaded` is the replay's own.
    replay_share: ReplayShare,
    /// What a reader of the figures must know.
    notes: Vec<String>,
    /// Why the replay ended early; null if it did not.
    pub(super) error: Option<String>,
    #[serde(skip)]
    pub(super) run: RunFile,
}

/// What was played.
#[derive(Debug, Serialize, JsonSchema)]
struct CaptureSummary {
    /// The primary's versioned machine type.
    machine_type: String,
    /// multifd channels; 0 is plain mode.
    channels: usize,
    /// The guest's RAM.
    ram_bytes: u64,
    /// Checkpoints in the capture.
    checkpoints: usize,
    /// Bytes of a checkpoint on average.
    bytes_per_checkpoint_mean: u64,
    /// How pages are compressed: `none`, a method, or `xbzrle`.
    compression: &'static str,
}

/// Figures of one phase.
#[derive(Debug, Serialize, JsonSchema)]
struct PhaseFigures {
    /// Checkpoints measured.
    count: u64,
    /// Arithmetic mean.
    mean_ns: u64,
    /// Median.
    p50_ns: u64,
    /// 90th percentile.
    p90_ns: u64,
    /// 99th percentile.
    p99_ns: u64,
    /// The longest.
    max_ns: u64,
}

/// How much of `loaded` is the replay's own: an upper bound, see docs/replay.md.
#[derive(Debug, Serialize, JsonSchema)]
struct ReplayShare {
    /// Of all checkpoints together.
    share: f64,
    /// Time that the replay itself took, summed.
    own_ns: u64,
    /// `loaded` of all checkpoints, summed.
    loaded_ns: u64,
    /// Processor time of the threads that send pages, precopy included: in this program, and in the kernel's sending.
    senders_user_ns: u64,
    /// The same, in the kernel's sending.
    senders_system_ns: u64,
}

impl Report {
    pub(super) fn new(
        args: &ReplayArgs,
        streams: &Streams,
        measured: Measured,
        secondary: Option<SecondaryUse>,
        is_again: bool,
        error: Option<String>,
    ) -> Self {
        let name = args.name.clone().unwrap_or_else(|| match &args.to {
            Some(address) => address.to_string(),
            None => "sink".to_owned(),
        });
        let options = serde_json::to_value(args).unwrap_or_default();
        let mut run = RunFile::new(&name, "replay", options.clone(), Clock::Primary, measured.started);
        run.secondary = secondary;
        run.compression = Some(streams.compression().to_owned());
        run.notes = notes(args, streams, &measured, is_again);
        run.notes
            .extend(error.as_ref().map(|error| format!("it ended early: {error}")));
        run.checkpoints = checkpoints(streams, &measured);
        let phases = run
            .phases()
            .into_iter()
            .map(|phase| (phase.to_owned(), PhaseFigures::of(&run, phase)));
        Self {
            schema: "colo-ring.replay",
            schema_version: 1,
            name,
            options,
            machine: run.machine.clone(),
            capture: CaptureSummary::of(streams),
            sessions: measured.sessions,
            checkpoints: run.checkpoints.len() as u64,
            disturbed: run
                .checkpoints
                .iter()
                .filter(|checkpoint| checkpoint.disturbed.is_some())
                .count() as u64,
            phases: phases.collect(),
            secondary,
            replay_share: ReplayShare::of(&measured),
            notes: run.notes.clone(),
            error,
            run,
        }
    }
}

fn checkpoints(streams: &Streams, measured: &Measured) -> Vec<Checkpoint> {
    let one = |measured: &super::session::MeasuredCheckpoint| {
        let (played, timing) = (&streams.checkpoints[measured.timing.checkpoint], &measured.timing);
        let phases = [
            ("replied", timing.reply),
            ("received", timing.received),
            ("loaded", timing.loaded),
        ];
        Checkpoint {
            n: measured.n,
            round: measured.session,
            at_ns: nanoseconds(measured.at),
            phases_ns: phases
                .map(|(phase, time)| (phase.to_owned(), nanoseconds(time)))
                .into(),
            pages: played.pages,
            zero_pages: played.zero_pages,
            bytes: played.bytes,
            disturbed: measured.disturbed.clone(),
        }
    };
    measured.checkpoints.iter().map(one).collect()
}

fn notes(args: &ReplayArgs, streams: &Streams, measured: &Measured, is_again: bool) -> Vec<String> {
    let mut notes = streams.notes.clone();
    if is_again {
        notes.push(format!(
            "the capture's {} checkpoints were played again and again",
            streams.checkpoints.len()
        ));
    }
    if args.pid.is_none() && !args.sink {
        notes.push("without --pid, disturbed checkpoints are not marked".to_owned());
    }
    let timings = || measured.checkpoints.iter().map(|checkpoint| &checkpoint.timing);
    let waited = timings().filter(|timing| !timing.waited.is_zero());
    if let Some(longest) = waited.clone().map(|timing| timing.waited).max() {
        notes.push(format!(
            "{} checkpoints were due while one before them was still running; received and loaded count their waiting, \
             up to {longest:.1?}",
            waited.count()
        ));
    }
    if let Some(latest) = timings()
        .map(|timing| timing.own_delay)
        .max()
        .filter(|latest| *latest >= LATE)
    {
        notes.push(format!(
            "the replay itself was up to {latest:.1?} late with a checkpoint, which no figure includes"
        ));
    }
    notes
}

/// Later than this side's timer usually is.
const LATE: Duration = Duration::from_millis(2);

impl CaptureSummary {
    fn of(streams: &Streams) -> Self {
        let checkpoints = streams.checkpoints.len();
        let bytes: u64 = streams
            .checkpoints
            .iter()
            .map(|checkpoint| checkpoint.bytes)
            .sum();
        Self {
            machine_type: streams.machine_type.clone(),
            channels: streams.channels.len(),
            ram_bytes: streams.blocks.total_bytes(),
            checkpoints,
            bytes_per_checkpoint_mean: bytes / (checkpoints as u64).max(1),
            compression: streams.compression(),
        }
    }
}

impl PhaseFigures {
    fn of(run: &RunFile, phase: &str) -> Self {
        let measured = MeasuredPhase::of(run, phase);
        Self {
            count: measured.count,
            // A mean of values of 64 bits is one itself.
            mean_ns: format!("{:.0}", measured.mean_ns).parse().unwrap_or(u64::MAX),
            p50_ns: measured.p50_ns,
            p90_ns: measured.p90_ns,
            p99_ns: measured.p99_ns,
            max_ns: measured.max_ns,
        }
    }
}

impl ReplayShare {
    fn of(measured: &Measured) -> Self {
        let timings = || measured.checkpoints.iter().map(|checkpoint| &checkpoint.timing);
        let own: Duration = timings().map(|timing| timing.own).sum();
        let loaded: Duration = timings().map(super::player::Timing::service).sum();
        let share = if loaded.is_zero() {
            0.0
        } else {
            own.as_secs_f64() / loaded.as_secs_f64()
        };
        Self {
            share,
            own_ns: nanoseconds(own),
            loaded_ns: nanoseconds(loaded),
            senders_user_ns: nanoseconds(measured.senders.user),
            senders_system_ns: nanoseconds(measured.senders.system),
        }
    }
}

/// The table for people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let capture = &self.capture;
        writeln!(f, "{}", self.machine)?;
        writeln!(
            f,
            "{}: {}, {} channels, {:.1} MiB a checkpoint{}; {} checkpoints in {} sessions\n",
            self.name,
            capture.machine_type,
            capture.channels,
            capture.bytes_per_checkpoint_mean as f64 / f64::from(1 << 20),
            match capture.compression {
                "none" => String::new(),
                method => format!(" ({method})"),
            },
            self.checkpoints,
            self.sessions
        )?;
        let head = ["", "p50", "p90", "p99", "max"].map(str::to_owned).to_vec();
        let row = |name: &&str| {
            let figures = self.phases.get(*name)?;
            let values = [figures.p50_ns, figures.p90_ns, figures.p99_ns, figures.max_ns];
            let cells = values.into_iter().map(display_nanoseconds);
            Some([(*name).to_owned()].into_iter().chain(cells).collect())
        };
        let rows: Vec<_> = [head]
            .into_iter()
            .chain(["replied", "received", "loaded"].iter().filter_map(row))
            .collect();
        write!(f, "{}", table(&rows))?;
        writeln!(
            f,
            "\nreplied: REQUEST to REPLY. received, loaded: SEND to RECEIVED and to LOADED."
        )?;
        if let Some(used) = &self.secondary {
            writeln!(
                f,
                "secondary: {} of processor time, {:.0} MiB resident; {} of {} checkpoints disturbed by other processes",
                display_nanoseconds(used.cpu_ns),
                used.rss_bytes_max as f64 / f64::from(1 << 20),
                self.disturbed,
                self.checkpoints
            )?;
        }
        writeln!(
            f,
            "the replay's own share of loaded: at most {:.1} %",
            self.replay_share.share * 100.0
        )?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}
