//! What can be wrong with a capture.

use super::{FORMAT_VERSION, OLDEST_VERSION, OrderError};
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a capture cannot be written or read. Messages do not name the file, except where it could not be opened.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// It cannot be opened or created.
    #[error("{}: {source}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It would be overwritten.
    #[error("{} exists already; give another name, or --force to replace it", .0.display())]
    Exists(PathBuf),
    /// Reading failed.
    #[error("reading the capture at byte {offset}: {source}")]
    Read {
        /// Where in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Writing failed. What was written before can be read, up to the tear.
    #[error("writing the capture at byte {offset}: {source}{}", hint(.source))]
    Write {
        /// Where in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A write failed earlier.
    #[error("the capture ended at an earlier error")]
    Ended,
    /// It is something else.
    #[error("this is not a capture: {0}")]
    Foreign(&'static str),
    /// It was written by a later version.
    #[error(
        "format version {0} is not known, only {OLDEST_VERSION} to {FORMAT_VERSION}: read it with the version that wrote it, or a later one"
    )]
    Version(u16),
    /// The header is damaged or cut short.
    #[error("the header of the capture is damaged: {0}; nothing of it can be read")]
    Header(String),
    /// A block is damaged, and there is more behind it.
    #[error("the capture is damaged: the block at byte {offset}: {what}")]
    Damaged {
        /// Where the block begins in the file.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A text is too long for the format.
    #[error("{what} has {bytes} bytes; a capture takes {max}")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The format's limit.
        max: usize,
    },
    /// Records that do not fit those before them.
    #[error(transparent)]
    Order(#[from] OrderError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "; make room, or record to another disk",
        io::ErrorKind::FileTooLarge => "; raise the limit: `ulimit -f unlimited`",
        io::ErrorKind::QuotaExceeded => "; the disk quota is used up: `quota` shows it",
        _ => "",
    }
}
