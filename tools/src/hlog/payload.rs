//! One histogram as a line encodes it: base64 over zlib over HdrHistogram's V2 encoding.
//!
//! The `hdrhistogram` crate decodes it, but it allocates what the header says and computes with what the counts
//! say. Both are checked here before it sees them.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use flate2::read::ZlibDecoder;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use std::io::Read;
use std::ops::Range;
use thiserror::Error;

/// Bytes of a decompressed histogram at most. One of five digits over the whole range of 64 bits has six million
/// counts, nearly all of them in runs of zeroes that take a few bytes.
pub const PLAIN_BYTES_MAX: usize = 16 << 20;

const V2_COOKIE: u32 = 0x1c84_9303;
const V2_COMPRESSED_COOKIE: u32 = 0x1c84_9304;
/// The bits of a cookie that say how wide counts are; in V2 they do not matter.
const WORD_SIZE_BITS: u32 = 0xf0;
const HEADER_BYTES: usize = 40;
/// Where in the header is by how many places the counts are shifted.
const SHIFT: Range<usize> = 8..12;
/// Where in the header the ratio of integers to values is.
const RATIO: Range<usize> = 32..40;

/// Why a histogram could not be decoded.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// Not base64.
    #[error("the histogram is not base64: {0}")]
    Base64(#[from] base64::DecodeError),
    /// Bytes are missing.
    #[error("the histogram ends after {have} bytes, and {need} were expected")]
    Short {
        /// Bytes that are there.
        have: usize,
        /// Bytes that should be.
        need: usize,
    },
    /// Of another encoding.
    #[error(
        "the histogram's encoding is {0:#010x}, and only V2 of integers is read; have the tool write format 1.2 or newer"
    )]
    Cookie(u32),
    /// Not zlib, or damaged.
    #[error("the histogram cannot be decompressed: {0}")]
    Inflate(std::io::Error),
    /// It would take too much memory.
    #[error("the histogram has more than {PLAIN_BYTES_MAX} bytes")]
    TooLarge,
    /// Counts that make no sense.
    #[error("the histogram's counts are damaged at byte {0}")]
    Counts(usize),
    /// What the crate found.
    #[error("the histogram cannot be decoded: {0}")]
    Decode(#[from] hdrhistogram::serialization::DeserializeError),
}

/// Decodes the last field of an interval.
pub(super) fn decode(text: &str) -> Result<Histogram<u64>, PayloadError> {
    let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bytes = GeneralPurpose::new(&alphabet::STANDARD, padding).decode(text)?;
    let cookie = word(&bytes, 0)?;
    let mut plain = match cookie & !WORD_SIZE_BITS {
        V2_COOKIE => bytes,
        V2_COMPRESSED_COOKIE => inflate(&bytes)?,
        _ => return Err(PayloadError::Cookie(cookie)),
    };
    check_plain(&plain)?;
    // The JavaScript library writes 1 as an integer where a floating-point number belongs, and a shift of counts of 1
    // where it shifts none; it reads neither.
    if plain[RATIO] == 1u64.to_be_bytes() && plain[SHIFT] == 1u32.to_be_bytes() {
        plain[RATIO].copy_from_slice(&1f64.to_be_bytes());
        plain[SHIFT].fill(0);
    }
    Ok(Deserializer::new().deserialize(&mut plain.as_slice())?)
}

fn word(bytes: &[u8], at: usize) -> Result<u32, PayloadError> {
    let short = PayloadError::Short {
        have: bytes.len(),
        need: at + 4,
    };
    let word = bytes.get(at..at + 4).ok_or(short)?;
    Ok(u32::from_be_bytes(word.try_into().expect("four bytes")))
}

fn inflate(bytes: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let length = usize::try_from(word(bytes, 4)?).map_err(|_| PayloadError::TooLarge)?;
    let compressed = bytes[8..].get(..length).ok_or(PayloadError::Short {
        have: bytes.len(),
        need: length.saturating_add(8),
    })?;
    let mut plain = Vec::new();
    ZlibDecoder::new(compressed)
        .take(PLAIN_BYTES_MAX as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(PayloadError::Inflate)?;
    if plain.len() > PLAIN_BYTES_MAX {
        return Err(PayloadError::TooLarge);
    }
    Ok(plain)
}

/// Proves what the decoder takes for granted: that the counts are as long as the header says, that each is whole,
/// and that neither a run of zeroes nor the sum overflows.
fn check_plain(plain: &[u8]) -> Result<(), PayloadError> {
    let cookie = word(plain, 0)?;
    if cookie & !WORD_SIZE_BITS != V2_COOKIE {
        return Err(PayloadError::Cookie(cookie));
    }
    let length = usize::try_from(word(plain, 4)?).map_err(|_| PayloadError::TooLarge)?;
    let short = PayloadError::Short {
        have: plain.len(),
        need: length.saturating_add(HEADER_BYTES),
    };
    let counts = plain.get(HEADER_BYTES..).and_then(|counts| counts.get(..length));
    let counts = counts.ok_or(short)?;
    let mut at = 0;
    let mut total = 0u64;
    while at < counts.len() {
        let damaged = PayloadError::Counts(HEADER_BYTES + at);
        let (number, bytes) = zigzag_varint(&counts[at..]).ok_or(damaged)?;
        let damaged = PayloadError::Counts(HEADER_BYTES + at);
        match u64::try_from(number) {
            Ok(count) => total = total.saturating_add(count),
            // A run of zeroes: no histogram has 2^32 counts.
            Err(_) if u32::try_from(number.unsigned_abs()).is_ok() => {}
            Err(_) => return Err(damaged),
        }
        if total > super::COUNT_MAX {
            return Err(damaged);
        }
        at += bytes;
    }
    Ok(())
}

/// A number of seven bits a byte, lowest first, nine bytes at most of which the last has eight; then zigzag. Returns
/// also its length.
fn zigzag_varint(bytes: &[u8]) -> Option<(i64, usize)> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().copied().enumerate().take(9) {
        let (bits, more) = match index {
            8 => (byte, false),
            _ => (byte & 0x7f, byte & 0x80 != 0),
        };
        value |= u64::from(bits) << (7 * index);
        if !more {
            let sign = (value & 1).wrapping_neg();
            return Some((((value >> 1) ^ sign).cast_signed(), index + 1));
        }
    }
    None
}
