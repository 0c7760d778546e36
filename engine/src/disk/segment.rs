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
use crate::failpoint;
use crate::store::memory::copy;
use crate::store::memory::mapping::Mapping;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Bytes of a segment. Whole huge pages of 2 MiB, for a RAM directory on hugetlbfs.
pub(crate) const SEGMENT_BYTES: u64 = 4 << 20;

/// An entry has so many bits for a place.
const _: () = assert!(SEGMENT_BYTES < 1 << (KIND_SHIFT - LENGTH_BITS));

/// Where data begins in a segment: on a page of its own, as its writes mostly are.
pub(crate) const DATA_BEGIN: usize = 4096;

/// Bytes of an entry.
pub(crate) const ENTRY_BYTES: usize = 24;

/// A segment has an entry for so many of its bytes at most, so that the index of an epoch (`index.rs`) stays small beside its segments.
const BYTES_PER_ENTRY: usize = 128;

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
        checksum([self.log, self.checkpoint, self.sequence])
    }
}

fn checksum(words: [u64; 3]) -> u64 {
    u64::from(crc32c::crc32c(words.map(u64::to_le_bytes).as_flattened()))
}

/// A write as its entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) offset: u64,
    pub(crate) length: u32,
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

/// Of an entry's second word: the length in the lower half, the place above it, the kind in the highest bits.
const LENGTH_BITS: u32 = 32;
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
        failpoint::may_be_killed();
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
        // It is inside the segment.
        let place = u64::try_from(place).unwrap_or(0);
        let word = u64::from(entry.length) | place << LENGTH_BITS | kind << KIND_SHIFT;
        let words = [entry.offset, word];
        let base = self.entry_place(entries);
        let check = checksum([checkpoint, words[0], words[1]]);
        for (word, at) in words.iter().chain([&check]).zip((base..).step_by(8)) {
            self.memory.word(at).store(*word, Ordering::Relaxed);
        }
        failpoint::may_be_killed();
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
        let words = [0, 8].map(|at| self.get(base + at));
        if self.get(base + 16) != checksum([header.checkpoint, words[0], words[1]]) {
            return Err(damaged());
        }
        // Its lower half.
        let length = u32::try_from(words[1] & u64::from(u32::MAX)).map_err(|_| damaged())?;
        let kind = match words[1] >> KIND_SHIFT {
            DATA => {
                let place = words[1] >> LENGTH_BITS & ((1 << (KIND_SHIFT - LENGTH_BITS)) - 1);
                let place = usize::try_from(place).ok();
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
        failpoint::may_be_killed();
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
        let free = self.end_with_one_more()?.checked_sub(self.data)?;
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
        if self.end_with_one_more()? < self.data {
            return None;
        }
        self.entries += 1;
        Some(self.entries - 1)
    }

    /// Where data has to end if another entry is taken; none if there are as many as there may be.
    fn end_with_one_more(&self) -> Option<usize> {
        let entries = self.entries + 1;
        match entries * BYTES_PER_ENTRY <= self.bytes {
            true => self.bytes.checked_sub(entries * ENTRY_BYTES),
            false => None,
        }
    }
}
