//! How the pages of a packet are compressed, and the decoders (spec §8.3, §9).
//!
//! The method is not negotiated: it is in the flags of each packet, and is pinned by the first packet with a payload.
//! A [`Decoder`] belongs to one channel for the whole session, because zlib and zstd are one continuous stream per
//! channel through syncs and checkpoints. A payload is decoded whole, into a [`PageBuffer`] that belongs to the
//! decoding thread and stays in its processor's cache; from there the pages are copied to where they belong. A decoder
//! never sees guest memory, so a packet that is damaged changes no page.
//!
//! **Bounds.** A payload's length is checked by `guard` before a byte of it is read. A decoder writes at most one
//! page more than the packet announces, and its memory is bounded by [`fixed_bytes`] and [`stream_bytes`], which a
//! budget can be charged with before they are taken.

mod encoder;
mod guard;
mod page_deflate;
// Miri runs no C library.
#[cfg(all(test, not(miri)))]
mod tests;
mod zlib;
mod zstd;

use super::WireError;
use crate::units::{PACKET_PAGES, PAGE_SIZE};
pub use encoder::Encoder;
pub use guard::PAYLOAD_MAX;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the primary compresses pages: its parameter `multifd-compression`. Methods that need an accelerator are not
/// values of a command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Pages as they are
    #[default]
    None,
    /// A zlib stream per channel
    Zlib,
    /// A zstd stream per channel, faster than zlib on both sides
    Zstd,
    /// Each page a raw deflate stream of its own, by Intel's QPL
    #[cfg_attr(feature = "cli", value(skip))]
    Qpl,
    /// Each page a zlib stream of its own, by UADK accelerators
    #[cfg_attr(feature = "cli", value(skip))]
    Uadk,
    /// All pages of the packet, by QATzip
    #[cfg_attr(feature = "cli", value(skip))]
    Qatzip,
}

/// Bits of a packet's flags that hold the method.
pub const METHOD_MASK: u32 = 0x3e;

impl Method {
    /// All of them, in the order of their bits.
    pub const ALL: [Self; 6] = [
        Self::None,
        Self::Zlib,
        Self::Zstd,
        Self::Qpl,
        Self::Uadk,
        Self::Qatzip,
    ];

    /// The method in a packet's flags.
    ///
    /// # Errors
    /// If they name two, or one that does not exist.
    pub fn from_flags(flags: u32) -> Result<Self, WireError> {
        let bits = flags & METHOD_MASK;
        let found = Self::ALL.into_iter().find(|method| method.flags() == bits);
        found.ok_or_else(|| {
            WireError::value(
                "the compression method of a packet",
                bits,
                "one bit of 0x3e or none",
            )
        })
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
    /// If the length does not fit the method, or there is no decoder for it here.
    pub fn check_payload(self, normal: u16, announced: u32) -> Result<(), WireError> {
        guard::check_length(self, normal, announced)
    }
}

/// Memory that [`Decoder::open`] takes at most, until the decoder is dropped.
pub fn fixed_bytes(method: Method) -> u64 {
    match method {
        Method::None | Method::Qatzip => 0,
        Method::Zlib | Method::Qpl | Method::Uadk => zlib::MEMORY_BYTES,
        Method::Zstd => zstd::FIXED_BYTES,
    }
}

/// Memory that the first [`Decoder::decode`] takes in addition, as its payload demands: the window of a zstd stream.
///
/// # Errors
/// If the payload cannot begin a stream of that method.
pub fn stream_bytes(method: Method, first_payload: &[u8]) -> Result<u64, WireError> {
    match method {
        Method::Zstd => Ok(zstd::stream_bytes(zstd::window_bytes(first_payload)?)),
        Method::None | Method::Zlib | Method::Qpl | Method::Uadk | Method::Qatzip => Ok(0),
    }
}

/// Where a thread decodes to: the pages of a packet, and one page more, by which an output that is too long is seen.
///
/// Its memory is allocated when the thread decodes for the first time.
#[derive(Default)]
pub struct PageBuffer {
    bytes: Vec<u8>,
}

impl PageBuffer {
    /// Has its memory.
    fn allocate(&mut self) -> Result<(), WireError> {
        const BYTES: usize = (PACKET_PAGES + 1) * PAGE_SIZE;
        if self.bytes.is_empty() {
            let reserved = self.bytes.try_reserve_exact(BYTES);
            reserved.map_err(|_| WireError::NoMemory {
                what: "decoded pages",
                bytes: BYTES as u64,
            })?;
            self.bytes.resize(BYTES, 0);
        }
        Ok(())
    }

