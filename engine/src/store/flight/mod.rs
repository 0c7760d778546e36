//! The flight recorder: where the time of the last 65,536 checkpoints of a guest went.
//!
//! A checkpoint leaves a [`FlightRecord`] of 256 bytes in a ring of fixed size, which lies in memory of the guest, or in a file of
//! the RAM directory, where it outlives the process. One thread writes, the one that drives the main channel; writing takes no lock
//! and allocates nothing. Any thread may copy the ring meanwhile ([`FlightRing::write_to`]).
//!
//! # The file
//! | byte | what |
//! |---|---|
//! | 0 | magic, version, capacity, bytes of a record, start of the receiver in ns since 1970, session; checksum of these |
//! | 4096 | records: the one of checkpoint `n` has the place `n` modulo the capacity (`record.rs`) |
//!
//! All numbers are words of 64 bits in this host's byte order.
//!
//! # What a reader may trust
//! Nothing that it has not checked ([`FlightLog`]): the file may be of a process that was killed in the middle of a record, or
//! damaged. A record carries its checkpoint's number, which must belong to its place, and a checksum; one that has not is counted
//! as damaged.

mod channels;
mod log;
mod record;
mod ring;
mod split;
mod ticks;

pub use channels::{ChannelBytes, ChannelMoments, FLIGHT_CHANNELS, LastChannel};
pub use log::{FlightError, FlightLog, NoFlight};
pub use record::{FlightRecord, SchedulerTimes};
pub use ring::FlightRing;
pub use split::{PauseSplit, Window};

/// Name of the file in a RAM directory, behind the guest's label.
pub(crate) const FLIGHT_FILE: &str = "~flight";

/// Checkpoints that the recorder of a guest holds: an hour and a half of 12 a second, a minute of a thousand.
pub const FLIGHT_CHECKPOINTS: u64 = 1 << 16;

/// First word, `\x89CLFLT\r\n`, and the second, the version.
const MAGIC: u64 = u64::from_be_bytes(*b"\x89CLFLT\r\n");
const VERSION: u64 = 2;

/// Words of the head, and of a record.
const HEAD_WORDS: usize = 512;
const RECORD_WORDS: usize = 32;

/// Bytes of a ring for so many checkpoints, and of its file.
pub const fn ring_bytes(checkpoints: u64) -> u64 {
    (HEAD_WORDS as u64 + checkpoints * RECORD_WORDS as u64) * 8
}

fn checksum(words: &[u64]) -> u64 {
    let add = |sum, word: &u64| crc32c::crc32c_append(sum, &word.to_le_bytes());
    u64::from(words.iter().fold(0, add))
}
