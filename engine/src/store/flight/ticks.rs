//! Spans of time as a record stores them: 32 bits each.

/// Unit of a stored span: 32 bits of it are seven minutes, and longer spans are stored as that.
const TICK_NS: u64 = 100;

/// A span that is not known.
pub(super) const UNKNOWN: u32 = u32::MAX;

/// Stores as much of a span as there is room for.
pub(super) fn ticks(nanoseconds: u64) -> u32 {
    u32::try_from(nanoseconds / TICK_NS).map_or(UNKNOWN - 1, |ticks| ticks.min(UNKNOWN - 1))
}

pub(super) fn maybe_ticks(nanoseconds: Option<u64>) -> u32 {
    nanoseconds.map_or(UNKNOWN, ticks)
}

pub(super) fn known(ticks: u32) -> Option<u64> {
    (ticks != UNKNOWN).then(|| u64::from(ticks) * TICK_NS)
}

/// The first of two spans in a word.
pub(super) fn low(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The second one.
pub(super) fn high(word: u64) -> u32 {
    (word >> 32) as u32
}
