//! Writing a session's last committed checkpoint to files.
//!
//! `checkpoint.json` names the others: a file for every RAM block, the device state, and what is constant for the
//! session (spec §15): the stream's header with its configuration, and the vmdesc.

use super::kept_checkpoint::KeptCheckpoint;
use crate::store::{RESERVED_FILES, StoreError};
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

const INDEX_FILE: &str = RESERVED_FILES[0];
const HEADER_FILE: &str = RESERVED_FILES[1];
const VMDESC_FILE: &str = RESERVED_FILES[2];

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
    /// The index was not encoded.
    #[error(transparent)]
    Index(#[from] serde_json::Error),
}

/// Writes the last committed checkpoint into `directory`. Blocks as long as the disk takes; its session goes on meanwhile.
///
/// # Errors
/// See [`DumpError`]. Some files may then exist, but no `checkpoint.json`.
pub(super) fn dump(checkpoint: &KeptCheckpoint, directory: &Path) -> Result<Dumped, DumpError> {
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
    std::fs::write(directory.join(HEADER_FILE), &description.header).map_err(failed)?;
    std::fs::write(directory.join(VMDESC_FILE), &description.vmdesc).map_err(failed)?;
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let blocks = report.blocks.iter().map(|block| DumpedBlock {
        name: String::from_utf8_lossy(&block.name).into_owned(),
        used_length: block.bytes,
        file: name(&block.file),
    });
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
    };
    let mut text = serde_json::to_vec_pretty(&dumped)?;
    text.push(b'\n');
    std::fs::write(index, text).map_err(failed)?;
    Ok(dumped)
}
