//! `colo-ring import`: a session that was recorded with tcpdump becomes a capture file.

mod packets;
mod reassembly;
mod session;
#[cfg(test)]
mod tests;

use crate::capture_file::{CaptureError, CaptureInfo, CaptureWriter, Compression, Totals};
use crate::output::{CommandError, mebibytes, print, print_json, tell};
use crate::streams::Streams;
use clap::Args;
use colo_ring::host::Machine;
use schemars::JsonSchema;
use serde::Serialize;
use session::Importer;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use thiserror::Error;

/// Options of `colo-ring import`.
#[derive(Debug, Args, Serialize, JsonSchema)]
pub struct ImportArgs {
    /// The file of tcpdump: pcap or pcapng, of Ethernet, Linux cooked (-i any), loopback or raw IP
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The TCP port that the secondary listened on
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,

    /// The capture file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Replace the capture file if it exists
    #[arg(long)]
    force: bool,

    /// How the capture file is compressed
    #[arg(long, value_enum, default_value_t = Compression::Zstd)]
    compress: Compression,

    /// Print JSON (schema colo-ring.import, version 1)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// Why a recording cannot be imported.
#[derive(Debug, Error)]
pub(crate) enum ImportError {
    /// It cannot be opened.
    #[error("{}: {source}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error(
        "this is neither pcap nor pcapng; record with tcpdump -w FILE, and unpack it if it is compressed"
    )]
    Foreign,
    /// It cannot be read on.
    #[error("the file is damaged at byte {offset}: {what}")]
    Damaged {
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// The times of an interface cannot be understood.
    #[error("an interface of the file has times of a resolution that is not known ({0:#x})")]
    Resolution(u8),
    /// Packets without times.
    #[error("the file has packets without times (simple packet blocks); record with tcpdump or dumpcap")]
    NoTimes,
    /// A packet names an interface that was not described.
    #[error("a packet is of interface {0}, which the file does not describe")]
    Interface(u32),
    /// A kind of network that is not read.
    #[error("link type {0} is not read; record with tcpdump on an Ethernet device, lo or any")]
    Link(i32),
    /// The recorder has cut a segment off.
    #[error(
        "packet {packet} was recorded without its last {cut} bytes: record whole packets, with tcpdump -s 0; \
         what came before is in the capture"
    )]
    Cut {
        /// Its number in the file.
        packet: u64,
        /// Bytes.
        cut: u32,
    },
    /// Bytes of a connection were not recorded.
    #[error(
        "connection {connection} ({label}), {direction}: bytes {begin} to {end} were not recorded, so nothing behind them \
         can be used: tcpdump prints how many packets it dropped, and -B 65536 gives it a larger buffer; what came before \
         is in the capture"
    )]
    Missing {
        /// The connection's number in the capture.
        connection: u16,
        /// Its ends.
        label: String,
        /// Which direction.
        direction: &'static str,
        /// The first byte, counted from the direction's begin.
        begin: u64,
        /// The byte behind the last.
        end: u64,
    },
    /// More connections than a capture takes.
    #[error("the recording has more than 65535 connections to that port")]
    TooManyConnections,
    /// No connection at all.
    #[error(
        "the recording has no connection to TCP port {0} from its begin on; is it the port that the secondary listened on, and was tcpdump started before the migration?"
    )]
    Nothing(u16),
    /// The capture file cannot be written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// What was imported.
#[derive(Serialize, JsonSchema)]
pub(crate) struct ImportReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: &'a ImportArgs,
    /// Where the command ran.
    machine: Machine,
    /// Packets in the file of tcpdump.
    packets: u64,
    /// What is in the capture.
    recorded: Totals,
    /// Complete checkpoints of the session; null if it cannot be played.
    checkpoints: Option<usize>,
    /// What was lost, or is not as usual.
    notes: Vec<String>,
}

