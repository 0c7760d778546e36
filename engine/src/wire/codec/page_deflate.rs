//! Deflate page by page, as QPL and UADK do it: the lengths of all pages, then the pages, each compressed on its own
//! or, where that would not make it smaller, as it is (spec §9).
//!
//! Made from the format's description: these methods need accelerators, and no stream of one was at hand.

use super::guard::PAGE_LENGTH_BYTES;
use super::{Method, damaged, zlib};
use crate::units::PAGE_SIZE;
use crate::wire::WireError;
use zlib_rs::{Inflate, Status};

pub(super) struct Pages {
    inflate: Inflate,
    zlib_header: bool,
}

impl Pages {
    /// QPL's.
    pub(super) fn raw_deflate() -> Self {
        Self::new(false)
    }

    /// UADK's.
    pub(super) fn zlib() -> Self {
        Self::new(true)
    }

    fn new(zlib_header: bool) -> Self {
        let inflate = Inflate::new(zlib_header, zlib::WINDOW_BITS);
        Self { inflate, zlib_header }
    }

    /// `room` is the packet's pages and one more.
    pub(super) fn decode(
        &mut self,
        method: Method,
        payload: &[u8],
        room: &mut [u8],
    ) -> Result<(), WireError> {
        let pages = room.len() / PAGE_SIZE - 1;
        let Some((lengths, mut rest)) = payload.split_at_checked(pages * PAGE_LENGTH_BYTES) else {
            return Err(damaged(method, payload.len(), "it ends in the pages' lengths"));
        };
        for (page, length) in lengths.as_chunks().0.iter().enumerate() {
            let length = page_length(u32::from_be_bytes(*length))?;
            let at = payload.len() - rest.len();
            let (compressed, behind) = rest
                .split_at_checked(length)
                .ok_or_else(|| damaged(method, at, "it ends in a page"))?;
            rest = behind;
            let room = &mut room[page * PAGE_SIZE..][..2 * PAGE_SIZE];
            if length == PAGE_SIZE {
                room[..PAGE_SIZE].copy_from_slice(compressed);
            } else {
                self.page(method, at, compressed, room)?;
            }
        }
        if rest.is_empty() {
            return Ok(());
        }
        let at = payload.len() - rest.len();
        let reason = "bytes are left over after the packet's last page";
        Err(damaged(method, at, reason))
    }

    /// Inflates one page, which stands at byte `at` of the payload, into room for two.
    fn page(
        &mut self,
        method: Method,
        at: usize,
        compressed: &[u8],
        room: &mut [u8],
    ) -> Result<(), WireError> {
        self.inflate.reset(self.zlib_header);
        let inside = |error| match error {
            WireError::Payload {
                method,
                at: byte,
                reason,
            } => WireError::Payload {
                method,
                at: at as u64 + byte,
                reason,
            },
            other => other,
        };
        let (status, progress) =
            zlib::inflate(&mut self.inflate, method, compressed, room).map_err(inside)?;
        progress.check(method, compressed, room).map_err(inside)?;
        if status == Status::StreamEnd {
            return Ok(());
        }
        Err(damaged(method, at, "a page's compressed data has no end"))
    }
}

/// Checks the length of a compressed page: 1 to [`PAGE_SIZE`].
fn page_length(seen: u32) -> Result<usize, WireError> {
    match usize::try_from(seen) {
        Ok(0) => Err(WireError::value(
            "the length of a compressed page",
            0_u32,
            "0x1 to 0x1000",
        )),
        Ok(length) if length <= PAGE_SIZE => Ok(length),
        _ => Err(WireError::Limit {
            field: "the length of a compressed page",
            seen: seen.into(),
            limit: PAGE_SIZE as u64,
        }),
    }
}
