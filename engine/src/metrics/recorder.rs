//! All histograms: total, per session, and of the running interval.
//!
//! Owned by the control thread. It is drained often, writes an interval about once a second, and writes the report
//! at the end. An error of a file loses no figure in memory: the caller may go on without the file.

use super::files::{with_suffix, write_json};
use super::log::IntervalLog;
use super::{Accumulator, CheckpointSample, Phase, SampleQueue, Summary};
use crate::host::Machine;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Name of the report's schema.
pub const SCHEMA: &str = "colo-ring.histograms";

/// Version of the report's schema: raised when a key changes its meaning or goes, not when one is added.
pub const SCHEMA_VERSION: u32 = 1;

/// Ended sessions whose figures are kept for the report; of older ones only the total remains.
pub const SESSIONS_KEPT: usize = 1024;

/// Length of an interval in the logs: how often [`Recorder::write_interval`] is to be called.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Why measurements could not be written.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// A file could not be made.
    #[error(
        "cannot create {}: {source}; choose a prefix in a directory that exists and is writable",
        path.display()
    )]
    Create {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write measurements to {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
}

/// What the logs and the report say about the run they belong to.
#[derive(Clone, Debug)]
pub struct RunDescription {
    /// The zero of all times: the receiver's start.
    pub started: SystemTime,
    /// The options in force, as the caller names them.
    pub options: serde_json::Value,
    /// Where it ran.
    pub machine: Machine,
}

/// The report at the end: what `PREFIX.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Start of the receiver, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// From the start to the report.
    pub duration_ms: u64,
    /// The options in force.
    pub options: serde_json::Value,
    /// Where it ran.
    pub machine: Machine,
    /// Checkpoints whose sample found no room and is in no histogram.
    pub samples_dropped: u64,
    /// Over all sessions.
    pub total: Summary,
    /// Each session, as far as kept.
    pub sessions: Vec<SessionSummary>,
    /// Ended sessions that are only in the total.
    pub sessions_not_listed: u64,
}

/// One session's part of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionSummary {
    /// Its number in this receiver.
    pub session: u32,
    /// Its figures.
    #[serde(flatten)]
    pub summary: Summary,
}

/// See the module's documentation.
pub struct Recorder {
    run: RunDescription,
    files: Option<Files>,
    total: Accumulator,
    sessions: BTreeMap<u32, Accumulator>,
    ended: VecDeque<SessionSummary>,
    ended_not_kept: u64,
    interval: BTreeMap<u32, Accumulator>,
    interval_start: Duration,
    dropped: u64,
    dropped_logged: u64,
}

struct Files {
    logs: Vec<(Phase, IntervalLog)>,
    report: PathBuf,
}

impl Recorder {
    /// Makes the recorder; with a `prefix`, also `PREFIX.<phase>.hlog` for every phase, replacing those of an
    /// earlier run.
    ///
    /// # Errors
    /// If a file cannot be made.
    pub fn start(prefix: Option<&Path>, run: RunDescription) -> Result<Self, MetricsError> {
        let files = prefix.map(|prefix| Files::create(prefix, &run)).transpose()?;
        Ok(Self {
            run,
            files,
            total: Accumulator::new(),
            sessions: BTreeMap::new(),
            ended: VecDeque::new(),
            ended_not_kept: 0,
            interval: BTreeMap::new(),
            interval_start: Duration::ZERO,
            dropped: 0,
            dropped_logged: 0,
        })
    }

    /// Records all samples in the queue.
    pub fn drain(&mut self, queue: &SampleQueue) {
        while let Some(sample) = queue.pop() {
            self.record(&sample);
        }
        self.dropped = queue.dropped();
    }

    /// Records one checkpoint.
    pub fn record(&mut self, sample: &CheckpointSample) {
        self.total.record(sample);
        self.sessions.entry(sample.session).or_default().record(sample);
        // Only what will be written is kept by interval.
        if self.files.is_some() {
            self.interval.entry(sample.session).or_default().record(sample);
        }
    }

    /// The figures over all sessions.
    pub fn total(&self) -> Summary {
        self.total.summary()
    }

