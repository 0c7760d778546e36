//! Why a disk is not served, or not any more.

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a disk cannot be served, or why its session ended.
#[derive(Debug, Error)]
pub enum DiskError {
    /// There is no base.
    #[error("{} does not exist: `truncate -s SIZE {}`, with the size of the guest's disk, creates it", .0.display(), .0.display())]
    NoBase(PathBuf),
    /// The base is a qcow2 image.
    #[error(
        "{} is a qcow2 image, and bases are raw: `qemu-img convert -O raw` converts it; where everything is copied anyway, an empty raw file is enough", .0.display()
    )]
    Qcow2(PathBuf),
    /// The base is neither a file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NotRaw(PathBuf),
    /// A guest may run on it.
    #[error("{} is in use by a QEMU: a guest that runs on it must not be overwritten", .0.display())]
    InUseByQemu(PathBuf),
    /// The base cannot be used.
    #[error("{}: {source}", path.display())]
    Base {
        /// The base.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The base is a link to what may not be opened.
    #[error(
        "{} is a link to what this receiver may not open ({source}): its user must be allowed to; and a link that was made after the \
         receiver's start needs a receiver that is not root's, and leads into /dev, or needs its restart", path.display()
    )]
    LinkedBase {
        /// The link.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A file of the log or the record of the disk.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Such a file has content that no receiver writes.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The record of a session names what is no disk.
    #[error("disk \"{}\" in \"{}\" cannot be one of a receiver", name.escape_debug(), directory.escape_debug())]
    NoDisk {
        /// Where it should be.
        directory: String,
        /// Its name.
        name: String,
    },
    /// Another receiver has the disk.
    #[error("another receiver serves {}", .0.display())]
    OtherReceiver(PathBuf),
    /// A checkpoint that was not recovered may need the disk.
    #[error(
        "{} belongs to a checkpoint of {owner}, which this receiver has not recovered: start it with that --ram-dir, or, if \
         nothing of that checkpoint is needed, remove the file", .record.display()
    )]
    Orphan {
        /// The record of the disk.
        record: PathBuf,
        /// Its session and RAM directory.
        owner: String,
    },
    /// The client is gone.
    #[error("disk {disk}: the primary's connection ended ({reason}), so its writes are not all here")]
    ConnectionLost {
        /// The disk.
        disk: String,
        /// How it ended.
        reason: String,
    },
    /// A write between the cut of an epoch and its acknowledgement.
    #[error(
        "disk {disk}: a write came while the guest was stopped for checkpoint {checkpoint}, so the disk of that checkpoint is unknown"
    )]
    LateWrite {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: u64,
    },
    /// A write that was not complete when its epoch was cut.
    #[error(
        "disk {disk}: a write was not complete when checkpoint {checkpoint} began: was the mirror job ready?"
    )]
    Unfinished {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: u64,
    },
    /// The first copy is not whole.
    #[error(
        "disk {disk}: something of its first copy was answered with an error ({reason}), so the base is not the guest's disk: mirror it again"
    )]
    CopyFailed {
        /// The disk.
        disk: String,
        /// The error.
        reason: String,
    },
    /// A write of a session that was not taken.
    #[error(
        "disk {disk}: a write was answered with an error ({reason}), so its content is not what the guest has written"
    )]
    WriteFailed {
        /// The disk.
        disk: String,
        /// The error.
        reason: String,
    },
    /// The log of one epoch is full.
    #[error(
        "disk {disk}: the writes since the last checkpoint fill its log of {limit} bytes; give more with --disk-log-max, or checkpoint more often"
    )]
    LogFull {
        /// The disk.
        disk: String,
        /// The limit.
        limit: u64,
    },
    /// There is no memory and no disk space for the log.
    #[error("disk {disk}: there is no room for its log: {source}")]
    NoRoom {
        /// The disk.
        disk: String,
        /// What was tried last.
        source: Box<DiskError>,
    },
    /// There is no memory for the index of the log.
    #[error("--ram-limit leaves no memory for its index")]
    NoIndex,
    /// Applying has failed.
    #[error("disk {disk}: writing its base: {source}")]
    Apply {
        /// The disk.
        disk: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The disk is not that of the checkpoint.
    #[error(
        "disk {disk} is at checkpoint {at:?} and the memory at {checkpoint}: they do not belong together"
    )]
    OtherEpoch {
        /// The disk.
        disk: String,
        /// Where it stands.
        at: Option<u64>,
        /// Where the memory stands.
        checkpoint: u64,
    },
    /// Connections cannot be attributed.
    #[error("{0}")]
    Ambiguous(String),
    /// There is no thread to apply logs on.
    #[error("disk {disk}: cannot start a thread: {source}")]
    Thread {
        /// The disk.
        disk: String,
        /// The error of the system.
        source: io::Error,
    },
}

impl DiskError {
    /// Whether a file may not be opened.
    pub(crate) fn is_denied(&self) -> bool {
        matches!(self, Self::Base { source, .. } | Self::File { source, .. } | Self::LinkedBase { source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied)
    }
}
