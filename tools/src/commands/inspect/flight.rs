//! A flight recorder: the file in a RAM directory, or one that `slow --save` has written.

use super::{InspectArgs, Kind};
use crate::flight::{By, SlowReport, TOP, file};
use crate::output::{CommandError, Lines, print, print_json};
use colo_ring::metrics::display_nanoseconds;
use colo_ring::store::{FlightLog, FlightRecord};
use schemars::JsonSchema;
use serde::Serialize;

/// The overview.
#[derive(Serialize, JsonSchema)]
pub(super) struct Content {
    /// Its slowest checkpoints, as `slow` shows them.
    recorder: SlowReport,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CommandError> {
    args.allow("a flight recorder", &[Kind::Checkpoints], true)?;
    let log = file::read(&args.file).map_err(CommandError::failed)?;
    if args.kind.is_some() {
        return list(args, &log);
    }
    let report = SlowReport::of(&log, None, TOP, By::Pause);
    match args.json {
        true => print_json(&args.inspection("flight recorder", Content { recorder: report })),
        false => print(&format!(
            "flight recorder, room for {}; {}",
            log.capacity,
            report.table()
        )),
    }
}

fn list(args: &InspectArgs, log: &FlightLog) -> Result<(), CommandError> {
    let mut lines = Lines::new(args.json, &args.around_list("flight recorder"), "checkpoints")?;
    let head = "number|at s|reply|send|ram|state|commit|loaded|pages|pause";
    lines.head(head, &[7, 9, 7, 7, 7, 7, 7, 7, 6, 7])?;
    for record in &log.records {
        if args.wants_checkpoint(Some(record.checkpoint)) {
            lines.item(record, || cells(record))?;
        }
    }
    lines.finish()
}

fn cells(record: &FlightRecord) -> Vec<String> {
    let moments = [
        record.reply_ns,
        record.send_ns,
        record.ram_ns,
        record.device_state_ns,
        record.committed_ns,
        record.loaded_ns,
    ];
    let begin = [
        record.checkpoint.to_string(),
        format!("{:.3}", record.requested_at_ns as f64 / 1e9),
    ];
    let end = [record.pages.to_string(), display_nanoseconds(record.pause_ns())];
    let moments = moments.map(display_nanoseconds);
    begin.into_iter().chain(moments).chain(end).collect()
}