    /// The figures of a running session; those of none if it had no checkpoint yet.
    pub fn session(&self, session: u32) -> Summary {
        self.sessions
            .get(&session)
            .map_or_else(|| Accumulator::new().summary(), Accumulator::summary)
    }

    /// Closes a session's histograms and returns its figures. Drain the queue before.
    pub fn end_session(&mut self, session: u32) -> Summary {
        let summary = self.sessions.remove(&session).unwrap_or_default().summary();
        if self.ended.len() == SESSIONS_KEPT {
            self.ended.pop_front();
            self.ended_not_kept += 1;
        }
        self.ended.push_back(SessionSummary {
            session,
            summary: summary.clone(),
        });
        summary
    }

    /// Checkpoints whose sample found no room in the queue.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Ends the running interval at `now` (since the receiver's start) and appends it to the logs: one line per
    /// phase and session that had a checkpoint in it.
    ///
    /// # Errors
    /// If a log cannot be written. The interval is then missing in that log; all other figures remain.
    pub fn write_interval(&mut self, now: Duration) -> Result<(), MetricsError> {
        let start = std::mem::replace(&mut self.interval_start, now);
        let length = now.saturating_sub(start);
        let sessions = std::mem::take(&mut self.interval);
        let newly_dropped = self.dropped - self.dropped_logged;
        self.dropped_logged = self.dropped;
        let Some(files) = &mut self.files else {
            return Ok(());
        };
        let mut result = Ok(());
        for (phase, log) in &mut files.logs {
            if newly_dropped > 0 {
                log.comment(&format!(
                    "{newly_dropped} checkpoints are missing in the next interval: the queue was full"
                ));
            }
            let added = sessions.iter().try_for_each(|(session, accumulator)| {
                let tag = format!("session-{session}");
                log.add(Some(&tag), accumulator.histogram(*phase), start, length)
            });
            // Every log is written, also after an error of another one.
            result = result.and(added.and(log.append()));
        }
        result
    }

    /// The report as of `now`.
    pub fn report(&self, now: Duration) -> Report {
        let since_epoch = self.run.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let running = self.sessions.iter().map(|(session, accumulator)| SessionSummary {
            session: *session,
            summary: accumulator.summary(),
        });
        Report {
            schema: SCHEMA.to_owned(),
            schema_version: SCHEMA_VERSION,
            started_unix_ms: milliseconds(since_epoch),
            duration_ms: milliseconds(now),
            options: self.run.options.clone(),
            machine: self.run.machine.clone(),
            samples_dropped: self.dropped,
            total: self.total(),
            sessions: self.ended.iter().cloned().chain(running).collect(),
            sessions_not_listed: self.ended_not_kept,
        }
    }

    /// Writes the last interval and `PREFIX.json`. Drain the queue before.
    ///
    /// # Errors
    /// If a file cannot be written; the others are written all the same.
    pub fn finish(&mut self, now: Duration) -> Result<Report, MetricsError> {
        let interval = self.write_interval(now);
        let report = self.report(now);
        if let Some(files) = &self.files {
            write_json(&files.report, &report)?;
        }
        interval.map(|()| report)
    }
}

impl Files {
    fn create(prefix: &Path, run: &RunDescription) -> Result<Self, MetricsError> {
        let logs = Phase::ALL.into_iter().map(|phase| {
            let comments = [
                format!(
                    "colo-ring {}: phase {phase}, receiver's clock",
                    env!("CARGO_PKG_VERSION")
                ),
                "values in nanoseconds; Interval_Max in milliseconds; tag: session".to_owned(),
                format!("machine: {}", run.machine),
                format!("options: {}", run.options),
                "[Histogram log format version 1.3]".to_owned(),
            ];
            let path = with_suffix(prefix, &format!(".{phase}.hlog"));
            Ok((phase, IntervalLog::create(path, &comments, run.started)?))
        });
        Ok(Self {
            logs: logs.collect::<Result<_, MetricsError>>()?,
            report: with_suffix(prefix, ".json"),
        })
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
