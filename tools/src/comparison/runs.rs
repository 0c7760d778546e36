//! What is compared: runs, from whatever files they are in.

use super::distribution::{Distribution, Point};
use crate::flight::file::{self, FlightFileError};
use crate::hlog::{HlogError, Log, add_values};
use crate::run_file::{
    self, Clock, RunFile, RunFileError, RunNameError, SecondaryUse, check_name, read_bounded,
};
use clap::ValueEnum;
use colo_ring::host::Machine;
use colo_ring::metrics::{self, Phase, Report, with_suffix};
use colo_ring::store::{FlightLog, FlightRecord};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The phase of a log whose name says none.
pub const PHASE_UNNAMED: &str = "latency";

/// Why runs cannot be compared.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A file of a run.
    #[error(transparent)]
    Run(#[from] RunFileError),
    /// An interval log.
    #[error(transparent)]
    Log(#[from] HlogError),
    /// A flight recorder.
    #[error(transparent)]
    Flight(#[from] FlightFileError),
    /// JSON of something else.
    #[error(
        "{} has the schema {schema:?}: {:?} (a run) and {:?} (a receiver's report) can be compared",
        path.display(), run_file::SCHEMA, metrics::SCHEMA
    )]
    Schema {
        /// The file.
        path: PathBuf,
        /// What it says.
        schema: String,
    },
    /// A name that cannot be in a table.
    #[error(transparent)]
    Name(#[from] RunNameError),
    /// Two runs of one name.
    #[error("two runs are named {name:?}: distinguish them by NAME=FILE{}", merge_hint(*mergeable))]
    SameName {
        /// The name.
        name: String,
        /// Whether they could be rounds of one measurement.
        mergeable: bool,
    },
    /// Runs that cannot be one.
    #[error("the runs named {0:?} cannot be added up: {1}; distinguish them by NAME=FILE")]
    Merge(String, &'static str),
    /// A baseline that is not there.
    #[error("no run is named {name:?}, which --baseline names; there are {there}")]
    Baseline {
        /// What was asked for.
        name: String,
        /// What there is.
        there: String,
    },
    /// A phase that no run has.
    #[error("no run has the phase {phase:?}; there are {there}")]
    Phase {
        /// What was asked for.
        phase: String,
        /// What there is.
        there: String,
    },
}

fn merge_hint(mergeable: bool) -> &'static str {
    if mergeable {
        return ", or add them up as rounds of one measurement with --merge";
    }
    ""
}

/// The unit of the values in an interval log: the format does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Nanoseconds, as colo-ring writes.
    #[default]
    Ns,
    /// Microseconds.
    Us,
    /// Milliseconds.
    Ms,
}

impl Unit {
    /// Nanoseconds in one.
    pub const fn nanoseconds(self) -> u64 {
        match self {
            Self::Ns => 1,
            Self::Us => 1_000,
            Self::Ms => 1_000_000,
        }
    }
}

/// The measured durations of one phase.
#[derive(Clone, Debug)]
pub(super) enum Samples {
    /// Each checkpoint, in the order of the run.
    Checkpoints(Vec<Point>),
    /// Counts alone, in nanoseconds.
    Histogram(Histogram<u64>),
}

/// One run, ready to be compared.
#[derive(Clone, Debug)]
pub struct Run {
    pub(super) name: String,
    pub(super) files: Vec<PathBuf>,
    pub(super) command: Option<String>,
    pub(super) options: serde_json::Value,
    pub(super) compression: Option<String>,
    pub(super) machine: Option<Machine>,
    /// When it began.
    pub(super) started_unix_ms: Option<u64>,
    /// Whose time its slow checkpoints were: what its receiver recorded.
    pub(super) flight: Option<FlightLog>,
    pub(super) clock: Option<Clock>,
    pub(super) secondary: Option<SecondaryUse>,
    pub(super) samples: BTreeMap<String, Samples>,
    pub(super) dropped: u64,
    pub(super) notes: Vec<String>,
}

