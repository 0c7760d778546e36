//! What is where in a commit record, and whether it is as it was written.
//!
//! | byte | word |
//! |---|---|
//! | 0, 8 | magic, version |
//! | 16, 24 | pages of the guest, extents of a slab |
//! | 32 | checksum of the three words before it |
//! | 40, 48 | length and checksum of the names of the image's files, which begin at byte 4096 |
//! | 64 | **the state word**: flags, and in its upper half their checksum |
//! | 128, 192 | two slots: checkpoint, length and checksum of its device state, time of the commit; checksum of these |
//! | 256, 264 | length and checksum of the session's description |
//!
//! The magic is stored last. All numbers are words of 64 bits in this host's byte order: the files are used on this host
//! only, until it restarts.

use crate::failpoint;
use crate::store::StoreError;
use crate::store::memory::copy;
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::ram_dir::RamFiles;
use crate::units::{CheckpointId, PAGE_BYTES, PAGE_SIZE};
use std::path::Path;
use std::sync::atomic::Ordering;

pub(crate) const RECORD_FILE: &str = "~record";

/// First word of a record, `\x89CLREC\r\n`, and the second, its version.
const MAGIC: u64 = u64::from_be_bytes(*b"\x89CLREC\r\n");
const VERSION: u64 = 3;

/// Where the words of a record are, in bytes.
pub(crate) mod at {
    use crate::units::PAGE_SIZE;

    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const PAGES: usize = 16;
    pub(crate) const SLAB_EXTENTS: usize = 24;
    pub(crate) const CHECK: usize = 32;
    pub(crate) const NAMES_LENGTH: usize = 40;
    pub(crate) const NAMES_CHECK: usize = 48;
    /// On a cache line of its own.
    pub(crate) const STATE: usize = 64;
    pub(crate) const SLOTS: [usize; 2] = [128, 192];
    pub(crate) const SESSION_LENGTH: usize = 256;
    pub(crate) const SESSION_CHECK: usize = 264;
    pub(crate) const NAMES: usize = PAGE_SIZE;
    /// In a slot.
    pub(crate) const CHECKPOINT: usize = 0;
    pub(crate) const DEVICE_LENGTH: usize = 8;
    pub(crate) const DEVICE_CHECK: usize = 16;
    pub(crate) const COMMITTED_NS: usize = 24;
    pub(crate) const SLOT_CHECK: usize = 32;
}

/// Flags of the state word. None at all: there is no checkpoint.
const SLOT: u64 = 1;
const FLUSHING: u64 = 2;
const GIVEN: u64 = 4;
const COMMITTED: u64 = 8;
const FLAGS: u64 = SLOT | FLUSHING | GIVEN | COMMITTED;

/// The checksum of bytes that are kept.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    u64::from(crc32c::crc32c(bytes))
}

fn checksum_of(words: &[u64]) -> u64 {
    let add = |sum, word: &u64| crc32c::crc32c_append(sum, &word.to_le_bytes());
    u64::from(words.iter().fold(0, add))
}

/// What a recovery must know of the guest to read its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestShape {
    pub(crate) pages: u64,
    /// 0 where no checkpoint outlives the process.
    pub(crate) slab_extents: u64,
}

/// What the state word says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// Which slot and device state the checkpoint has; none if there is no checkpoint.
    pub(crate) slot: Option<usize>,
    /// Pages of it are in slabs.
    pub(crate) is_flushing: bool,
    /// A guest may run on the image.
    pub(crate) is_given: bool,
}

impl State {
    fn pack(self) -> u64 {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let slot = self.slot.map_or(0, |slot| COMMITTED | flag(slot == 1, SLOT));
        let flags = slot | flag(self.is_flushing, FLUSHING) | flag(self.is_given, GIVEN);
        flags | checksum_of(&[flags]) << 32
    }

    fn of_flags(word: u64) -> Self {
        let is_set = |flag| word & flag != 0;
        Self {
            slot: is_set(COMMITTED).then(|| index(word & SLOT)),
            is_flushing: is_set(FLUSHING),
            is_given: is_set(GIVEN),
        }
    }

    fn parse(word: u64) -> Option<Self> {
        let state = Self::of_flags(word & FLAGS);
        (state.pack() == word).then_some(state)
    }
}

/// What a slot says of its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotContent {
    pub(crate) checkpoint: CheckpointId,
    pub(crate) device_bytes: u64,
    pub(crate) device_check: u64,
    /// Nanoseconds since 1970.
    pub(crate) committed_ns: u64,
}

/// A mapped record.
pub(crate) struct Record(Mapping);

impl Record {
    /// What [`Self::create`] takes of the budget.
    pub(crate) fn charge(files: &RamFiles, names: &[String]) -> u64 {
        files.bytes_of(Self::length(&names.join("\n")))
    }

    fn length(names: &str) -> u64 {
        PAGE_BYTES.saturating_add(u64::try_from(names.len()).unwrap_or(u64::MAX))
    }

    /// Makes and locks the record of a guest's files, before any of them: with it the next receiver finds what a killed one has
    /// left. `names` are those of the image's files.
    pub(crate) fn create(files: &RamFiles, shape: GuestShape, names: &[String]) -> Result<Self, StoreError> {
        let names = names.join("\n");
        let length = u64::try_from(names.len()).unwrap_or(u64::MAX);
        let file = files.create(RECORD_FILE, Self::length(&names))?;
        // Another process can know the new file only by listing the directory.
        if !files.lock(&file)? {
            return Err(StoreError::RamFileExists(file.path));
        }
        let mapped = file.map_owned();
        let record = Self(mapped.map_err(|errno| files.refused(&file.path, file.length, errno))?);
        copy::write_bytes(&record.0, at::NAMES, names.as_bytes());
        record.put(at::NAMES_LENGTH, length);
        record.put(at::NAMES_CHECK, checksum(names.as_bytes()));
        record.put(at::PAGES, shape.pages);
        record.put(at::SLAB_EXTENTS, shape.slab_extents);
        record.put(at::VERSION, VERSION);
        record.put(at::CHECK, record.head_check());
        record.set_state(State::default());
        record.put(at::MAGIC, MAGIC);
        Ok(record)
    }

