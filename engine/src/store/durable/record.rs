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
//! | `LABEL.~record` | state word, two slots, and what follows from the guest (`layout.rs`); locked by the process that has the guest |
//! | `LABEL.~session` | what stays the same for the session, as its owner encodes it |
//! | `LABEL.~device-0`, `-1` | device state of the last checkpoint or of the one before |
//! | `LABEL.~places` | a word for each page |
//! | `LABEL.~flight` | the flight recorder: no checkpoint depends on it (`store/flight`) |
//! | `LABEL.~slab-N` | slots |
//! | `LABEL.BLOCK` | the image |
//!
//! The record is made before the others and removed after them, and says *no checkpoint* while they are made or removed: a
//! later receiver removes what a killed one has left of them. What a recovery reads has a checksum, and each word of the
//! table has one in it; the pages themselves have none, as memory has none.

use super::layout::{GuestShape, RECORD_FILE, Record, SlotContent, State, at, checksum};
use crate::canary::{self, Canary};
use crate::failpoint;
use crate::store::StoreError;
use crate::store::flight::{FLIGHT_CHECKPOINTS, FLIGHT_FILE, FlightRing, NoFlight, ring_bytes};
use crate::store::memory::copy;
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::populate::populate;
use crate::store::memory::ram_dir::{LOG_FILES, MemoryFile, RamFiles};
use crate::store::memory::slab::SLAB_FILES;
use crate::store::memory::words::Words;
use crate::units::{CheckpointId, PAGE_BYTES};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

const SESSION_FILE: &str = "~session";
const DEVICE_FILES: [&str; 2] = ["~device-0", "~device-1"];
pub(crate) const PLACES_FILE: &str = "~places";

/// Most memory mappings of these files, but for image and slabs; two of a device state while it grows.
pub(crate) const MAPPINGS_MAX: u64 = 9;

/// What the files beside the record have of the budget from the beginning, but for places and slabs.
pub(crate) fn files_charge(files: &RamFiles, area_bytes: u64) -> u64 {
    let areas = 1 + DEVICE_FILES.len() as u64;
    areas * files.bytes_of(area_bytes)
}

/// Whether a guest whose image has files of these `names` has a file of that name. Others may lie beside them, a copy that
/// an operator has made for example.
fn is_own(name: &str, names: &[String]) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_slab = || name.strip_prefix(SLAB_FILES).is_some_and(is_number);
    let is_log = || {
        let log = name.strip_prefix(LOG_FILES).and_then(|log| log.rsplit_once('-'));
        log.is_some_and(|(_, number)| is_number(number))
    };
    let fixed = [RECORD_FILE, SESSION_FILE, PLACES_FILE, FLIGHT_FILE];
    fixed.iter().chain(&DEVICE_FILES).any(|fixed| *fixed == name)
        || names.iter().any(|own| own == name)
        || is_slab()
        || is_log()
}

/// Owns all files of a guest whose image has files of these `names`, so that they are removed with `files`.
pub(crate) fn own(files: &RamFiles, names: &[String]) -> Result<(), StoreError> {
    files.own(|name| is_own(name, names))
}

/// Creates the file of the flight recorder.
pub(crate) fn create_flight(files: &RamFiles, bytes: u64, words: usize) -> Result<Words, StoreError> {
    let area = Area::create(files, FLIGHT_FILE, bytes)?;
    Ok(Words::mapped(area.memory, words))
}

/// Most memory that the flight recorder of an earlier receiver has. One that is longer is damaged, and is not opened.
fn flight_bytes_max(files: &RamFiles) -> u64 {
    files.bytes_of(ring_bytes(FLIGHT_CHECKPOINTS))
}

