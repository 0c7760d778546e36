//! The capture file: everything that went between a primary and its secondary, with times. `docs/capture-file.md`
//! describes the format byte by byte.
//!
//! A file is a header and then *blocks*; a block is whole *records*, as they are or compressed. Every block is written
//! in one piece, so that a writer that is killed leaves a file that reads up to its last whole block, and a reader can
//! follow a file that grows: [`CaptureReader::next`] returns `None` where the file ends *now*, and may be called again.
//!
//! Nothing in a file is believed before its checksum is right, and no length in it decides how much memory is taken:
//! a reader holds one block, of at most [`BLOCK_MAX`] bytes.
//!
//! ```no_run
//! use colo_ring_tools::capture_file::{CaptureReader, Event};
//! # fn main() -> Result<(), colo_ring_tools::capture_file::CaptureError> {
//! let mut reader = CaptureReader::open("session.cap".as_ref())?;
//! while let Some(record) = reader.next()? {
//!     if let Event::Data { connection, bytes, .. } = record.event {
//!         println!("{:?}: connection {}, {} bytes", record.at, connection.0, bytes.len());
//!     }
//! }
//! if let Some(tear) = reader.is_torn() {
//!     eprintln!("it ends early: {tear}");
//! }
//! # Ok(())
//! # }
//! ```

mod block;
mod error;
mod info;
mod order;
mod reader;
mod record;
#[cfg(test)]
mod tests;
mod writer;

pub use error::{BlockError, CaptureError, RecordError};
pub use info::CaptureInfo;
pub use order::{OrderError, Totals};
pub use reader::{CaptureReader, Tear, TearReason};
pub use writer::{CaptureWriter, Compression};

use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// First bytes of every capture. As with PNG, a transfer as text damages them: the first has its high bit set, and
/// both kinds of line end and an end-of-file character are in it.
pub const MAGIC: [u8; 8] = *b"\x89CLR\r\n\x1a\n";

/// The version of the format that is written.
pub const FORMAT_VERSION: u16 = 2;

/// The oldest version that is read. Its blocks are not chained: a whole block that is missing is noticed only by the
/// records behind it, or not at all.
pub const OLDEST_VERSION: u16 = 1;

/// Most bytes of the information in the header.
pub const INFO_MAX: usize = 64 << 10;

/// Most bytes of a Data record; the writer splits longer ones.
pub const DATA_MAX: usize = 1 << 20;

/// Most bytes of a label or a note.
pub const TEXT_MAX: usize = 64 << 10;

/// Most bytes of a block, before and after compression: what a reader may have to hold.
pub const BLOCK_MAX: usize = 4 << 20;

/// A connection between the two sides. They are numbered from 0 in the order in which they were opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct ConnectionId(pub u16);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which way bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Sent by the primary.
    ToSecondary,
    /// Sent by the secondary.
    ToPrimary,
}

impl Direction {
    /// Both, the primary's first.
    pub const ALL: [Self; 2] = [Self::ToSecondary, Self::ToPrimary];

    /// Its place in an array of both.
    pub const fn index(self) -> usize {
        match self {
            Self::ToSecondary => 0,
            Self::ToPrimary => 1,
        }
    }
}

/// How one direction of a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndKind {
    /// Its sender closed it: all that it sent is here.
    Eof,
    /// A reset or another failure: bytes may have been lost.
    Reset,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A connection was opened.
    Open {
        /// Its number: the next one.
        connection: ConnectionId,
        /// Where it came from, as text for readers.
        label: &'a str,
    },
    /// Bytes went over a connection.
    Data {
        /// Which one.
        connection: ConnectionId,
        /// Which way.
        direction: Direction,
        /// The bytes: at most [`DATA_MAX`] where they are read. How a stream is cut into records says nothing.
        bytes: &'a [u8],
    },
    /// One direction of a connection ended. Nothing follows in that direction.
    End {
        /// Which one.
        connection: ConnectionId,
        /// Which way.
        direction: Direction,
        /// How.
        how: EndKind,
    },
    /// Something that a reader of the capture should know.
    Note(&'a str),
    /// The recording ended in an orderly way: the last record. [`CaptureWriter::finish`] writes it.
    Finish(Totals),
}

/// What happened, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Time since the start of the recording, on a clock that does not step. Records stand in the order in which they
    /// were recorded; within one direction of a connection, times do not decrease.
    pub at: Duration,
    /// What happened.
    pub event: Event<'a>,
}
