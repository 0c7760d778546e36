//! The comparison as one HTML page.

mod runs;

use super::headline::headline;
use super::table::{figures, interval_cell, ratio_cell, way_in_words};
use super::{COUNT_MIN, Comparison, PhaseComparison, Ratio, Resampling, Row, RunInfo, plots};
use crate::flight;
use crate::html_page::html_page;
use colo_ring::metrics::display_nanoseconds;
use maud::{Markup, PreEscaped, html};
use std::collections::BTreeSet;

/// The style sheet of every page.
pub(crate) const STYLE: &str = include_str!("page.css");

/// What a page says beside the figures.
#[derive(Clone, Debug, Default)]
pub struct Intro<'a> {
    /// Above all.
    pub title: &'a str,
    /// What there is to know before one looks at figures.
    pub explanation: &'a str,
    /// The result in a sentence or two.
    pub headline: String,
    /// What a run is, in a word: its name, and the word.
    pub marks: &'a [(&'a str, &'a str)],
    /// Phases that are shown at once, in this order, the others on request; none: all are shown.
    pub phases: &'a [&'a str],
}

/// The page of a comparison.
pub fn page(comparison: &Comparison) -> String {
    let intro = Intro {
        title: "Checkpoint latency",
        headline: headline(comparison),
        ..Intro::default()
    };
    page_with(comparison, &intro)
}

/// The page with an introduction.
pub fn page_with(comparison: &Comparison, intro: &Intro) -> String {
    let of_name = |name: &&str| comparison.phases.iter().find(|phase| phase.phase == **name);
    let first: Vec<_> = match intro.phases {
        [] => comparison.phases.iter().collect(),
        phases => phases.iter().filter_map(of_name).collect(),
    };
    let is_first = |phase: &&PhaseComparison| first.iter().any(|shown| shown.phase == phase.phase);
    let others: Vec<_> = comparison
        .phases
        .iter()
        .filter(|phase| !is_first(phase))
        .collect();
    let body = html! {
        main {
            h1 { (intro.title) }
            @if !intro.explanation.is_empty() { p.lead { (intro.explanation.replace('`', "")) } }
            p.headline { (intro.headline) }
            @if intro.phases.is_empty() { (runs::table(comparison, intro.marks)) }
            @for compared in first { (phase(comparison, compared, intro.marks)) }
            (stacks(comparison))
            @if !intro.phases.is_empty() { (runs::table(comparison, intro.marks)) }
            (slow(&comparison.runs))
            @if !others.is_empty() {
                details {
                    summary { "Other phases: " (others.iter().map(|phase| phase.phase.as_str()).collect::<Vec<_>>().join(", ")) }
                    @for compared in others { (phase(comparison, compared, intro.marks)) }
                }
            }
            (runs::machines(&comparison.runs))
            (runs::details(&comparison.runs))
            (method(comparison))
        }
    };
    html_page(intro.title, STYLE, &body)
}

/// A run's sign in legends and tables: its colour and dashes.
fn sign(index: usize) -> Markup {
    let class = plots::class(index);
    html! {
        svg.sign viewBox="0 0 28 10" aria-hidden="true" {
            path class={ "curve " (class) } d="M0 5H28" {}
            circle class={ "mark " (class) } cx="14" cy="5" r="3.5" {}
        }
    }
}

fn index_of(comparison: &Comparison, name: &str) -> usize {
    let position = comparison.runs.iter().position(|run| run.name == name);
    position.unwrap_or(0)
}

fn stacks(comparison: &Comparison) -> Markup {
    let stacks = plots::stacks(comparison.sources);
    html! {
        @if !stacks.is_empty() {
            h2 { "Where the time goes" }
            p { "Means, because means add up and percentiles do not." }
        }
        @for (parts, drawing) in stacks {
            figure {
                ul.legend {
                    @for part in &parts {
                        li {
                            svg.sign viewBox="0 0 28 10" aria-hidden="true" {
                                rect class={ "part p" (part.class) } width="28" height="10" {}
                            }
                            (part.name)
                        }
                    }
                }
                (PreEscaped(drawing))
            }
        }
    }
}

fn phase(comparison: &Comparison, phase: &PhaseComparison, marks: &[(&str, &str)]) -> Markup {
    html! {
        section id=(phase.phase) {
            h2 {
                (phase.phase)
                @if let Some(meaning) = meaning(&phase.phase) { " " small { (meaning) } }
            }
            (table(comparison, phase, marks))
            figure {
                ul.legend {
                    @for row in &phase.rows {
                        @let index = index_of(comparison, &row.run);
                        @if plots::is_drawn(comparison.sources, index, comparison.baseline) {
                            li { (sign(index)) (row.run) }
                        }
                    }
                }
                (PreEscaped(plots::curves(comparison.sources, &phase.phase, comparison.baseline)))
            }
            @match plots::over_time(comparison.sources, &phase.phase, comparison.baseline) {
                Some(drawing) => figure { (PreEscaped(drawing)) },
                None => p.note { "Histograms have no times: nothing to draw over time." },
            }
            @if phase.rows.len() > plots::DRAWN_MAX {
                p.note {
                    "Drawn are the first runs and the baseline, " (plots::DRAWN_MAX) " in all: more cannot be told apart. The table \
                     has all."
                }
            }
        }
    }
}

