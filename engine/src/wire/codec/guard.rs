//! The length of a payload, checked before a byte of it is read: one place for all methods.

use super::Method;
use crate::units::PAGE_BYTES;
use crate::wire::WireError;

/// Most bytes of a compressed payload: twice what 128 pages have, as in QEMU's own receiver (spec §9). Pages that do
/// not compress give about 150 bytes more than they have.
pub const PAYLOAD_MAX: u32 = 1 << 20;

/// Bytes of the length that stands before the pages for each page, where each is compressed on its own.
pub(super) const PAGE_LENGTH_BYTES: usize = 4;

pub(super) fn check_length(method: Method, normal: u16, announced: u32) -> Result<(), WireError> {
    let pages = u64::from(normal);
    let (least, most) = match method {
        Method::None => (pages * PAGE_BYTES, pages * PAGE_BYTES),
        Method::Zlib | Method::Zstd => (1, PAYLOAD_MAX.into()),
        Method::Qpl | Method::Uadk => {
            let lengths = pages * PAGE_LENGTH_BYTES as u64;
            (lengths + pages, lengths + pages * PAGE_BYTES)
        }
        Method::Qatzip => return Err(refuse(method)),
    };
    let seen = u64::from(announced);
    if method == Method::None && seen != most {
        return Err(WireError::Mismatch {
            field: "the payload size of a packet of uncompressed pages",
            seen,
            expected: most,
        });
    }
    if seen < least {
        return Err(WireError::Mismatch {
            field: "the payload size of a packet of compressed pages",
            seen,
            expected: least,
        });
    }
    if seen > most {
        return Err(WireError::Limit {
            field: "the payload size of a packet of compressed pages",
            seen,
            limit: most,
        });
    }
    Ok(())
}

pub(super) fn refuse(method: Method) -> WireError {
    let what = format!("pages compressed with {}", method.name());
    WireError::refused(
        what,
        "set its parameter multifd-compression to zstd, zlib or none",
    )
}
