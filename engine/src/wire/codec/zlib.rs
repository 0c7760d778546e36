//! zlib (RFC 1950): one stream per channel, each payload the next part of it, ended by a sync flush (spec §9).

use super::{Method, Progress, damaged};
use crate::wire::WireError;
use zlib_rs::{Inflate, InflateError, InflateFlush, Status};

/// Largest window that the format has, as a binary logarithm.
pub(super) const WINDOW_BITS: u8 = 15;

/// What an [`Inflate`] takes at most: the window of 32 KiB and its tables, with room for other releases.
pub(super) const MEMORY_BYTES: u64 = 64 << 10;

/// What a sync flush ends with: the lengths of an empty stored block.
pub(super) const SYNC_FLUSH: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

pub(super) struct Stream {
    inflate: Inflate,
}

impl Stream {
    pub(super) fn new() -> Self {
        let inflate = Inflate::new(true, WINDOW_BITS);
        Self { inflate }
    }

    /// `room` is the packet's pages and one more.
    pub(super) fn decode(&mut self, payload: &[u8], room: &mut [u8]) -> Result<(), WireError> {
        // A payload that is cut inside of the flush's marker would give all of its pages.
        if !payload.ends_with(&SYNC_FLUSH) {
            let reason = "it does not end with a sync flush";
            return Err(damaged(Method::Zlib, payload.len(), reason));
        }
        let (status, progress) = inflate(&mut self.inflate, Method::Zlib, payload, room)?;
        if status == Status::StreamEnd {
            let reason = "the channel's zlib stream ends, which no primary does";
            return Err(damaged(Method::Zlib, progress.taken, reason));
        }
        progress.check(Method::Zlib, payload, room)
    }
}

/// Inflates as far as input and room reach.
pub(super) fn inflate(
    inflate: &mut Inflate,
    method: Method,
    input: &[u8],
    room: &mut [u8],
) -> Result<(Status, Progress), WireError> {
    let mut progress = Progress::default();
    loop {
        let (in_before, out_before) = (inflate.total_in(), inflate.total_out());
        let Progress { taken, written } = progress;
        let result = inflate.decompress(&input[taken..], &mut room[written..], InflateFlush::SyncFlush);
        let (took, wrote) = (
            moved(in_before, inflate.total_in()),
            moved(out_before, inflate.total_out()),
        );
        progress.taken += took;
        progress.written += wrote;
        match result {
            Ok(Status::Ok) if took + wrote > 0 => {}
            Ok(status) => return Ok((status, progress)),
            Err(error) => return Err(damaged(method, progress.taken, reason(inflate, error))),
        }
    }
}

/// Bytes that one call moved, which fit a slice.
fn moved(before: u64, after: u64) -> usize {
    usize::try_from(after - before).expect("no longer than the slice that was given")
}

fn reason(inflate: &Inflate, error: InflateError) -> &'static str {
    match error {
        InflateError::NeedDict { .. } => "it needs a preset dictionary, which no primary has",
        _ => inflate.error_message().unwrap_or_else(|| error.as_str()),
    }
}
