//! `colo-ring inspect`: what is in a file: a capture, an interval log, a flight recorder, a measured run or a receiver's report.
//!
//! A file's kind follows from its first bytes. Damage is reported with its offset; a file that ends early is
//! shown up to there.

mod capture;
mod elements;
mod flight;
mod log;
mod report;
mod schema;

use crate::capture_file;
use crate::comparison::Unit;
use crate::output::CommandError;
use clap::{Args, ValueEnum};
use colo_ring::store::FlightLog;
pub(crate) use schema::AnyInspection;
use schemars::JsonSchema;
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

/// Name of the schema of all that `inspect --json` prints; the key `file_kind` names the rest of the keys.
const SCHEMA: &str = "colo-ring.inspect";
/// Its version.
const SCHEMA_VERSION: u32 = 1;

/// Options of `colo-ring inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A capture, an interval log (.hlog), a flight recorder, a run (.run.json), or a receiver's report (.json)
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// List these, one by one, instead of the overview; --json has more of each
    #[arg(long, value_enum)]
    kind: Option<Kind>,

    /// Of a capture, list this channel alone: main, or the number of a multifd channel
    #[arg(long, value_name = "main|N")]
    channel: Option<ChannelFilter>,

    /// List these checkpoints alone, both ends included; 0 is what comes before the first
    #[arg(long, value_name = "N|A..B")]
    checkpoint: Option<CheckpointFilter>,

    /// Unit of the values in an interval log
    #[arg(long, value_enum, value_name = "UNIT", default_value = "ns")]
    unit: Unit,

    /// Print JSON (schema colo-ring.inspect, version 1)
    #[arg(long)]
    json: bool,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// Connections of a capture.
    Connections,
    /// Checkpoints of a capture, a run or a flight recorder.
    Checkpoints,
    /// What is on the main channel of a capture: header, sections, messages, device states.
    Sections,
    /// Multifd packets of a capture, and page records of its main channel.
    Packets,
    /// Intervals of a log.
    Intervals,
}

/// One channel of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ChannelFilter {
    /// The main channel.
    Main,
    /// A multifd channel, by its number.
    Multifd(u8),
}

impl FromStr for ChannelFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "main" => Ok(Self::Main),
            number => number
                .parse()
                .map(Self::Multifd)
                .map_err(|_| "main, or the number of a multifd channel".to_owned()),
        }
    }
}

/// A range of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
struct CheckpointFilter(RangeInclusive<u64>);

impl FromStr for CheckpointFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.parse::<u64>().map_err(|_| "N, or A..B".to_owned());
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{first} comes after {last}"));
        }
        Ok(Self(first..=last))
    }
}

/// The options, as they are echoed.
#[derive(Debug, Serialize, JsonSchema)]
struct Echo<'a> {
    /// The file.
    file: &'a PathBuf,
    /// What was asked to be listed; null for the overview.
    kind: Option<Kind>,
    /// The one channel that was asked for; null for all.
    channel: Option<ChannelFilter>,
    /// The checkpoints that were asked for; null for all.
    checkpoint: Option<&'a CheckpointFilter>,
}

/// What is in a file.
#[derive(Debug, Serialize, JsonSchema)]
struct Inspection<'a, T> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: Echo<'a>,
    /// What the file is: `capture`, `interval log`, `flight recorder`, `run` or `receiver's report`.
    file_kind: &'static str,
    #[serde(flatten)]
    content: T,
}

/// Of a list, which is written behind it.
#[derive(Debug, Serialize, JsonSchema)]
struct NoContent {}

impl InspectArgs {
    /// What a list is put into.
    fn around_list(&self, file_kind: &'static str) -> Inspection<'_, NoContent> {
        self.inspection(file_kind, NoContent {})
    }

    fn inspection<T>(&self, file_kind: &'static str, content: T) -> Inspection<'_, T> {
        Inspection {
            schema: SCHEMA,
            schema_version: SCHEMA_VERSION,
            options: Echo {
                file: &self.file,
                kind: self.kind,
                channel: self.channel,
                checkpoint: self.checkpoint.as_ref(),
            },
            file_kind,
            content,
        }
    }

    /// Whether a checkpoint is to be listed. What belongs to none is only listed without a filter.
    fn wants_checkpoint(&self, checkpoint: Option<u64>) -> bool {
        let wanted = |filter: &CheckpointFilter| checkpoint.is_some_and(|number| filter.0.contains(&number));
        self.checkpoint.as_ref().is_none_or(wanted)
    }

    fn wants_channel(&self, channel: ChannelFilter) -> bool {
        self.channel.is_none_or(|wanted| wanted == channel)
    }

    /// Refuses what this kind of file does not have.
    fn allow(&self, file: &str, kinds: &[Kind], filters: bool) -> Result<(), CommandError> {
        if let Some(kind) = self.kind.filter(|kind| !kinds.contains(kind)) {
            return Err(CommandError::Usage(format!(
                "{} is {file}: it has no {kind:?} to list",
                self.file.display()
            )));
        }
        if !filters && (self.channel.is_some() || self.checkpoint.is_some()) {
            return Err(CommandError::Usage(format!(
                "{} is {file}: --channel and --checkpoint are for captures",
                self.file.display()
            )));
        }
        Ok(())
    }
}

/// Shows a file.
///
/// # Errors
/// If it cannot be read or is damaged, or does not have what was asked for.
pub fn run(args: &InspectArgs) -> Result<ExitCode, CommandError> {
    let cannot = |error| CommandError::Failed(format!("cannot read {}: {error}", args.file.display()));
    let mut start = Vec::new();
    let file = File::open(&args.file).map_err(cannot)?;
    let magic = capture_file::MAGIC;
    file.take(magic.len() as u64)
        .read_to_end(&mut start)
        .map_err(cannot)?;
    if start.trim_ascii_start().starts_with(b"{") {
        report::run(args)?;
    } else if FlightLog::is_one(&start) {
        flight::run(args)?;
    } else if start.first() == Some(&magic[0]) || args.file.extension().is_some_and(|name| name == "cap") {
        capture::run(args)?;
    } else {
        log::run(args)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        assert_eq!("main".parse(), Ok(ChannelFilter::Main));
        assert_eq!("15".parse(), Ok(ChannelFilter::Multifd(15)));
        assert!("256".parse::<ChannelFilter>().is_err());
        assert_eq!("7".parse(), Ok(CheckpointFilter(7..=7)));
        assert_eq!("0..3".parse(), Ok(CheckpointFilter(0..=3)));
        for bad in ["", "a", "3..1", "1..", "..2", "-1"] {
            assert!(bad.parse::<CheckpointFilter>().is_err(), "{bad}");
        }
    }
}
