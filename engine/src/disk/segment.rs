//! Segments of a redo log: mapped files of one size, in which the writes of an epoch lie as they arrived.
//!
//! # Layout
//! | from | what |
//! |---|---|
//! | 0 | header: words, see `at` |
//! | [`DATA_BEGIN`] | data, upwards |
//! | the end | entries of [`ENTRY_BYTES`], downwards: the first one is the last in the segment |
//!
//! An entry counts once the header counts it, which is stored after the entry ([`Segment::append`]); a segment belongs to a checkpoint
//! once its header has the right checksum, which is stored last. So a process that is killed leaves segments that can be read. All numbers
//! are words of 64 bits in this host's byte order.

use crate::disk::DiskError;
use crate::killpoint;
use crate::store::memory::copy;
use crate::store::memory::mapping::Mapping;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Bytes of a segment. Whole huge pages of 2 MiB, for a RAM directory on hugetlbfs.
pub(crate) const SEGMENT_BYTES: u64 = 4 << 20;

/// Where data begins in a segment: on a page of its own, as its writes mostly are.
pub(crate) const DATA_BEGIN: usize = 4096;

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: usize = 32;

/// Places of data are multiples of that many bytes, so that no two share a cache line.
const ALIGNMENT: usize = 64;

/// First word of a segment, `\x89CLLOG\r\n`.
const MAGIC: u64 = u64::from_be_bytes(*b"\x89CLLOG\r\n");

/// The number that stands for no checkpoint.
const FREE: u64 = u64::MAX;

mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const LOG: usize = 8;
    pub(super) const CHECKPOINT: usize = 16;
    pub(super) const SEQUENCE: usize = 24;
    /// Checksum of the three words before it.
    pub(super) const CHECK: usize = 32;
    pub(super) const ENTRIES: usize = 64;
}

/// Which part of which log a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    /// The id of the log.
    pub(crate) log: u64,
    /// The checkpoint with which it commits.
    pub(crate) checkpoint: u64,
    /// Its position in the epoch.
    pub(crate) sequence: u64,
}

impl SegmentHeader {
    fn check(&self) -> u64 {
        checksum(0, [self.log, self.checkpoint, self.sequence])
    }
}

fn checksum(salt: u64, words: [u64; 3]) -> u64 {
    let mut bytes = [0; 32];
    for (chunk, word) in bytes
        .chunks_exact_mut(8)
        .zip([salt, words[0], words[1], words[2]])
    {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    u64::from(crc32c::crc32c(&bytes))
}

/// A write as its entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) kind: EntryKind,
}

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// Data at this place of the segment.
    Data(usize),
    /// Zeros; a hole will do if `may_punch`.
    Zero { may_punch: bool },
}

const KIND_SHIFT: u32 = 62;
const DATA: u64 = 0;
const ZERO: u64 = 1;
const PUNCH: u64 = 2;

/// A mapped segment. Its data is written by the one connection of the disk, and read by anyone.
pub(crate) struct Segment {
    memory: Mapping,
    pub(crate) path: PathBuf,
    /// Its number among the disk's.
    pub(crate) number: u32,
    /// Whether it is in memory, or else in the directory of the bases.
    pub(crate) is_ram: bool,
}