/// Imports the recording.
///
/// # Errors
/// If it cannot be read or the capture not be written, or something of it is missing: what came before is in the
/// capture then.
pub fn run(args: &ImportArgs) -> Result<ExitCode, CommandError> {
    let imported = import(args);
    let (recorded, packets, mut notes, error) = imported.map_err(|error| failed(args, &error))?;
    let checkpoints = match Streams::load(&args.out) {
        Ok(streams) => {
            notes.extend(streams.notes);
            Some(streams.checkpoints.len())
        }
        Err(error) => {
            notes.push(error.to_string());
            None
        }
    };
    notes
        .iter()
        .for_each(|note| tell(&format!("{}: {note}", args.file.display())));
    if args.json {
        print_json(&ImportReport {
            schema: "colo-ring.import",
            schema_version: 1,
            options: args,
            machine: Machine::read(),
            packets,
            recorded,
            checkpoints,
            notes,
        })?;
    } else {
        let playable = match checkpoints {
            Some(count) => format!("{count} complete checkpoints"),
            None => "no session that can be played".to_owned(),
        };
        print(&format!(
            "{}: {} connections, {:.1} MiB to the secondary; {playable}\n",
            args.out.display(),
            recorded.connections,
            mebibytes(recorded.bytes_to_secondary)
        ))?;
    }
    match error {
        None => Ok(ExitCode::SUCCESS),
        Some(error) => Err(failed(args, &error)),
    }
}

/// Writes the capture. What is missing is an error beside the result, since what came before is there.
fn import(args: &ImportArgs) -> Result<(Totals, u64, Vec<String>, Option<ImportError>), ImportError> {
    let options = serde_json::to_value(args).unwrap_or_default();
    let mut importer = Importer::new(args.port, |began, primary, secondary| {
        let info = CaptureInfo {
            created_unix_ns: u64::try_from(began.as_nanos()).unwrap_or(u64::MAX),
            primary: Some(primary),
            secondary: Some(secondary),
            ..CaptureInfo::now("pcap", options.clone())
        };
        if !args.force {
            return Ok(CaptureWriter::create(&args.out, &info, args.compress)?);
        }
        Ok(CaptureWriter::replace(&args.out, &info, args.compress)?)
    });
    let file = File::open(&args.file).map_err(|source| ImportError::Open {
        path: args.file.clone(),
        source,
    });
    let read = file.and_then(|file| packets::read(file, |segment| importer.take(&segment)));
    let (packets, mut notes, error) = match read {
        Ok(summary) => {
            let mut notes = Vec::new();
            if summary.is_torn {
                notes.push("it ends inside a packet; all before it is used".to_owned());
            }
            if summary.fragments > 0 {
                notes.push(format!("{} IP fragments are left out", summary.fragments));
            }
            (summary.packets, notes, None)
        }
        Err(error) => (0, Vec::new(), Some(error)),
    };
    let (totals, more, missing) = importer.finish(error)?;
    notes.extend(more);
    Ok((totals, packets, notes, missing))
}

fn failed(args: &ImportArgs, error: &ImportError) -> CommandError {
    CommandError::Failed(format!("{}: {error}", args.file.display()))
}

/// What a fuzzer gives to the import: a recording of packets, of which connections to port 4444 are taken. Counts those.
#[doc(hidden)]
pub fn fuzz(recording: &[u8]) -> usize {
    let mut importer = Importer::new(4444, |_, primary, secondary| {
        let info = CaptureInfo {
            primary: Some(primary),
            secondary: Some(secondary),
            ..CaptureInfo::now("pcap", serde_json::Value::Null)
        };
        Ok(CaptureWriter::new(io::sink(), &info, Compression::None)?)
    });
    let read = packets::read(recording, |segment| importer.take(&segment));
    match importer.finish(read.err()) {
        Ok((totals, ..)) => usize::try_from(totals.connections).unwrap_or(usize::MAX),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            0
        }
    }
}
