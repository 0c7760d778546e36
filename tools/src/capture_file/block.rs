//! Block headers as bytes.

use super::record;
use super::{BLOCK_MAX, BlockError};

/// Bytes of a block before its content.
pub(super) const HEADER_LEN: usize = 20;

/// Bytes of the header that its own checksum covers.
const CHECKED_LEN: usize = 16;

/// Ties a block to everything before it: the checksum of a block's header continues the checksum before it, which is
/// that of the previous block's header, or of the file's header. So a whole block that is missing, repeated, moved or
/// from another capture does not fit, although its own bytes are right.
#[derive(Clone, Copy, Debug)]
pub(super) enum Chain {
    /// Version 1: each header is checked alone.
    Unlinked,
    /// The checksum before the next block.
    After(u32),
}

impl Chain {
    fn checksum(self, fields: &[u8]) -> u32 {
        match self {
            Self::Unlinked => crc32c::crc32c(fields),
            Self::After(previous) => crc32c::crc32c_append(previous, fields),
        }
    }

    /// The chain behind a block whose header has this checksum.
    fn then(self, checksum: u32) -> Self {
        match self {
            Self::Unlinked => Self::Unlinked,
            Self::After(_) => Self::After(checksum),
        }
    }
}

/// How the records of a block are stored in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As they are.
    Stored,
    /// As one zstd frame.
    Zstd,
}

/// The header of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Bytes of the content in the file.
    pub(super) stored_len: usize,
    /// Bytes of its records.
    pub(super) raw_len: usize,
    /// Of the content as it is stored.
    pub(super) checksum: u32,
}

impl Header {
    /// For this content of a block with `raw_len` bytes of records, both within the format's limits.
    pub(super) fn new(kind: Kind, content: &[u8], raw_len: usize) -> Self {
        Self {
            kind,
            stored_len: content.len(),
            raw_len,
            checksum: crc32c::crc32c(content),
        }
    }

    /// As bytes, at this place of the chain, which goes on behind them.
    pub(super) fn encode(&self, chain: &mut Chain) -> [u8; HEADER_LEN] {
        let length = |length: usize| {
            u32::try_from(length)
                .expect("a length within the format's limits")
                .to_le_bytes()
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = match self.kind {
            Kind::Stored => 0,
            Kind::Zstd => 1,
        };
        bytes[4..8].copy_from_slice(&length(self.stored_len));
        bytes[8..12].copy_from_slice(&length(self.raw_len));
        bytes[12..16].copy_from_slice(&self.checksum.to_le_bytes());
        let own = chain.checksum(&bytes[..CHECKED_LEN]);
        bytes[CHECKED_LEN..].copy_from_slice(&own.to_le_bytes());
        *chain = chain.then(own);
        bytes
    }

    /// Returns the header and the chain behind its block.
    ///
    /// # Errors
    /// What is wrong with it. Lengths are within the limits otherwise.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN], chain: Chain) -> Result<(Self, Chain), BlockError> {
        let (words, _) = bytes.as_chunks::<4>();
        let word = |place: usize| u32::from_le_bytes(words[place]);
        if chain.checksum(&bytes[..CHECKED_LEN]) != word(4) {
            return Err(BlockError::HeaderChecksum);
        }
        let kind = match words[0] {
            [0, 0, 0, 0] => Kind::Stored,
            [1, 0, 0, 0] => Kind::Zstd,
            other => return Err(BlockError::Kind(other)),
        };
        let length = |place: usize| {
            let length = usize::try_from(word(place)).unwrap_or(usize::MAX);
            let possible = (1..=BLOCK_MAX).contains(&length);
            possible.then_some(length).ok_or(BlockError::Length(length))
        };
        let (stored_len, raw_len) = (length(1)?, length(2)?);
        let fits = match kind {
            Kind::Stored => stored_len == raw_len,
            Kind::Zstd => stored_len < raw_len,
        };
        if !fits || raw_len < record::HEADER_LEN {
            return Err(BlockError::Lengths {
                stored: stored_len,
                raw: raw_len,
            });
        }
        let header = Self {
            kind,
            stored_len,
            raw_len,
            checksum: word(3),
        };
        Ok((header, chain.then(word(4))))
    }
}
