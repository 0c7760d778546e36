//! A measured run, or a receiver's report.

use super::{InspectArgs, Kind};
use crate::comparison::{self, Comparison, Options, Run};
use crate::output::{CommandError, Lines, mebibytes, print, print_json, printable};
use crate::run_file::{self, Checkpoint, RunFile, read_bounded};
use colo_ring::metrics::{self, Report, display_nanoseconds};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The part that names the rest of the keys.
#[derive(Deserialize)]
struct Head {
    schema: String,
}

/// The overview of a report.
#[derive(Serialize, JsonSchema)]
pub(super) struct ReportContent<'a> {
    /// All of it.
    report: &'a Report,
}

/// The overview of a run.
#[derive(Serialize, JsonSchema)]
pub(super) struct RunContent<'a> {
    /// Its figures, as `compare` shows them.
    run: &'a Comparison<'a>,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CommandError> {
    let failed = |error: &dyn std::fmt::Display| CommandError::Failed(error.to_string());
    let text = read_bounded(&args.file).map_err(|error| failed(&error))?;
    let json = |error: serde_json::Error| {
        CommandError::Failed(format!(
            "{} is not a file of colo-ring: {error}",
            args.file.display()
        ))
    };
    let head: Head = serde_json::from_slice(&text).map_err(json)?;
    match head.schema.as_str() {
        run_file::SCHEMA => {
            let run = RunFile::parse(&args.file, &text).map_err(|error| failed(&error))?;
            show_run(args, run)
        }
        metrics::SCHEMA => {
            args.allow("a receiver's report", &[], false)?;
            let report: Report = serde_json::from_slice(&text).map_err(json)?;
            show_report(args, &report)
        }
        other => Err(CommandError::Failed(format!(
            "{} has the schema {other:?}, which inspect does not know: it is JSON, print it with jq",
            args.file.display()
        ))),
    }
}

fn show_report(args: &InspectArgs, report: &Report) -> Result<(), CommandError> {
    if args.json {
        return print_json(&args.inspection("receiver's report", ReportContent { report }));
    }
    let mut text = format!(
        "a receiver's report, {} sessions, {:.1} s\nmachine: {}\noptions: {}\n\n{}",
        report.sessions.len() as u64 + report.sessions_not_listed,
        report.duration_ms as f64 / 1000.0,
        printable(&report.machine.to_string()),
        printable(&report.options.to_string()),
        report.total
    );
    if report.samples_dropped > 0 {
        text.push_str(&format!(
            "{} checkpoints are in none of these: the queue of samples was full\n",
            report.samples_dropped
        ));
    }
    if report.intervals_lost > 0 {
        text.push_str(&format!(
            "{} intervals of a second are missing in the logs: they could not be written\n",
            report.intervals_lost
        ));
    }
    for session in &report.sessions {
        text.push_str(&format!("\nsession {}\n{}", session.session, session.summary));
    }
    print(&text)
}

fn show_run(args: &InspectArgs, run: RunFile) -> Result<(), CommandError> {
    args.allow("a measured run", &[Kind::Checkpoints], args.channel.is_none())?;
    if args.kind.is_some() || args.checkpoint.is_some() {
        return list(args, &run);
    }
    let mut text = format!(
        "a measured run: {}\ncommand: {}\noptions: {}\nmachine: {}\n{} checkpoints, {} left out\n",
        run.name,
        printable(&run.command),
        printable(&run.options.to_string()),
        printable(&run.machine.to_string()),
        run.checkpoints.len(),
        run.dropped,
    );
    for note in &run.notes {
        text.push_str(&format!("note: {}\n", printable(note)));
    }
    let runs = [Run::from(run)];
    let compared = comparison::report(&runs, Options::default())
        .map_err(|error| CommandError::Failed(error.to_string()))?;
    if args.json {
        return print_json(&args.inspection("run", RunContent { run: &compared }));
    }
    print(&format!("{text}\n{}", compared.table()))
}

fn list(args: &InspectArgs, run: &RunFile) -> Result<(), CommandError> {
    let phases: Vec<_> = run.phases().into_iter().collect();
    let has_rounds = run.checkpoints.iter().any(|checkpoint| checkpoint.round > 0);
    let is_disturbed = run
        .checkpoints
        .iter()
        .any(|checkpoint| checkpoint.disturbed.is_some());
    let mut columns = vec![("ckpt", 5), ("at s", 8), ("pages", 7), ("MiB", 6)];
    columns.extend(has_rounds.then_some(("round", 5)));
    columns.extend(phases.iter().map(|name| (*name, name.len().max(7))));
    columns.extend(is_disturbed.then_some(("disturbed", 0)));
    let (names, widths): (Vec<_>, Vec<_>) = columns.into_iter().unzip();

    let mut lines = Lines::new(args.json, &args.around_list("run"), "checkpoints")?;
    lines.head(&names.join("|"), &widths)?;
    let wanted = |checkpoint: &&Checkpoint| args.wants_checkpoint(Some(checkpoint.n));
    for checkpoint in run.checkpoints.iter().filter(wanted) {
        lines.item(checkpoint, || {
            let mut cells = vec![
                checkpoint.n.to_string(),
                format!("{:.3}", checkpoint.at_ns as f64 / 1e9),
                checkpoint.pages.to_string(),
                format!("{:.2}", mebibytes(checkpoint.bytes)),
            ];
            cells.extend(has_rounds.then(|| checkpoint.round.to_string()));
            cells.extend(phases.iter().map(|name| {
                let nanoseconds = checkpoint.phases_ns.get(*name);
                nanoseconds.map_or_else(|| "-".to_owned(), |nanoseconds| display_nanoseconds(*nanoseconds))
            }));
            cells.extend(checkpoint.disturbed.as_deref().map(printable));
            cells
        })?;
    }
    lines.finish()
}
