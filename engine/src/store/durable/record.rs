//! The commit record in a file of the RAM directory, beside the image: with it a checkpoint outlives its receiver.
//!
//! # How
//! Image, slabs and the table of places (`pool.rs`) are files in memory, too: what a process has stored in them stays when it
//! is killed, at any time. Only the order of its stores matters. A commit stores
//!
//! 1. the device state, in that one of two files that the checkpoint before does not use,
//! 2. the checkpoint's number and the length of that, in the slot that the checkpoint before does not use,
//! 3. **the state word**, which names the slot and says *flushing*: one aligned word, so it is stored whole or not at all.
//!
//! All pages are in slots by then, and their places in the table, which has nothing else. So between 3 and 4 the checkpoint is
//! the image and, over it, the slots that the table names. The flush copies a page, then clears its place; when all are cleared
//!
//! 4. the state word no longer says *flushing*: the checkpoint is the image alone.
//!
//! Only then CHECKPOINT_REPLY allows the primary to send pages, so what the table has after 4 is of a checkpoint that is not
//! complete, and is ignored. A kill anywhere leaves the checkpoint before 3, or the one behind it,
//! whole. `recovery.rs` reads it.
//!
//! Reads that the kernel completes after the process has died go to slots that no place names.
//!
//! # The files
//! | name | content |
//! |---|---|
//! | `LABEL.~record` | magic, version, what follows from the guest; state word; two slots. Locked by the process that has the guest |
//! | `LABEL.~session` | what stays the same for the session, as its owner encodes it |
//! | `LABEL.~device-0`, `-1` | device state of the last checkpoint or of the one before |
//! | `LABEL.~places` | a word for each page |
//! | `LABEL.~slab-N` | slots |
//! | `LABEL.BLOCK` | the image |
//!
//! All numbers are words of 64 bits in this host's byte order: the files are used on this host only, until it restarts.

use crate::canary::{self, Canary};
use crate::killpoint;
use crate::store::StoreError;
use crate::store::memory::copy;
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::populate::populate;
use crate::store::memory::ram_dir::{MemoryFile, RamFiles};
use crate::store::memory::words::Words;
use crate::units::{CheckpointId, PAGE_BYTES};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

pub(crate) const RECORD_FILE: &str = "~record";
const SESSION_FILE: &str = "~session";
const DEVICE_FILES: [&str; 2] = ["~device-0", "~device-1"];
pub(crate) const PLACES_FILE: &str = "~places";

/// Most memory mappings of these files, but for image and slabs; two of a device state while it grows.
pub(crate) const MAPPINGS_MAX: u64 = 8;

/// First word of a record, `\x89CLREC\r\n`, and the second, its version.
const MAGIC: u64 = u64::from_be_bytes(*b"\x89CLREC\r\n");
const VERSION: u64 = 2;

/// Where the words of a record are, in bytes.
pub(crate) mod at {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    pub(crate) const PAGES: usize = 16;
    pub(crate) const SLAB_EXTENTS: usize = 24;
    /// Checksum of the four words before it.
    pub(crate) const CHECK: usize = 32;
    pub(crate) const SESSION_LENGTH: usize = 40;
    pub(crate) const SESSION_CHECK: usize = 48;
    /// On a cache line of its own.
    pub(crate) const STATE: usize = 64;
    pub(crate) const SLOTS: [usize; 2] = [128, 192];
    /// In a slot.
    pub(crate) const CHECKPOINT: usize = 0;
    pub(crate) const DEVICE_LENGTH: usize = 8;
    pub(crate) const COMMITTED_NS: usize = 16;
    /// Checksum of the three words before it.
    pub(crate) const SLOT_CHECK: usize = 24;
}

/// Bits of the state word; 0 as a whole: nothing is committed.
const SLOT: u64 = 1;
const FLUSHING: u64 = 2;
const GIVEN: u64 = 4;
const COMMITTED: u64 = 8;

/// The checkpoint that a record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordedCheckpoint {
    pub(crate) checkpoint: CheckpointId,
    pub(crate) device_state: usize,
    pub(crate) device_bytes: u64,
    /// Nanoseconds since 1970.
    pub(crate) committed_ns: u64,
    pub(crate) is_flushing: bool,
    pub(crate) is_given: bool,
}

