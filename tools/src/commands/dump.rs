//! `colo-ring dump`: a session's last committed checkpoint as files.

use crate::control::{Conversation, WhichSession};
use crate::options::ControlAddress;
use crate::output::{CommandError, print, print_json, table, tell};
use crate::signals;
use clap::Args;
use colo_ring::receiver::{DumpContents, DumpFiles, Dumped, DumpedBlock, DumpedDisk, Request, SessionTitle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `colo-ring dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The receiver's control socket
    #[arg(long, value_name = "unix:PATH")]
    control: ControlAddress,

    #[command(flatten)]
    which: WhichSession,

    /// Directory for the files; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Leave the guest's disks out; otherwise they are copied once the session has ended
    #[arg(long)]
    no_disks: bool,

    /// Print what was written as JSON, as in DIR/checkpoint.json (schema colo-ring.checkpoint, version 1)
    #[arg(long)]
    json: bool,
}

/// Has the receiver write a session's last committed checkpoint to files.
///
/// # Errors
/// If the receiver does not answer or refuses, or the files cannot be made.
pub fn run(args: &DumpArgs) -> Result<ExitCode, CommandError> {
    let failed = |error: std::io::Error| CommandError::Failed(format!("{}: {error}", args.out.display()));
    let is_new = !args.out.exists();
    std::fs::create_dir_all(&args.out).map_err(failed)?;
    let directory = args.out.canonicalize().map_err(failed)?;
    let (title, dumped) = dump(args, &directory).inspect_err(|_| {
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
        print(&render(&title, &dumped, &directory))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the files, has the receiver write to them, and gives them their names.
fn dump(args: &DumpArgs, directory: &Path) -> Result<(SessionTitle, Dumped), CommandError> {
    let mut conversation = Conversation::open(&args.control)?;
    let title = args.which.find(&mut conversation)?;
    let session = title.session;
    let mut contents: DumpContents = conversation.ask(&Request::Contents { session })?;
    if args.no_disks {
        contents.disks.clear();
    }
    let files = DumpFiles::create(directory, contents).map_err(CommandError::failed)?;
    let parts = files.parts();
    signals::on_end(move || {
        for part in parts {
            // One that is complete has another name.
            let _ = std::fs::remove_file(part);
        }
        std::process::exit(1);
    })?;
    let request = Request::Dump {
        session,
        disks: files.disks(),
    };
    let dumped = conversation.ask_with(&request, &files.descriptors())?;
    let dumped = files.finish(dumped).map_err(CommandError::failed)?;
    Ok((title, dumped))
}

fn render(title: &SessionTitle, dumped: &Dumped, directory: &Path) -> String {
    let mut text = format!(
        "checkpoint {} of session {title}, {}, is in {}\n",
        dumped.checkpoint,
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
