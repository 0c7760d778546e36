//! Makes a capture small enough for the repository: see [`colo_ring_tests::shrink`].

use clap::Parser;
use colo_ring_tests::shrink::{read_capture, read_directory, shrink};
use std::path::PathBuf;
use std::process::ExitCode;

/// Replaces the content of every page on the multifd channels by a fingerprint of it
///
/// Everything else stays byte for byte: headers, page lists, the main channel with its device state, the answers,
/// and how the bytes came in time.
#[derive(Parser)]
#[command(
    name = "shrink-capture",
    after_help = "Example:\n  cargo run --release -p colo-ring-tests --bin shrink-capture -- guest1.cap tests/captures/small.cap"
)]
struct Cli {
    /// A capture file, or a directory with connN.p2s.bin, connN.s2p.bin and index.jsonl
    input: PathBuf,
    /// The capture file to write
    output: PathBuf,
    /// What the primary was
    #[arg(long)]
    primary: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let recording = match cli.input.is_dir() {
        true => read_directory(&cli.input),
        false => read_capture(&cli.input),
    };
    match recording.and_then(|recording| shrink(recording, cli.primary, &cli.output)) {
        Ok(shrunk) => {
            println!("{shrunk}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("shrink-capture: {message}");
            ExitCode::FAILURE
        }
    }
}
