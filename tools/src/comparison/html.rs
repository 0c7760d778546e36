//! The comparison as one HTML page: nothing is loaded, no script is needed, light and dark are the reader's.
//!
//! Whatever comes from a file passes `escape`.

use super::svg::escape;
use super::table::{display_mean, figures, interval_cell, ratio_cell, way_in_words};
use super::{COUNT_MIN, Comparison, PhaseComparison, Ratio, Resampling, Row, RunInfo, plots};
use crate::run_file::Clock;
use colo_ring::metrics::display_nanoseconds;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

const STYLE: &str = include_str!("page.css");

/// The page.
pub fn page(comparison: &Comparison) -> String {
    let names: Vec<_> = comparison.runs.iter().map(|run| escape(run.name)).collect();
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>Checkpoint latency</h1>\n<p class=\"lead\">{}</p>\n",
        names.join(", "),
        lead(comparison)
    );
    push_runs(&mut page, comparison);
    push_stacks(&mut page, comparison);
    for phase in &comparison.phases {
        push_phase(&mut page, comparison, phase);
    }
    push_method(&mut page, comparison);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn lead(comparison: &Comparison) -> String {
    let checkpoints: u64 = comparison.runs.iter().map(|run| run.checkpoints).sum();
    match &comparison.runs[..] {
        [run] => format!("{} checkpoints of {}.", checkpoints, escape(run.name)),
        runs => format!(
            "{} runs, {checkpoints} checkpoints. Ratios are to <strong>{}</strong>; below 1 is faster.",
            runs.len(),
            escape(comparison.baseline)
        ),
    }
}

/// A run's sign in legends and tables: its colour and dashes.
fn sign(index: usize) -> String {
    let class = plots::class(index);
    format!(
        "<svg class=\"sign\" viewBox=\"0 0 28 10\" aria-hidden=\"true\"><path class=\"curve {class}\" d=\"M0 5H28\"/>\
         <circle class=\"mark {class}\" cx=\"14\" cy=\"5\" r=\"3.5\"/></svg>"
    )
}

fn index_of(comparison: &Comparison, name: &str) -> usize {
    let position = comparison.runs.iter().position(|run| run.name == name);
    position.unwrap_or(0)
}

fn push_runs(page: &mut String, comparison: &Comparison) {
    page.push_str(
        "<h2>Runs</h2>\n<div class=\"wide\"><table>\n<thead><tr><th>run</th><th>clock</th>\
         <th class=\"number\">checkpoints</th><th class=\"number\">left out</th>\
         <th class=\"number\">secondary’s CPU per checkpoint</th><th class=\"number\">its memory</th>\
         </tr></thead>\n<tbody>\n",
    );
    for (index, run) in comparison.runs.iter().enumerate() {
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
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
        let _ = writeln!(
            page,
            "<tr><th scope=\"row\">{}{}</th><td>{clock}</td><td class=\"number\">{}</td>\
             <td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td></tr>",
            sign(index),
            escape(run.name),
            run.checkpoints,
            run.dropped,
            or_dash(cpu),
            or_dash(memory),
        );
    }
    page.push_str("</tbody></table></div>\n");
    push_machines(page, &comparison.runs);
    push_details(page, &comparison.runs);
}

/// Each machine once, with the runs that were made on it.
fn push_machines(page: &mut String, runs: &[RunInfo]) {
    let mut machines: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for run in runs {
        if let Some(machine) = run.machine {
            machines.entry(machine.to_string()).or_default().push(run.name);
        }
    }
    for (machine, names) in machines {
        let of = match names.len() == runs.len() {
            true => "Machine".to_owned(),
            false => format!("Machine of {}", names.join(", ")),
        };
        let _ = writeln!(
            page,
            "<p class=\"note\">{}: {}</p>",
            escape(&of),
            escape(&machine)
        );
    }
}

