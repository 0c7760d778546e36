//! How the pages of a packet are packed (spec §8.3, §9). The seam for page codecs: only "none" is filled.
//!
//! A codec belongs to one channel for the whole session, because zlib and zstd are one stream per channel through
//! syncs and checkpoints. The method is not negotiated; it is in the flags of each packet.

use super::WireError;
use crate::units::PAGE_SIZE;

/// How the primary packs pages: its parameter `multifd-compression`.
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

/// Unpacks the payloads of one channel, in order.
pub trait PageCodec: Send {
    /// Unpacks one packet's whole `payload` into exactly `pages`, the packet's normal pages in order.
    ///
    /// # Errors
    /// If the payload does not give exactly that many bytes, or bytes of it are left over.
    fn unpack(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), WireError>;
}

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

    /// What unpacks this method's payloads: nothing for [`Method::None`], whose payload goes straight to the pages.
    ///
    /// # Errors
    /// If there is no codec for it here.
    pub fn open(self) -> Result<Option<Box<dyn PageCodec>>, WireError> {
        self.check_supported().map(|()| None)
    }

    /// Checks the announced payload of a packet with `normal` ≥ 1 normal pages before a byte of it is read.
    ///
    /// # Errors
    /// If the length does not fit the method, or there is no codec for it here.
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
