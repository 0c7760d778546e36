//! Measured runs side by side: what `colo-ring compare` prints.
//!
//! [`report`] makes a [`Comparison`] of runs; it can be printed as a table, as JSON, and as one HTML page.

mod bootstrap;
mod distribution;
pub(crate) mod headline;
pub mod html;
mod plots;
mod runs;
pub(crate) mod svg;
mod table;

pub(crate) use html::STYLE;

pub use bootstrap::{COUNT_MIN, Interval, Ratio, Ratios};
pub use distribution::{ROUNDS_MIN, Resampling};
pub use runs::{CompareError, PHASE_UNNAMED, Run, Unit, gather};

use crate::flight::{self, By, SlowReport};
use crate::run_file::{Clock, RunFile, SecondaryUse};
use bootstrap::Resampled;
use colo_ring::host::Machine;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Every known phase, in the order of tables: the receiver's clock, then the primary's.
pub const PHASES: [&str; 9] = [
    "reply", "transfer", "vmstate", "commit", "pause", "flush", "replied", "received", "loaded",
];

/// What is known of one phase of a run: the same figures wherever they are shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MeasuredPhase {
    pub(crate) count: u64,
    pub(crate) mean_ns: f64,
    pub(crate) p50_ns: u64,
    pub(crate) p90_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) max_ns: u64,
}

impl MeasuredPhase {
    /// Of one run's checkpoints.
    pub(crate) fn of(run: &RunFile, phase: &str) -> Self {
        let values = || {
            let checkpoints = run.checkpoints.iter();
            checkpoints.filter_map(|checkpoint| checkpoint.phases_ns.get(phase).copied())
        };
        let (figures, max_ns) = distribution::figures_of(values());
        Self {
            count: values().count() as u64,
            mean_ns: figures.mean,
            p50_ns: figures.p50,
            p90_ns: figures.p90,
            p99_ns: figures.p99,
            max_ns,
        }
    }
}

/// Resamples behind every interval.
pub const RESAMPLES: u32 = 1000;

/// What of the runs is compared, and how.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Options {
    /// Name of the run that the others are divided by; None takes the first.
    pub baseline: Option<String>,
    /// Phases to compare; empty takes all.
    pub phases: Vec<String>,
    /// Seed of the resampling.
    pub seed: u64,
    /// Resamples behind every interval.
    pub resamples: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            baseline: None,
            phases: Vec::new(),
            seed: 1,
            resamples: RESAMPLES,
        }
    }
}

/// Runs side by side.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Comparison<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: Options,
    /// Name of the run that the others are divided by.
    baseline: &'a str,
    /// The runs, in the order of the figures.
    runs: Vec<RunInfo<'a>>,
    /// Figures by phase.
    phases: Vec<PhaseComparison>,
    /// For plots.
    #[serde(skip)]
    sources: &'a [Run],
}

/// What there is to say of a run.
#[derive(Debug, Serialize, JsonSchema)]
struct RunInfo<'a> {
    /// Its name.
    name: &'a str,
    /// The files that it was read from.
    files: &'a [PathBuf],
    /// The command that measured; null if that is not known.
    command: Option<&'a str>,
    /// The options that it was measured with.
    options: &'a serde_json::Value,
    /// How pages were made smaller; null if that is not known.
    compression: Option<&'a str>,
    /// Where it was measured; null if that is not known.
    machine: Option<&'a Machine>,
    /// When it began, in milliseconds since 1970.
    started_unix_ms: Option<u64>,
    /// Whose clock measured; null if that is not known.
    clock: Option<Clock>,
    /// What the secondary's process used; null if that is not known.
    secondary: Option<SecondaryUse>,
    /// Its checkpoints.
    checkpoints: u64,
    /// Of `checkpoints`, those that something is known to have disturbed.
    disturbed: u64,
    /// Left out when the run was written.
    dropped: u64,
    /// What a reader of the figures must know.
    notes: &'a [String],
    /// Whose time its slowest checkpoints were, where its flight recorder is there.
    slow: Option<SlowReport>,
}

/// One phase of all runs.
#[derive(Debug, Serialize, JsonSchema)]
struct PhaseComparison {
    /// Its name.
    phase: String,
    /// A row for each run that has it.
    rows: Vec<Row>,
}

/// One phase of one run.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Row {
    /// The run's name.
    pub run: String,
    /// Checkpoints.
    pub count: u64,
    /// Their mean.
    pub mean_ns: f64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p99_9_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// There are too few checkpoints for the 99th percentile to be another than the longest.
    pub p99_is_max: bool,
    /// As for the 99th.
    pub p99_9_is_max: bool,
    /// What the interval was made by. None if there are too few values for one.
    pub resampled: Option<Resampling>,
    /// To the baseline. None for the baseline, and where that lacks the phase.
    pub ratios: Option<Ratios>,
}

