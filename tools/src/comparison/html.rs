//! The comparison as one HTML page.

use super::table::{display_mean, figures, interval_cell, ratio_cell, way_in_words};
use super::{COUNT_MIN, Comparison, PhaseComparison, Ratio, Resampling, Row, RunInfo, plots};
use crate::html_page::html_page;
use crate::run_file::Clock;
use colo_ring::metrics::display_nanoseconds;
use maud::{Markup, PreEscaped, html};
use std::collections::{BTreeMap, BTreeSet};

const STYLE: &str = include_str!("page.css");

/// The page.
pub fn page(comparison: &Comparison) -> String {
    let names: Vec<_> = comparison.runs.iter().map(|run| run.name).collect();
    let body = html! {
        main {
            h1 { "Checkpoint latency" }
            p.lead { (lead(comparison)) }
            (runs(comparison))
            (stacks(comparison))
            @for compared in &comparison.phases { (phase(comparison, compared)) }
            (method(comparison))
        }
    };
    html_page(&names.join(", "), STYLE, &body)
}

fn lead(comparison: &Comparison) -> Markup {
    let checkpoints: u64 = comparison.runs.iter().map(|run| run.checkpoints).sum();
    match &comparison.runs[..] {
        [run] => html! { (checkpoints) " checkpoints of " (run.name) "." },
        runs => html! {
            (runs.len()) " runs, " (checkpoints) " checkpoints. Ratios are to "
            strong { (comparison.baseline) } "; below 1 is faster."
        },
    }
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

fn runs(comparison: &Comparison) -> Markup {
    html! {
        h2 { "Runs" }
        div.wide {
            table {
                thead {
                    tr {
                        th { "run" }
                        th { "clock" }
                        th.number { "checkpoints" }
                        th.number { "left out" }
                        th.number { "secondary’s CPU per checkpoint" }
                        th.number { "its memory" }
                    }
                }
                tbody {
                    @for (index, run) in comparison.runs.iter().enumerate() {
                        (run_row(index, run, &comparison.label(run.name)))
                    }
                }
            }
        }
        (machines(&comparison.runs))
        (details(&comparison.runs))
    }
}

fn run_row(index: usize, run: &RunInfo, label: &str) -> Markup {
    let clock = match run.clock {
        Some(Clock::Primary) => "primary’s",
        Some(Clock::Receiver) => "receiver’s",
        None => "–",
    };
    let cpu = run.secondary.filter(|_| run.checkpoints > 0);
    let cpu = cpu.map(|used| display_mean(used.cpu_ns as f64 / run.checkpoints as f64));
    let memory = run.secondary.map(|used| {
        let mebibytes = used.rss_bytes_max as f64 / f64::from(1 << 20);
        format!("{mebibytes:.0} MiB")
    });
    html! {
        tr {
            th scope="row" { (sign(index)) (label) }
            td { (clock) }
            td.number { (run.checkpoints) }
            td.number { (run.dropped) }
            td.number { (cpu.as_deref().unwrap_or("–")) }
            td.number { (memory.as_deref().unwrap_or("–")) }
        }
    }
}

/// Each machine once, with the runs that were made on it.
fn machines(runs: &[RunInfo]) -> Markup {
    let mut machines: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for run in runs {
        if let Some(machine) = run.machine {
            machines.entry(machine.to_string()).or_default().push(run.name);
        }
    }
    html! {
        @for (machine, names) in machines {
            p.note {
                "Machine" @if names.len() < runs.len() { " of " (names.join(", ")) } ": " (machine)
            }
        }
    }
}

/// How each run was made, to make it again.
fn details(runs: &[RunInfo]) -> Markup {
    let item = |name: &str, text: &str| html! { li { (name) ": " code { (text) } } };
    html! {
        details {
            summary { "Commands, options, files and notes" }
            @for run in runs {
                h3 { (run.name) }
                ul {
                    @if let Some(command) = run.command { (item("command", command)) }
                    @if !run.options.is_null() { (item("options", &run.options.to_string())) }
                    @for file in run.files { (item("file", &file.display().to_string())) }
                    @for note in run.notes { li { (note) } }
                    @if run.disturbed > 0 {
                        li {
                            (run.disturbed)
                            " of its checkpoints were disturbed (hollow dots where they are among the slowest)"
                        }
                    }
                }
            }
        }
    }
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

fn phase(comparison: &Comparison, phase: &PhaseComparison) -> Markup {
    html! {
        section id=(phase.phase) {
            h2 {
                (phase.phase)
                @if let Some(meaning) = meaning(&phase.phase) { " " small { (meaning) } }
            }
            (table(comparison, phase))
            figure {
                ul.legend {
                    @for row in &phase.rows { li { (sign(index_of(comparison, &row.run))) (row.run) } }
                }
                (PreEscaped(plots::curves(comparison.sources, &phase.phase)))
            }
            @match plots::over_time(comparison.sources, &phase.phase) {
                Some(drawing) => figure { (PreEscaped(drawing)) },
                None => p.note { "Histograms have no times: nothing to draw over time." },
            }
        }
    }
}

/// What a known phase is.
fn meaning(phase: &str) -> Option<&'static str> {
    Some(match phase {
        "reply" => "CHECKPOINT_REQUEST read until CHECKPOINT_REPLY sent",
        "transfer" => "VMSTATE_SEND read until all pages are there",
        "vmstate" => "from there until the device state is complete",
        "commit" => "from there until VMSTATE_LOADED is sent",
        "pause" => "CHECKPOINT_REPLY sent until VMSTATE_LOADED sent, as the receiver sees it",
        "flush" => "copying pages to the RAM image",
        "received" => "VMSTATE_SEND sent until VMSTATE_RECEIVED read, as the primary sees it",
        "loaded" => "VMSTATE_SEND sent until VMSTATE_LOADED read, as the primary sees it",
        _ => return None,
    })
}

fn table(comparison: &Comparison, phase: &PhaseComparison) -> Markup {
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
                    @for one in &phase.rows { (row(index_of(comparison, &one.run), one)) }
                }
            }
        }
        @if phase.rows.iter().any(|row| row.p99_9_is_max) {
            p.note { "* is the maximum: p99 needs 100 checkpoints, p99.9 needs 1000 to be more." }
        }
    }
}

fn row(index: usize, row: &Row) -> Markup {
    let ratios = row.ratios.map(|ratios| ratios.columns());
    html! {
        tr {
            th scope="row" { (sign(index)) (row.run) }
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