/// The flight recorder that an earlier receiver has left. A checkpoint can do without.
///
/// # Errors
/// If there is none, or it is not whole.
pub(crate) fn open_flight(files: &RamFiles) -> Result<FlightRing, NoFlight> {
    let length = match std::fs::symlink_metadata(files.path(FLIGHT_FILE)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(NoFlight::Missing),
        Err(_) => return Err(NoFlight::Damaged),
        Ok(about) => about.len(),
    };
    if length > flight_bytes_max(files) {
        return Err(NoFlight::Damaged);
    }
    let area = Area::open(files, FLIGHT_FILE).map_err(|_| NoFlight::Damaged)?;
    let words = area.memory.len() / 8;
    Ok(FlightRing::open(Words::mapped(area.memory, words))?)
}

/// What files there are of a guest.
pub(crate) enum Found {
    /// A checkpoint.
    Checkpoint(Box<DurableRecord>, FoundCheckpoint),
    /// A record without a checkpoint. All files are owned.
    Nothing,
    /// A record that a running receiver has locked.
    InUse,
    /// Files without a record.
    NoRecord,
}

/// The checkpoint that a record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundCheckpoint {
    pub(crate) shape: GuestShape,
    pub(crate) state: State,
    pub(crate) slot: SlotContent,
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
        let memory = memory.and_then(|memory| populate(&[&memory]).map(|()| memory));
        let memory = memory.map_err(|errno| files.refused(&file.path, file.length, errno))?;
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

    /// What was written, if it still has that checksum.
    fn read(&self, bytes: u64, check: u64) -> Result<Vec<u8>, StoreError> {
        let length = usize::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes <= self.memory.len());
        let Some(length) = length else {
            let what = format!("it should have {bytes} bytes, and has {}", self.memory.len());
            return Err(StoreError::damaged(&self.file.path, what));
        };
        let mut out = Vec::new();
        let reserved = out.try_reserve_exact(length);
        reserved.map_err(|_| StoreError::no_tables::<u8>(length))?;
        out.resize(length, 0);
        copy::read_bytes(&self.memory, 0, &mut out);
        match checksum(&out) == check {
            true => Ok(out),
            false => Err(StoreError::damaged(
                &self.file.path,
                "it is damaged: wrong checksum",
            )),
        }
    }

    /// Returns the checksum of what is written.
    fn write(&mut self, files: &RamFiles, bytes: &[u8]) -> Result<u64, StoreError> {
        if bytes.len() > self.memory.len() {
            self.memory = files.grow(&mut self.file, u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
        }
        let half = bytes.len() / 2;
        copy::write_bytes(&self.memory, 0, &bytes[..half]);
        failpoint::may_be_killed();
        copy::write_bytes(&self.memory, half, &bytes[half..]);
        failpoint::may_be_killed();
        Ok(checksum(bytes))
    }
}

struct Areas {
    session: Area,
    /// Those that there are: of a checkpoint that was found, its own.
    device: [Option<Area>; 2],
    /// The checkpoint whose device state is in its file before the commit, with its checksum, or why it is not.
    written: Option<(CheckpointId, Result<u64, StoreError>)>,
    /// Why no checkpoint outlives this receiver any more, until it is taken.
    failed: Option<StoreError>,
}

