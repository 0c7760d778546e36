//! One measured run as a file: what `replay`, `synth`, `demo` and the measurements write, and what `compare` reads.
//!
//! `PREFIX.run.json` holds every checkpoint; beside it lies `PREFIX.<phase>.hlog` for every phase that was measured,
//! an HdrHistogram V2 interval log that other tools read, too. The logs are made from the checkpoints: a reader needs
//! the JSON alone.

use colo_ring::host::Machine;
use colo_ring::metrics::{INTERVAL, IntervalLog, MetricsError, SIGNIFICANT_DIGITS, with_suffix, write_json};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Name of the schema.
pub const SCHEMA: &str = "colo-ring.run";

/// Version of the schema: raised when a key changes its meaning or goes, not when one is added.
pub const SCHEMA_VERSION: u32 = 1;

/// Bytes of a run file at most: half a million checkpoints of six phases.
pub const FILE_BYTES_MAX: u64 = 256 << 20;

/// Different phases in one run at most: each is a file.
pub const PHASES_MAX: usize = 32;

/// Characters of a run's name at most: tables show it.
pub const NAME_CHARS_MAX: usize = 100;

/// A measured run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunFile {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The name in tables: `colo-ring uring pool`, `QEMU 11.1.3`, `sink`. Runs of one name are rounds of one
    /// measurement.
    pub name: String,
    /// When it began, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// The command that measured.
    pub command: String,
    /// Its options.
    pub options: serde_json::Value,
    /// How the session made its pages smaller: `none`, a method with its level where that is known (`zstd level 3`),
    /// or `xbzrle`. None where nothing is known of it.
    #[serde(default)]
    pub compression: Option<String>,
    /// Where it ran.
    pub machine: Machine,
    /// Whose clock measured.
    pub clock: Clock,
    /// What the secondary's process used, if that is known.
    #[serde(default)]
    pub secondary: Option<SecondaryUse>,
    /// Every measured checkpoint.
    pub checkpoints: Vec<Checkpoint>,
    /// Checkpoints that were measured, found disturbed, and left out.
    #[serde(default)]
    pub dropped: u64,
    /// What a reader of the figures must know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Whose clock measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The primary's: what the guest's pause is made of, the network included.
    Primary,
    /// The receiver's.
    Receiver,
}

/// What the secondary's process used during the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecondaryUse {
    /// Its process.
    pub pid: u32,
    /// Processor time, of all its threads.
    pub cpu_ns: u64,
    /// Resident memory at its highest.
    pub rss_bytes_max: u64,
}

/// One checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Checkpoint {
    /// Its number in its session.
    pub n: u64,
    /// Which of several alternated rounds it belongs to, counted from 0. What disturbs a machine lasts for a while, so
    /// rounds, not checkpoints, are independent of each other.
    #[serde(default)]
    pub round: u32,
    /// When it ended, since the run's start.
    pub at_ns: u64,
    /// Durations by phase: `loaded`, `received`, `pause`...
    pub phases_ns: BTreeMap<String, u64>,
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes on all channels.
    pub bytes: u64,
    /// What disturbed it, if anything is known to have.
    #[serde(default)]
    pub disturbed: Option<String>,
}

/// A text that cannot be the name of a run.
#[derive(Debug, Error)]
#[error(
    "{0:.200?} cannot be a run's name: it has 1 to {NAME_CHARS_MAX} characters, none of them a control character"
)]
pub struct RunNameError(String);

/// What a run file says that cannot be right.
#[derive(Debug, Error)]
pub enum ContentError {
    /// It is a file of another kind.
    #[error("the schema is {0:?}, and {SCHEMA:?} was expected")]
    Schema(String),
    /// Of another version of colo-ring.
    #[error("schema version {0}: this colo-ring knows {SCHEMA_VERSION}")]
    Version(u32),
    /// A name that no run can have.
    #[error(transparent)]
    Name(#[from] RunNameError),
    /// More phases than a run has.
    #[error("{0} phases are more than the {PHASES_MAX} that are allowed")]
    Phases(usize),
    /// A name that would not be one of a file.
    #[error("{0:?} cannot be a phase: a phase's name is 1 to 32 of a-z, 0-9, - and _")]
    Phase(String),
}

/// Why a run file could not be written or read.
#[derive(Debug, Error)]
pub enum RunFileError {
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] MetricsError),
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is larger than any run file.
    #[error("{} has more than {FILE_BYTES_MAX} bytes: it is no run file of colo-ring", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is no JSON of that shape.
    #[error("{} is no run file of colo-ring: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What was expected, with line and column.
        source: serde_json::Error,
    },
    /// It is JSON of that shape, and cannot be right.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: ContentError,
    },
}