impl From<RunFile> for Run {
    fn from(file: RunFile) -> Self {
        let points = |phase: &str| {
            let point = |checkpoint: &run_file::Checkpoint| {
                Some(Point {
                    round: checkpoint.round,
                    at_ns: checkpoint.at_ns,
                    value_ns: *checkpoint.phases_ns.get(phase)?,
                    disturbed: checkpoint.disturbed.is_some(),
                })
            };
            Samples::Checkpoints(file.checkpoints.iter().filter_map(point).collect())
        };
        let phases = file.phases().into_iter();
        let samples = phases.map(|phase| (phase.to_owned(), points(phase))).collect();
        Self {
            samples,
            name: file.name,
            files: Vec::new(),
            command: Some(file.command),
            options: file.options,
            compression: file.compression,
            machine: Some(file.machine),
            started_unix_ms: Some(file.started_unix_ms),
            flight: None,
            clock: Some(file.clock),
            secondary: file.secondary,
            dropped: file.dropped,
            notes: file.notes,
        }
    }
}

impl Run {
    /// Its name in tables.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a reader of its figures should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Reads a run from `[NAME=]FILE`: a run file, a receiver's report beside its logs, a flight recorder, or one interval log.
    /// A recorder beside `PREFIX.run.json` or `PREFIX.json`, as `PREFIX.flight`, is read with it.
    ///
    /// # Errors
    /// If the file cannot be read, or is none of these.
    pub fn read(argument: &str, unit: Unit) -> Result<Self, CompareError> {
        // A file whose name has a '=' is still a file.
        let named = argument.split_once('=').filter(|_| !Path::new(argument).exists());
        let path = Path::new(named.map_or(argument, |(_, path)| path));
        let mut run = if path.extension().is_some_and(|extension| extension == "hlog") {
            Self::read_log(path, unit)?
        } else if path.is_file() && file::is_one(path)? {
            Self::of_flight(path, file::read(path)?)
        } else {
            Self::read_json(path)?
        };
        run.add_flight(path);
        if let Some((name, _)) = named {
            name.clone_into(&mut run.name);
        }
        check_name(&run.name)?;
        run.files.push(path.to_owned());
        Ok(run)
    }

    /// A recorder has every checkpoint by the receiver's clock.
    fn of_flight(path: &Path, log: FlightLog) -> Self {
        let mut run = Self::empty(path.with_extension("").as_path());
        let point = |record: &FlightRecord, value_ns: u64| Point {
            round: 0,
            at_ns: record.requested_at_ns.saturating_add(record.loaded_ns),
            value_ns,
            disturbed: false,
        };
        for phase in Phase::ALL {
            let points = log.records.iter();
            let points = points.map(|record| point(record, duration(record, phase)));
            run.samples
                .insert(phase.name().to_owned(), Samples::Checkpoints(points.collect()));
        }
        if log.damaged > 0 {
            run.notes.push(format!(
                "{} records of {} are damaged",
                log.damaged,
                path.display()
            ));
        }
        run.command = Some("colo-ring receive".to_owned());
        run.clock = Some(Clock::Receiver);
        run.started_unix_ms = Some(log.started_unix_ns / 1_000_000);
        run.flight = Some(log);
        run
    }

    /// Reads the recorder that lies beside a run's file, if one does. The run needs none: one of another run, or one that cannot be
    /// read, is left out with a note.
    fn add_flight(&mut self, path: &Path) {
        let stem = path.with_extension("");
        let stem = match stem.extension() {
            Some(run) if run == "run" => stem.with_extension(""),
            _ => stem,
        };
        let beside = with_suffix(&stem, ".flight");
        if self.flight.is_some() || !beside.is_file() {
            return;
        }
        match file::read(&beside) {
            Ok(log) if self.is_recorded_by(&log) => self.flight = Some(log),
            Ok(_) => self.notes.push(format!("{} is of another run", beside.display())),
            Err(error) => self.notes.push(error.to_string()),
        }
    }

    /// Whether a recorder is of the receiver that made this run, or of one that had checkpoints while this run lasted.
    pub(super) fn is_recorded_by(&self, log: &FlightLog) -> bool {
        let Some(started) = self.started_unix_ms else {
            return false;
        };
        if self.clock == Some(Clock::Receiver) {
            return (log.started_unix_ns / 1_000_000).abs_diff(started) <= SAME_START_MS;
        }
        let points = self.samples.values().filter_map(|samples| match samples {
            Samples::Checkpoints(points) => points.last(),
            Samples::Histogram(_) => None,
        });
        let lasted = points.map(|point| point.at_ns / 1_000_000).max().unwrap_or(0);
        let during = started..=started.saturating_add(lasted);
        let at_ms =
            |record: &FlightRecord| log.started_unix_ns.saturating_add(record.requested_at_ns) / 1_000_000;
        log.records.iter().any(|record| during.contains(&at_ms(record)))
    }

