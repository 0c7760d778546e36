//! Requests and replies of the transmission phase.

use super::handshake::{ALLOCATION_ID, Agreed};
use thiserror::Error;

/// Bytes of a request's header.
pub(crate) const REQUEST_BYTES: usize = 28;

/// Most bytes that a READ or WRITE may have.
pub(crate) const PAYLOAD_MAX: u64 = 32 << 20;

/// Most extents in a reply to BLOCK_STATUS.
pub(crate) const STATUS_EXTENTS_MAX: usize = 1024;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

mod kind {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISCONNECT: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const TRIM: u16 = 4;
    pub(super) const CACHE: u16 = 5;
    pub(super) const WRITE_ZEROES: u16 = 6;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

mod flag {
    pub(super) const FUA: u16 = 1;
    pub(super) const NO_HOLE: u16 = 2;
    pub(super) const DF: u16 = 4;
    pub(super) const REQ_ONE: u16 = 8;
    pub(super) const FAST_ZERO: u16 = 16;
}

mod chunk {
    pub(super) const DONE: u16 = 1;
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR: u16 = 0x8001;
}

/// An error as the protocol numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NbdError {
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Unsupported = 95,
    Shutdown = 108,
}

/// Why a client is disconnected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum RequestError {
    #[error("a request begins with {0:#010x}")]
    Magic(u32),
    #[error("a WRITE of {0} bytes, and at most {PAYLOAD_MAX} are taken")]
    TooLong(u32),
}

/// A range of a disk, in bytes; its end is below 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Range {
    pub(crate) const fn end(self) -> u64 {
        self.offset + self.length
    }
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    flags: u16,
    kind: u16,
    /// The client's name of it.
    pub(crate) cookie: u64,
    offset: u64,
    length: u32,
}

/// A request that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read(Range),
    Write {
        range: Range,
        fua: bool,
    },
    Flush,
    Trim {
        range: Range,
        fua: bool,
    },
    WriteZeroes {
        range: Range,
        fua: bool,
        may_punch: bool,
        fast: bool,
    },
    Cache(Range),
    BlockStatus {
        range: Range,
        one: bool,
    },
    Disconnect,
}

impl Request {
    /// Reads a header.
    ///
    /// # Errors
    /// If the client must be disconnected: where the next request begins is unknown, or too far away.
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, RequestError> {
        let magic = u32::from_be_bytes(part(bytes, 0));
        if magic != REQUEST_MAGIC {
            return Err(RequestError::Magic(magic));
        }
        let request = Self {
            flags: u16::from_be_bytes(part(bytes, 4)),
            kind: u16::from_be_bytes(part(bytes, 6)),
            cookie: u64::from_be_bytes(part(bytes, 8)),
            offset: u64::from_be_bytes(part(bytes, 16)),
            length: u32::from_be_bytes(part(bytes, 24)),
        };
        if request.payload() > PAYLOAD_MAX {
            return Err(RequestError::TooLong(request.length));
        }
        Ok(request)
    }

    /// Bytes that follow the header.
    pub(crate) fn payload(&self) -> u64 {
        match self.kind {
            kind::WRITE => u64::from(self.length),
            _ => 0,
        }
    }