impl RunFile {
    /// A run on this machine without any checkpoint yet, begun at `started`.
    pub fn new(
        name: &str,
        command: &str,
        options: serde_json::Value,
        clock: Clock,
        started: SystemTime,
    ) -> Self {
        let since_epoch = started.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            schema: SCHEMA.to_owned(),
            schema_version: SCHEMA_VERSION,
            name: name.to_owned(),
            started_unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            command: command.to_owned(),
            options,
            compression: None,
            machine: Machine::read(),
            clock,
            secondary: None,
            checkpoints: Vec::new(),
            dropped: 0,
            notes: Vec::new(),
        }
    }

    /// The names of all phases that any checkpoint has.
    pub fn phases(&self) -> BTreeSet<&str> {
        let names = self
            .checkpoints
            .iter()
            .flat_map(|checkpoint| checkpoint.phases_ns.keys());
        names.map(String::as_str).collect()
    }

    /// The histogram of one phase, in nanoseconds.
    pub fn histogram(&self, phase: &str) -> Histogram<u64> {
        histogram_of(self.checkpoints.iter(), phase)
    }

    /// Writes `PREFIX.<phase>.hlog` for every phase, then `PREFIX.run.json`, which appears whole or not at all.
    ///
    /// # Errors
    /// If a file cannot be written, or this is not what [`Self::read`] would accept.
    pub fn write(&self, prefix: &Path) -> Result<(), RunFileError> {
        let path = with_suffix(prefix, ".run.json");
        self.check().map_err(|reason| RunFileError::Content {
            path: path.clone(),
            reason,
        })?;
        for phase in self.phases() {
            self.write_log(prefix, phase)?;
        }
        Ok(write_json(&path, self)?)
    }

    /// Reads `PREFIX.run.json`.
    ///
    /// # Errors
    /// If it cannot be read, or is not such a file.
    pub fn read(path: &Path) -> Result<Self, RunFileError> {
        Self::parse(path, &read_bounded(path)?)
    }

    /// What [`Self::read`] does with the text of the file.
    ///
    /// # Errors
    /// If it is not that of such a file.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, RunFileError> {
        let mut run: Self = serde_json::from_slice(text).map_err(|source| RunFileError::Json {
            path: path.to_owned(),
            source,
        })?;
        run.check().map_err(|reason| RunFileError::Content {
            path: path.to_owned(),
            reason,
        })?;
        run.name_replies();
        Ok(run)
    }

    /// Earlier files call by the same name what the primary and what the receiver sees of a reply.
    fn name_replies(&mut self) {
        if self.clock == Clock::Receiver {
            return;
        }
        for checkpoint in &mut self.checkpoints {
            if let Some(time) = checkpoint.phases_ns.remove("reply") {
                checkpoint.phases_ns.insert("replied".to_owned(), time);
            }
        }
    }

    fn check(&self) -> Result<(), ContentError> {
        if self.schema != SCHEMA {
            return Err(ContentError::Schema(self.schema.clone()));
        }
        if self.schema_version != SCHEMA_VERSION {
            return Err(ContentError::Version(self.schema_version));
        }
        for name in [Some(&self.name), self.compression.as_ref()]
            .into_iter()
            .flatten()
        {
            check_name(name)?;
        }
        let phases = self.phases();
        if phases.len() > PHASES_MAX {
            return Err(ContentError::Phases(phases.len()));
        }
        match phases.iter().find(|phase| !is_phase_name(phase)) {
            // It becomes part of a file's name.
            Some(phase) => Err(ContentError::Phase((*phase).to_owned())),
            None => Ok(()),
        }
    }

    fn write_log(&self, prefix: &Path, phase: &str) -> Result<(), RunFileError> {
        let clock = match self.clock {
            Clock::Primary => "primary's",
            Clock::Receiver => "receiver's",
        };
        let comments = [
            format!(
                "colo-ring {}: {}, phase {phase}, {clock} clock",
                env!("CARGO_PKG_VERSION"),
                self.name
            ),
            "values in nanoseconds; Interval_Max in milliseconds".to_owned(),
            format!("machine: {}", self.machine),
            format!("options: {}", self.options),
            "[Histogram log format version 1.3]".to_owned(),
        ];
        let started = UNIX_EPOCH + Duration::from_millis(self.started_unix_ms);
        let path = with_suffix(prefix, &format!(".{phase}.hlog"));
        let mut log = IntervalLog::create(path, &comments, started)?;
        let mut intervals = BTreeMap::<u64, Vec<&Checkpoint>>::new();
        for checkpoint in &self.checkpoints {
            let second = Duration::from_nanos(checkpoint.at_ns).as_secs();
            intervals
                .entry(second / INTERVAL.as_secs())
                .or_default()
                .push(checkpoint);
        }
        for (interval, checkpoints) in intervals {
            let start = Duration::from_secs(interval * INTERVAL.as_secs());
            let histogram = histogram_of(checkpoints.into_iter(), phase);
            if !histogram.is_empty() {
                log.add(None, &histogram, start, INTERVAL)?;
                log.append()?;
            }
        }
        Ok(())
    }
}

fn histogram_of<'a>(checkpoints: impl Iterator<Item = &'a Checkpoint>, phase: &str) -> Histogram<u64> {
    let mut histogram = Histogram::new(SIGNIFICANT_DIGITS).expect("0 to 5 significant digits are allowed");
    for nanoseconds in checkpoints.filter_map(|checkpoint| checkpoint.phases_ns.get(phase)) {
        histogram
            .record(*nanoseconds)
            .expect("a histogram that resizes itself takes any value");
    }
    histogram
}

/// Whether this can be the name of a run.
///
/// # Errors
/// If it cannot.
pub fn check_name(name: &str) -> Result<(), RunNameError> {
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || name.chars().any(char::is_control) {
        return Err(RunNameError(name.to_owned()));
    }
    Ok(())
}

fn is_phase_name(name: &str) -> bool {
    let allowed =
        |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || b"-_".contains(&letter);
    (1..=32).contains(&name.len()) && name.bytes().all(allowed)
}

/// The whole file, if it is no larger than a run file can be. Also for `PREFIX.json` of a receiver.
///
/// # Errors
/// If it cannot be read or is too large.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>, RunFileError> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?
            .take(FILE_BYTES_MAX + 1)
            .read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| RunFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    match u64::try_from(text.len()) {
        Ok(length) if length <= FILE_BYTES_MAX => Ok(text),
        _ => Err(RunFileError::TooLarge {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests;