/// What a recovery must know of the guest to read its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestShape {
    pub(crate) pages: u64,
    pub(crate) slab_extents: u64,
}

/// What files there are of a guest.
pub(crate) enum Found {
    /// A checkpoint.
    Checkpoint(Box<DurableRecord>, GuestShape, RecordedCheckpoint),
    /// A record in which nothing is committed.
    Nothing,
    /// A record that a running receiver has locked.
    InUse,
    /// Files without a record.
    NoRecord,
}

/// A mapped record.
struct Record(Mapping);

impl Record {
    fn get(&self, at: usize) -> u64 {
        self.0.word(at).load(Ordering::Relaxed)
    }

    fn put(&self, at: usize, value: u64) {
        self.0.word(at).store(value, Ordering::Relaxed);
        killpoint::here();
    }

    fn check(&self, words: [usize; 3]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|at| self.get(*at).to_le_bytes()).collect();
        u64::from(crc32c::crc32c(&bytes))
    }

    fn head_check(&self) -> u64 {
        self.check([at::VERSION, at::PAGES, at::SLAB_EXTENTS])
    }

    fn slot_check(&self, slot: usize) -> u64 {
        self.check([at::CHECKPOINT, at::DEVICE_LENGTH, at::COMMITTED_NS].map(|at| slot + at))
    }

    fn state(&self) -> u64 {
        self.get(at::STATE)
    }

    /// Stores the state word after everything that was stored before.
    fn set_state(&self, state: u64) {
        copy::fence();
        self.0.word(at::STATE).store(state, Ordering::Release);
        killpoint::here();
    }
}

impl Record {
    /// Whether its creator was killed before it stored the magic, and so before anything was committed.
    fn is_unfinished(&self) -> bool {
        self.get(at::MAGIC) == 0 && self.state() == 0
    }

    /// The content of a record that was found: the guest's shape, and the checkpoint if anything was committed.
    fn read(&self, path: &Path) -> Result<(GuestShape, Option<RecordedCheckpoint>), StoreError> {
        let damaged = |what: &str| StoreError::damaged(path, what);
        if self.get(at::MAGIC) != MAGIC {
            return Err(damaged("it is not a commit record of a receiver"));
        }
        let version = self.get(at::VERSION);
        if version != VERSION {
            return Err(damaged(&format!(
                "it is of version {version}, and this receiver reads version {VERSION}; use the one that wrote it"
            )));
        }
        if self.get(at::CHECK) != self.head_check() {
            return Err(damaged("its header is damaged: wrong checksum at byte 32"));
        }
        let shape = GuestShape {
            pages: self.get(at::PAGES),
            slab_extents: self.get(at::SLAB_EXTENTS),
        };
        let state = self.state();
        if state == 0 {
            return Ok((shape, None));
        }
        if state & COMMITTED == 0 || state > SLOT | FLUSHING | GIVEN | COMMITTED {
            return Err(damaged(&format!("invalid state word {state:#x} at byte 64")));
        }
        let which = index(state & SLOT);
        let slot = at::SLOTS[which];
        if self.get(slot + at::SLOT_CHECK) != self.slot_check(slot) {
            return Err(damaged(&format!(
                "its slot at byte {slot} is damaged: wrong checksum"
            )));
        }
        let recorded = RecordedCheckpoint {
            checkpoint: CheckpointId(self.get(slot + at::CHECKPOINT)),
            device_state: which,
            device_bytes: self.get(slot + at::DEVICE_LENGTH),
            committed_ns: self.get(slot + at::COMMITTED_NS),
            is_flushing: state & FLUSHING != 0,
            is_given: state & GIVEN != 0,
        };
        Ok((shape, Some(recorded)))
    }
}

/// A file for bytes that are replaced as a whole.
struct Area {
    file: MemoryFile,
    memory: Mapping,
}

impl Area {
    fn create(files: &RamFiles, name: &str, bytes: u64) -> Result<Self, StoreError> {
        let file = files.create(name, bytes)?;
        let memory = file.map_owned();
        let memory = memory.map_err(|errno| StoreError::file(&file.path, errno.into()))?;
        populate(&[&memory]).map_err(|errno| StoreError::file(&file.path, errno.into()))?;
        Ok(Self { file, memory })
    }

