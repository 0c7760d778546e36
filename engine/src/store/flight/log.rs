//! A recorder as it is read, from a file or from a receiver.

use super::record::FlightRecord;
use super::ring::Head;
use super::{HEAD_WORDS, MAGIC, RECORD_WORDS, VERSION};
use thiserror::Error;

/// Why there is nothing to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FlightError {
    /// It has another beginning.
    #[error("it is no flight recorder")]
    NotOne,
    /// Of another version of colo-ring.
    #[error("its version is {0}: this colo-ring knows {VERSION}")]
    Version(u64),
    /// Its head is not as it was written, or it is shorter than that says.
    #[error("its head is damaged")]
    Damaged,
}

/// Why a checkpoint that was recovered has no flight recorder. It does not depend on one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NoFlight {
    /// It is of a version without one.
    #[error("an earlier receiver has left no flight recorder with this checkpoint")]
    Missing,
    /// It is of another version.
    #[error("an earlier receiver has left a flight recorder of version {0}: this colo-ring knows {VERSION}")]
    Version(u64),
    /// It is not as it was written.
    #[error(
        "the flight recorder that an earlier receiver left is damaged; the checkpoint does not depend on it"
    )]
    Damaged,
}

impl From<FlightError> for NoFlight {
    fn from(error: FlightError) -> Self {
        match error {
            FlightError::Version(version) => Self::Version(version),
            FlightError::NotOne | FlightError::Damaged => Self::Damaged,
        }
    }
}

/// What a flight recorder held when it was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlightLog {
    /// Number of the session in its receiver.
    pub session: u32,
    /// Start of the receiver, in nanoseconds since 1970.
    pub started_unix_ns: u64,
    /// Checkpoints that there is room for.
    pub capacity: u64,
    /// In the order of their numbers.
    pub records: Vec<FlightRecord>,
    /// Places that hold something else than a whole record of theirs.
    pub damaged: u64,
}

impl FlightLog {
    /// Whether a file that begins so is one.
    pub fn is_one(start: &[u8]) -> bool {
        start.starts_with(&MAGIC.to_ne_bytes())
    }

    /// Reads what [`FlightRing::write_to`](super::FlightRing::write_to) wrote, or the file in a RAM directory.
    ///
    /// # Errors
    /// See [`FlightError`]. Damaged records are no error, but counted.
    pub fn parse(bytes: &[u8]) -> Result<Self, FlightError> {
        let words: Vec<u64> = (bytes.as_chunks::<8>().0.iter())
            .map(|word| u64::from_ne_bytes(*word))
            .collect();
        let head = Head::parse(&words, words.len())?;
        let mut log = Self {
            session: head.session,
            started_unix_ns: head.started_unix_ns,
            capacity: head.capacity,
            ..Self::default()
        };
        let places = words.get(HEAD_WORDS..).unwrap_or_default();
        let places = places.as_chunks::<RECORD_WORDS>().0.iter();
        for (place, words) in (0..head.capacity).zip(places) {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let record = FlightRecord::of_words(words);
            match record.filter(|record| record.checkpoint % head.capacity == place) {
                Some(record) => log.records.push(record),
                None => log.damaged += 1,
            }
        }
        log.records.sort_by_key(|record| record.checkpoint);
        Ok(log)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::store::flight::FlightRing;
    use crate::store::memory::words::Words;
    use proptest::prelude::*;

    fn file() -> Vec<u8> {
        let ring = FlightRing::create(Words::zeroed(HEAD_WORDS + 4 * RECORD_WORDS).unwrap());
        for checkpoint in 0..4 {
            ring.write(&FlightRecord {
                checkpoint,
                ..FlightRecord::default()
            });
        }
        let mut bytes = Vec::new();
        ring.write_to(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn damage_is_counted_and_not_shown() {
        let whole = file();
        assert!(FlightLog::is_one(&whole));
        let place = |number: usize| 8 * (HEAD_WORDS + number * RECORD_WORDS);
        let mut bytes = whole.clone();
        bytes[place(1) + 100] ^= 1;
        // A record that is whole and in another's place.
        bytes.copy_within(place(2)..place(3), place(3));
        // One that its writer did not end.
        bytes[place(0)..place(0) + 8].fill(0);
        let log = FlightLog::parse(&bytes).unwrap();
        let numbers: Vec<_> = log.records.iter().map(|record| record.checkpoint).collect();
        assert_eq!((numbers, log.damaged), (vec![2], 3));
        assert_eq!(
            FlightLog::parse(&whole[..place(4) - 1]),
            Err(FlightError::Damaged)
        );
        assert_eq!(FlightLog::parse(&whole[..20]), Err(FlightError::NotOne));
        assert_eq!(FlightLog::parse(b""), Err(FlightError::NotOne));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(at in 0..5200usize, with in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = file();
            for (byte, with) in bytes[at.min(5100)..].iter_mut().zip(with) {
                *byte = with;
            }
            if let Ok(log) = FlightLog::parse(&bytes) {
                prop_assert!(log.records.len() as u64 + log.damaged <= 4);
            }
        }
    }
}
