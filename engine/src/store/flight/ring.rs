//! The ring that records are written to.
//!
//! Contract: one thread at a time writes. A reader that comes in between sees that the word which says whose a place is has changed,
//! or is 0, and does not take what it has read for a record.

use super::record::FlightRecord;
use super::{FlightError, HEAD_WORDS, MAGIC, RECORD_WORDS, VERSION, checksum};
use crate::store::memory::words::Words;
use crate::sync::{Ordering, fence};
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// How often a reader tries a place that is being written.
const TRIES: usize = 4;

/// See the module.
pub struct FlightRing {
    words: Words,
    /// Places.
    capacity: u64,
}

impl FlightRing {
    /// A ring without records in words of zero: as many places as there is room for.
    pub(crate) fn create(words: Words) -> Self {
        let places = words.len().saturating_sub(HEAD_WORDS) / RECORD_WORDS;
        let ring = Self {
            words,
            capacity: u64::try_from(places).unwrap_or(0),
        };
        ring.begin(0, SystemTime::now());
        ring
    }

    /// The ring that an earlier process has left.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn open(words: Words) -> Result<Self, FlightError> {
        let head: Vec<u64> = (words.iter().take(HEAD_WORDS))
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        let head = Head::parse(&head, words.len())?;
        Ok(Self {
            words,
            capacity: head.capacity,
        })
    }

    /// Writes its head: of which session it is, in a receiver that began then.
    pub fn begin(&self, session: u32, started: SystemTime) {
        let since_epoch = started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = Head {
            capacity: self.capacity,
            started_unix_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            session,
        };
        for (word, value) in self.words.iter().zip(head.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Words of the place of a checkpoint; none in a ring without places.
    fn place(&self, checkpoint: u64) -> Option<&[crate::sync::AtomicU64]> {
        let place = usize::try_from(checkpoint.checked_rem(self.capacity)?).ok()?;
        let begin = HEAD_WORDS + place * RECORD_WORDS;
        self.words.get(begin..begin + RECORD_WORDS)
    }

    /// Writes a checkpoint's record, in place of the oldest one, or of what was written of the same checkpoint before.
    pub fn write(&self, record: &FlightRecord) {
        let Some(place) = self.place(record.checkpoint) else {
            return;
        };
        let words = record.to_words();
        place[0].store(0, Ordering::Relaxed);
        // A reader that sees one of the new words sees that the place is nobody's, too.
        fence(Ordering::Release);
        for (word, value) in place.iter().zip(words).skip(1) {
            word.store(value, Ordering::Relaxed);
        }
        // Release: a reader that sees the number sees the words.
        place[0].store(words[0], Ordering::Release);
    }

    /// The words of a place, all of one record or of none.
    fn read(place: &[crate::sync::AtomicU64]) -> [u64; RECORD_WORDS] {
        for _ in 0..TRIES {
            let number = place[0].load(Ordering::Acquire);
            let mut words = [0; RECORD_WORDS];
            for (word, stored) in words.iter_mut().zip(place) {
                *word = stored.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if number != 0 && place[0].load(Ordering::Relaxed) == number {
                words[0] = number;
                return words;
            }
        }
        [0; RECORD_WORDS]
    }

    /// Writes all of it, as its file has it, while records may be written.
    ///
    /// # Errors
    /// Of the writer.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEAD_WORDS * 8);
        for word in self.words.iter().take(HEAD_WORDS) {
            bytes.extend(word.load(Ordering::Relaxed).to_ne_bytes());
        }
        out.write_all(&bytes)?;
        // What a file has beyond its places is not of the recorder.
        let places = usize::try_from(self.capacity).unwrap_or(usize::MAX);
        let end = places.saturating_mul(RECORD_WORDS).saturating_add(HEAD_WORDS);
        let records = self.words.get(HEAD_WORDS..end).unwrap_or_default();
        for places in records.chunks(HEAD_WORDS) {
            bytes.clear();
            for place in places.chunks_exact(RECORD_WORDS) {
                bytes.extend(Self::read(place).iter().flat_map(|word| word.to_ne_bytes()));
            }
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// What is at the beginning.
pub(super) struct Head {
    pub(super) capacity: u64,
    pub(super) started_unix_ns: u64,
    pub(super) session: u32,
}

impl Head {
    fn to_words(&self) -> [u64; 7] {
        let record_bytes = (RECORD_WORDS * 8) as u64;
        let session = u64::from(self.session);
        let mut words = [
            MAGIC,
            VERSION,
            self.capacity,
            record_bytes,
            self.started_unix_ns,
            session,
            0,
        ];
        words[6] = checksum(&words[..6]);
        words
    }

    /// Of a file that has so many words.
    pub(super) fn parse(words: &[u64], all: usize) -> Result<Self, FlightError> {
        let head = words.first_chunk::<7>().ok_or(FlightError::NotOne)?;
        if head[0] != MAGIC {
            return Err(FlightError::NotOne);
        }
        if head[1] != VERSION {
            return Err(FlightError::Version(head[1]));
        }
        let room = all.saturating_sub(HEAD_WORDS) / RECORD_WORDS;
        let fits =
            |capacity: u64| usize::try_from(capacity).is_ok_and(|capacity| (1..=room).contains(&capacity));
        let session = u32::try_from(head[5]).ok();
        match session {
            Some(session) if checksum(&head[..6]) == head[6] && fits(head[2]) => Ok(Self {
                capacity: head[2],
                started_unix_ns: head[4],
                session,
            }),
            _ => Err(FlightError::Damaged),
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::store::flight::FlightLog;
    use std::sync::atomic::AtomicBool;

    fn ring(places: usize) -> FlightRing {
        FlightRing::create(Words::zeroed(HEAD_WORDS + places * RECORD_WORDS).unwrap())
    }

    fn bytes(ring: &FlightRing) -> Vec<u8> {
        let mut bytes = Vec::new();
        ring.write_to(&mut bytes).unwrap();
        bytes
    }

    fn record(checkpoint: u64) -> FlightRecord {
        FlightRecord {
            checkpoint,
            // So that a mixture of two records is seen.
            bytes: checkpoint,
            requested_at_ns: checkpoint,
            ..FlightRecord::default()
        }
    }

    #[test]
    fn the_last_ones_are_kept_and_one_can_be_written_again() {
        let ring = ring(4);
        let started = UNIX_EPOCH + std::time::Duration::from_secs(1_000);
        ring.begin(3, started);
        (1..=6).for_each(|checkpoint| ring.write(&record(checkpoint)));
        ring.write(&FlightRecord {
            pages: 9,
            ..record(6)
        });
        let log = FlightLog::parse(&bytes(&ring)).unwrap();
        assert_eq!((log.session, log.started_unix_ns), (3, 1_000_000_000_000));
        let numbers: Vec<_> = log.records.iter().map(|record| record.checkpoint).collect();
        assert_eq!((numbers, log.damaged, log.capacity), (vec![3, 4, 5, 6], 0, 4));
        assert_eq!(log.records[3].pages, 9);
    }

    #[test]
    fn a_reader_sees_whole_records_while_they_are_written() {
        let ring = ring(2);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut checkpoint = 0;
                while !stop.load(Ordering::Relaxed) {
                    ring.write(&record(checkpoint));
                    checkpoint += 1;
                }
            });
            for _ in 0..2_000 {
                let log = FlightLog::parse(&bytes(&ring)).unwrap();
                assert_eq!(log.damaged, 0);
                for record in log.records {
                    assert_eq!(
                        (record.bytes, record.requested_at_ns),
                        (record.checkpoint, record.checkpoint)
                    );
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn an_earlier_ring_is_opened_or_refused() {
        let words = Words::zeroed(HEAD_WORDS + 4 * RECORD_WORDS).unwrap();
        assert!(matches!(FlightRing::open(words), Err(FlightError::NotOne)));
        let words = ring(4).words;
        words[2].store(5, Ordering::Relaxed);
        assert!(matches!(FlightRing::open(words), Err(FlightError::Damaged)));
        assert!(FlightRing::open(ring(4).words).is_ok());
    }
}