    /// As it was written; it must not be shorter than it was.
    fn open(files: &RamFiles, name: &str) -> Result<Self, StoreError> {
        let path = files.path(name);
        let file = files.open(name)?;
        let file = file.ok_or_else(|| StoreError::damaged(&path, "the file does not exist"))?;
        let memory = file.map_owned();
        let memory = memory.map_err(|errno| StoreError::file(&path, errno.into()))?;
        Ok(Self { file, memory })
    }

    fn read(&self, bytes: u64) -> Result<Vec<u8>, StoreError> {
        let length = usize::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes <= self.memory.len());
        let Some(length) = length else {
            let what = format!("it should have {bytes} bytes, and has {}", self.memory.len());
            return Err(StoreError::damaged(&self.file.path, what));
        };
        let mut out = vec![0; length];
        copy::read_bytes(&self.memory, 0, &mut out);
        Ok(out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if bytes.len() > self.memory.len() {
            let grown = self.file.grow_for(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            self.memory = grown.map_err(|errno| StoreError::file(&self.file.path, errno.into()))?;
        }
        let half = bytes.len() / 2;
        copy::write_bytes(&self.memory, 0, &bytes[..half]);
        killpoint::here();
        copy::write_bytes(&self.memory, half, &bytes[half..]);
        killpoint::here();
        Ok(())
    }
}

struct Areas {
    session: Area,
    device: [Area; 2],
    /// Why no checkpoint outlives this receiver any more, until it is taken.
    failed: Option<StoreError>,
}

/// The record of a guest that is received. See the module.
pub(crate) struct DurableRecord {
    files: Arc<RamFiles>,
    record: Record,
    areas: Mutex<Areas>,
}

impl DurableRecord {
    /// Opens the files of an earlier receiver, after locking its record.
    pub(crate) fn open(files: Arc<RamFiles>) -> Result<Found, StoreError> {
        let path = files.path(RECORD_FILE);
        let Some(file) = files.open(RECORD_FILE)? else {
            return Ok(Found::NoRecord);
        };
        if !files.lock(&file)? {
            return Ok(Found::InUse);
        }
        if file.length < PAGE_BYTES {
            return Err(StoreError::damaged(&path, "it is too short"));
        }
        let mapped = file.map_owned();
        let record = Record(mapped.map_err(|errno| StoreError::file(&path, errno.into()))?);
        if record.is_unfinished() {
            return Ok(Found::Nothing);
        }
        let (shape, Some(recorded)) = record.read(&path)? else {
            return Ok(Found::Nothing);
        };
        let areas = Areas {
            session: Area::open(&files, SESSION_FILE)?,
            device: [
                Area::open(&files, DEVICE_FILES[0])?,
                Area::open(&files, DEVICE_FILES[1])?,
            ],
            failed: None,
        };
        let areas = Mutex::new(areas);
        let durable = Box::new(Self { files, record, areas });
        Ok(Found::Checkpoint(durable, shape, recorded))
    }

    /// What [`Self::record_session`] has written.
    pub(crate) fn session(&self) -> Result<Vec<u8>, StoreError> {
        let session = self.areas().session.read(self.record.get(at::SESSION_LENGTH))?;
        match u64::from(crc32c::crc32c(&session)) == self.record.get(at::SESSION_CHECK) {
            true => Ok(session),
            false => Err(StoreError::damaged(
                &self.files.path(SESSION_FILE),
                "it is damaged: wrong checksum",
            )),
        }
    }

    pub(crate) fn device_state(&self, recorded: &RecordedCheckpoint) -> Result<Vec<u8>, StoreError> {
        self.areas().device[recorded.device_state].read(recorded.device_bytes)
    }

