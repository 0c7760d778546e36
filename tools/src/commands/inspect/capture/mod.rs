//! A capture: its connections as they are in the file, and the session in them as the protocol sees it.
//!
//! The connections are read record by record and need no memory; everything else is found by [`Streams`], which holds
//! the capture whole, up to half of the machine's memory.

mod lists;
mod overview;
mod session;

use super::{InspectArgs, Kind};
use crate::output::{CommandError, print, print_json, printable, tell};
use crate::streams::{Streams, StreamsError};
use colo_ring::metrics::display_nanoseconds;
pub(super) use lists::{CheckpointItem, ElementItem, PacketItem};
use lists::{list_checkpoints, list_elements, list_packets};
use overview::Overview;
use schemars::JsonSchema;
use serde::Serialize;
use session::SessionOverview;

/// The overview.
#[derive(Serialize, JsonSchema)]
pub(super) struct Content<'a> {
    /// What is in the file, without a look at what it means.
    capture: &'a Overview,
    /// The session in it; null if there is none, or if the connections alone were asked for.
    session: Option<&'a SessionOverview>,
    /// Why there is none.
    no_session: Option<&'a str>,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CommandError> {
    let kinds = [
        Kind::Connections,
        Kind::Checkpoints,
        Kind::Sections,
        Kind::Packets,
    ];
    args.allow("a capture", &kinds, true)?;
    let failed = |error: StreamsError| CommandError::Failed(format!("{}: {error}", args.file.display()));
    match args.kind {
        None | Some(Kind::Connections) => overview(args),
        Some(kind) => {
            let streams = Streams::load(&args.file).map_err(failed)?;
            for note in &streams.notes {
                tell(&format!("{}: {}", args.file.display(), printable(note)));
            }
            match kind {
                Kind::Checkpoints => list_checkpoints(args, &streams),
                Kind::Sections => list_elements(args, &streams),
                _ => list_packets(args, &streams),
            }
        }
    }
}

fn overview(args: &InspectArgs) -> Result<(), CommandError> {
    let file = Overview::read(&args.file)
        .map_err(|error| CommandError::Failed(format!("{}: {error}", args.file.display())))?;
    let session = match args.kind {
        None => Some(Streams::load(&args.file).map(|streams| SessionOverview::of(&streams))),
        // The connections alone were asked for: they need no memory.
        Some(_) => None,
    };
    let reason = match &session {
        Some(Err(error)) => Some(error.to_string()),
        _ => None,
    };
    let session = session.and_then(Result::ok);
    if args.json {
        return print_json(&args.inspection(
            "capture",
            Content {
                capture: &file,
                session: session.as_ref(),
                no_session: reason.as_deref(),
            },
        ));
    }
    let mut text = file.render();
    if let Some(session) = &session {
        text.push_str(&session.render());
    }
    if let Some(reason) = reason {
        text.push_str(&format!("\nno session can be shown: {reason}\n"));
    }
    print(&text)
}

/// A time since the start of the capture.
fn time(nanoseconds: u64) -> String {
    format!("{:.6}", nanoseconds as f64 / 1e9)
}

fn time_or_dash(nanoseconds: Option<u64>) -> String {
    nanoseconds.map_or_else(|| "-".to_owned(), time)
}

fn duration_or_dash(nanoseconds: Option<u64>) -> String {
    nanoseconds.map_or_else(|| "-".to_owned(), display_nanoseconds)
}

fn number_or_dash(number: Option<u64>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}
