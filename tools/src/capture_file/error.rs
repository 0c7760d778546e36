//! What can be wrong with a capture.

use super::{BLOCK_MAX, FORMAT_VERSION, OLDEST_VERSION, OrderError};
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
    #[error("the header of the capture is damaged, so that it cannot be read: {0}")]
    Header(String),
    /// A block is damaged, and there is more behind it.
    #[error("the capture is damaged: the block at byte {offset}: {what}")]
    Damaged {
        /// Where the block begins in the file.
        offset: u64,
        /// What is wrong with it.
        what: BlockError,
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

/// What is wrong with a block.
#[derive(Debug, Error)]
pub enum BlockError {
    /// Its header is damaged, or the block belongs elsewhere.
    #[error("the checksum of its header is wrong")]
    HeaderChecksum,
    /// Of a kind that the format does not have.
    #[error("it is of the unknown kind {0:?}")]
    Kind([u8; 4]),
    /// No block has that length.
    #[error("it announces {0} bytes; 1 to {BLOCK_MAX} are possible")]
    Length(usize),
    /// Its two lengths contradict each other.
    #[error("it announces {stored} bytes for {raw} bytes of records")]
    Lengths {
        /// Bytes of its content in the file.
        stored: usize,
        /// Bytes of its records.
        raw: usize,
    },
    /// Its content is damaged.
    #[error("the checksum of its content is wrong")]
    ContentChecksum,
    /// Its content is no zstd frame, or too long.
    #[error("it cannot be decompressed: {0}")]
    Decompress(io::Error),
    /// Its content has another length than its header says.
    #[error("it has {seen} bytes of records where {announced} were announced")]
    Decompressed {
        /// Bytes of its records.
        seen: usize,
        /// What the header says.
        announced: usize,
    },
    /// The capture is finished before it.
    #[error("it follows the end of the capture")]
    AfterEnd,
    /// One of its records is damaged.
    #[error("{position} bytes into its records: {error}")]
    Record {
        /// Where the record begins in the block.
        position: usize,
        /// What is wrong with it.
        error: RecordError,
    },
    /// One of its records does not fit those before it.
    #[error("{position} bytes into its records: {error}")]
    Order {
        /// Where the record begins in the block.
        position: usize,
        /// Why it does not fit.
        error: OrderError,
    },
}

/// What is wrong with a record.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// The block ends in its header.
    #[error("it ends inside a record: {left} bytes are left")]
    Header {
        /// Bytes up to the end of the block.
        left: usize,
    },
    /// The block ends in its content.
    #[error("it ends inside a record: {left} bytes are left, the record has {length}")]
    Content {
        /// Bytes up to the end of the block.
        left: usize,
        /// Bytes of content that its header announces.
        length: u32,
    },
    /// It is damaged.
    #[error("the checksum of a record is wrong")]
    Checksum,
    /// Of a kind that the format does not have.
    #[error("a record is of the unknown kind {0}")]
    Kind(u8),
    /// Neither to the primary nor to the secondary.
    #[error("a record has direction {0}")]
    Direction(u8),
    /// More data than a record may have.
    #[error("a record has {0} bytes of data")]
    DataLength(usize),
    /// The end of a connection with other content than how it ended.
    #[error("an end has {0} bytes")]
    EndLength(usize),
    /// Totals of another length.
    #[error("the totals have {0} bytes")]
    TotalsLength(usize),
    /// A text that is longer than the format allows.
    #[error("a text has {0} bytes")]
    TextLength(usize),
    /// A text that is none.
    #[error("a text is not UTF-8: {0}")]
    Text(#[from] std::str::Utf8Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "; make room, or record to another disk",
        io::ErrorKind::FileTooLarge => "; raise the limit: `ulimit -f unlimited`",
        io::ErrorKind::QuotaExceeded => "; the disk quota is used up: `quota` shows it",
        _ => "",
    }
}
