//! How the pages of a packet are compressed (spec §8.3, §9). Only uncompressed pages can be received.
//!
//! The method is not negotiated; it is in the flags of each packet.

use super::WireError;
use crate::units::PAGE_SIZE;

/// How the primary compresses pages: its parameter `multifd-compression`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Not at all: the payload is the pages.
    None,
    /// One zlib stream per channel.
    Zlib,
    /// One zstd frame per channel.
    Zstd,
    /// Each page on its own, by Intel's QPL.
    Qpl,
    /// Each page on its own, by UADK accelerators.
    Uadk,
    /// All pages of the packet, by QATzip.
    Qatzip,
}

/// Bits of a packet's flags that hold the method.
pub const METHOD_MASK: u32 = 0x3e;

impl Method {
    /// The method in a packet's flags.
    ///
    /// # Errors
    /// If they name two, or one that does not exist.
    pub fn from_flags(flags: u32) -> Result<Self, WireError> {
        match flags & METHOD_MASK {
            0 => Ok(Self::None),
            0x02 => Ok(Self::Zlib),
            0x04 => Ok(Self::Zstd),
            0x08 => Ok(Self::Qpl),
            0x10 => Ok(Self::Uadk),
            0x20 => Ok(Self::Qatzip),
            two => Err(WireError::value(
                "the compression method of a packet",
                two,
                "one bit of 0x3e or none",
            )),
        }
    }

    /// Its bits in a packet's flags.
    pub fn flags(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => 0x02,
            Self::Zstd => 0x04,
            Self::Qpl => 0x08,
            Self::Uadk => 0x10,
            Self::Qatzip => 0x20,
        }
    }

    /// Its name as the primary's parameter has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
            Self::Qpl => "qpl",
            Self::Uadk => "uadk",
            Self::Qatzip => "qatzip",
        }
    }

    /// Checks the announced payload of a packet with `normal` ≥ 1 normal pages before a byte of it is read.
    ///
    /// # Errors
    /// If the length does not fit the method, or pages compressed with it cannot be received.
    pub fn check_payload(self, normal: u16, announced: u32) -> Result<(), WireError> {
        self.check_supported()?;
        let expected = u64::from(normal) * PAGE_SIZE as u64;
        if u64::from(announced) == expected {
            return Ok(());
        }
        Err(WireError::Mismatch {
            field: "the payload size of a packet of uncompressed pages",
            seen: announced.into(),
            expected,
        })
    }

    fn check_supported(self) -> Result<(), WireError> {
        if self == Self::None {
            return Ok(());
        }
        let what = format!("pages compressed with {}", self.name());
        Err(WireError::refused(
            what,
            "set its parameter multifd-compression to none",
        ))
    }
}
