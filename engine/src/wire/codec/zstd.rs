//! zstd (RFC 8878): one frame per channel that never ends, each payload ended by a flush (spec §9).

use super::{Method, Progress, damaged};
use crate::units::PAGE_SIZE;
use crate::wire::WireError;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Magic, descriptor, window.
const HEADER_BYTES: usize = 6;

/// Largest window, as a binary logarithm: that of zstd's highest level. QEMU's highest, 20, has 25.
pub(super) const WINDOW_LOG_MAX: u32 = 27;

/// A block's header: whether it is the last one, its type and its size.
const BLOCK_HEADER_BYTES: usize = 3;

/// Most bytes of a block, with its content or compressed. A smaller window is the limit instead.
const BLOCK_BYTES: u64 = 128 << 10;

/// What a decoder takes beside window and blocks: tables of the entropy decoders, with room for other releases.
pub(super) const FIXED_BYTES: u64 = 256 << 10;

/// The window of a frame, from its first payload.
///
/// # Errors
/// If a primary's frame does not begin so, or the window is too large.
pub(super) fn window_bytes(payload: &[u8]) -> Result<u64, WireError> {
    let Some(header) = payload.first_chunk::<HEADER_BYTES>() else {
        let reason = "it ends in the frame's header";
        return Err(damaged(Method::Zstd, payload.len(), reason));
    };
    let [magic @ .., descriptor, window] = *header;
    if magic != MAGIC {
        return Err(damaged(Method::Zstd, 0, "no zstd frame begins there"));
    }
    // A content size, a checksum or a dictionary: a frame that is flushed before it is complete has none of them.
    if descriptor != 0 {
        let field = "the descriptor of the channel's zstd frame";
        return Err(WireError::value(field, descriptor, "0x0"));
    }
    let base = 1_u64 << (10 + (window >> 3));
    let bytes = base + base / 8 * u64::from(window & 7);
    let limit = 1 << WINDOW_LOG_MAX;
    if bytes > limit {
        let field = "the window of the channel's zstd frame";
        return Err(WireError::Limit {
            field,
            seen: bytes,
            limit,
        });
    }
    Ok(bytes)
}

/// What a decoder takes at most beside that: its window with a block behind it, and a block of input.
pub(super) fn stream_bytes(window: u64) -> u64 {
    window + 2 * BLOCK_BYTES
}

/// Where the block ends that begins at byte `at` of a payload.
///
/// # Errors
/// If a primary's frame has no such block, or the payload ends within it.
fn block_end(payload: &[u8], at: usize, most_bytes: u64) -> Result<usize, WireError> {
    let error = |reason| damaged(Method::Zstd, at, reason);
    let Some(&[low, middle, high]) = payload[at..].first_chunk::<BLOCK_HEADER_BYTES>() else {
        return Err(error("it ends in a block's header"));
    };
    let header = u32::from_le_bytes([low, middle, high, 0]);
    let (is_last, kind, size) = (header & 1 == 1, header >> 1 & 3, header >> 3);
    if is_last {
        return Err(error("the channel's zstd frame ends, which no primary does"));
    }
    if u64::from(size) > most_bytes {
        return Err(error("a block is larger than the format allows"));
    }
    let bytes = match kind {
        0 | 2 => size as usize,
        // One byte, which is repeated.
        1 => 1,
        _ => return Err(error("a block has the reserved type")),
    };
    let end = at + BLOCK_HEADER_BYTES + bytes;
    if end > payload.len() {
        return Err(error("it ends in a block"));
    }
    Ok(end)
}

/// A channel's frame. Every payload is a number of whole blocks, the first one with the frame's header before them. The
/// decoder is given one block at a time: of a payload that is damaged it says that only, not where.
pub(super) struct Frame {
    context: DCtx<'static>,
    /// Most bytes of a block; 0 before the first payload.
    block_bytes: u64,
}

impl Frame {
    pub(super) fn new() -> Result<Self, WireError> {
        let error = |code| damaged(Method::Zstd, 0, zstd_safe::get_error_name(code));
        let mut context =
            DCtx::try_create().ok_or_else(|| damaged(Method::Zstd, 0, "no memory for a decoder"))?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(error)?;
        Ok(Self {
            context,
            block_bytes: 0,
        })
    }

    /// Bytes that the decoder has allocated.
    #[cfg(all(test, not(miri)))]
    pub(super) fn allocated(&self) -> u64 {
        self.context.sizeof() as u64
    }

    /// `room` is the packet's pages and one more.
    pub(super) fn decode(&mut self, payload: &[u8], room: &mut [u8]) -> Result<(), WireError> {
        let mut block = 0;
        if self.block_bytes == 0 {
            self.block_bytes = window_bytes(payload)?.min(BLOCK_BYTES);
            block = HEADER_BYTES;
        }
        let expected = room.len() - PAGE_SIZE;
        let (mut taken, mut written) = (0, 0);
        while block < payload.len() {
            let end = block_end(payload, block, self.block_bytes)?;
            let before = written;
            let mut input = InBuffer::around(&payload[taken..end]);
            let mut output = OutBuffer::around(&mut room[written..]);
            self.context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| damaged(Method::Zstd, block, zstd_safe::get_error_name(code)))?;
            taken += input.pos();
            written += output.pos();
            if written > expected {
                taken = block;
                break;
            }
            if before == expected {
                let reason = "a block without content follows the packet's last page";
                return Err(damaged(Method::Zstd, block, reason));
            }
            block = end;
        }
        Progress { taken, written }.check(Method::Zstd, payload, room)
    }
}