    /// Room for `pages` pages and one more.
    fn room(&mut self, pages: usize) -> &mut [u8] {
        &mut self.bytes[..(pages + 1) * PAGE_SIZE]
    }

    fn pages(&self, pages: usize) -> &[[u8; PAGE_SIZE]] {
        self.bytes[..pages * PAGE_SIZE].as_chunks().0
    }
}

/// Whether a page is all zeros. Ends at the first byte that is not, in steps of a cache line.
pub fn is_zero(page: &[u8; PAGE_SIZE]) -> bool {
    let (lines, _) = page.as_chunks::<64>();
    lines
        .iter()
        .all(|line| line.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Decodes the payloads of one channel, in order.
pub struct Decoder {
    kind: Kind,
    method: Method,
    failed: bool,
}

enum Kind {
    Zlib(zlib::Stream),
    Zstd(zstd::Frame),
    Pages(page_deflate::Pages),
}

impl Decoder {
    /// The decoder of a method; `None` for [`Method::None`], whose payload goes straight to the pages.
    ///
    /// # Errors
    /// If there is no decoder for it here.
    pub fn open(method: Method) -> Result<Option<Self>, WireError> {
        let kind = match method {
            Method::None => return Ok(None),
            Method::Zlib => Kind::Zlib(zlib::Stream::new()),
            Method::Zstd => Kind::Zstd(zstd::Frame::new()?),
            Method::Qpl => Kind::Pages(page_deflate::Pages::raw_deflate()),
            Method::Uadk => Kind::Pages(page_deflate::Pages::zlib()),
            Method::Qatzip => return Err(guard::refuse(method)),
        };
        Ok(Some(Self {
            kind,
            method,
            failed: false,
        }))
    }

    /// The method that it decodes.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Decodes one packet's whole payload into its `normal` pages. After an error all that follow fail: what comes
    /// later in the stream cannot be decoded without what was lost.
    ///
    /// # Errors
    /// If the payload does not give exactly that many pages, or bytes of it are left over; without memory to decode to.
    ///
    /// # Panics
    /// With more pages than a packet has.
    pub fn decode<'b>(
        &mut self,
        payload: &[u8],
        normal: u16,
        buffer: &'b mut PageBuffer,
    ) -> Result<&'b [[u8; PAGE_SIZE]], WireError> {
        let pages = usize::from(normal);
        buffer.allocate()?;
        if self.failed {
            return Err(damaged(self.method, 0, "a payload before it was damaged"));
        }
        let decoded = match &mut self.kind {
            Kind::Zlib(stream) => stream.decode(payload, buffer.room(pages)),
            Kind::Zstd(frame) => frame.decode(payload, buffer.room(pages)),
            Kind::Pages(each) => each.decode(self.method, payload, buffer.room(pages)),
        };
        self.failed = decoded.is_err();
        decoded.map(|()| buffer.pages(pages))
    }
}

/// How far a stream's decoder came with a payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Bytes taken of the payload.
    taken: usize,
    /// Bytes of pages written.
    written: usize,
}

impl Progress {
    /// Checks that all of `payload` gave exactly the pages for which `room` was made.
    fn check(self, method: Method, payload: &[u8], room: &[u8]) -> Result<(), WireError> {
        let Self { taken, written } = self;
        let expected = room.len() - PAGE_SIZE;
        if written > expected {
            return Err(damaged(method, taken, "it gives more than the packet's pages"));
        }
        if written < expected {
            return Err(damaged(method, taken, "it gives less than the packet's pages"));
        }
        if taken < payload.len() {
            let reason = "bytes are left over after the packet's last page";
            return Err(damaged(method, taken, reason));
        }
        Ok(())
    }
}

fn damaged(method: Method, at: usize, reason: &'static str) -> WireError {
    WireError::Payload {
        method: method.name(),
        at: at as u64,
        reason,
    }
}
