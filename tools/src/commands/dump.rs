//! `colo-ring dump`: a session's last committed checkpoint as files.

use crate::control::ask;
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json, table};
use clap::Args;
use colo_ring::receiver::{Dumped, DumpedBlock, Request};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `colo-ring dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    /// Number of the session, as `colo-ring status` lists it
    #[arg(long, value_name = "N")]
    session: u32,

    /// Directory for the files; made if it is not there. The receiver's user must be able to write it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Print what was written as JSON, as in DIR/checkpoint.json
    #[arg(long)]
    json: bool,
}

/// Has the receiver write a session's last committed checkpoint to files.
///
/// # Errors
/// If the receiver does not answer or refuses, or the directory cannot be made.
pub fn run(args: &DumpArgs) -> Result<ExitCode, CommandError> {
    let failed = |error: std::io::Error| CommandError::Failed(format!("{}: {error}", args.out.display()));
    let is_new = !args.out.exists();
    std::fs::create_dir_all(&args.out).map_err(failed)?;
    // The receiver runs elsewhere: a relative path means nothing to it.
    let directory = args.out.canonicalize().map_err(failed)?;
    let request = Request::Dump {
        session: args.session,
        directory: directory.clone(),
    };
    let dumped: Dumped = ask(&args.control, &request).inspect_err(|_| {
        if is_new {
            // Leaves it if something has been written after all.
            let _ = std::fs::remove_dir(&directory);
        }
    })?;
    if args.json {
        print_json(&dumped)?;
    } else {
        print(&render(&dumped, &directory))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn render(dumped: &Dumped, directory: &Path) -> String {
    let mut text = format!(
        "checkpoint {} of session {} ({}) is in {}\n",
        dumped.checkpoint,
        dumped.session,
        dumped.machine,
        directory.display()
    );
    let row = |block: &DumpedBlock| {
        vec![
            block.file.clone(),
            format!("{} bytes", block.used_length),
            block.name.clone(),
        ]
    };
    text.push_str(&table(&dumped.blocks.iter().map(row).collect::<Vec<_>>()));
    text
}
