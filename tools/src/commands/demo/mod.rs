//! `colo-ring demo`: a synthetic primary against a receiver of every kind, on this machine alone.
//!
//! All receivers run from the beginning to the end, and get their sessions in turn, in an order that is rotated from
//! round to round: what disturbs the machine meanwhile disturbs them alike.

mod contestant;

use crate::comparison::{self, Comparison, html};
use crate::cores::default_cores;
use crate::options::Size;
use crate::output::{CommandError, ProgressLine, print, print_json, table, tell};
use clap::Args;
use colo_ring::files::{self, Readers};
use colo_ring::host::Machine;
use colo_ring::metrics::Phase;
use contestant::{Contestant, Variant, VariantReport, Warnings};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Built as QEMU's own receiver is: the others are divided by it.
const BASELINE: &str = "threads mirror sync";

/// Where the page goes unless something else is said.
const HTML_DEFAULT: &str = "colo-ring-demo.html";

/// Options of `colo-ring demo`.
#[derive(Debug, Args, Serialize)]
pub struct DemoArgs {
    /// RAM of the synthetic guest
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    #[serde(rename = "ram_bytes")]
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

    /// Also sessions that compress, with zstd and with zlib, and whose pages compress about 3 to 1
    #[arg(long)]
    all: bool,

    /// Write the page of plots there, in place of what is there [default: colo-ring-demo.html in this directory; none
    /// with --json]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Print JSON (schema colo-ring.demo, version 2)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// Everything the demo found out.
#[derive(Serialize)]
struct DemoReport<'a> {
    schema: &'static str,
    schema_version: u32,
    options: &'a DemoArgs,
    machine: Machine,
    cores: &'a [usize],
    variants: Vec<VariantReport>,
    /// The primary's `loaded` of all variants, with intervals.
    comparison: Comparison<'a>,
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
        .any(|run| run.name() == BASELINE)
        .then(|| BASELINE.to_owned());
    let compare = |phases: &[&str]| {
        let options = comparison::Options {
            baseline: baseline.clone(),
            phases: phases.iter().map(|phase| (*phase).to_owned()).collect(),
            ..comparison::Options::default()
        };
        comparison::report(&runs, options).map_err(CommandError::failed)
    };
    let report = DemoReport {
        schema: "colo-ring.demo",
        schema_version: 2,
        options: args,
        machine: Machine::read(),
        cores: &cores,
        variants,
        comparison: compare(&["loaded"])?,
        warnings: warnings.take(),
    };
    let default_page = (!args.json).then_some(Path::new(HTML_DEFAULT));
    let page = args.html.as_deref().or(default_page);
    let written = page.map(|page| {
        files::write(page, html::page(&compare(&[])?).as_bytes(), Readers::ByUmask).map_err(|error| {
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
    let compressed = Variant::compressed().into_iter();
    // Without channels there is nothing that compresses.
    let compressed = compressed.filter(|_| args.all && args.channels > 0);
    for variant in Variant::all().into_iter().chain(compressed) {
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

fn render(report: &DemoReport, elapsed: Duration) -> String {
    let options = report.options;
    let mut head = vec!["p50/p99 in ms".to_owned()];
    head.extend(Phase::ALL.map(|phase| phase.to_string()));
    head.extend(["received", "loaded"].map(str::to_owned));
    let mut rows = vec![head];
    for variant in &report.variants {
        let receiver = Phase::ALL.map(|phase| {
            let figures = variant.receiver.phase(phase);
            (figures.p50_ns, figures.p99_ns)
        });
        let primary = variant.primary.iter();
        let primary = primary.filter(|figures| ["received", "loaded"].contains(&figures.phase));
        let primary = primary.map(|figures| (figures.p50_ns, figures.p99_ns));
        let cells = receiver.into_iter().chain(primary);
        let cells = cells.map(|(p50, p99)| format!("{}/{}", milliseconds(p50), milliseconds(p99)));
        rows.push(
            std::iter::once(variant.variant.name.clone())
                .chain(cells)
                .collect(),
        );
    }
    let checkpoints = options.checkpoints * u64::from(options.rounds);
    format!(
        "{}\n{} of guest RAM, {} dirty pages every {} ms, {} channels over loopback TCP; primary and receiver share cores \
         {:?}; {checkpoints} checkpoints each, in {:.1} s\n\n{}\n\
         uring: reads into registered buffers. recvmsg: io_uring without them. threads mirror sync: as QEMU's own receiver \
         works.\n\
         receiver's clock: reply: REQUEST to REPLY. transfer: SEND to all pages here. vmstate: to the device state here. \
         commit: to LOADED sent.\npause: REPLY to LOADED. flush: copying to the RAM image. \
         primary's clock: received, loaded: from when SEND was due to\n         RECEIVED and to LOADED.\n\n{}",
        report.machine,
        options.ram,
        options.pages,
        options.interval,
        options.channels,
        report.cores,
        elapsed.as_secs_f64(),
        table(&rows),
        report.comparison.table(),
    )
}

/// Milliseconds with three significant digits, at most to the microsecond.
fn milliseconds(nanoseconds: u64) -> String {
    match nanoseconds as f64 / 1e6 {
        ms if ms >= 99.95 => format!("{ms:.0}"),
        ms if ms >= 9.995 => format!("{ms:.1}"),
        ms if ms >= 0.9995 => format!("{ms:.2}"),
        ms => format!("{ms:.3}"),
    }
}