    /// Whether it changes the disk.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self.kind, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES)
    }

    /// Whether its reply is a chunk where structured replies are agreed on.
    pub(crate) fn has_data_reply(&self) -> bool {
        matches!(self.kind, kind::READ | kind::BLOCK_STATUS)
    }

    /// What is asked for, of a disk of `size` bytes.
    ///
    /// # Errors
    /// The error to answer.
    pub(crate) fn command(&self, size: u64, agreed: &Agreed) -> Result<Command, NbdError> {
        let range = Range {
            offset: self.offset,
            length: u64::from(self.length),
        };
        let is_inside = self
            .offset
            .checked_add(range.length)
            .is_some_and(|end| end <= size);
        let allowed = match self.kind {
            kind::READ => flag::DF | flag::FUA,
            kind::WRITE | kind::TRIM => flag::FUA,
            kind::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            kind::BLOCK_STATUS => flag::REQ_ONE | flag::FUA,
            _ => flag::FUA,
        };
        let has = |flag: u16| self.flags & flag != 0;
        if self.flags & !allowed != 0 || (has(flag::DF) && !agreed.has_structured_replies) {
            return Err(NbdError::Invalid);
        }
        let fua = has(flag::FUA);
        let command = match self.kind {
            kind::DISCONNECT => return Ok(Command::Disconnect),
            kind::FLUSH => return Ok(Command::Flush),
            kind::READ if range.length > PAYLOAD_MAX => return Err(NbdError::Invalid),
            kind::READ => Command::Read(range),
            kind::WRITE => Command::Write { range, fua },
            kind::TRIM => Command::Trim { range, fua },
            kind::WRITE_ZEROES => Command::WriteZeroes {
                range,
                fua,
                may_punch: !has(flag::NO_HOLE),
                fast: has(flag::FAST_ZERO),
            },
            kind::CACHE => Command::Cache(range),
            kind::BLOCK_STATUS if agreed.has_allocation && range.length > 0 => Command::BlockStatus {
                range,
                one: has(flag::REQ_ONE),
            },
            _ => return Err(NbdError::Invalid),
        };
        match (is_inside, command) {
            (true, command) => Ok(command),
            (false, Command::Write { .. } | Command::WriteZeroes { .. }) => Err(NbdError::NoSpace),
            (false, _) => Err(NbdError::Invalid),
        }
    }
}

fn part<const N: usize>(bytes: &[u8; REQUEST_BYTES], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

/// What goes before the data of a READ's reply.
pub(crate) fn put_read_head(out: &mut Vec<u8>, agreed: &Agreed, cookie: u64, range: Range) {
    if agreed.has_structured_replies {
        let kind = if range.length == 0 {
            chunk::NONE
        } else {
            chunk::OFFSET_DATA
        };
        let length = if range.length == 0 { 0 } else { range.length + 8 };
        put_chunk(out, kind, cookie, length);
        if range.length > 0 {
            out.extend(range.offset.to_be_bytes());
        }
    } else {
        put_simple(out, 0, cookie);
    }
}

/// The reply to a request that has no data.
pub(crate) fn put_done(out: &mut Vec<u8>, agreed: &Agreed, cookie: u64, result: Result<(), NbdError>) {
    match result {
        Ok(()) => put_simple(out, 0, cookie),
        Err(error) => put_error(out, agreed, cookie, error, false),
    }
}

/// The reply to a request whose replies have data, if it has failed. `is_read`: it must be a chunk where those are agreed on.
pub(crate) fn put_error(out: &mut Vec<u8>, agreed: &Agreed, cookie: u64, error: NbdError, is_read: bool) {
    if agreed.has_structured_replies && is_read {
        put_chunk(out, chunk::ERROR, cookie, 6);
        out.extend((error as u32).to_be_bytes());
        out.extend(0u16.to_be_bytes());
    } else {
        put_simple(out, error as u32, cookie);
    }
}

/// What is allocated, as extents of length and state, at most [`STATUS_EXTENTS_MAX`].
pub(crate) fn put_block_status(out: &mut Vec<u8>, cookie: u64, extents: &[(u32, Allocation)]) {
    let length = 4 + 8 * u64::try_from(extents.len()).unwrap_or(0);
    put_chunk(out, chunk::BLOCK_STATUS, cookie, length);
    out.extend(ALLOCATION_ID.to_be_bytes());
    for (length, allocation) in extents {
        out.extend(length.to_be_bytes());
        out.extend((*allocation as u32).to_be_bytes());
    }
}

/// The state of an extent, as `base:allocation` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocation {
    Data = 0,
    /// Zero and not allocated.
    Hole = 3,
}

fn put_simple(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend(SIMPLE_MAGIC.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(cookie.to_be_bytes());
}

fn put_chunk(out: &mut Vec<u8>, kind: u16, cookie: u64, length: u64) {
    out.extend(STRUCTURED_MAGIC.to_be_bytes());
    out.extend(chunk::DONE.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    // At most 32 MiB and a few bytes: requests are bounded.
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}
