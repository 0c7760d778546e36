//! The figures of a cell: its runs side by side, and what each secondary used for them.

use super::contest::{CellResult, Turns};
use super::secondary::Secondary;
use colo_ring::units::PAGE_BYTES;
use colo_ring_tools::comparison::{CompareError, Options, Ratios, Row, Run, html, report};
use serde::Serialize;

/// The figures of a cell.
#[derive(Debug, Serialize)]
pub struct CellFigures {
    /// Its name in files.
    pub cell: String,
    /// What its checkpoints carry.
    pub capture: String,
    /// Milliseconds from one checkpoint to the next; 0 is back to back.
    pub spacing_ms: u128,
    /// The name of the secondary that ratios are to: QEMU's own.
    pub baseline: Option<String>,
    /// The phases, the most important first.
    pub phases: Vec<&'static str>,
    /// Every secondary.
    pub secondaries: Vec<SecondaryFigures>,
}

/// The figures of one secondary in one cell.
#[derive(Debug, Serialize)]
pub struct SecondaryFigures {
    /// Its name in tables.
    pub name: String,
    /// Its name in options.
    pub secondary: String,
    /// Undisturbed checkpoints that were measured.
    pub checkpoints: u64,
    /// Checkpoints that were left out, as others had the processor.
    pub dropped: u64,
    /// Mean guest pages of a checkpoint.
    pub pages_per_checkpoint: f64,
    /// Each phase; none where nothing was measured.
    pub phases: Vec<Option<Row>>,
    /// Each phase's ratio to the same receiver of another build, where that was measured.
    pub to_other_build: Vec<Option<Ratios>>,
    /// Each phase's ratio to the same secondary without TLS, where it has TLS.
    pub to_plaintext: Vec<Option<Ratios>>,
    /// Processor time of its process for a GiB of guest pages, all that it does between checkpoints included.
    pub cpu_s_per_gib: Option<f64>,
    /// The same for a checkpoint.
    pub cpu_ms_per_checkpoint: Option<f64>,
    /// Resident memory at its highest.
    pub rss_bytes_max: Option<u64>,
    /// Guest pages that a receiver copied to the RAM image in a second of flushing, in bytes.
    pub flush_bytes_per_s: Option<f64>,
    /// Why it was not measured (further).
    pub failed: Option<String>,
}