    /// Creates the files, and the table of places in one of them. `area_bytes` are allocated for a device state at first.
    pub(crate) fn create(
        files: Arc<RamFiles>,
        shape: GuestShape,
        area_bytes: u64,
    ) -> Result<(Self, Words), StoreError> {
        let file = files.create(RECORD_FILE, PAGE_BYTES)?;
        // Another process can know the new file only by listing the directory.
        if !files.lock(&file)? {
            return Err(StoreError::RamFileExists(file.path));
        }
        let mapped = file.map_owned();
        let record = Record(mapped.map_err(|errno| StoreError::file(&file.path, errno.into()))?);
        record.put(at::PAGES, shape.pages);
        record.put(at::SLAB_EXTENTS, shape.slab_extents);
        record.put(at::VERSION, VERSION);
        record.put(at::CHECK, record.head_check());
        record.put(at::MAGIC, MAGIC);
        let areas = Areas {
            session: Area::create(&files, SESSION_FILE, area_bytes)?,
            device: [
                Area::create(&files, DEVICE_FILES[0], area_bytes)?,
                Area::create(&files, DEVICE_FILES[1], area_bytes)?,
            ],
            failed: None,
        };
        let words = files.create(PLACES_FILE, shape.pages * 8)?.map_owned();
        // Populated as all memory is: no page fault falls into a pause.
        let words = words.and_then(|words| populate(&[&words]).map(|()| words));
        let words = words.map_err(|errno| StoreError::file(&files.path(PLACES_FILE), errno.into()))?;
        let durable = Self {
            files,
            record,
            areas: Mutex::new(areas),
        };
        Ok((durable, Words::mapped(words, index(shape.pages))))
    }

    fn areas(&self) -> std::sync::MutexGuard<'_, Areas> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what stays the same for the session. To be called before the first commit.
    pub(crate) fn record_session(&self, session: &[u8]) {
        let mut areas = self.areas();
        if let Err(error) = areas.session.write(session) {
            areas.failed = Some(error);
            return;
        }
        self.record.put(
            at::SESSION_LENGTH,
            u64::try_from(session.len()).unwrap_or(u64::MAX),
        );
        self.record
            .put(at::SESSION_CHECK, u64::from(crc32c::crc32c(session)));
    }

    /// The checkpoint is committed, in image and slots together. After a failure nothing is kept for a later receiver.
    pub(crate) fn commit(&self, checkpoint: CheckpointId, device_state: &[u8]) {
        let mut areas = self.areas();
        let before = self.record.state();
        if areas.failed.is_some() || (before == 0 && checkpoint.0 > 0) {
            return;
        }
        let next = match before {
            0 => 0,
            _ if canary::is_set(Canary::OneDeviceState) => index(before & SLOT),
            _ => 1 - index(before & SLOT),
        };
        if let Err(error) = areas.device[next].write(device_state) {
            // An older checkpoint must never be taken for the last one.
            self.record.set_state(0);
            areas.failed = Some(error);
            return;
        }
        let slot = at::SLOTS[next];
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        self.record.put(slot + at::CHECKPOINT, checkpoint.0);
        self.record.put(
            slot + at::DEVICE_LENGTH,
            u64::try_from(device_state.len()).unwrap_or(u64::MAX),
        );
        self.record.put(slot + at::COMMITTED_NS, now);
        self.record
            .put(slot + at::SLOT_CHECK, self.record.slot_check(slot));
        let which = if next == 1 { SLOT } else { 0 };
        let flushing = if canary::is_set(Canary::EarlyFlushed) {
            0
        } else {
            FLUSHING
        };
        self.record.set_state(COMMITTED | flushing | which);
    }

    /// All pages of the last checkpoint are in the image.
    pub(crate) fn flushed(&self) {
        let state = self.record.state();
        self.record.set_state(state & !FLUSHING);
    }

    /// Records whether a guest may run on the image from now on, so that it is not taken for a checkpoint.
    pub(crate) fn set_given(&self, given: bool) {
        let state = self.record.state();
        if state != 0 {
            self.record
                .set_state(if given { state | GIVEN } else { state & !GIVEN });
        }
    }

    /// Why nothing is kept for a later receiver any more; returned once.
    pub(crate) fn take_failure(&self) -> Option<StoreError> {
        self.areas().failed.take()
    }

    pub(crate) fn files(&self) -> &Arc<RamFiles> {
        &self.files
    }

    /// Whether there is a checkpoint for a later receiver.
    pub(crate) fn has_checkpoint(&self) -> bool {
        self.record.state() != 0
    }
}
