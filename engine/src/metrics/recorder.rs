//! All histograms: total, per session, and of the running interval.
//!
//! Owned by the control thread. It is drained often, ends an interval about once a second, and makes the report at the end. Files
//! are written by a thread of their own (`writer.rs`). An error of a file loses no figure in memory: the caller may go on without
//! the file.

use super::log::Lines;
use super::writer::{Interval, Writer};
use super::{
    Accumulator, CheckpointSample, Phase, RecentFigures, RecentPauses, SampleQueue, Summary, WINDOW,
};
use crate::host::Machine;
use crate::text::elapsed;
use crate::threads::Threads;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
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
    /// A prefix without a name.
    #[error("{path} is a directory, and not the beginning of files' names: give for example {path}run", path = .0.display())]
    Directory(PathBuf),
    /// Another program writes to these files.
    #[error("{} belongs to another program that is running; choose another prefix", .0.display())]
    InUse(PathBuf),
    /// Files of an earlier run could not be set aside.
    #[error("cannot set {} aside, which an earlier run has left: {source}", path.display())]
    SetAside {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// There is no thread to write files.
    #[error("cannot start the thread that writes measurements: {0}")]
    Thread(std::io::Error),
    /// Files are not written as fast as measurements come.
    #[error(
        "measurements are not written to {}.*: its file system hangs, or nobody reads a pipe there; intervals are missing in the logs \
         until that ends", .0.display()
    )]
    Behind(PathBuf),
    /// The last files were not written in time.
    #[error("the last measurements were not written to {}.* within {}: its file system hangs, or nobody reads a pipe there", prefix.display(), elapsed(*waited))]
    Late {
        /// Of the files.
        prefix: PathBuf,
        /// How long.
        waited: Duration,
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// Intervals that are missing in at least one log, because it could not be written.
    #[serde(default)]
    pub intervals_lost: u64,
    /// Over all sessions.
    pub total: Summary,
    /// Each session, as far as kept.
    pub sessions: Vec<SessionSummary>,
    /// Ended sessions that are only in the total.
    pub sessions_not_listed: u64,
}

/// One session's part of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SessionSummary {
    /// Its number in this receiver.
    pub session: u32,
    /// Its guest's name: the operator's, or its UUID; none if it has neither.
    #[serde(default)]
    pub guest: Option<String>,
    /// Its figures.
    #[serde(flatten)]
    pub summary: Summary,
}

/// See the module's documentation.
pub struct Recorder {
    run: RunDescription,
    /// Writes the files, if there are any.
    writer: Option<Writer>,
    /// Of each phase, for the interval that ends.
    lines: Vec<(Phase, Lines)>,
    /// Whether the last interval found no place among those that are to be written.
    is_behind: bool,
    total: Accumulator,
    sessions: BTreeMap<u32, Accumulator>,
    /// Of running sessions, by windows.
    recent: BTreeMap<u32, RecentPauses>,
    window_start: Duration,
    /// Of running sessions.
    names: BTreeMap<u32, String>,
    ended: VecDeque<SessionSummary>,
    ended_not_kept: u64,
    interval: BTreeMap<u32, Accumulator>,
    interval_start: Duration,
    dropped: u64,
    dropped_logged: u64,
    /// Takes each recorded sample.
    observer: Option<Arc<SampleQueue>>,
}

impl Recorder {
    /// Makes the recorder; with a `prefix`, also `PREFIX.<phase>.hlog` for every phase. Those of an earlier run are set aside, as
    /// `PREFIX.run-<n>.<phase>.hlog`. They are written by one of the `threads`; `warn` takes what goes wrong there.
    ///
    /// # Errors
    /// If a file cannot be made, a running program has this prefix, or there is no thread.
    pub fn start(
        prefix: Option<&Path>,
        run: RunDescription,
        threads: &Threads,
        warn: impl Fn(String) + Send + 'static,
    ) -> Result<Self, MetricsError> {
        let writer = prefix.map(|prefix| Writer::start(prefix, run.clone(), threads, warn));
        Ok(Self {
            run,
            writer: writer.transpose()?,
            lines: Phase::ALL.map(|phase| (phase, Lines::new())).into(),
            is_behind: false,
            total: Accumulator::new(),
            sessions: BTreeMap::new(),
            recent: BTreeMap::new(),
            window_start: Duration::ZERO,
            names: BTreeMap::new(),
            ended: VecDeque::new(),
            ended_not_kept: 0,
            interval: BTreeMap::new(),
            interval_start: Duration::ZERO,
            dropped: 0,
            dropped_logged: 0,
            observer: None,
        })
    }

    /// The same, which also hands each sample that it records over to `observer`.
    #[must_use]
    pub fn observed_by(self, observer: Option<Arc<SampleQueue>>) -> Self {
        Self { observer, ..self }
    }

    /// Records all samples in the queue.
    pub fn drain(&mut self, queue: &SampleQueue) {
        while let Some(sample) = queue.pop() {
            self.record(&sample);
            if let Some(observer) = &self.observer {
                observer.push(sample);
            }
        }
        self.dropped = queue.dropped();
    }

