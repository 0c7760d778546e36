//! Writing a session's last committed checkpoint to files.
//!
//! `checkpoint.json` names the others: a file for every RAM block, the device state, what is constant for the
//! session (spec §15): the stream's header with its configuration, and the vmdesc; and once the session has ended, a copy of each
//! of the guest's disks.

use super::kept_checkpoint::KeptCheckpoint;
use crate::disk::{DiskError, copy_base};
use crate::files::{self, Readers};
use crate::store::{RESERVED_FILES, StoreError};
use crate::text;
use crate::units::CheckpointId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Name of the schema of `checkpoint.json`.
pub const DUMP_SCHEMA: &str = "colo-ring.checkpoint";

/// Its version.
pub const DUMP_VERSION: u32 = 1;

/// What was written; the content of `checkpoint.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dumped {
    /// Always [`DUMP_SCHEMA`].
    pub schema: String,
    /// See [`DUMP_VERSION`].
    pub schema_version: u32,
    /// The session's number.
    pub session: u32,
    /// The checkpoint's number; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// The primary's machine type.
    pub machine: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Id of the RAM section in the primary's stream.
    pub ram_section: u32,
    /// The RAM blocks, in the primary's order.
    pub blocks: Vec<DumpedBlock>,
    /// File of the device state, which ends with its EOF byte.
    pub device_state_file: String,
    /// File of the stream's header and configuration, verbatim.
    pub header_file: String,
    /// File of the vmdesc.
    pub vmdesc_file: String,
    /// The guest's disks at the checkpoint.
    #[serde(default)]
    pub disks: Vec<DumpedDisk>,
    /// Which disks of the guest are not among them, and why; none if all are.
    #[serde(default)]
    pub disks_left_out: Option<String>,
}

/// One RAM block's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpedBlock {
    /// The block's name.
    pub name: String,
    /// Its length in bytes, and the file's.
    pub used_length: u64,
    /// The file, in the same directory.
    pub file: String,
}

/// One disk's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpedDisk {
    /// Its export's name.
    pub name: String,
    /// Its length in bytes, and the file's.
    pub size_bytes: u64,
    /// The file, below the same directory: raw.
    pub file: String,
}

