//! `colo-ring demo`: a synthetic primary against secondaries of several kinds, on this machine alone.
//!
//! Four by default: this receiver with its defaults, the same with epoll, one that receives as QEMU does, and a sink as the floor.
//! All of them run from the beginning to the end, and get their sessions in turn, in an order that is rotated from
//! round to round: what disturbs the machine meanwhile disturbs them alike.

mod contestant;
mod message;
mod usage;
mod variant;

use crate::comparison::{self, Comparison, html};
use crate::cores::default_cores;
use crate::options::Size;
use crate::output::{CommandError, ProgressLine, print, print_json, table, tell, wrapped};
use clap::Args;
use colo_ring::files::{self, Readers};
use colo_ring::host::Machine;
use colo_ring::metrics::display_nanoseconds;
use colo_ring::text::mebibytes;
use contestant::{Contestant, VariantReport, Warnings};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use variant::{AS_QEMU, DEFAULT, FLOOR, Variant};

/// Where the page goes unless something else is said.
const HTML_DEFAULT: &str = "colo-ring-demo.html";

/// Options of `colo-ring demo`.
#[derive(Debug, Args, Serialize, JsonSchema)]
pub struct DemoArgs {
    /// RAM of the synthetic guest
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    #[serde(rename = "ram_bytes")]
    #[schemars(with = "u64")]
    ram: Size,

    /// Pages that the guest dirties before each checkpoint
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pages: u64,

    /// Multifd channels; 0 sends all pages on the main channel
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,

    /// Checkpoints of each session
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoints: u64,

    /// Milliseconds from when one checkpoint is due to when the next one is; 0 = as fast as it goes
    #[arg(long = "interval", value_name = "MS", default_value_t = 10)]
    #[serde(rename = "interval_ms")]
    interval: u64,

    /// Rounds: each variant has one session in each. From 6 on, intervals are made of whole rounds
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Every backend, cache and commit mode, and sessions that compress, with zstd and with zlib, whose pages compress about 3 to 1
    #[arg(long)]
    all: bool,

    /// Write the page of plots there, in place of what is there [default: colo-ring-demo.html in this directory; none
    /// with --json]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Print JSON (schema colo-ring.demo, version 3)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// Everything the demo found out.
#[derive(Serialize, JsonSchema)]
pub(crate) struct DemoReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: &'a DemoArgs,
    /// Where it ran.
    machine: Machine,
    /// Cores that received.
    cores: &'a [usize],
    /// The figures of each contestant.
    variants: Vec<VariantReport>,
    /// The primary's `loaded` of all variants, with intervals.
    comparison: Comparison<'a>,
    /// The result in a sentence.
    message: String,
    /// What was asked for and is not available.
    warnings: BTreeSet<String>,
}

/// Runs the demo, prints its table and writes its page.
///
/// # Errors
/// If not a single backend works, a session fails, or the page cannot be written.
pub fn run(args: &DemoArgs) -> Result<ExitCode, CommandError> {
    let warnings = Warnings::default();
    let cores = default_cores(args.channels)?;
    let started = Instant::now();
    let measured = measure(args, &cores, &warnings)?;
    let elapsed = started.elapsed();
    let (variants, runs): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
    let runs: Vec<_> = runs.into_iter().map(comparison::Run::from).collect();
    let baseline = runs
        .iter()
        .any(|run| run.name() == AS_QEMU)
        .then(|| AS_QEMU.to_owned());
    let compare = |phases: &[&str]| {
        let options = comparison::Options {
            baseline: baseline.clone(),
            phases: phases.iter().map(|phase| (*phase).to_owned()).collect(),
            ..comparison::Options::default()
        };
        comparison::report(&runs, options).map_err(CommandError::failed)
    };
    let comparison = compare(&["loaded"])?;
    let report = DemoReport {
        schema: "colo-ring.demo",
        schema_version: 3,
        options: args,
        machine: Machine::read(),
        cores: &cores,
        variants,
        message: message::sentence(&comparison, args),
        comparison,
        warnings: warnings.take(),
    };
    let default_page = (!args.json).then_some(Path::new(HTML_DEFAULT));
    let page = args.html.as_deref().or(default_page);
    let intro = html::Intro {
        title: "What a checkpoint costs the guest",
        explanation: message::EXPLANATION,
        headline: report.message.clone(),
        marks: &[(DEFAULT, "default"), (FLOOR, "floor")],
        phases: &["loaded"],
    };
    let written = page.map(|page| {
        let html = html::page_with(&compare(&[])?, &intro);
        files::write(page, html.as_bytes(), Readers::ByUmask).map_err(|error| {
            CommandError::Failed(format!(
                "cannot write the page {}: {error}; choose another place with --html FILE",
                page.display()
            ))
        })
    });
    if args.json {
        print_json(&report)?;
    } else {
        let warn = |warning: &String| tell(&format!("warning: {warning}"));
        report.warnings.iter().for_each(warn);
        print(&render(&report, elapsed))?;
        if let (Some(page), Some(Ok(()))) = (page, &written) {
            print(&format!("page: {}\n", page.display()))?;
        }
    }
    // The figures are printed in any case.
    written.transpose()?;
    Ok(ExitCode::SUCCESS)
}

