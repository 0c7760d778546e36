//! COLO's own messages on the main channel, in both directions (spec §12.1).

use super::cursor::Cursor;
use super::limits::{VMSTATE_MAX, VMSTATE_MIN};
use super::{Parsed, WireError};

/// One COLO message. [`Message::VmstateSize`] alone has a value on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Secondary: the initial state is loaded. Once.
    CheckpointReady,
    /// Primary: requests a checkpoint.
    CheckpointRequest,
    /// Secondary: ready for it; the primary then stops its guest.
    CheckpointReply,
    /// Primary: RAM follows.
    VmstateSend,
    /// Primary: this many bytes of device state follow. Within [`VMSTATE_MIN`] and [`VMSTATE_MAX`] when parsed.
    VmstateSize(u64),
    /// Secondary: the checkpoint is complete here.
    VmstateReceived,
    /// Secondary: the checkpoint is committed; the primary restarts its guest.
    VmstateLoaded,
}

impl Message {
    /// Parses one message.
    ///
    /// # Errors
    /// If the id is unknown or the announced size is out of bounds.
    pub fn parse(input: &[u8]) -> Parsed<Self> {
        Cursor::parse(input, |cursor| {
            Ok(match cursor.be32()? {
                0 => Self::CheckpointReady,
                1 => Self::CheckpointRequest,
                2 => Self::CheckpointReply,
                3 => Self::VmstateSend,
                4 => Self::VmstateSize(check_size(cursor.be64()?)?),
                5 => Self::VmstateReceived,
                6 => Self::VmstateLoaded,
                other => return Err(WireError::value("a COLO message id", other, "0 to 6").into()),
            })
        })
    }

    /// Its id on the wire.
    pub fn id(self) -> u32 {
        match self {
            Self::CheckpointReady => 0,
            Self::CheckpointRequest => 1,
            Self::CheckpointReply => 2,
            Self::VmstateSend => 3,
            Self::VmstateSize(_) => 4,
            Self::VmstateReceived => 5,
            Self::VmstateLoaded => 6,
        }
    }

    /// Appends the message.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id().to_be_bytes());
        if let Self::VmstateSize(size) = self {
            out.extend_from_slice(&size.to_be_bytes());
        }
    }
}

fn check_size(size: u64) -> Result<u64, WireError> {
    if size < VMSTATE_MIN {
        return Err(WireError::value("VMSTATE_SIZE", size, "at least 2 bytes"));
    }
    if size > VMSTATE_MAX {
        return Err(WireError::Limit {
            field: "VMSTATE_SIZE",
            seen: size,
            limit: VMSTATE_MAX,
        });
    }
    Ok(size)
}

/// Checks the ends of a complete device state, initial or of a checkpoint: sections from the first byte, the EOF
/// byte last (spec §12.3). What is between them is not checked here: the QEMU that restarts the guest reads it.
///
/// # Errors
/// If it begins or ends otherwise.
pub fn check_device_state(blob: &[u8]) -> Result<(), WireError> {
    let (first, last) = match blob {
        [first, .., last] => (*first, *last),
        _ => {
            return Err(WireError::value(
                "the length of the device state",
                blob.len() as u64,
                "2 or more",
            ));
        }
    };
    if first != super::stream::SECTION_FULL {
        return Err(WireError::value(
            "the first byte of the device state",
            first,
            "0x4",
        ));
    }
    if last != super::stream::SECTION_EOF {
        return Err(WireError::value("the last byte of the device state", last, "0x0"));
    }
    Ok(())
}