impl Segment {
    pub(crate) fn new(memory: Mapping, path: PathBuf, number: u32, is_ram: bool) -> Self {
        Self {
            memory,
            path,
            number,
            is_ram,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.len()
    }

    pub(crate) fn memory(&self) -> &Mapping {
        &self.memory
    }

    fn get(&self, at: usize) -> u64 {
        self.memory.word(at).load(Ordering::Acquire)
    }

    fn put(&self, at: usize, value: u64) {
        self.memory.word(at).store(value, Ordering::Release);
        killpoint::here();
    }

    /// Makes it an empty segment of an epoch.
    pub(crate) fn begin(&self, header: SegmentHeader) {
        self.put(at::CHECKPOINT, FREE);
        self.put(at::ENTRIES, 0);
        self.put(at::LOG, header.log);
        self.put(at::SEQUENCE, header.sequence);
        self.put(at::CHECK, header.check());
        self.put(at::MAGIC, MAGIC);
        self.put(at::CHECKPOINT, header.checkpoint);
    }

    /// It belongs to no epoch any more.
    pub(crate) fn free(&self) {
        self.put(at::CHECKPOINT, FREE);
    }

    /// What it belongs to; none if it is free.
    pub(crate) fn header(&self) -> Option<SegmentHeader> {
        let header = SegmentHeader {
            log: self.get(at::LOG),
            checkpoint: self.get(at::CHECKPOINT),
            sequence: self.get(at::SEQUENCE),
        };
        let is_used = self.get(at::MAGIC) == MAGIC && header.checkpoint != FREE;
        (is_used && self.get(at::CHECK) == header.check()).then_some(header)
    }

    pub(crate) fn entries(&self) -> u64 {
        self.get(at::ENTRIES)
    }

    fn entry_place(&self, number: usize) -> usize {
        self.bytes() - (number + 1) * ENTRY_BYTES
    }

    /// Appends an entry, behind `entries` others of an epoch that commits with `checkpoint`. The data is in its place.
    pub(crate) fn append(&self, entries: usize, entry: Entry, checkpoint: u64) {
        let (kind, place) = match entry.kind {
            EntryKind::Data(place) => (DATA, place),
            EntryKind::Zero { may_punch: false } => (ZERO, 0),
            EntryKind::Zero { may_punch: true } => (PUNCH, 0),
        };
        let words = [
            entry.offset,
            entry.length | kind << KIND_SHIFT,
            u64::try_from(place).unwrap_or(u64::MAX),
        ];
        let base = self.entry_place(entries);
        for (word, at) in words.iter().zip((base..).step_by(8)) {
            self.memory.word(at).store(*word, Ordering::Relaxed);
        }
        let check = checksum(checkpoint, words);
        self.memory.word(base + 24).store(check, Ordering::Relaxed);
        killpoint::here();
        self.put(at::ENTRIES, u64::try_from(entries + 1).unwrap_or(u64::MAX));
    }

    /// The entry of that number, as [`append`](Self::append) wrote it.
    ///
    /// # Errors
    /// If it is damaged.
    pub(crate) fn entry(&self, number: usize, header: SegmentHeader) -> Result<Entry, DiskError> {
        let damaged = || DiskError::Damaged {
            path: self.path.clone(),
            what: format!("its entry {number} is damaged"),
        };
        let room = (self.bytes() - DATA_BEGIN) / ENTRY_BYTES;
        if number >= room {
            return Err(damaged());
        }
        let base = self.entry_place(number);
        let words = [0, 8, 16].map(|at| self.get(base + at));
        if self.get(base + 24) != checksum(header.checkpoint, words) {
            return Err(damaged());
        }
        let length = words[1] & ((1 << KIND_SHIFT) - 1);
        let kind = match words[1] >> KIND_SHIFT {
            DATA => {
                let place = usize::try_from(words[2]).ok();
                let end = place
                    .zip(usize::try_from(length).ok())
                    .and_then(|(at, length)| at.checked_add(length));
                match (place, end) {
                    (Some(place), Some(end)) if place >= DATA_BEGIN && end <= base => EntryKind::Data(place),
                    _ => return Err(damaged()),
                }
            }
            ZERO => EntryKind::Zero { may_punch: false },
            PUNCH => EntryKind::Zero { may_punch: true },
            _ => return Err(damaged()),
        };
        Ok(Entry {
            offset: words[0],
            length,
            kind,
        })
    }

    /// Copies data out.
    pub(crate) fn read(&self, place: usize, out: &mut [u8]) {
        copy::read_bytes(&self.memory, place, out);
    }

    /// Copies data in.
    pub(crate) fn write(&self, place: usize, bytes: &[u8]) {
        copy::write_bytes(&self.memory, place, bytes);
        killpoint::here();
    }
}

/// The room that is left in the newest segment of an epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Where the next data goes.
    data: usize,
    entries: usize,
    bytes: usize,
}

impl Room {
    /// No room at all.
    pub(crate) const NONE: Self = Self {
        data: 0,
        entries: 0,
        bytes: 0,
    };

    pub(crate) fn of(segment: &Segment) -> Self {
        Self {
            data: DATA_BEGIN,
            entries: 0,
            bytes: segment.bytes(),
        }
    }

    /// Takes room for an entry with at most that much data: the entry's number, the place and the length of the data. None if there is no
    /// room for an entry with any data.
    pub(crate) fn take(&mut self, length: u64) -> Option<(usize, usize, usize)> {
        let end = self.bytes.checked_sub((self.entries + 1) * ENTRY_BYTES)?;
        let free = end.checked_sub(self.data)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(free);
        if length == 0 {
            return None;
        }
        let taken = (self.entries, self.data, length);
        self.entries += 1;
        self.data = (self.data + length).next_multiple_of(ALIGNMENT);
        Some(taken)
    }

    /// Takes room for an entry without data: its number.
    pub(crate) fn take_entry(&mut self) -> Option<usize> {
        let end = self.bytes.checked_sub((self.entries + 1) * ENTRY_BYTES)?;
        if end < self.data {
            return None;
        }
        self.entries += 1;
        Some(self.entries - 1)
    }
}
