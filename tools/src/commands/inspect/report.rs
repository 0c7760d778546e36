//! A measured run, or a receiver's report.

use super::{InspectArgs, Kind};
use crate::comparison::{self, Options, Run};
use crate::output::{CommandError, Lines, print, print_json, printable};
use crate::run_file::{self, Checkpoint, RunFile, read_bounded};
use colo_ring::metrics::{self, Report, display_nanoseconds};
use serde::{Deserialize, Serialize};

/// The part that names the rest of the keys.
#[derive(Deserialize)]
struct Head {
    schema: String,
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
    #[derive(Serialize)]
    struct Content<'a> {
        report: &'a Report,
    }
    if args.json {
        return print_json(&args.inspection("receiver's report", Content { report }));
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
        #[derive(Serialize)]
        struct Content<'a> {
            run: &'a comparison::Comparison<'a>,
        }
        return print_json(&args.inspection("run", Content { run: &compared }));
    }
    print(&format!("{text}\n{}", compared.table()))
}

fn list(args: &InspectArgs, run: &RunFile) -> Result<(), CommandError> {
    let phases: Vec<_> = run.phases().into_iter().collect();
    let mut lines = Lines::new(args.json, &args.inspection("run", ()), "checkpoints")?;
    let head = ["checkpoint", "round", "at s", "pages", "zero", "bytes"];
    let head = [&head[..], &phases, &["disturbed"]].concat().join("|");
    let widths = [vec![10, 5, 10, 8, 8, 12], vec![9; phases.len()], vec![9]].concat();
    lines.head(&head, &widths)?;
    let wanted = |checkpoint: &&Checkpoint| args.wants_checkpoint(Some(checkpoint.n));
    for checkpoint in run.checkpoints.iter().filter(wanted) {
        lines.item(checkpoint, || {
            let begin = vec![
                checkpoint.n.to_string(),
                checkpoint.round.to_string(),
                format!("{:.3}", checkpoint.at_ns as f64 / 1e9),
                checkpoint.pages.to_string(),
                checkpoint.zero_pages.to_string(),
                checkpoint.bytes.to_string(),
            ];
            let phase = |name: &&str| {
                let nanoseconds = checkpoint.phases_ns.get(*name);
                nanoseconds.map_or_else(|| "-".to_owned(), |nanoseconds| display_nanoseconds(*nanoseconds))
            };
            let phases = phases.iter().map(phase).collect();
            let disturbed = checkpoint.disturbed.as_deref().unwrap_or("-");
            [begin, phases, vec![printable(disturbed)]].concat()
        })?;
    }
    lines.finish()
}