/// Whose time slow checkpoints were, of the runs that say it.
fn slow(runs: &[RunInfo]) -> Markup {
    html! {
        @if runs.iter().any(|run| run.slow.is_some()) {
            section id="slow" {
                h2 { "Slow checkpoints" " " small { "whose time they were" } }
                @for run in runs {
                    @if let Some(report) = &run.slow {
                        h3 { (run.name) }
                        (flight::section(report))
                    }
                }
            }
        }
    }
}

/// What a known phase is.
fn meaning(phase: &str) -> Option<&'static str> {
    Some(match phase {
        "reply" => "CHECKPOINT_REQUEST read until CHECKPOINT_REPLY sent, as the receiver sees it",
        "transfer" => "VMSTATE_SEND read until all pages are there",
        "vmstate" => "from there until the device state is complete",
        "commit" => "from there until VMSTATE_LOADED is sent",
        "pause" => "CHECKPOINT_REPLY sent until VMSTATE_LOADED sent, as the receiver sees it",
        "flush" => "copying pages to the RAM image",
        "replied" => "CHECKPOINT_REQUEST sent until CHECKPOINT_REPLY read, as the primary sees it",
        "received" => "VMSTATE_SEND sent until VMSTATE_RECEIVED read, as the primary sees it",
        "loaded" => "VMSTATE_SEND sent until VMSTATE_LOADED read, as the primary sees it",
        "waited" => {
            "how long a checkpoint was due while the one before it was still running; received and loaded count it"
        }
        "service" => "loaded without the waiting",
        _ => return None,
    })
}

fn table(comparison: &Comparison, phase: &PhaseComparison, marks: &[(&str, &str)]) -> Markup {
    html! {
        div.wide {
            table {
                thead {
                    tr {
                        th { "run" }
                        @for name in ["n", "mean", "p50", "p90", "p99", "p99.9", "max"] {
                            th.number { (name) }
                        }
                    }
                }
                tbody {
                    @for one in &phase.rows { (row(comparison, one, marks)) }
                }
            }
        }
        @if phase.rows.iter().any(|row| row.p99_9_is_max) {
            p.note { "* is the maximum: p99 needs 100 checkpoints, p99.9 needs 1000 to be more." }
        }
    }
}

fn row(comparison: &Comparison, row: &Row, marks: &[(&str, &str)]) -> Markup {
    let index = index_of(comparison, &row.run);
    let ratios = row.ratios.map(|ratios| ratios.columns());
    html! {
        tr {
            th scope="row" {
                @if plots::is_drawn(comparison.sources, index, comparison.baseline) { (sign(index)) }
                (row.run)
                (runs::tags(comparison, &row.run, marks))
            }
            td.number { (row.count) }
            @for (column, figure) in figures(row).iter().enumerate() {
                td.number {
                    (figure)
                    @if let Some(ratios) = &ratios { (ratio(&ratios[column])) }
                }
            }
        }
    }
}

/// A ratio below its figure: in words and signs, not by colour alone.
fn ratio(ratio: &Ratio) -> Markup {
    let text = ratio_cell(ratio);
    let Some(interval) = ratio.interval else {
        return html! { div.ratio { "× " (text) } };
    };
    let (class, sign, words) = match interval {
        shown if !shown.difference_shown => ("none", "", "no difference shown"),
        lower if lower.high < 1.0 => ("lower", "▼ ", ""),
        _ => ("higher", "▲ ", ""),
    };
    html! {
        div class={ "ratio " (class) } { (sign) "× " (text) }
        div.interval { (interval_cell(ratio)) }
        div.words { (words) }
    }
}

fn method(comparison: &Comparison) -> Markup {
    let rows = || comparison.phases.iter().flat_map(|phase| &phase.rows);
    let ways: BTreeSet<_> = rows().filter_map(|row| row.resampled.map(way_in_words)).collect();
    let slowest = rows().map(|row| row.max_ns).max().unwrap_or(0);
    html! {
        section.method {
            h2 { "How to read this" }
            @if comparison.runs.len() > 1 && !ways.is_empty() {
                p {
                    "Below each figure is its ratio to " (comparison.baseline) " and the 95 % interval of that \
                     ratio: both runs were resampled " (comparison.options.resamples) " times (percentile bootstrap of "
                    (ways.into_iter().collect::<Vec<_>>().join("; ")) "; seed " (comparison.options.seed) "). Where the \
                     interval includes 1, no difference is shown, which does not mean that there is none. Of runs that \
                     do not differ, about one interval in twenty excludes 1 by chance. Maxima and percentiles that are \
                     maxima have no interval, nor has a run of fewer than " (COUNT_MIN) " checkpoints."
                }
            }
            @if rows().any(|row| row.resampled == Some(Resampling::Counts)) {
                p { "Values from histograms have three significant digits; their intervals are wider by 0.1 %." }
            }
            p {
                "The percentile axis gives every further nine the same room; each curve ends at its slowest checkpoint \
                 (open circle; the slowest of all is " (display_nanoseconds(slowest)) "). Over time, the slowest of \
                 each run can be pointed at, and long runs are thinned out where they are fast."
            }
            p { "colo-ring " (env!("CARGO_PKG_VERSION")) }
        }
    }
}
