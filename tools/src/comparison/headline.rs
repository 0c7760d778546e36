//! The result of a comparison in a sentence.

use super::{Comparison, Ratio, Row};
use colo_ring::metrics::display_nanoseconds;

/// The phases that a headline is about: the first of them that there is.
const PHASES: [&str; 2] = ["loaded", "pause"];

/// Runs that it names beside the baseline.
const RUNS_MAX: usize = 3;

/// The main figures of the runs, and what their intervals show.
pub(crate) fn headline(comparison: &Comparison) -> String {
    let known = PHASES
        .iter()
        .find_map(|name| comparison.phases.iter().find(|phase| phase.phase == *name));
    let Some(phase) = known.or(comparison.phases.first()) else {
        return "Nothing was measured.".to_owned();
    };
    let name = &phase.phase;
    let baseline = phase.rows.iter().find(|row| row.run == comparison.baseline);
    let others: Vec<_> = phase
        .rows
        .iter()
        .filter(|row| row.run != comparison.baseline)
        .collect();
    let mut text = match baseline {
        Some(row) => format!("{}: {name} {}.", row.run, figures(row)),
        None => String::new(),
    };
    for row in others.iter().take(RUNS_MAX) {
        text.push_str(&format!(
            " {}: {}{}.",
            row.run,
            figures(row),
            ratio(row, comparison.baseline)
        ));
    }
    if others.len() > RUNS_MAX {
        text.push_str(&format!(" {} more are below.", others.len() - RUNS_MAX));
    }
    text.trim_start().to_owned()
}

fn figures(row: &Row) -> String {
    format!(
        "p50 {}, p99 {}",
        display_nanoseconds(row.p50_ns),
        display_nanoseconds(row.p99_ns)
    )
}

fn ratio(row: &Row, baseline: &str) -> String {
    let Some(ratios) = row.ratios else {
        return String::new();
    };
    let p99 = match row.p99_is_max {
        true => String::new(),
        false => format!(", p99 {}", in_words(&ratios.p99)),
    };
    format!("; to {baseline} p50 {}{p99}", in_words(&ratios.p50))
}

/// A ratio with its interval, and what that shows.
pub(crate) fn in_words(ratio: &Ratio) -> String {
    let shown = |ratio: f64| format!("{ratio:.2}");
    let Some(value) = ratio.ratio else {
        return "without a ratio".to_owned();
    };
    match ratio.interval {
        None => format!("× {}", shown(value)),
        Some(interval) if !interval.difference_shown => format!(
            "× {} (95 %: {} to {}, no difference shown)",
            shown(value),
            shown(interval.low),
            shown(interval.high)
        ),
        Some(interval) => format!(
            "× {} (95 %: {} to {})",
            shown(value),
            shown(interval.low),
            shown(interval.high)
        ),
    }
}