/// How each run was made, for whoever wants to make it again.
fn push_details(page: &mut String, runs: &[RunInfo]) {
    page.push_str("<details><summary>Commands, options, files and notes</summary>\n");
    for run in runs {
        let _ = writeln!(page, "<h3>{}</h3>\n<ul>", escape(run.name));
        let mut item = |name: &str, text: &str| {
            let _ = writeln!(page, "<li>{name}: <code>{}</code></li>", escape(text));
        };
        if let Some(command) = run.command {
            item("command", command);
        }
        if !run.options.is_null() {
            item("options", &run.options.to_string());
        }
        for file in run.files {
            item("file", &file.display().to_string());
        }
        for note in run.notes {
            let _ = writeln!(page, "<li>{}</li>", escape(note));
        }
        if run.disturbed > 0 {
            let _ = writeln!(
                page,
                "<li>{} of its checkpoints were disturbed (hollow dots where they are among the slowest)</li>",
                run.disturbed
            );
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</details>\n");
}

fn push_stacks(page: &mut String, comparison: &Comparison) {
    let stacks = plots::stacks(comparison.sources);
    if stacks.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Where the time goes</h2>\n<p>Means, because means add up and percentiles do not.</p>\n",
    );
    for (parts, drawing) in stacks {
        page.push_str("<figure>\n<ul class=\"legend\">");
        for part in &parts {
            let _ = write!(
                page,
                "<li><svg class=\"sign\" viewBox=\"0 0 28 10\" aria-hidden=\"true\">\
                 <rect class=\"part p{}\" width=\"28\" height=\"10\"/></svg>{}</li>",
                part.class, part.name
            );
        }
        let _ = writeln!(page, "</ul>\n{drawing}</figure>");
    }
}

fn push_phase(page: &mut String, comparison: &Comparison, phase: &PhaseComparison) {
    let name = escape(&phase.phase);
    let _ = writeln!(
        page,
        "<section id=\"{name}\">\n<h2>{name}{}</h2>",
        meaning(&phase.phase)
    );
    push_table(page, comparison, phase);
    page.push_str("<figure>\n<ul class=\"legend\">");
    for row in &phase.rows {
        let _ = write!(
            page,
            "<li>{}{}</li>",
            sign(index_of(comparison, &row.run)),
            escape(&row.run)
        );
    }
    let _ = writeln!(
        page,
        "</ul>\n{}</figure>",
        plots::curves(comparison.sources, &phase.phase)
    );
    match plots::over_time(comparison.sources, &phase.phase) {
        Some(drawing) => {
            let _ = writeln!(page, "<figure>\n{drawing}</figure>");
        }
        None => page.push_str("<p class=\"note\">Histograms have no times: nothing to draw over time.</p>\n"),
    }
    page.push_str("</section>\n");
}

/// What a phase is, for who meets it here first.
fn meaning(phase: &str) -> String {
    let text = match phase {
        "reply" => "CHECKPOINT_REQUEST read until CHECKPOINT_REPLY sent",
        "transfer" => "VMSTATE_SEND read until all pages are there",
        "vmstate" => "from there until the device state is complete",
        "commit" => "from there until VMSTATE_LOADED is sent",
        "pause" => "CHECKPOINT_REPLY sent until VMSTATE_LOADED sent, as the receiver sees it",
        "flush" => "copying pages to the RAM image",
        "received" => "VMSTATE_SEND sent until VMSTATE_RECEIVED read, as the primary sees it",
        "loaded" => "VMSTATE_SEND sent until VMSTATE_LOADED read, as the primary sees it",
        _ => return String::new(),
    };
    format!(" <small>{text}</small>")
}

fn push_table(page: &mut String, comparison: &Comparison, phase: &PhaseComparison) {
    page.push_str("<div class=\"wide\"><table>\n<thead><tr><th>run</th>");
    for name in ["n", "mean", "p50", "p90", "p99", "p99.9", "max"] {
        let _ = write!(page, "<th class=\"number\">{name}</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &phase.rows {
        push_row(page, index_of(comparison, &row.run), row);
    }
    page.push_str("</tbody></table></div>\n");
    if phase.rows.iter().any(|row| row.p99_9_is_max) {
        page.push_str(
            "<p class=\"note\">* is the maximum: p99 needs 100 checkpoints, p99.9 needs 1000 to be more.</p>\n",
        );
    }
}

fn push_row(page: &mut String, index: usize, row: &Row) {
    let _ = write!(
        page,
        "<tr><th scope=\"row\">{}{}</th><td class=\"number\">{}</td>",
        sign(index),
        escape(&row.run),
        row.count
    );
    let ratios = row.ratios.map(|ratios| ratios.columns());
    for (column, figure) in figures(row).iter().enumerate() {
        let ratio = ratios
            .map(|ratios| ratio_html(&ratios[column]))
            .unwrap_or_default();
        let _ = write!(page, "<td class=\"number\">{figure}{ratio}</td>");
    }
    page.push_str("</tr>\n");
}

/// A ratio below its figure: in words and signs, not by colour alone.
fn ratio_html(ratio: &Ratio) -> String {
    let text = ratio_cell(ratio);
    match ratio.interval {
        None => format!("<div class=\"ratio\">× {text}</div>"),
        Some(interval) => {
            let (class, sign, words) = match interval {
                shown if !shown.difference_shown => ("none", "", "no difference shown"),
                lower if lower.high < 1.0 => ("lower", "▼ ", ""),
                _ => ("higher", "▲ ", ""),
            };
            let interval = interval_cell(ratio);
            format!(
                "<div class=\"ratio {class}\">{sign}× {text}</div><div class=\"interval\">{interval}</div>\
                 <div class=\"words\">{words}</div>"
            )
        }
    }
}

fn push_method(page: &mut String, comparison: &Comparison) {
    page.push_str("<section class=\"method\">\n<h2>How to read this</h2>\n");
    let rows = || comparison.phases.iter().flat_map(|phase| &phase.rows);
    let ways: BTreeSet<_> = rows().filter_map(|row| row.resampled.map(way_in_words)).collect();
    if comparison.runs.len() > 1 && !ways.is_empty() {
        let _ = writeln!(
            page,
            "<p>Below each figure stands its ratio to {} and the 95 % interval of that ratio: both runs were resampled \
             {} times (percentile bootstrap of {}; seed {}). Where the interval includes 1, no difference is shown, which \
             does not mean that there is none. Of runs that do not differ, about one interval in twenty excludes 1 by chance. Maxima \
             and percentiles that are maxima have no interval, nor has a run of fewer than {COUNT_MIN} checkpoints.</p>",
            escape(comparison.baseline),
            comparison.options.resamples,
            ways.into_iter().collect::<Vec<_>>().join("; "),
            comparison.options.seed,
        );
    }
    if rows().any(|row| row.resampled == Some(Resampling::Counts)) {
        page.push_str(
            "<p>Values from histograms have three significant digits; their intervals are wider by 0.1 %.</p>\n",
        );
    }
    let slowest = rows().map(|row| row.max_ns).max().unwrap_or(0);
    let _ = writeln!(
        page,
        "<p>The percentile axis gives every further nine the same room; each curve ends at its slowest checkpoint \
         (open circle; the slowest of all is {}). Over time, the slowest of each run can be pointed at, and long runs \
         are thinned out where they are fast.</p>\n<p>colo-ring {}</p>\n</section>",
        display_nanoseconds(slowest),
        env!("CARGO_PKG_VERSION")
    );
}