/// What becomes of the guest's disks.
enum DumpDisks {
    /// The session has ended, so they stay at its checkpoint.
    Copied,
    /// For this reason.
    LeftOut(&'static str),
}

const INDEX_FILE: &str = RESERVED_FILES[0];
const HEADER_FILE: &str = RESERVED_FILES[1];
const VMDESC_FILE: &str = RESERVED_FILES[2];
/// With the names that they have in a receiver's own directory of disks.
const DISKS_DIRECTORY: &str = RESERVED_FILES[3];

/// Why a checkpoint was not dumped.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A relative path means nothing to the receiver.
    #[error("{} is not an absolute path", .0.display())]
    RelativePath(PathBuf),
    /// A file of the dump was not written.
    #[error("writing to {}: {source}", directory.display())]
    File {
        /// The dump's directory.
        directory: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The image was not written.
    #[error(transparent)]
    Image(#[from] StoreError),
    /// A disk is not at the checkpoint.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The index was not encoded.
    #[error(transparent)]
    Index(#[from] serde_json::Error),
}

/// Writes the last committed checkpoint, but for the guest's disks, into `directory`. Blocks as long as the disk takes; its session goes
/// on meanwhile.
///
/// # Errors
/// See [`DumpError`]. Some files may then exist, but no `checkpoint.json`.
pub(super) fn dump(checkpoint: &KeptCheckpoint, directory: &Path) -> Result<Dumped, DumpError> {
    const LIVE: &str = "they change as long as the session is live; a dump has them once it has ended (`colo-ring unprotect` \
                        ends it on the primary's host)";
    write(checkpoint, directory, DumpDisks::LeftOut(LIVE))
}

/// The same with the guest's disks, unless they are not wanted. The session has ended.
///
/// # Errors
/// Those of [`dump`].
pub(super) fn dump_ended(
    checkpoint: &KeptCheckpoint,
    directory: &Path,
    without_disks: bool,
) -> Result<Dumped, DumpError> {
    let disks = match without_disks {
        true => DumpDisks::LeftOut("they were not asked for"),
        false => DumpDisks::Copied,
    };
    write(checkpoint, directory, disks)
}

fn write(checkpoint: &KeptCheckpoint, directory: &Path, disks: DumpDisks) -> Result<Dumped, DumpError> {
    if !directory.is_absolute() {
        return Err(DumpError::RelativePath(directory.to_owned()));
    }
    let description = &checkpoint.description;
    let index = directory.join(INDEX_FILE);
    let failed = |source| DumpError::File {
        directory: directory.to_owned(),
        source,
    };
    match std::fs::remove_file(&index) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let report = checkpoint.image.dump(directory)?;
    let write = |name: &str, content: &[u8]| {
        files::write(&directory.join(name), content, Readers::Owner).map_err(failed)
    };
    write(HEADER_FILE, &description.header)?;
    write(VMDESC_FILE, &description.vmdesc)?;
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let blocks = report.blocks.iter().map(|block| DumpedBlock {
        name: text::from_bytes(&block.name),
        used_length: block.bytes,
        file: name(&block.file),
    });
    let (disks, disks_left_out) = dump_disks(checkpoint, report.checkpoint, directory, disks)?;
    let dumped = Dumped {
        schema: DUMP_SCHEMA.into(),
        schema_version: DUMP_VERSION,
        session: checkpoint.session,
        checkpoint: report.checkpoint.0,
        machine: description.machine_type.clone(),
        page_size: crate::units::PAGE_BYTES,
        ram_section: description.ram_section,
        blocks: blocks.collect(),
        device_state_file: name(&report.device_state),
        header_file: HEADER_FILE.into(),
        vmdesc_file: VMDESC_FILE.into(),
        disks,
        disks_left_out,
    };
    let index = text::json(&dumped)? + "\n";
    write(INDEX_FILE, index.as_bytes())?;
    Ok(dumped)
}

/// Copies the disks, which are at checkpoint `number`, unless there is a reason not to. Returns the copies, and what was left out.
fn dump_disks(
    checkpoint: &KeptCheckpoint,
    number: CheckpointId,
    directory: &Path,
    disks: DumpDisks,
) -> Result<(Vec<DumpedDisk>, Option<String>), DumpError> {
    const FAILED_OVER: &str = "a guest may have written to them since a failover of the session";
    let all = checkpoint.disks.all();
    let left_out = |why: &str| {
        let names: Vec<_> = all.iter().map(|disk| disk.name()).collect();
        Ok((Vec::new(), Some(format!("{}: {why}", names.join(", ")))))
    };
    match disks {
        _ if all.is_empty() => return Ok((Vec::new(), None)),
        DumpDisks::LeftOut(why) => return left_out(why),
        DumpDisks::Copied if !checkpoint.promotion().is_here() => return left_out(FAILED_OVER),
        DumpDisks::Copied => {}
    }
    let failed = |source| DumpError::File {
        directory: directory.join(DISKS_DIRECTORY),
        source,
    };
    files::directory(&directory.join(DISKS_DIRECTORY)).map_err(failed)?;
    let mut dumped = Vec::new();
    for disk in checkpoint.disks.restored(number)? {
        let file = format!("{DISKS_DIRECTORY}/{}.raw", disk.name);
        copy_base(&disk.path, &directory.join(&file)).map_err(failed)?;
        dumped.push(DumpedDisk {
            name: disk.name,
            size_bytes: disk.size_bytes,
            file,
        });
    }
    // A claim comes before everything by which a guest can get them.
    if checkpoint.promotion().is_here() {
        return Ok((dumped, None));
    }
    for disk in &dumped {
        std::fs::remove_file(directory.join(&disk.file)).map_err(failed)?;
    }
    left_out(FAILED_OVER)
}
