//! The comparison as tables for a terminal.

use super::{COUNT_MIN, Comparison, PhaseComparison, Ratio, Resampling, Row};
use crate::output::table;
use colo_ring::metrics::display_nanoseconds;
use std::collections::BTreeSet;

impl Comparison<'_> {
    /// A table for every phase, and what is needed to read them.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for phase in &self.phases {
            text.push_str(&table(&self.phase_rows(phase)));
            text.push('\n');
        }
        for run in &self.runs {
            if let Some(slow) = &run.slow {
                text.push_str(&format!("{}: {}\n{}\n", run.name, slow.head(), slow.summary()));
            }
        }
        self.explanations()
            .iter()
            .for_each(|line| text.push_str(&format!("{line}\n")));
        text
    }

    fn phase_rows(&self, phase: &PhaseComparison) -> Vec<Vec<String>> {
        let head = ["n", "mean", "p50", "p90", "p99", "p99.9", "max"].map(str::to_owned);
        let mut rows = vec![[vec![phase.phase.clone()], head.to_vec()].concat()];
        for row in &phase.rows {
            let cells = [vec![self.label(&row.run), row.count.to_string()], figures(row)].concat();
            rows.push(cells);
            let Some(ratios) = row.ratios else { continue };
            let line = |name: &str, cell: fn(&Ratio) -> String| {
                let cells = ratios.columns().map(|ratio| cell(&ratio));
                [vec![format!("  {name}"), String::new()], cells.to_vec()].concat()
            };
            rows.push(line(&format!("to {}", self.baseline), ratio_cell));
            if row.resampled.is_some() {
                rows.push(line("95 % interval", interval_cell));
                rows.push(line("difference", verdict_cell));
            }
        }
        rows
    }

    fn explanations(&self) -> Vec<String> {
        let rows = || self.phases.iter().flat_map(|phase| &phase.rows);
        let mut lines = Vec::new();
        if rows().any(|row| row.p99_is_max || row.p99_9_is_max) {
            lines.push("* is the maximum: p99 needs 100 checkpoints, p99.9 needs 1000 to be more".to_owned());
        }
        let compared = || rows().filter(|row| row.ratios.is_some());
        if compared().any(|row| row.resampled.is_some()) {
            lines.push(
                "none: the interval of the ratio includes 1, no difference shown (not: shown to be equal)"
                    .to_owned(),
            );
            let ways: BTreeSet<_> = rows().filter_map(|row| row.resampled.map(way_in_words)).collect();
            let ways = ways.into_iter().collect::<Vec<_>>().join("; ");
            lines.push(format!(
                "intervals: bootstrap, {} resamples of {ways}; seed {}",
                self.options.resamples, self.options.seed
            ));
        }
        if compared().any(|row| row.resampled.is_none()) {
            lines.push(format!(
                "a run of fewer than {COUNT_MIN} checkpoints has no interval"
            ));
        }
        for phase in &self.phases {
            if phase.rows.iter().all(|row| row.ratios.is_none()) && phase.rows.len() > 1 {
                lines.push(format!(
                    "{} has no {}: no ratios there; choose another --baseline",
                    self.baseline, phase.phase
                ));
            }
        }
        for run in &self.runs {
            if run.dropped > 0 {
                lines.push(format!(
                    "{}: {} disturbed checkpoints were left out",
                    run.name, run.dropped
                ));
            }
            if run.disturbed > 0 {
                lines.push(format!(
                    "{}: {} of its checkpoints were disturbed",
                    run.name, run.disturbed
                ));
            }
        }
        lines
    }
}

/// The figures of a row; those that are only maxima are marked.
pub(super) fn figures(row: &Row) -> Vec<String> {
    let marked = |is_max: bool, nanoseconds| {
        let mark = if is_max { "*" } else { "" };
        format!("{}{mark}", display_nanoseconds(nanoseconds))
    };
    vec![
        display_mean(row.mean_ns),
        display_nanoseconds(row.p50_ns),
        display_nanoseconds(row.p90_ns),
        marked(row.p99_is_max, row.p99_ns),
        marked(row.p99_9_is_max, row.p99_9_ns),
        display_nanoseconds(row.max_ns),
    ]
}

/// A mean of values of 64 bits is one itself, but for its fraction.
pub(super) fn display_mean(nanoseconds: f64) -> String {
    let rounded = format!("{nanoseconds:.0}").parse();
    display_nanoseconds(rounded.unwrap_or(u64::MAX))
}

pub(super) fn ratio_cell(ratio: &Ratio) -> String {
    ratio.ratio.map_or_else(|| "-".to_owned(), ratio_text)
}

pub(super) fn interval_cell(ratio: &Ratio) -> String {
    ratio.interval.map_or_else(
        || "-".to_owned(),
        |interval| format!("{}–{}", ratio_text(interval.low), ratio_text(interval.high)),
    )
}

pub(super) fn verdict_cell(ratio: &Ratio) -> String {
    let text = match ratio.interval {
        None => "-",
        Some(interval) if !interval.difference_shown => "none",
        Some(interval) if interval.high < 1.0 => "lower",
        Some(_) => "higher",
    };
    text.to_owned()
}

/// A thousandth around 1, which is where it matters.
fn ratio_text(ratio: f64) -> String {
    match ratio {
        r if r >= 100.0 => format!("{r:.0}"),
        r if r >= 10.0 => format!("{r:.1}"),
        r => format!("{r:.3}"),
    }
}

pub(super) fn way_in_words(way: Resampling) -> &'static str {
    match way {
        Resampling::Rounds => "whole rounds",
        Resampling::Blocks => "blocks of consecutive checkpoints",
        Resampling::Counts => "a histogram's counts",
    }
}