    fn read_json(path: &Path) -> Result<Self, CompareError> {
        #[derive(Deserialize)]
        struct Head {
            schema: String,
        }
        let text = read_bounded(path)?;
        let json = |source| RunFileError::Json {
            path: path.to_owned(),
            source,
        };
        let head: Head = serde_json::from_slice(&text).map_err(json)?;
        match head.schema.as_str() {
            run_file::SCHEMA => Ok(RunFile::parse(path, &text)?.into()),
            metrics::SCHEMA => {
                let report: Report = serde_json::from_slice(&text).map_err(json)?;
                Self::of_report(path, report)
            }
            _ => Err(CompareError::Schema {
                path: path.to_owned(),
                schema: head.schema,
            }),
        }
    }

    /// A receiver's report has percentiles; the distributions are in the logs beside it.
    fn of_report(path: &Path, report: Report) -> Result<Self, CompareError> {
        let mut run = Self::empty(path.with_extension("").as_path());
        if report.total.checkpoints > 0 {
            for phase in Phase::ALL {
                let log = with_suffix(&path.with_extension(""), &format!(".{phase}.hlog"));
                run.add_log(&log, phase.name(), Unit::Ns)?;
            }
        }
        run.command = Some("colo-ring receive".to_owned());
        run.options = report.options;
        run.machine = Some(report.machine);
        run.started_unix_ms = Some(report.started_unix_ms);
        run.clock = Some(Clock::Receiver);
        if report.samples_dropped > 0 {
            run.notes.push(format!(
                "{} checkpoints are missing: the receiver's queue of samples was full",
                report.samples_dropped
            ));
        }
        if report.intervals_lost > 0 {
            run.notes.push(format!(
                "{} intervals of a second are missing in the logs: they could not be written",
                report.intervals_lost
            ));
        }
        Ok(run)
    }

    /// `NAME.<phase>.hlog` is that phase of NAME; other logs have a phase without a name.
    fn read_log(path: &Path, unit: Unit) -> Result<Self, CompareError> {
        let stem = path.with_extension("");
        let extension = stem.extension().and_then(|extension| extension.to_str());
        let known = |phase: &&str| super::PHASES.contains(phase);
        let (name, phase) = match extension.filter(known) {
            Some(phase) => (stem.with_extension(""), phase.to_owned()),
            None => (stem.clone(), PHASE_UNNAMED.to_owned()),
        };
        let mut run = Self::empty(&name);
        run.add_log(path, &phase, unit)?;
        Ok(run)
    }

