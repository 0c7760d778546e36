//! Writing a session's last committed checkpoint to files that a client has opened (`dump_files.rs`). The receiver itself opens none.

use super::kept_checkpoint::KeptCheckpoint;
use super::status::GuestBlock;
use crate::disk::{DiskError, copy_base};
use crate::store::{DumpTargets, StoreError};
use crate::units::{CheckpointId, PAGE_BYTES};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use thiserror::Error;

/// What a dump of a session consists of: a client makes a file for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpContents {
    /// The session's number.
    #[serde(rename = "contents")]
    pub session: u32,
    /// The RAM blocks, in the primary's order.
    pub blocks: Vec<GuestBlock>,
    /// The names of the guest's disks; none while the session is live.
    pub disks: Vec<String>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpedCheckpoint {
    /// The session's number.
    #[serde(rename = "dumped")]
    pub session: u32,
    /// The checkpoint's number; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// The primary's machine type.
    pub machine: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Id of the RAM section in the primary's stream.
    pub ram_section: u32,
    /// The disks that were copied.
    pub disks: Vec<CopiedDisk>,
    /// Which disks of the guest were not copied, and why; none if all were.
    pub disks_left_out: Option<String>,
}

/// A disk that was copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedDisk {
    /// Its export's name.
    pub name: String,
    /// Its length in bytes, and the file's.
    pub size_bytes: u64,
}

/// Why a checkpoint was not dumped.
#[derive(Debug, Error)]
pub enum DumpError {
    /// Other files than the request needs.
    #[error(
        "a dump of this session needs {needed} open files with the request (of each ram block, the device state, the header, the \
         vmdesc, and each disk that is named), and {came} came"
    )]
    Files {
        /// Files that it needs.
        needed: usize,
        /// Files that came.
        came: usize,
    },
    /// A pipe, for example: a reader that does not read would hold the thread, and the end of the receiver.
    #[error("the dump of {0} goes to a regular file, and something else was opened")]
    NotRegular(String),
    /// A file of the dump was not written.
    #[error("the dump of {what}: {source}")]
    File {
        /// What was to be written.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
    /// A guest may have changed the image while it was read.
    #[error(
        "a failover gave the guest's memory itself to a QEMU while it was dumped, so the dump may be of no checkpoint; `colo-ring failover \
         --keep` copies the checkpoint before"
    )]
    Shared,
    /// The image was not written.
    #[error(transparent)]
    Image(#[from] StoreError),
    /// A disk is not at the checkpoint.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl DumpError {
    fn file(what: &str) -> impl Fn(io::Error) -> Self {
        move |source| Self::File {
            what: what.to_owned(),
            source,
        }
    }
}

/// The files of a dump, as they come with the request.
struct DumpFiles {
    blocks: Vec<File>,
    device_state: File,
    header: File,
    vmdesc: File,
    /// Of the disks that are wanted.
    disks: Vec<(String, File)>,
}

/// How many files beside those of blocks and disks.
const OTHER_FILES: usize = 3;

impl DumpFiles {
    fn of(files: Vec<OwnedFd>, blocks: usize, disks: Vec<String>) -> Result<Self, DumpError> {
        let (needed, came) = (blocks + OTHER_FILES + disks.len(), files.len());
        let mut files = files.into_iter().map(File::from);
        let blocks: Vec<File> = files.by_ref().take(blocks).collect();
        match (came == needed, files.next(), files.next(), files.next()) {
            (true, Some(device_state), Some(header), Some(vmdesc)) => Ok(Self {
                blocks,
                device_state: regular(device_state, DEVICE_STATE)?,
                header: regular(header, HEADER)?,
                vmdesc: regular(vmdesc, VMDESC)?,
                disks: disks.into_iter().zip(files).collect(),
            }),
            _ => Err(DumpError::Files { needed, came }),
        }
    }
}

/// What they are called in messages.
const DEVICE_STATE: &str = "the device state";
const HEADER: &str = "the stream's header";
const VMDESC: &str = "the vmdesc";

/// The file, if it is one. Those of blocks and disks get a length, which nothing else has.
fn regular(file: File, what: &str) -> Result<File, DumpError> {
    let about = file.metadata().map_err(DumpError::file(what))?;
    match about.is_file() {
        true => Ok(file),
        false => Err(DumpError::NotRegular(what.to_owned())),
    }
}