    /// One that was found, at least a page long.
    pub(crate) fn of(mapping: Mapping) -> Self {
        Self(mapping)
    }

    /// Memory of its file.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    pub(crate) fn get(&self, at: usize) -> u64 {
        self.0.word(at).load(Ordering::Acquire)
    }

    pub(crate) fn put(&self, at: usize, value: u64) {
        self.0.word(at).store(value, Ordering::Release);
        failpoint::may_be_killed();
    }

    fn head_check(&self) -> u64 {
        checksum_of(&[at::VERSION, at::PAGES, at::SLAB_EXTENTS].map(|at| self.get(at)))
    }

    /// Whether its creator was killed before it stored the magic: then there was no other file, and no checkpoint.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.get(at::MAGIC) == 0
    }

    /// The state of a record of this process.
    pub(crate) fn state(&self) -> State {
        State::of_flags(self.get(at::STATE))
    }

    /// Stores the state word after everything that was stored before: one aligned word, so it is whole at any time.
    pub(crate) fn set_state(&self, state: State) {
        copy::fence();
        self.put(at::STATE, state.pack());
    }

    fn slot_check(&self, slot: usize) -> u64 {
        let words = [
            at::CHECKPOINT,
            at::DEVICE_LENGTH,
            at::DEVICE_CHECK,
            at::COMMITTED_NS,
        ];
        checksum_of(&words.map(|at| self.get(slot + at)))
    }

    /// Fills a slot that the state word does not name.
    pub(crate) fn fill_slot(&self, which: usize, content: SlotContent) {
        let slot = at::SLOTS[which];
        self.put(slot + at::CHECKPOINT, content.checkpoint.0);
        self.put(slot + at::DEVICE_LENGTH, content.device_bytes);
        self.put(slot + at::DEVICE_CHECK, content.device_check);
        self.put(slot + at::COMMITTED_NS, content.committed_ns);
        self.put(slot + at::SLOT_CHECK, self.slot_check(slot));
    }

    /// The content of a record that was found: the guest's shape, the state, and the slot that this names.
    pub(crate) fn read(&self, path: &Path) -> Result<(GuestShape, State, Option<SlotContent>), StoreError> {
        let damaged = |what: &str| StoreError::damaged(path, what);
        if self.get(at::MAGIC) != MAGIC {
            return Err(damaged("it is not a commit record of a receiver"));
        }
        let version = self.get(at::VERSION);
        if version != VERSION {
            return Err(damaged(&format!(
                "it is of version {version}, and this receiver reads version {VERSION}: let the colo-ring that wrote it fail \
                 over, dump or discard the checkpoint"
            )));
        }
        if self.get(at::CHECK) != self.head_check() {
            return Err(damaged("its header is damaged: wrong checksum at byte 32"));
        }
        let shape = GuestShape {
            pages: self.get(at::PAGES),
            slab_extents: self.get(at::SLAB_EXTENTS),
        };
        let word = self.get(at::STATE);
        let state = State::parse(word)
            .ok_or_else(|| damaged(&format!("invalid state word {word:#x} at byte {}", at::STATE)))?;
        let slot = state.slot.map(|which| self.read_slot(at::SLOTS[which], path));
        Ok((shape, state, slot.transpose()?))
    }

    fn read_slot(&self, slot: usize, path: &Path) -> Result<SlotContent, StoreError> {
        if self.get(slot + at::SLOT_CHECK) != self.slot_check(slot) {
            let what = format!("its slot at byte {slot} is damaged: wrong checksum");
            return Err(StoreError::damaged(path, what));
        }
        Ok(SlotContent {
            checkpoint: CheckpointId(self.get(slot + at::CHECKPOINT)),
            device_bytes: self.get(slot + at::DEVICE_LENGTH),
            device_check: self.get(slot + at::DEVICE_CHECK),
            committed_ns: self.get(slot + at::COMMITTED_NS),
        })
    }

    /// The names of the image's files.
    pub(crate) fn names(&self, path: &Path) -> Result<Vec<String>, StoreError> {
        let damaged = || StoreError::damaged(path, "the names of the image's files in it are damaged");
        let room = self.0.len() - PAGE_SIZE;
        let length = usize::try_from(self.get(at::NAMES_LENGTH)).ok();
        let length = length.filter(|length| *length <= room).ok_or_else(damaged)?;
        let mut names = vec![0; length];
        copy::read_bytes(&self.0, at::NAMES, &mut names);
        if checksum(&names) != self.get(at::NAMES_CHECK) {
            return Err(damaged());
        }
        let names = String::from_utf8(names).map_err(|_| damaged())?;
        Ok(names.lines().map(str::to_owned).collect())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_state_word_with_any_bit_flipped_is_none() {
        let slots = [None, Some(0), Some(1)];
        let bools = [false, true];
        for slot in slots {
            for (is_flushing, is_given) in bools.map(|flag| bools.map(|other| (flag, other))).concat() {
                let state = State {
                    slot,
                    is_flushing,
                    is_given,
                };
                let word = state.pack();
                assert_eq!(State::parse(word), Some(state));
                for bit in 0..64 {
                    assert_eq!(State::parse(word ^ 1 << bit), None, "{state:?}, bit {bit}");
                }
            }
        }
        assert_eq!(State::parse(0), None, "memory that was lost is no state");
    }
}