/// The record of a guest that is received. See the module.
pub(crate) struct DurableRecord {
    files: Arc<RamFiles>,
    record: Record,
    areas: Mutex<Areas>,
    /// Locked to make another state of the last one: the end of a flush must not bring a checkpoint back that is given up meanwhile.
    /// May be taken under `areas`.
    changing: Mutex<()>,
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
        let is_short = file.length < PAGE_BYTES;
        if is_short && !file.is_empty {
            return Err(StoreError::damaged(&path, "it is too short"));
        }
        let mapped = (!is_short).then(|| file.map_owned()).transpose();
        let record = mapped.map_err(|errno| StoreError::file(&path, errno.into()))?;
        let record = record.map(Record::of).filter(|record| !record.is_unfinished());
        let Some(record) = record else {
            // Its creator was killed before it made another file.
            return match files.are_others(RECORD_FILE)? {
                false => Ok(Found::Nothing),
                true => Err(StoreError::damaged(
                    &path,
                    "it is empty, and there are other files",
                )),
            };
        };
        let (shape, state, slot) = record.read(&path)?;
        let (Some(slot), Some(which)) = (slot, state.slot) else {
            own(&files, &record.names(&path)?)?;
            return Ok(Found::Nothing);
        };
        let mut device = [None, None];
        device[which] = Some(Area::open(&files, DEVICE_FILES[which])?);
        let areas = Mutex::new(Areas {
            session: Area::open(&files, SESSION_FILE)?,
            device,
            written: None,
            failed: None,
        });
        let durable = Box::new(Self {
            files,
            record,
            areas,
            changing: Mutex::default(),
        });
        Ok(Found::Checkpoint(durable, FoundCheckpoint { shape, state, slot }))
    }

    /// What [`Self::record_session`] has written.
    pub(crate) fn session(&self) -> Result<Vec<u8>, StoreError> {
        let length = self.record.get(at::SESSION_LENGTH);
        let check = self.record.get(at::SESSION_CHECK);
        self.areas().session.read(length, check)
    }

    /// The device state of a checkpoint that was found.
    pub(crate) fn device_state(&self, found: &FoundCheckpoint) -> Result<Vec<u8>, StoreError> {
        let areas = self.areas();
        let area = found.state.slot.and_then(|which| areas.device[which].as_ref());
        area.map_or(Ok(Vec::new()), |area| {
            area.read(found.slot.device_bytes, found.slot.device_check)
        })
    }

    /// Creates the files beside the `record`, and the table of places in one of them. `area_bytes` are allocated for a
    /// device state at first.
    pub(crate) fn create(
        files: Arc<RamFiles>,
        record: Record,
        pages: u64,
        area_bytes: u64,
    ) -> Result<(Self, Words), StoreError> {
        let area = |name| Area::create(&files, name, area_bytes);
        let areas = Areas {
            session: area(SESSION_FILE)?,
            device: [Some(area(DEVICE_FILES[0])?), Some(area(DEVICE_FILES[1])?)],
            written: None,
            failed: None,
        };
        // Populated as all memory is: no page fault falls into a pause.
        let places = Area::create(&files, PLACES_FILE, pages * 8)?;
        let durable = Self {
            files,
            record,
            areas: Mutex::new(areas),
            changing: Mutex::default(),
        };
        Ok((durable, Words::mapped(places.memory, index(pages))))
    }

    fn areas(&self) -> std::sync::MutexGuard<'_, Areas> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Threads that commit, flush, give away and give up change the state one after the other.
    fn change_state(&self, next: impl FnOnce(State) -> State) {
        let _turn = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.record.set_state(next(self.record.state()));
    }

    /// Writes what stays the same for the session. To be called before the first commit.
    pub(crate) fn record_session(&self, session: Result<Vec<u8>, StoreError>) {
        let mut areas = self.areas();
        let written = session.and_then(|session| {
            let check = areas.session.write(&self.files, &session)?;
            Ok((u64::try_from(session.len()).unwrap_or(u64::MAX), check))
        });
        match written {
            Ok((length, check)) => {
                self.record.put(at::SESSION_LENGTH, length);
                self.record.put(at::SESSION_CHECK, check);
            }
            Err(error) => areas.failed = Some(error),
        }
    }

    /// The slot and the device state's file that the next commit uses. None if nothing is kept any more.
    fn next_slot(&self, areas: &Areas, checkpoint: CheckpointId) -> Option<usize> {
        let before = self.record.state();
        if areas.failed.is_some() || (before.slot.is_none() && checkpoint.0 > 0) {
            return None;
        }
        Some(match before.slot {
            None => 0,
            Some(before) if canary::is_set(Canary::OneDeviceState) => before,
            Some(before) => 1 - before,
        })
    }

    /// Writes the device state of the next commit, which then only has to name it.
    pub(crate) fn write_ahead(&self, checkpoint: CheckpointId, device_state: &[u8]) {
        let areas = &mut *self.areas();
        let Some(next) = self.next_slot(areas, checkpoint) else {
            return;
        };
        if let Some(area) = &mut areas.device[next] {
            let written = match canary::is_set(Canary::UnwrittenState) {
                true => Ok(checksum(device_state)),
                false => area.write(&self.files, device_state),
            };
            areas.written = Some((checkpoint, written));
        }
    }

    /// The checkpoint is committed, in image and slots together. After a failure nothing is kept for a later receiver.
    pub(crate) fn commit(&self, checkpoint: CheckpointId, device_state: &[u8]) {
        let areas = &mut *self.areas();
        let Some(next) = self.next_slot(areas, checkpoint) else {
            return;
        };
        let Some(area) = &mut areas.device[next] else {
            return;
        };
        let written = match areas.written.take() {
            Some((ahead, written)) if ahead == checkpoint => written,
            _ => area.write(&self.files, device_state),
        };
        let device_check = match written {
            Ok(check) => check,
            Err(error) => {
                // An older checkpoint must never be taken for the last one.
                self.forget();
                areas.failed = Some(error);
                return;
            }
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let content = SlotContent {
            checkpoint,
            device_bytes: u64::try_from(device_state.len()).unwrap_or(u64::MAX),
            device_check,
            committed_ns: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
        };
        self.record.fill_slot(next, content);
        self.change_state(|_| State {
            slot: Some(next),
            is_flushing: !canary::is_set(Canary::EarlyFlushed),
            is_given: false,
        });
    }

    /// All pages of the last checkpoint are in the image.
    pub(crate) fn flushed(&self) {
        self.change_state(|state| State {
            is_flushing: false,
            ..state
        });
    }

    /// Records whether a guest may run on the image from now on, so that it is not taken for a checkpoint.
    pub(crate) fn set_given(&self, is_given: bool) {
        self.change_state(|state| State {
            // Without a checkpoint there is nothing to give.
            is_given: is_given && state.slot.is_some(),
            ..state
        });
    }

    /// There is no checkpoint any more: a later receiver removes what it finds of the files.
    pub(crate) fn forget(&self) {
        self.change_state(|_| State::default());
    }

    /// Why nothing is kept for a later receiver any more; returned once.
    pub(crate) fn take_failure(&self) -> Option<StoreError> {
        self.areas().failed.take()
    }

    pub(crate) fn files(&self) -> &Arc<RamFiles> {
        &self.files
    }

    /// Memory of the files that stay with a checkpoint, but for its image.
    pub(crate) fn bytes(&self) -> u64 {
        let areas = self.areas();
        let devices = areas.device.iter().zip(DEVICE_FILES);
        let devices = devices.map(|(area, name)| match area {
            Some(area) => area.memory.len() as u64,
            // It stays beside the one that was found.
            None => self.files.length_of(name),
        });
        // What is longer is not opened, whatever its length says.
        let flight = self
            .files
            .length_of(FLIGHT_FILE)
            .min(flight_bytes_max(&self.files));
        let all = [areas.session.memory.len() as u64, self.record.bytes(), flight];
        devices.chain(all).fold(0, u64::saturating_add)
    }

    /// Whether there is a checkpoint for a later receiver.
    pub(crate) fn has_checkpoint(&self) -> bool {
        self.record.state().slot.is_some()
    }
}

impl Drop for DurableRecord {
    fn drop(&mut self) {
        // The files go with the last reference to them, one by one.
        if self.files.go_with_this() {
            self.forget();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_files_are_ours() {
        let names = ["pc.ram".to_owned(), "vga.vram~3".to_owned()];
        for own in [
            "~record",
            "~session",
            "~device-1",
            "~places",
            "~slab-0",
            "~slab-17",
            "~log-root-000001",
            "~log-a-b-2",
            "pc.ram",
            "vga.vram~3",
        ] {
            assert!(is_own(own, &names), "{own}");
        }
        for other in [
            "pc.ram.backup-by-operator",
            "pc.ra",
            "~record.old",
            "~device-2",
            "~slab-",
            "~slab-1.bak",
            "~log-root",
            "~log-root-1~",
            "",
        ] {
            assert!(!is_own(other, &names), "{other}");
        }
    }
}
