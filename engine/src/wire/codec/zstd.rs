//! zstd (RFC 8878): one frame per channel that never ends, each payload ended by a flush (spec §9).

use super::{Method, Progress, damaged};
use crate::wire::WireError;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Magic, descriptor, window.
const HEADER_BYTES: usize = 6;

/// Largest window, as a binary logarithm: that of zstd's highest level. QEMU's highest, 20, has 25.
pub(super) const WINDOW_LOG_MAX: u32 = 27;

/// Most bytes of a block.
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

pub(super) struct Frame {
    context: DCtx<'static>,
    begun: bool,
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
            begun: false,
        })
    }

    /// Bytes that the decoder has allocated.
    #[cfg(all(test, not(miri)))]
    pub(super) fn allocated(&self) -> u64 {
        self.context.sizeof() as u64
    }

    /// `room` is the packet's pages and one more.
    pub(super) fn decode(&mut self, payload: &[u8], room: &mut [u8]) -> Result<(), WireError> {
        if !self.begun {
            window_bytes(payload)?;
            self.begun = true;
        }
        let room_bytes = room.len();
        let (mut input, mut output) = (InBuffer::around(payload), OutBuffer::around(&mut *room));
        let progress = loop {
            let (in_before, out_before) = (input.pos(), output.pos());
            let result = self.context.decompress_stream(&mut output, &mut input);
            let (taken, written) = (input.pos(), output.pos());
            match result {
                Ok(0) => {
                    let reason = "the channel's zstd frame ends, which no primary does";
                    return Err(damaged(Method::Zstd, taken, reason));
                }
                Ok(_) => {}
                Err(code) => return Err(damaged(Method::Zstd, taken, zstd_safe::get_error_name(code))),
            }
            let stuck = (in_before, out_before) == (taken, written);
            // With room left, all that the input gives has been written.
            if stuck || (taken == payload.len() && written < room_bytes) {
                break Progress { taken, written };
            }
        };
        progress.check(Method::Zstd, payload, room)
    }
}