/// Whether the guest's disks can be copied: while the session is live, they change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DumpDisks {
    Copied,
    Live,
}

/// What [`dump`] would write now.
pub(super) fn contents(checkpoint: &KeptCheckpoint, disks: DumpDisks) -> DumpContents {
    let all = checkpoint.disks.all().iter();
    let is_copied = disks == DumpDisks::Copied && checkpoint.promotion().is_here();
    DumpContents {
        session: checkpoint.session,
        blocks: GuestBlock::all(&checkpoint.image),
        disks: all
            .filter(|_| is_copied)
            .map(|disk| disk.name().to_owned())
            .collect(),
    }
}

/// Writes the last committed checkpoint, with those `wanted` of the guest's disks that can be copied. Blocks as long as the disk takes; a live
/// session goes on meanwhile.
///
/// # Errors
/// See [`DumpError`]. Something may have been written then.
pub(super) fn dump(
    checkpoint: &KeptCheckpoint,
    files: Vec<OwnedFd>,
    wanted: Vec<String>,
    disks: DumpDisks,
) -> Result<DumpedCheckpoint, DumpError> {
    let description = &checkpoint.description;
    let files = DumpFiles::of(files, description.blocks.iter().len(), wanted)?;
    let times_shared = checkpoint.times_shared();
    let report = checkpoint.image.dump(&DumpTargets {
        blocks: files.blocks.iter().collect(),
        device_state: &files.device_state,
    })?;
    if checkpoint.times_shared() != times_shared {
        return Err(DumpError::Shared);
    }
    let write =
        |mut file: &File, what: &str, content: &[u8]| file.write_all(content).map_err(DumpError::file(what));
    write(&files.header, HEADER, &description.header)?;
    write(&files.vmdesc, VMDESC, &description.vmdesc)?;
    let (disks, disks_left_out) = dump_disks(checkpoint, report.checkpoint, &files.disks, disks)?;
    Ok(DumpedCheckpoint {
        session: checkpoint.session,
        checkpoint: report.checkpoint.0,
        machine: description.machine_type.clone(),
        page_size: PAGE_BYTES,
        ram_section: description.ram_section,
        disks,
        disks_left_out,
    })
}

/// Copies the disks, which are at checkpoint `number`, unless there is a reason not to. Returns the copies, and what was left out.
fn dump_disks(
    checkpoint: &KeptCheckpoint,
    number: CheckpointId,
    wanted: &[(String, File)],
    disks: DumpDisks,
) -> Result<(Vec<CopiedDisk>, Option<String>), DumpError> {
    const LIVE: &str = "they change as long as the session is live; a dump has them once it has ended (`colo-ring unprotect` \
                        ends it on the primary's host)";
    const NOT_WANTED: &str = "they were not asked for";
    const FAILED_OVER: &str = "a guest may have written to them since a failover of the session";
    let all = checkpoint.disks.all();
    let left_out = |why: &str| {
        let names: Vec<_> = all.iter().map(|disk| disk.name()).collect();
        Ok((Vec::new(), Some(format!("{}: {why}", names.join(", ")))))
    };
    let is_wanted = |disk: &str| wanted.iter().any(|(name, _)| name == disk);
    match disks {
        _ if all.is_empty() => return Ok((Vec::new(), None)),
        DumpDisks::Live => return left_out(LIVE),
        DumpDisks::Copied if !checkpoint.promotion().is_here() => return left_out(FAILED_OVER),
        DumpDisks::Copied if !all.iter().all(|disk| is_wanted(disk.name())) => return left_out(NOT_WANTED),
        DumpDisks::Copied => {}
    }
    checkpoint.disks.restored(number)?;
    let mut copied = Vec::new();
    for disk in all {
        for (name, file) in wanted.iter().filter(|(name, _)| name == disk.name()) {
            copy_base(disk.base(), file).map_err(DumpError::file(name))?;
            copied.push(CopiedDisk {
                name: name.clone(),
                size_bytes: disk.base().size(),
            });
        }
    }
    // A claim comes before everything by which a guest can get them.
    match checkpoint.promotion().is_here() {
        true => Ok((copied, None)),
        false => left_out(FAILED_OVER),
    }
}
