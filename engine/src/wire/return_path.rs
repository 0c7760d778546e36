//! Framed messages from the secondary to the primary, before COLO begins (spec §6). Only the two that a COLO
//! secondary sends; after CHECKPOINT_READY there are none.

use super::cursor::Cursor;
use super::{Parsed, WireError};

/// A return-path message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpMessage {
    /// The load has finished, with this error (0: none); no further return-path message follows.
    Shut(u32),
    /// Answer to PING, with its value.
    Pong(u32),
}

impl RpMessage {
    /// Parses one message, as a primary does.
    ///
    /// # Errors
    /// If the type is unknown or the length is wrong.
    pub fn parse(input: &[u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            let kind = cursor.be16()?;
            if !matches!(kind, 1 | 2) {
                return Err(WireError::value("a return-path message type", kind, "1 or 2").into());
            }
            let length = cursor.be16()?;
            if length != 4 {
                return Err(WireError::value("a return-path message's length", length, "4").into());
            }
            let value = cursor.be32()?;
            Ok(if kind == 1 {
                Self::Shut(value)
            } else {
                Self::Pong(value)
            })
        })
    }

    /// Appends the message.
    pub fn encode(self, out: &mut Vec<u8>) {
        let (kind, value) = match self {
            Self::Shut(error) => (1u16, error),
            Self::Pong(value) => (2u16, value),
        };
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&4u16.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}