impl CellFigures {
    /// Compares the runs of a cell. Returns the page of that comparison, too.
    ///
    /// # Errors
    /// When two secondaries have one name.
    pub fn of(result: &CellResult, phases: &[&'static str]) -> Result<(Self, String), CompareError> {
        let runs = result.turns.iter().filter_map(|turns| turns.run.clone());
        let runs: Vec<_> = runs.map(Run::from).collect();
        let compared_to = |baseline: &Option<String>| {
            let options = Options {
                baseline: baseline.clone(),
                ..Options::default()
            };
            report(&runs, options)
        };
        let baselines = [false, true].map(|is_over_tls| baseline_of(result, is_over_tls));
        let [plain, secured] = baselines.each_ref().map(compared_to);
        let (comparison, secured) = (plain?, secured?);
        let row = |phase: &str, turns: &Turns| {
            let (comparison, baseline) = match turns.secondary.is_over_tls() {
                false => (&comparison, &baselines[0]),
                true => (&secured, &baselines[1]),
            };
            let row = comparison.row(phase, &turns.run.as_ref()?.name)?;
            // Without QEMU the first run replaces it, and no ratio to that is of interest.
            let ratios = row.ratios.filter(|_| baseline.is_some());
            Some(Row {
                ratios,
                ..row.clone()
            })
        };
        let secondary = |turns: &Turns| {
            let rows = phases.iter().map(|phase| row(phase, turns)).collect();
            Ok::<_, CompareError>(SecondaryFigures {
                to_other_build: to_other(result, turns, phases, |other| {
                    other.is_other_build_of(&turns.secondary)
                })?,
                to_plaintext: to_other(result, turns, phases, |other| {
                    turns.secondary.is_over_tls_what(other)
                })?,
                ..SecondaryFigures::of(turns, rows)
            })
        };
        let secondaries = result.turns.iter().map(secondary).collect::<Result<_, _>>()?;
        let figures = Self {
            cell: result.cell.name(),
            capture: result.cell.shape.to_string(),
            spacing_ms: result.cell.spacing.as_millis(),
            phases: phases.to_vec(),
            secondaries,
            baseline: baselines[0].clone(),
        };
        Ok((figures, html::page(&comparison)))
    }

    /// Guest pages of a checkpoint, MiB, on average over what was measured; none where that is not known.
    #[must_use]
    pub fn measured_mib(&self) -> Option<f64> {
        let known = self
            .secondaries
            .iter()
            .filter(|one| one.pages_per_checkpoint > 0.0);
        let pages = |one: &SecondaryFigures| one.pages_per_checkpoint * one.checkpoints as f64;
        let checkpoints: u64 = known.clone().map(|one| one.checkpoints).sum();
        let mib_per_page = PAGE_BYTES as f64 / f64::from(1 << 20);
        (checkpoints > 0).then(|| known.map(pages).sum::<f64>() / checkpoints as f64 * mib_per_page)
    }

    /// What is measured, in words.
    #[must_use]
    pub fn title(&self) -> String {
        match self.spacing_ms {
            0 => format!("{}, back to back", self.capture),
            ms => format!("{}, every {ms} ms", self.capture),
        }
    }
}

/// The name of QEMU's own secondary with or without TLS.
fn baseline_of(result: &CellResult, is_over_tls: bool) -> Option<String> {
    let is_it = |turns: &&Turns| turns.secondary.is_qemu() && turns.secondary.is_over_tls() == is_over_tls;
    let qemu = result.turns.iter().find(is_it);
    qemu.and_then(|turns| Some(turns.run.as_ref()?.name.clone()))
}

/// The ratios of each phase to that other secondary; none where there is no such.
fn to_other(
    result: &CellResult,
    turns: &Turns,
    phases: &[&'static str],
    is_meant: impl Fn(&Secondary) -> bool,
) -> Result<Vec<Option<Ratios>>, CompareError> {
    let other = result.turns.iter().find(|other| is_meant(&other.secondary));
    let (Some(own), Some(other)) = (&turns.run, other.and_then(|other| other.run.as_ref())) else {
        return Ok(Vec::new());
    };
    // The first is the baseline.
    let runs = [other, own].map(|run| Run::from(run.clone()));
    let comparison = report(&runs, Options::default())?;
    let ratios = |phase: &&str| comparison.row(phase, &own.name)?.ratios;
    Ok(phases.iter().map(ratios).collect())
}

impl SecondaryFigures {
    fn of(turns: &Turns, phases: Vec<Option<Row>>) -> Self {
        let run = turns.run.as_ref();
        let used = run.and_then(|run| run.secondary);
        let measured = run.map_or(&[][..], |run| &run.checkpoints);
        let pages: u64 = measured.iter().map(|checkpoint| checkpoint.pages).sum();
        let bytes = |pages: u64| (pages * PAGE_BYTES) as f64;
        let seconds = |ns: u64| ns as f64 / 1e9;
        let session_gib = bytes(turns.session_pages) / f64::from(1 << 30);
        let cpu = turns.session_cpu_ns.filter(|_| turns.session_pages > 0);
        let flushed = turns.flushed.filter(|flushed| flushed.ns > 0);
        Self {
            name: run.map_or(&turns.secondary.name, |run| &run.name).clone(),
            secondary: turns.secondary.name.clone(),
            checkpoints: turns.checkpoints(),
            dropped: run.map_or(0, |run| run.dropped),
            pages_per_checkpoint: pages as f64 / turns.checkpoints().max(1) as f64,
            phases,
            to_other_build: Vec::new(),
            to_plaintext: Vec::new(),
            cpu_s_per_gib: cpu.map(|cpu_ns| seconds(cpu_ns) / session_gib),
            cpu_ms_per_checkpoint: cpu
                .map(|cpu_ns| 1e3 * seconds(cpu_ns) / turns.session_checkpoints.max(1) as f64),
            rss_bytes_max: used.map(|used| used.rss_bytes_max),
            flush_bytes_per_s: flushed.map(|flushed| bytes(flushed.pages) / seconds(flushed.ns)),
            failed: turns.failed.clone(),
        }
    }
}
