//! What runs are compared: a table of them, their machines, and how each was made.

use super::super::table::display_mean;
use super::super::{Comparison, RunInfo, plots};
use super::sign;
use crate::run_file::Clock;
use maud::{Markup, html};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, UNIX_EPOCH};

/// The runs; `marks` has a word for some of them.
pub(super) fn table(comparison: &Comparison, marks: &[(&str, &str)]) -> Markup {
    let runs = &comparison.runs;
    let has = |of: fn(&RunInfo) -> bool| runs.iter().any(of);
    let shows = Columns {
        disturbed: has(|run| run.disturbed > 0 || run.dropped > 0),
        use_: has(|run| run.secondary.is_some()),
    };
    html! {
        h2 { "Runs" }
        div.wide {
            table {
                thead {
                    tr {
                        th { "run" }
                        th { "begun (UTC)" }
                        th { "clock" }
                        th.number { "checkpoints" }
                        @if shows.disturbed {
                            th.number { "disturbed" }
                            th.number { "left out" }
                        }
                        @if shows.use_ {
                            th.number { "CPU a checkpoint" }
                            th.number { "memory" }
                        }
                    }
                }
                tbody {
                    @for (index, run) in runs.iter().enumerate() {
                        (row(comparison, index, run, marks, &shows))
                    }
                }
            }
        }
        @if shows.disturbed {
            p.note {
                "Disturbed: something else is known to have kept the machine busy. Those that were left out are in no figure; the \
                 others are, and are hollow dots where they are among the slowest."
            }
        }
    }
}

/// Columns that not every comparison has.
struct Columns {
    disturbed: bool,
    use_: bool,
}

fn row(
    comparison: &Comparison,
    index: usize,
    run: &RunInfo,
    marks: &[(&str, &str)],
    shows: &Columns,
) -> Markup {
    let clock = match run.clock {
        Some(Clock::Primary) => "primary’s",
        Some(Clock::Receiver) => "receiver’s",
        None => "–",
    };
    let cpu = run.secondary.filter(|_| run.checkpoints > 0);
    let cpu = cpu.map(|used| display_mean(used.cpu_ns as f64 / run.checkpoints as f64));
    // Of what is not known it is 0.
    let memory = run.secondary.filter(|used| used.rss_bytes_max > 0);
    let memory = memory.map(|used| {
        let mebibytes = used.rss_bytes_max as f64 / f64::from(1 << 20);
        format!("{mebibytes:.0} MiB")
    });
    html! {
        tr {
            th scope="row" {
                @if plots::is_drawn(comparison.sources, index, comparison.baseline) { (sign(index)) }
                (comparison.label(run.name))
                (tags(comparison, run.name, marks))
            }
            td { (run.started_unix_ms.map_or_else(|| "–".to_owned(), date)) }
            td { (clock) }
            td.number { (run.checkpoints) }
            @if shows.disturbed {
                td.number { (run.disturbed) }
                td.number { (run.dropped) }
            }
            @if shows.use_ {
                td.number { (cpu.as_deref().unwrap_or("–")) }
                td.number { (memory.as_deref().unwrap_or("–")) }
            }
        }
    }
}

/// What a run is, in a word each.
pub(super) fn tags(comparison: &Comparison, run: &str, marks: &[(&str, &str)]) -> Markup {
    let is_baseline = run == comparison.baseline && comparison.runs.len() > 1;
    let marks = marks
        .iter()
        .filter(|(name, _)| *name == run)
        .map(|(_, mark)| *mark);
    html! {
        @for mark in marks.chain(is_baseline.then_some("baseline")) { " " span.tag { (mark) } }
    }
}

/// To the minute.
fn date(unix_ms: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms));
    // Years after 9999 have no such text, and are no date of a run.
    let text = time.filter(|_| unix_ms < 253_402_300_800_000);
    let text = text.map(|time| humantime::format_rfc3339_seconds(time).to_string());
    text.and_then(|text| Some(text.get(..16)?.replace('T', " ")))
        .unwrap_or_else(|| "–".to_owned())
}

/// Each machine once, with the runs that were made on it.
pub(super) fn machines(runs: &[RunInfo]) -> Markup {
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
pub(super) fn details(runs: &[RunInfo]) -> Markup {
    let options: Vec<_> = runs.iter().map(options).collect();
    let keys: BTreeSet<&String> = options.iter().flatten().map(|(key, _)| key).collect();
    let value = |run: usize, key: &String| options[run].get(key).map_or("–", String::as_str);
    let is_shared = |key: &&String| (1..runs.len()).all(|run| value(run, key) == value(0, key));
    let (shared, own): (Vec<&String>, Vec<&String>) = keys.into_iter().partition(is_shared);
    html! {
        details {
            summary { "Commands, options, files and notes" }
            @if !own.is_empty() {
                h3 { "Options that differ" }
                div.wide {
                    table.options {
                        thead { tr { th { "run" } @for key in &own { th { (key) } } } }
                        tbody {
                            @for (number, run) in runs.iter().enumerate() {
                                tr {
                                    th scope="row" { (run.name) }
                                    @for key in &own { td { code { (value(number, key)) } } }
                                }
                            }
                        }
                    }
                }
            }
            @if !shared.is_empty() {
                h3 { @if runs.len() > 1 { "Options of all" } @else { "Options" } }
                div.wide {
                    table.options {
                        tbody { @for key in &shared { tr { th scope="row" { (key) } td { code { (value(0, key)) } } } } }
                    }
                }
            }
            h3 { "Commands and files" }
            div.wide {
                table.options {
                    tbody {
                        @for run in runs {
                            tr {
                                th scope="row" { (run.name) }
                                td { code { (run.command.unwrap_or("–")) } }
                                td { @for file in run.files { code { (file.display()) } " " } }
                                td { @for note in run.notes { (note) " " } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Names and values of a run's options; those of an object in it have both names.
fn options(run: &RunInfo) -> BTreeMap<String, String> {
    let mut options = BTreeMap::new();
    flatten("", run.options, 0, &mut options);
    options
}

/// Objects deeper than this are shown as JSON.
const DEPTH_MAX: usize = 3;

fn flatten(name: &str, value: &Value, depth: usize, options: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(object) if depth < DEPTH_MAX => {
            for (key, value) in object {
                let name = match name {
                    "" => key.clone(),
                    _ => format!("{name}.{key}"),
                };
                flatten(&name, value, depth + 1, options);
            }
        }
        Value::Null => {}
        Value::String(text) => _ = options.insert(name.to_owned(), text.clone()),
        other => _ = options.insert(name.to_owned(), other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_to_the_minute_or_none() {
        assert_eq!(date(1_700_000_000_000), "2023-11-14 22:13");
        assert_eq!(date(u64::MAX), "–");
    }

    #[test]
    fn options_of_objects_have_both_names() {
        let mut options = BTreeMap::new();
        let value = serde_json::json!({ "a": 1, "b": { "c": "text", "d": null }, "e": [1, 2] });
        flatten("", &value, 0, &mut options);
        let shown: Vec<_> = options
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        assert_eq!(shown, ["a=1", "b.c=text", "e=[1,2]"]);
    }
}
