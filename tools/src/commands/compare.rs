//! `colo-ring compare`: runs side by side, as a table, JSON or a page.

use crate::comparison::{CompareError, Options, Run, Unit, gather, html, report};
use crate::output::{CommandError, print, print_json, printable, tell};
use clap::Args;
use colo_ring::files::{self, Readers};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `colo-ring compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Runs: PREFIX.run.json, a receiver's PREFIX.json (its logs lie beside it), or an interval log (.hlog); NAME=
    /// sets the name in tables
    #[arg(value_name = "[NAME=]FILE", required = true)]
    files: Vec<String>,

    /// Compare this phase alone (repeatable): pause, transfer, loaded...
    #[arg(long, value_name = "NAME")]
    phase: Vec<String>,

    /// The run that the others are divided by; the first one unless given
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,

    /// Add up runs of one name: they are rounds of one measurement
    #[arg(long)]
    merge: bool,

    /// Unit of the values in interval logs (.hlog) that are given by themselves
    #[arg(long, value_enum, value_name = "UNIT", default_value = "ns")]
    unit: Unit,

    /// Seed of the resampling: the same seed gives the same intervals
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Write one HTML page with plots, which needs no network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Print JSON (schema colo-ring.compare, version 1)
    #[arg(long)]
    json: bool,
}

/// Reads the runs, compares them, and prints the result.
///
/// # Errors
/// If a file cannot be read or runs cannot be compared.
pub fn run(args: &CompareArgs) -> Result<ExitCode, CommandError> {
    let failed = |error: CompareError| match error {
        CompareError::SameName { .. }
        | CompareError::Name(_)
        | CompareError::Baseline { .. }
        | CompareError::Phase { .. } => CommandError::Usage(error.to_string()),
        _ => CommandError::Failed(error.to_string()),
    };
    let read = |file: &String| Run::read(file, args.unit);
    let runs = args
        .files
        .iter()
        .map(read)
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let runs = gather(runs, args.merge).map_err(failed)?;
    let options = Options {
        baseline: args.baseline.clone(),
        phases: args.phase.clone(),
        seed: args.seed,
        ..Options::default()
    };
    let comparison = report(&runs, options).map_err(failed)?;
    if let Some(path) = &args.html {
        files::write(path, html::page(&comparison).as_bytes(), Readers::ByUmask).map_err(|error| {
            CommandError::Failed(format!("cannot write the page {}: {error}", path.display()))
        })?;
    }
    if args.json {
        print_json(&comparison)?;
    } else {
        for run in &runs {
            for note in run.notes() {
                tell(&format!("{}: {}", run.name(), printable(note)));
            }
        }
        print(&comparison.table())?;
    }
    Ok(ExitCode::SUCCESS)
}