impl Comparison<'_> {
    /// A run's name as tables have it: with its compression where any of the runs has one.
    fn label(&self, name: &str) -> String {
        let compressed = |run: &RunInfo| run.compression.is_some_and(|method| method != "none");
        let run = self.runs.iter().find(|run| run.name == name);
        let compression = run.and_then(|run| run.compression);
        match compression.filter(|_| self.runs.iter().any(compressed)) {
            None => name.to_owned(),
            Some("none") => format!("{name} (not compressed)"),
            Some(method) => format!("{name} ({method})"),
        }
    }

    /// One phase of the first run that has it.
    pub(crate) fn first(&self, phase: &str) -> Option<&Row> {
        let phase = self.phases.iter().find(|compared| compared.phase == phase)?;
        phase.rows.first()
    }

    /// One phase of one run, if that has it.
    pub fn row(&self, phase: &str, run: &str) -> Option<&Row> {
        let phase = self.phases.iter().find(|compared| compared.phase == phase)?;
        phase.rows.iter().find(|row| row.run == run)
    }
}

/// Compares `runs`, which have different names.
///
/// # Errors
/// If the baseline or a phase that `options` names is not there, or two runs have one name.
pub fn report<'a>(runs: &'a [Run], options: Options) -> Result<Comparison<'a>, CompareError> {
    let mut names = BTreeSet::new();
    if let Some(run) = runs.iter().find(|run| !names.insert(run.name.as_str())) {
        return Err(CompareError::SameName {
            name: run.name.clone(),
            mergeable: false,
        });
    }
    let baseline = match &options.baseline {
        None => 0,
        Some(name) => {
            let position = runs.iter().position(|run| run.name == *name);
            position.ok_or_else(|| CompareError::Baseline {
                name: name.clone(),
                there: names.iter().copied().collect::<Vec<_>>().join(", "),
            })?
        }
    };
    let phases = phases_of(runs, &options.phases)?;
    let compare = |phase: String| PhaseComparison {
        rows: rows(runs, baseline, &phase, &options),
        phase,
    };
    Ok(Comparison {
        schema: "colo-ring.compare",
        schema_version: 1,
        baseline: runs.get(baseline).map_or("", Run::name),
        runs: runs.iter().map(run_info).collect(),
        phases: phases.into_iter().map(compare).collect(),
        options: options.clone(),
        sources: runs,
    })
}

/// All phases of the runs, the known ones first and in their order; or those of `wanted`.
fn phases_of(runs: &[Run], wanted: &[String]) -> Result<Vec<String>, CompareError> {
    let there: BTreeSet<_> = runs
        .iter()
        .flat_map(|run| run.samples.keys())
        .map(String::as_str)
        .collect();
    if let Some(missing) = wanted.iter().find(|phase| !there.contains(phase.as_str())) {
        return Err(CompareError::Phase {
            phase: missing.clone(),
            there: there.into_iter().collect::<Vec<_>>().join(", "),
        });
    }
    let mut phases: Vec<_> = there.into_iter().map(str::to_owned).collect();
    phases.retain(|phase| wanted.is_empty() || wanted.contains(phase));
    phases.sort_by_key(|phase| {
        PHASES
            .iter()
            .position(|known| known == phase)
            .unwrap_or(PHASES.len())
    });
    Ok(phases)
}

fn run_info(run: &Run) -> RunInfo<'_> {
    let (checkpoints, disturbed) = run.checkpoints();
    RunInfo {
        name: &run.name,
        files: &run.files,
        command: run.command.as_deref(),
        options: &run.options,
        compression: run.compression.as_deref(),
        machine: run.machine.as_ref(),
        started_unix_ms: run.started_unix_ms,
        clock: run.clock,
        secondary: run.secondary,
        checkpoints,
        disturbed,
        dropped: run.dropped,
        notes: &run.notes,
        slow: run
            .flight
            .as_ref()
            .map(|log| SlowReport::of(log, None, flight::TOP, By::Pause)),
    }
}

fn rows(runs: &[Run], baseline: usize, phase: &str, options: &Options) -> Vec<Row> {
    let distributions: Vec<_> = runs.iter().map(|run| run.distribution(phase)).collect();
    let mut rounds = distributions.iter().flatten().map(|run| run.rounds());
    let first = rounds.next();
    // Runs with the same rounds were alternated: a round is then drawn for all of them at once.
    let alternated = rounds.all(|rounds| Some(&rounds) == first.as_ref());
    let resampled: Vec<_> = distributions
        .into_iter()
        .zip(1..)
        .map(|(distribution, number)| {
            let distribution = distribution?;
            let paired = alternated && distribution.resampling() == Resampling::Rounds;
            let stream = if paired { 0 } else { number };
            Some(Resampled::new(
                distribution,
                options.seed,
                stream,
                options.resamples,
            ))
        })
        .collect();
    let base = resampled.get(baseline).and_then(Option::as_ref);
    let row = |(index, resampled): (usize, &Option<Resampled>)| {
        let resampled = resampled.as_ref()?;
        let distribution = &resampled.distribution;
        let figures = distribution.figures();
        let count = distribution.count();
        Some(Row {
            run: runs[index].name.clone(),
            count,
            mean_ns: figures.mean,
            p50_ns: figures.p50,
            p90_ns: figures.p90,
            p99_ns: figures.p99,
            p99_9_ns: figures.p99_9,
            max_ns: distribution.max(),
            p99_is_max: count < 100,
            p99_9_is_max: count < 1000,
            resampled: resampled.resampling(),
            ratios: base
                .filter(|_| index != baseline)
                .map(|base| resampled.ratios(base)),
        })
    };
    resampled.iter().enumerate().filter_map(row).collect()
}

#[cfg(test)]
mod tests;
