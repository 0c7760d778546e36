//! The guest's disks in a failover: that the fresh QEMU has them, and that they are of the checkpoint.

use super::FailoverArgs;
use crate::control::Conversation;
use crate::guest_disks::{self, DiskUse, GuestDisk};
use crate::output::{CommandError, print, print_json, tell};
use crate::qmp::Qmp;
use colo_ring::receiver::{
    ClaimedCheckpoint, DiskStatus, Request, RestoreReport, RestoredDisk, StatusReport,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::ExitCode;
use thiserror::Error;

/// Longest name of a node in QEMU.
const NODE_NAME_MAX: usize = 31;

/// A file as the kernel knows it, whatever its path.
type FileId = (u64, u64);

/// What a fresh QEMU needs for the disks of a guest.
#[derive(Serialize, JsonSchema)]
pub(crate) struct BlockdevReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The session's number.
    session: u32,
    /// The guest's disks.
    disks: &'a [DiskStatus],
    /// What the command line of a fresh QEMU needs for them, word by word.
    arguments: Vec<String>,
}

/// Prints what a fresh QEMU's command line needs for the disks of a session. Claims nothing.
pub(super) fn print_blockdev(args: &FailoverArgs) -> Result<ExitCode, CommandError> {
    let mut conversation = Conversation::open(&args.control)?;
    let title = args.which.find(&mut conversation)?;
    let status: StatusReport = conversation.ask(&Request::Status)?;
    let found = status
        .sessions
        .iter()
        .find(|session| session.session == title.session);
    let Some(session) = found else {
        return Err(CommandError::Failed(format!("there is no session {title}")));
    };
    let arguments = blockdev_words(&session.disks, is_block_device);
    if args.json {
        print_json(&BlockdevReport {
            schema: "colo-ring.blockdev",
            schema_version: 1,
            session: title.session,
            disks: &session.disks,
            arguments,
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.is_empty() {
        tell(&format!(
            "session {title} has no disks: its guest has none, or they are not protected"
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let quoted = arguments
        .iter()
        .map(|word| shlex::try_quote(word).unwrap_or_else(|_| word.into()));
    let quoted: Vec<_> = quoted.collect();
    let lines = quoted.chunks(2).map(|pair| pair.join(" "));
    print(&format!("{}\n", lines.collect::<Vec<_>>().join(" \\\n")))?;
    tell(
        "these take the place of the primary's own -drive and -blockdev; each -device gets the drive= of its disk",
    );
    Ok(ExitCode::SUCCESS)
}

/// Whether a path is that of a block device, which QEMU has another driver for.
fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|about| about.file_type().is_block_device())
}

/// `-blockdev` for each disk, with a node of its name.
fn blockdev_words(disks: &[DiskStatus], is_block_device: impl Fn(&Path) -> bool) -> Vec<String> {
    let words = disks.iter().enumerate().flat_map(|(number, disk)| {
        let file = disk.base.display().to_string().replace(',', ",,");
        let node = node_name(number, &disk.name);
        let driver = match is_block_device(&disk.base) {
            true => "host_device",
            false => "file",
        };
        let blockdev = format!("driver=raw,node-name={node},file.driver={driver},file.filename={file}");
        ["-blockdev".to_owned(), blockdev]
    });
    words.collect()
}

fn node_name(number: usize, name: &str) -> String {
    let is_allowed =
        name.len() <= NODE_NAME_MAX && name.starts_with(|first: char| first.is_ascii_alphabetic());
    match is_allowed {
        true => name.to_owned(),
        false => format!("disk{number}"),
    }
}

/// Checks that a QEMU that waits for the checkpoint has its disks.
pub(super) fn check(qmp: &mut Qmp, claimed: &ClaimedCheckpoint, is_waived: bool) -> Result<(), CommandError> {
    let disks = guest_disks::list(qmp).map_err(CommandError::failed)?;
    let nodes = qmp
        .execute("query-named-block-nodes", &json!({"flat": true}))
        .map_err(CommandError::failed)?;
    let files = nodes.as_array().into_iter().flatten();
    let files: HashSet<FileId> = files
        .filter_map(|node| file_id(Path::new(node["file"].as_str()?)))
        .collect();
    for disk in &claimed.disks {
        let Some(id) = file_id(&disk.base) else {
            return Err(CommandError::Failed(format!(
                "disk {} of the checkpoint: {} cannot be read here",
                disk.name,
                disk.base.display()
            )));
        };
        if files.contains(&id) {
            continue;
        }
        let missing = format!(
            "this QEMU does not use {}, which is the checkpoint's disk {}",
            disk.base.display(),
            disk.name
        );
        match is_waived {
            true => tell(&format!("WARNING: {missing}")),
            false => {
                return Err(CommandError::Failed(format!(
                    "{missing}; `failover --print-blockdev` prints what its command line needs; --other-disks if what \
                     it uses instead is that disk's content at this checkpoint"
                )));
            }
        }
    }
    tell_of_others(&disks, claimed);
    Ok(())
}

/// Says which disks the guest would find otherwise than its memory has them.
fn tell_of_others(disks: &[GuestDisk], claimed: &ClaimedCheckpoint) {
    let bases: HashSet<FileId> = (claimed.disks.iter())
        .filter_map(|disk| file_id(&disk.base))
        .collect();
    let is_of_checkpoint = |disk: &GuestDisk| {
        let ids = disk.files.iter().filter_map(|file| file_id(Path::new(file)));
        ids.into_iter().any(|id| bases.contains(&id))
    };
    for disk in disks {
        if disk.usage == DiskUse::Writable && !is_of_checkpoint(disk) {
            tell(&format!(
                "WARNING: disk {} ({}) is not one of the checkpoint's: it is not of the same instant as the guest's \
                 memory, which destroys file systems on it",
                disk.name, disk.file
            ));
        }
    }
}

/// Why the memory of a checkpoint must not run with a disk.
#[derive(Debug, PartialEq, Eq, Error)]
pub(super) enum DiskNotReady {
    #[error("disk {disk} is at checkpoint {checkpoint} (all of it: {is_all}), and the memory is at {memory}")]
    At {
        disk: String,
        checkpoint: u64,
        is_all: bool,
        memory: u64,
    },
    #[error("the receiver does not say at which checkpoint disk {0} is")]
    Unknown(String),
}

/// Checks that the receiver has left every disk of the checkpoint as the memory needs it.
///
/// # Errors
/// The first disk of which it has not.
pub(super) fn check_restored(
    claimed: &ClaimedCheckpoint,
    restored: &RestoreReport,
) -> Result<(), DiskNotReady> {
    for disk in &claimed.disks {
        let found = restored.disks.iter().find(|one| one.name == disk.name);
        let is_ready = |one: &RestoredDisk| one.drained && one.epoch == restored.checkpoint;
        match found {
            Some(one) if is_ready(one) => {}
            Some(one) => {
                return Err(DiskNotReady::At {
                    disk: disk.name.clone(),
                    checkpoint: one.epoch,
                    is_all: one.drained,
                    memory: restored.checkpoint,
                });
            }
            None => return Err(DiskNotReady::Unknown(disk.name.clone())),
        }
    }
    Ok(())
}

/// A line for each disk.
pub(super) fn lines(restored: &RestoreReport) -> String {
    let line = |disk: &RestoredDisk| {
        format!(
            "disk {} is {}, as at checkpoint {}\n",
            disk.name,
            disk.path.display(),
            disk.epoch
        )
    };
    restored.disks.iter().map(line).collect()
}

fn file_id(path: &Path) -> Option<FileId> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::tests::{Responder, SocketPath, monitor};
    use colo_ring::failover::StreamReport;
    use colo_ring::receiver::DiskState;
    use serde_json::Value;
    use std::path::PathBuf;
    use std::time::Duration;

    fn disk(name: &str, base: &Path) -> DiskStatus {
        DiskStatus {
            name: name.to_owned(),
            base: base.to_owned(),
            size_bytes: 4096,
            state: DiskState::Lost,
            log_bytes: 0,
            lag_bytes: 0,
            lag_epochs: 0,
            epoch: Some(3),
        }
    }

    fn claimed(disks: Vec<DiskStatus>) -> ClaimedCheckpoint {
        ClaimedCheckpoint {
            session: 1,
            checkpoint: 3,
            checkpoint_age_ms: 1,
            guest: None,
            uuid: None,
            listener: None,
            peer: "a primary".to_owned(),
            end: None,
            machine: "pc".to_owned(),
            blocks: Vec::new(),
            disks,
        }
    }

    /// A QEMU whose only disk is in that file.
    fn qemu(file: PathBuf) -> SocketPath {
        let image = json!({"virtual-size": 4096, "filename": file});
        let respond: Responder = Box::new(move |command, _| match command {
            "query-block" => Ok(json!([{"device": "vda", "qdev": "vda", "inserted":
                {"node-name": "n0", "ro": false, "file": file, "image": image}}])),
            "query-named-block-nodes" => Ok(json!([{"node-name": "n0", "file": file}])),
            "qom-get" => Ok(Value::Null),
            other => Err(format!("{other}: not now")),
        });
        monitor((11, 1, 3), respond)
    }

    fn checked(path: &SocketPath, claimed: &ClaimedCheckpoint, is_waived: bool) -> Result<(), CommandError> {
        let mut qmp = Qmp::connect(&path.0, Duration::from_secs(5)).unwrap();
        check(&mut qmp, claimed, is_waived)
    }

    #[test]
    fn a_qemu_without_the_checkpoints_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let [base, link, other] =
            ["base.raw", "link.raw", "other.raw"].map(|name| directory.path().join(name));
        fs::write(&base, "x").unwrap();
        fs::write(&other, "x").unwrap();
        std::os::unix::fs::symlink(&base, &link).unwrap();
        let claimed = claimed(vec![disk("web3-root", &base)]);
        checked(&qemu(base.clone()), &claimed, false).unwrap();
        checked(&qemu(link), &claimed, false).unwrap();
        let refused = checked(&qemu(other.clone()), &claimed, false)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("disk web3-root") && refused.contains("--print-blockdev"),
            "{refused}"
        );
        checked(&qemu(other), &claimed, true).unwrap();
    }

    #[test]
    fn a_command_line_has_a_node_for_each_disk() {
        let disks = [
            disk("web3-root", Path::new("/srv/a,b.raw")),
            disk(&"x".repeat(40), Path::new("/srv/x.raw")),
        ];
        let expected = [
            "-blockdev",
            "driver=raw,node-name=web3-root,file.driver=file,file.filename=/srv/a,,b.raw",
            "-blockdev",
            "driver=raw,node-name=disk1,file.driver=file,file.filename=/srv/x.raw",
        ];
        assert_eq!(blockdev_words(&disks, is_block_device), expected);
        let device = disk("web3-root", Path::new("/srv/a,b.raw"));
        assert_eq!(
            blockdev_words(&[device], |base| base == Path::new("/srv/a,b.raw"))[1],
            "driver=raw,node-name=web3-root,file.driver=host_device,file.filename=/srv/a,,b.raw"
        );
    }

    #[test]
    fn disks_of_another_checkpoint_are_found() {
        let claimed = claimed(vec![disk("d", Path::new("/srv/d.raw"))]);
        let restored = |disks: Vec<RestoredDisk>| RestoreReport {
            session: 1,
            checkpoint: 3,
            stream: StreamReport::default(),
            disks,
            hold_ns: 0,
            keep_ns: 0,
            write_ns: 0,
        };
        let at = |epoch: u64| {
            vec![RestoredDisk {
                name: "d".to_owned(),
                path: "/srv/d.raw".into(),
                size_bytes: 1,
                epoch,
                drained: true,
            }]
        };
        check_restored(&claimed, &restored(at(3))).unwrap();
        assert!(check_restored(&claimed, &restored(at(2))).is_err());
        assert!(check_restored(&claimed, &restored(Vec::new())).is_err());
    }
}