    fn empty(path: &Path) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str());
        Self {
            name: name.to_string_lossy().into_owned(),
            files: Vec::new(),
            command: None,
            options: serde_json::Value::Null,
            compression: None,
            machine: None,
            started_unix_ms: None,
            flight: None,
            clock: None,
            secondary: None,
            samples: BTreeMap::new(),
            dropped: 0,
            notes: Vec::new(),
        }
    }

    fn add_log(&mut self, path: &Path, phase: &str, unit: Unit) -> Result<(), CompareError> {
        let log = Log::read(path)?;
        if let Some(torn) = &log.torn {
            self.notes.push(format!("{} is {torn}", path.display()));
        }
        let histogram = scaled(log.total, unit.nanoseconds());
        self.samples
            .insert(phase.to_owned(), Samples::Histogram(histogram));
        Ok(())
    }

    /// Why `other` cannot be further rounds of this measurement.
    fn differs_from(&self, other: &Self) -> Option<&'static str> {
        let cpu_model = |machine: &Machine| machine.cpu_model.clone();
        if self.clock != other.clock {
            return Some("one is of the primary's clock, one of the receiver's");
        }
        if self.compression != other.compression {
            return Some("their pages were compressed in different ways");
        }
        let [own, others] = [self, other].map(|run| run.machine.as_ref().map(cpu_model));
        (own != others).then_some("they were measured on different machines")
    }

    /// Whether `other` has phases that this lacks, and no other: the logs of one run, given one by one.
    fn is_completed_by(&self, other: &Self) -> bool {
        let log_alone = |run: &Self| run.machine.is_none();
        let disjoint = other
            .samples
            .keys()
            .all(|phase| !self.samples.contains_key(phase));
        log_alone(self) && log_alone(other) && disjoint
    }

    /// Adds `other` as further rounds of the same measurement.
    fn add_rounds(&mut self, other: Self) -> Result<(), CompareError> {
        if let Some(why) = self.differs_from(&other) {
            return Err(CompareError::Merge(self.name.clone(), why));
        }
        for (phase, samples) in other.samples {
            match (self.samples.get_mut(&phase), samples) {
                (None, samples) => {
                    self.samples.insert(phase, samples);
                }
                (Some(Samples::Checkpoints(points)), Samples::Checkpoints(more)) => {
                    let after = points
                        .iter()
                        .map(|point| point.round)
                        .max()
                        .map_or(0, |last| last.saturating_add(1));
                    points.extend(more.into_iter().map(|point| Point {
                        round: point.round.saturating_add(after),
                        ..point
                    }));
                }
                (Some(Samples::Histogram(histogram)), Samples::Histogram(more)) => {
                    add_values(histogram, &more);
                }
                _ => {
                    let why = "one has checkpoints, one has a histogram alone";
                    return Err(CompareError::Merge(self.name.clone(), why));
                }
            }
        }
        self.started_unix_ms = match (self.started_unix_ms, other.started_unix_ms) {
            (Some(own), Some(others)) => Some(own.min(others)),
            (own, others) => own.or(others),
        };
        // Of several recorders none is of all rounds.
        self.flight = None;
        self.secondary = match (self.secondary, other.secondary) {
            (Some(one), Some(more)) => Some(SecondaryUse {
                pid: one.pid,
                cpu_ns: one.cpu_ns.saturating_add(more.cpu_ns),
                rss_bytes_max: one.rss_bytes_max.max(more.rss_bytes_max),
            }),
            _ => None,
        };
        self.dropped = self.dropped.saturating_add(other.dropped);
        self.files.extend(other.files);
        self.notes.extend(other.notes);
        Ok(())
    }

    /// Checkpoints of one phase, and those of them that something is known to have disturbed.
    pub(super) fn checkpoints(&self) -> (u64, u64) {
        let of_phase = |samples: &Samples| match samples {
            Samples::Checkpoints(points) => {
                let disturbed = points.iter().filter(|point| point.disturbed).count();
                (points.len() as u64, disturbed as u64)
            }
            Samples::Histogram(histogram) => (histogram.len(), 0),
        };
        self.samples.values().map(of_phase).max().unwrap_or_default()
    }

    pub(super) fn distribution(&self, phase: &str) -> Option<Distribution> {
        let distribution = match self.samples.get(phase)? {
            Samples::Checkpoints(points) => Distribution::of_points(points),
            Samples::Histogram(histogram) => Distribution::of_histogram(histogram),
        };
        (distribution.count() > 0).then_some(distribution)
    }
}

/// Puts together what belongs together: the logs of one run; and with `merge` all runs of one name.
///
/// # Errors
/// If two runs have one name and cannot be, or shall not be, one.
pub fn gather(runs: Vec<Run>, merge: bool) -> Result<Vec<Run>, CompareError> {
    let mut gathered: Vec<Run> = Vec::new();
    for run in runs {
        match gathered.iter_mut().find(|other| other.name == run.name) {
            None => gathered.push(run),
            Some(same) if merge || same.is_completed_by(&run) => same.add_rounds(run)?,
            Some(same) => {
                let mergeable = same.differs_from(&run).is_none();
                return Err(CompareError::SameName {
                    name: run.name,
                    mergeable,
                });
            }
        }
    }
    Ok(gathered)
}

/// How far apart two notes of one receiver's start may be: the clock may have been set meanwhile.
const SAME_START_MS: u64 = 1000;

/// What a record says of a phase.
fn duration(record: &FlightRecord, phase: Phase) -> u64 {
    let span = |to: u64, from: u64| to.saturating_sub(from);
    match phase {
        Phase::Reply => record.reply_ns,
        Phase::Transfer => span(record.ram_ns, record.send_ns),
        Phase::Vmstate => span(record.device_state_ns, record.ram_ns),
        Phase::Commit => span(record.loaded_ns, record.device_state_ns),
        Phase::Pause => record.pause_ns(),
        Phase::Flush => record.flush_ns,
    }
}

fn scaled(histogram: Histogram<u64>, factor: u64) -> Histogram<u64> {
    if factor == 1 {
        return histogram;
    }
    let mut scaled = crate::hlog::empty();
    for step in histogram.iter_recorded() {
        let value = step.value_iterated_to().saturating_mul(factor);
        scaled
            .record_n(value, step.count_at_value())
            .expect("a histogram that resizes itself takes any value");
    }
    scaled
}
