//! `colo-ring dump`: a session's last committed checkpoint as files.

use crate::control::ask;
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json, table, tell};
use clap::Args;
use colo_ring::receiver::{Dumped, DumpedBlock, DumpedDisk, Request};
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

    /// Leave the guest's disks out; otherwise they are copied once the session has ended
    #[arg(long)]
    no_disks: bool,

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
        without_disks: args.no_disks,
    };
    let dumped: Dumped = ask(&args.control, &request).inspect_err(|_| {
        if is_new {
            // Leaves it if something has been written after all.
            let _ = std::fs::remove_dir(&directory);
        }
    })?;
    if let Some(left_out) = dumped.disks_left_out.as_deref().filter(|_| !args.no_disks) {
        tell(&format!("WARNING: the dump is without disks {left_out}"));
    }
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
    let disk = |disk: &DumpedDisk| {
        vec![
            disk.file.clone(),
            format!("{} bytes", disk.size_bytes),
            format!("disk {}", disk.name),
        ]
    };
    let rows = dumped.blocks.iter().map(row).chain(dumped.disks.iter().map(disk));
    text.push_str(&table(&rows.collect::<Vec<_>>()));
    text
}