    /// Records one checkpoint.
    pub fn record(&mut self, sample: &CheckpointSample) {
        self.total.record(sample);
        self.sessions.entry(sample.session).or_default().record(sample);
        self.recent.entry(sample.session).or_default().record(sample);
        // Only what will be written is kept by interval.
        if self.writer.is_some() {
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

    /// The pauses of a running session lately; none before its first checkpoint.
    pub fn recent(&self, session: u32) -> Option<RecentFigures> {
        self.recent.get(&session).map(RecentPauses::figures)
    }

    /// What a running session's guest is called from now on, if it is.
    pub fn name(&mut self, session: u32, name: Option<String>) {
        if let Some(name) = name {
            self.names.insert(session, name);
        }
    }

    /// Closes a session's histograms and returns its figures. Drain the queue before.
    pub fn end_session(&mut self, session: u32) -> Summary {
        self.recent.remove(&session);
        let summary = self.sessions.remove(&session).unwrap_or_default().summary();
        if self.ended.len() == SESSIONS_KEPT {
            self.ended.pop_front();
            self.ended_not_kept += 1;
        }
        // Its last interval, with its name, may not be written yet.
        let guest = self.names.get(&session).cloned();
        self.ended.push_back(SessionSummary {
            session,
            guest,
            summary: summary.clone(),
        });
        summary
    }

    /// Intervals that are missing in at least one log.
    pub fn intervals_lost(&self) -> u64 {
        self.writer.as_ref().map_or(0, Writer::lost)
    }

    /// Checkpoints whose sample found no room in the queue.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Ends the running interval at `now` (since the receiver's start) and has it appended to the logs: one line per
    /// phase and session that had a checkpoint in it. Does not wait for that.
    ///
    /// # Errors
    /// If an interval cannot be encoded, or is the first of those that find no place because files are not written. It is then missing
    /// in the logs, which is counted; all other figures remain.
    pub fn write_interval(&mut self, now: Duration) -> Result<(), MetricsError> {
        let interval = self.end_interval(now);
        let (Some(writer), Some(interval)) = (&self.writer, interval?) else {
            return Ok(());
        };
        if interval.is_empty() {
            return Ok(());
        }
        let was_behind = self.is_behind;
        self.is_behind = !writer.put(interval);
        match self.is_behind && !was_behind {
            true => Err(MetricsError::Behind(writer.prefix().to_owned())),
            false => Ok(()),
        }
    }

    /// What is to be written of the interval that ends at `now`; none if there are no files.
    fn end_interval(&mut self, now: Duration) -> Result<Option<Interval>, MetricsError> {
        if now.saturating_sub(self.window_start) >= WINDOW {
            self.window_start = now;
            self.recent.values_mut().for_each(RecentPauses::turn);
        }
        let start = std::mem::replace(&mut self.interval_start, now);
        let length = now.saturating_sub(start);
        let sessions = std::mem::take(&mut self.interval);
        let newly_dropped = self.dropped - self.dropped_logged;
        self.dropped_logged = self.dropped;
        let sessions_there = &self.sessions;
        self.names
            .retain(|session, _| sessions_there.contains_key(session) || sessions.contains_key(session));
        let Some(writer) = &self.writer else {
            return Ok(None);
        };
        let mut written = Vec::with_capacity(self.lines.len());
        let mut result = Ok(());
        for (phase, lines) in &mut self.lines {
            if newly_dropped > 0 {
                lines.comment(&format!(
                    "{newly_dropped} checkpoints are missing in the next interval: the queue was full"
                ));
            }
            for (session, accumulator) in &sessions {
                let number = || format!("session-{session}");
                let tag = self.names.get(session).cloned().unwrap_or_else(number);
                let added = lines.add(Some(&tag), accumulator.histogram(*phase), start, length);
                result = result.and(added);
            }
            // Also what belongs to an interval that is lost.
            written.push(lines.take());
        }
        if let Err(source) = result {
            writer.lose();
            let path = writer.prefix().to_owned();
            return Err(MetricsError::Write { path, source });
        }
        Ok(Some(Interval::new(written, !sessions.is_empty())))
    }

    /// The report as of `now`.
    pub fn report(&self, now: Duration) -> Report {
        let since_epoch = self.run.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let running = self.sessions.iter().map(|(session, accumulator)| SessionSummary {
            session: *session,
            guest: self.names.get(session).cloned(),
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
            intervals_lost: self.intervals_lost(),
            total: self.total(),
            sessions: self.ended.iter().cloned().chain(running).collect(),
            sessions_not_listed: self.ended_not_kept,
        }
    }

    /// Has the last interval and `PREFIX.json` written, waits for that, but not for ever, and returns the report in any case. Drain the
    /// queue before.
    pub fn finish(&mut self, now: Duration) -> (Report, Result<(), MetricsError>) {
        let interval = self.end_interval(now);
        let report = self.report(now);
        let Some(writer) = &self.writer else {
            return (report, interval.map(drop));
        };
        let (interval, encoded) = match interval {
            Ok(interval) => (interval, Ok(())),
            Err(error) => (None, Err(error)),
        };
        let (report, written) = writer.finish(interval, report);
        (report, encoded.and(written))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
