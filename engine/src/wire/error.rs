//! Errors in received bytes, worded for an operator.

use crate::blocks::{BlockListError, NotAPage};
use std::borrow::Cow;
use thiserror::Error;

/// Why received bytes were refused: what was seen and what was expected, and which setting of the primary to change
/// if there is one. The caller adds the channel, the packet and the byte offset.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// The first bytes of a connection belong to neither kind of channel (spec §2).
    #[error("the connection begins with \"{first}\", which is not a migration channel{hint}")]
    NotAChannel {
        /// The first four bytes, escaped.
        first: String,
        /// What it looks like, if that is known.
        hint: &'static str,
    },
    /// A field holds a value that the format does not allow.
    #[error("{field} is {seen:#x}, expected {expected}")]
    Value {
        /// The field's name.
        field: &'static str,
        /// The value received.
        seen: u64,
        /// The values allowed.
        expected: &'static str,
    },
    /// A number is above its limit.
    #[error("{field} is {seen}, expected at most {limit}")]
    Limit {
        /// What the number counts.
        field: &'static str,
        /// The number.
        seen: u64,
        /// The limit.
        limit: u64,
    },
    /// Two numbers that must be equal differ.
    #[error("{field} is {seen}, expected {expected}")]
    Mismatch {
        /// What the number is.
        field: &'static str,
        /// What was received.
        seen: u64,
        /// The value required by what was received before.
        expected: u64,
    },
    /// Valid on the wire, but not supported.
    #[error("the primary sends {what}, which cannot be received here; {remedy}")]
    Refused {
        /// What the primary does.
        what: Cow<'static, str>,
        /// Which of its settings to change.
        remedy: &'static str,
    },
    /// A page of a block that is not in the block list.
    #[error("block \"{name}\" is not in the block list")]
    UnknownBlock {
        /// Its name, escaped.
        name: String,
    },
    /// The first page record of the stream refers to the block of the one before.
    #[error("the first page record of the stream continues the block of the previous one")]
    NothingToContinue,
    /// One packet has the same page twice (spec §8.2).
    #[error("offset {offset:#x} of block \"{name}\" occurs twice in one packet")]
    PageTwice {
        /// The block's name, escaped.
        name: String,
        /// The repeated offset.
        offset: u64,
    },
    /// A compressed payload that does not decode to its packet's pages (spec §9).
    #[error("the {method} payload is damaged at its byte {at}: {reason}")]
    Payload {
        /// The compression method.
        method: &'static str,
        /// Offset in the payload up to which it was read.
        at: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// An XBZRLE delta that does not fit its page or itself (spec §7.4).
    #[error("a bad XBZRLE delta: {0}")]
    Xbzrle(&'static str),
    /// There is no memory for what has arrived.
    #[error("there is no memory for {bytes} bytes of {what}")]
    NoMemory {
        /// What it is.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
    /// A bad block list.
    #[error(transparent)]
    BlockList(#[from] BlockListError),
    /// A bad page address.
    #[error(transparent)]
    NotAPage(#[from] NotAPage),
}

impl WireError {
    pub(crate) fn value(field: &'static str, seen: impl Into<u64>, expected: &'static str) -> Self {
        let seen = seen.into();
        Self::Value {
            field,
            seen,
            expected,
        }
    }

    pub(crate) fn refused(what: impl Into<Cow<'static, str>>, remedy: &'static str) -> Self {
        let what = what.into();
        Self::Refused { what, remedy }
    }

    pub(crate) fn unknown_block(name: &[u8]) -> Self {
        let name = name.escape_ascii().to_string();
        Self::UnknownBlock { name }
    }
}