/// All sessions of all variants.
fn measure(
    args: &DemoArgs,
    cores: &[usize],
    warnings: &Warnings,
) -> Result<Vec<(VariantReport, crate::run_file::RunFile)>, CommandError> {
    let mut contestants = Vec::new();
    let variants = match args.all {
        // Without channels there is nothing that compresses.
        true => Variant::all(args.channels > 0),
        false => Variant::main(),
    };
    for variant in variants {
        contestants.extend(Contestant::start(variant, args, cores, warnings)?);
    }
    if contestants.is_empty() {
        let reasons = warnings.take().into_iter().collect::<Vec<_>>().join("; ");
        return Err(CommandError::Failed(format!("no backend works here: {reasons}")));
    }
    let mut line = ProgressLine::new(!args.json);
    let started = Instant::now();
    let count = contestants.len();
    for round in 0..args.rounds {
        let before = round as usize * count;
        for (turn, contestant) in contestants.iter_mut().enumerate() {
            line.bar(before + turn, args.rounds as usize * count, contestant.name());
            contestant.session(args, round, started)?;
        }
        contestants.rotate_left(1);
    }
    line.clear();
    let back = args.rounds as usize % count;
    contestants.rotate_right(back);
    contestants.into_iter().map(Contestant::finish).collect()
}

/// The table's head; a row has 80 columns at most.
const HEAD: [&str; 7] = ["loaded", "p50", "p99", "to QEMU", "95 %", "CPU", "memory"];

fn render(report: &DemoReport, elapsed: Duration) -> String {
    let options = report.options;
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    rows.extend(report.variants.iter().map(|variant| row(report, variant)));
    let checkpoints = options.checkpoints * u64::from(options.rounds);
    let conditions = format!(
        "{} of guest RAM, {} dirty pages every {} ms, {} channels over loopback TCP; primary and secondary share the cores {}; \
         {checkpoints} checkpoints each, in {:.0} s.",
        mebibytes(options.ram.0),
        options.pages,
        options.interval,
        options.channels,
        list(report.cores),
        elapsed.as_secs_f64(),
    );
    [
        wrapped(message::EXPLANATION),
        wrapped(&conditions),
        table(&rows),
        wrapped(message::LEGEND),
        wrapped(&report.message),
    ]
    .join("\n")
}

fn list(cores: &[usize]) -> String {
    let cores: Vec<_> = cores.iter().map(ToString::to_string).collect();
    cores.join(", ")
}

/// What a contestant's checkpoints took, and the ratio of the median to the baseline's.
fn row(report: &DemoReport, variant: &VariantReport) -> Vec<String> {
    let loaded = report.comparison.row("loaded", &variant.variant.name);
    let ratio = loaded.and_then(|row| row.ratios).map(|ratios| ratios.p50);
    let interval = ratio.and_then(|ratio| ratio.interval);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        variant.variant.name.clone(),
        or_dash(loaded.map(|row| display_nanoseconds(row.p50_ns))),
        or_dash(loaded.map(|row| display_nanoseconds(row.p99_ns))),
        or_dash(ratio.and_then(|ratio| ratio.ratio).map(three_digits)),
        or_dash(interval.map(|interval| {
            let [low, high] = [interval.low, interval.high].map(three_digits);
            format!("{low}–{high}")
        })),
        or_dash(variant.cpu_ns_per_checkpoint.map(display_nanoseconds)),
        match variant.memory_bytes {
            0 => "-".to_owned(),
            bytes => mebibytes(bytes),
        },
    ]
}

/// A ratio in four columns.
fn three_digits(ratio: f64) -> String {
    match ratio {
        9999.5.. => format!("{ratio:.0e}"),
        99.95.. => format!("{ratio:.0}"),
        9.995.. => format!("{ratio:.1}"),
        _ => format!("{ratio:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contestant_has_a_line_of_eighty_columns() {
        let figures = ["9.99 ms", "99.9 ms", "0.99", "0.99–99.9", "99.9 ms", "1023 MiB"];
        let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
        rows.extend(Variant::all(true).into_iter().map(|variant| {
            let figures = figures.iter().map(|figure| (*figure).to_owned());
            std::iter::once(variant.name).chain(figures).collect()
        }));
        let table = table(&rows);
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
        assert_eq!(
            [0.834, 9.994, 9.996, 99.96, 9999.4, 23_456.0].map(three_digits),
            ["0.83", "9.99", "10.0", "100", "9999", "2e4"]
        );
    }
}
