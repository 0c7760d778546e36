//! The disks of a simulated guest: what the guest has written, and what the receiver has of it.
//!
//! A write is answered at once, as a mirrored one is that has arrived. It comes while the guest runs, and never between the cut of
//! an epoch and its acknowledgement, but for the faults of that name.

use super::primary::Stage;
use super::rng::Rng;
use crate::disk::tests::{read, with_faulty_base, write};
use crate::disk::{
    self, Binding, Disk, DiskError, DiskOptions, Ownership, RamPlace, RamShare, apply_step, path_of,
};
use crate::receiver::disks::SessionDisks;
use crate::receiver::end::SessionEnd;
use crate::receiver::live_session::LiveSession;
use crate::units::CheckpointId;
use nix::errno::Errno;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a disk: few, so that many writes meet.
const SIZE: usize = 64 << 10;

const SECTOR: usize = 512;

/// Segments so small that most epochs have several.
const SEGMENT: u64 = 12 << 10;

/// Segments that a write of the model may take.
const SEGMENTS_OF_WRITE: u64 = 3;

/// What is done to a guest's disk, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskFault {
    /// Its connection breaks.
    Lost,
    /// Its connection breaks, and its thread waits for the session to end by itself.
    LostQuietly,
    /// A write of the first copy is answered with an error.
    CopyFails,
    /// The base takes nothing of a committed log.
    ApplyFails,
    /// A write comes after the cut.
    LateWrite,
    /// A write does not become complete.
    Unfinished,
}

pub(super) const DISK_FAULTS: [DiskFault; 7] = [
    DiskFault::Lost,
    DiskFault::LostQuietly,
    DiskFault::CopyFails,
    DiskFault::ApplyFails,
    DiskFault::LateWrite,
    DiskFault::LateWrite,
    DiskFault::Unfinished,
];

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskStep {
    /// Now is not the time for it.
    Nothing,
    Done,
    /// The session has lost the disk by it.
    Lost,
}

struct SimDisk {
    disk: Arc<Disk>,
    content: Vec<u8>,
}

/// The content of all disks at an instant.
type Contents = Rc<Vec<Vec<u8>>>;

/// See the module.
pub(super) struct SimDisks {
    disks: Vec<SimDisk>,
    /// As the snapshots of the memory.
    snapshots: Vec<Contents>,
    is_lost: bool,
}

impl SimDisks {
    /// The disks of a session, which its primary mirrors to a directory.
    pub(super) fn new(rng: &mut Rng, directory: &Path, session: usize) -> Self {
        let count = rng.range(1, 2);
        let log_max = rng.pick(&[SEGMENT * 8, 1 << 30, 1 << 30]);
        let disks = (0..count).map(|number| {
            let name = format!("disk-{session}-{number}");
            let content = vec![0xee; SIZE];
            std::fs::write(path_of(directory, &name), &content).expect("a file");
            let options = DiskOptions {
                log_max,
                segment_bytes: SEGMENT,
            };
            let disk = Disk::open(directory, &name, options).expect("a base");
            SimDisk {
                disk: Arc::new(disk),
                content,
            }
        });
        Self {
            disks: disks.collect(),
            snapshots: Vec::new(),
            is_lost: false,
        }
    }

    pub(super) fn all(&self) -> Vec<Arc<Disk>> {
        self.disks.iter().map(|disk| disk.disk.clone()).collect()
    }

    /// The primary has stopped its guest and taken so many snapshots of its memory.
    pub(super) fn take_snapshot(&mut self, snapshots: usize) {
        if self.snapshots.len() < snapshots {
            let contents = self.disks.iter().map(|disk| disk.content.clone()).collect();
            self.snapshots.push(Rc::new(contents));
        }
    }

    /// The guest writes, if it runs.
    pub(super) fn run(&mut self, rng: &mut Rng, stage: Stage) -> DiskStep {
        let runs = matches!(stage, Stage::Start | Stage::Idle | Stage::WaitReply | Stage::Done);
        if !runs {
            return DiskStep::Nothing;
        }
        let which = rng.below(self.disks.len());
        let SimDisk { disk, content } = &mut self.disks[which];
        let at = rng.below(SIZE / SECTOR) * SECTOR;
        let length = (rng.any_size(20) * SECTOR).min(SIZE - at);
        if self.is_lost {
            // The guest writes on, and the receiver does not have it: no checkpoint may be committed any more.
            content[at..at + length].fill(0xdd);
            return DiskStep::Nothing;
        }
        while !disk.has_room_for(SEGMENTS_OF_WRITE) && apply_step(disk) {}
        let value = u8::try_from(rng.below(256)).expect("a byte");
        let is_done = match rng.below(4) {
            0 => disk.zero(at as u64, length as u64, rng.one_in(2), false).is_ok(),
            _ => write(disk, at, &vec![value; length]),
        };
        if !is_done {
            self.is_lost = true;
            return DiskStep::Lost;
        }
        let range = at..at + length;
        let mut now = vec![0; length];
        now.copy_from_slice(&read(disk, at, length));
        content[range].copy_from_slice(&now);
        let is_right = now.iter().all(|byte| *byte == value) || now.iter().all(|byte| *byte == 0);
        assert!(is_right, "what was written is not what is read");
        DiskStep::Done
    }

    /// Does something to a disk.
    ///
    /// # Errors
    /// If it goes unnoticed.
    pub(super) fn break_one(
        &mut self,
        rng: &mut Rng,
        fault: DiskFault,
        is_committed: bool,
    ) -> Result<DiskStep, String> {
        let which = rng.below(self.disks.len());
        let SimDisk { disk, content } = &mut self.disks[which];
        let is_bound = !disk.is_copying();
        let is_time = match fault {
            DiskFault::Lost | DiskFault::LostQuietly | DiskFault::Unfinished => is_bound && !disk.is_cut(),
            DiskFault::CopyFails => !is_bound,
            DiskFault::ApplyFails => is_bound,
            // Once that is committed, while the acknowledgement waits for a guard, a write is of the next epoch.
            DiskFault::LateWrite => disk.is_cut() && !is_committed,
        };
        if self.is_lost || !is_time {
            return Ok(DiskStep::Nothing);
        }
        match fault {
            DiskFault::Lost | DiskFault::LostQuietly => {
                disk.disconnected();
                let lost = DiskError::ConnectionLost {
                    disk: disk.name().to_owned(),
                    reason: "a fault".to_owned(),
                };
                match fault {
                    DiskFault::Lost => disk.lose(lost),
                    _ => drop(disk.note_loss(lost)),
                }
            }
            DiskFault::CopyFails => {
                if with_faulty_base(disk, Errno::ENOSPC, |disk| write(disk, 0, &[1; SECTOR])) {
                    return Err("a write that the base did not take is answered as done".to_owned());
                }
                content[..SECTOR].fill(1);
            }
            DiskFault::ApplyFails => {
                if !with_faulty_base(disk, Errno::EIO, apply_step) {
                    return Ok(DiskStep::Nothing);
                }
            }
            DiskFault::LateWrite => {
                if write(disk, 0, &[1; SECTOR]) {
                    return Err("a write after the cut of an epoch is taken".to_owned());
                }
            }
            DiskFault::Unfinished => {
                while !disk.has_room_for(SEGMENTS_OF_WRITE) && apply_step(disk) {}
                // An answer that the log is full ends the session as well.
                let _ = disk.begin_write((0, SECTOR as u64), &mut disk::Wanted::default());
            }
        }
        self.is_lost = true;
        Ok(DiskStep::Lost)
    }

    /// Applies a log; whether there was one.
    pub(super) fn apply(&self, rng: &mut Rng) -> bool {
        apply_step(&self.disks[rng.below(self.disks.len())].disk)
    }

    /// Compares what is committed with what the guest had written then.
    pub(super) fn check(&self, state: usize) -> Result<(), String> {
        for (disk, expected) in self.disks.iter().zip(&*self.snapshots[state]) {
            let epoch = disk.disk.figures().epoch;
            if epoch != Some(state as u64) {
                return Err(format!(
                    "{} is at {epoch:?} where state {state} is committed",
                    disk.disk.name()
                ));
            }
            compare(disk.disk.name(), &disk.disk.read_committed(), expected, state)?;
        }
        Ok(())
    }

    /// The session is over and may have left a checkpoint: the bases must be it.
    pub(super) fn end(&self, disks: Option<&Arc<SessionDisks>>, state: Option<usize>) -> Result<(), String> {
        if let Some(disks) = disks {
            disks.end_session();
        }
        for disk in &self.disks {
            while apply_step(&disk.disk) {}
        }
        let (Some(disks), Some(state)) = (disks, state) else {
            return Ok(());
        };
        let restored = disks
            .restored(CheckpointId(state as u64))
            .map_err(|error| error.to_string())?;
        for (disk, expected) in restored.iter().zip(&*self.snapshots[state]) {
            let base = std::fs::read(&disk.path).map_err(|error| error.to_string())?;
            compare(&disk.name, &base, expected, state)?;
        }
        Ok(())
    }

    /// What the next receiver makes of the bases in a directory, for a checkpoint that it has found.
    pub(super) fn found(&self, found: &RecoveredDisks<'_>, state: usize) -> Result<(), String> {
        if found.stored.len() != self.disks.len() {
            return Err(format!(
                "{} disks are found of {}",
                found.stored.len(),
                self.disks.len()
            ));
        }
        for (stored, expected) in found.stored.iter().zip(&*self.snapshots[state]) {
            let mut stored = stored.clone();
            stored.directory = found.directory.to_str().expect("a text").to_owned();
            let disk =
                disk::recover(&stored, found.ram, state as u64, false).map_err(|error| error.to_string())?;
            disk.keep_files();
            let base =
                std::fs::read(path_of(found.directory, &stored.name)).map_err(|error| error.to_string())?;
            compare(&stored.name, &base, expected, state)?;
        }
        Ok(())
    }
}

/// The disks that a killed receiver has left.
pub(super) struct RecoveredDisks<'a> {
    pub(super) stored: &'a [disk::StoredDisk],
    pub(super) directory: &'a Path,
    pub(super) ram: &'a crate::store::memory::ram_dir::RamFiles,
}

fn compare(name: &str, content: &[u8], expected: &[u8], state: usize) -> Result<(), String> {
    if content == expected {
        return Ok(());
    }
    let at = content.iter().zip(expected).position(|(one, other)| one != other);
    Err(format!(
        "{name} is not what state {state} had there: at {at:?} {:?} instead of {:?}",
        at.map(|at| content[at]),
        at.map(|at| expected[at])
    ))
}

/// A share that so much may be taken of.
struct Share(AtomicUsize);

impl RamShare for Share {
    fn take(&self, _: u64) -> Option<Box<dyn Send + Sync>> {
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        taken.ok().map(|_| Box::new(()) as Box<dyn Send + Sync>)
    }
}

/// Binds the disks of a session, as the registry does.
pub(super) fn bind(
    session: &Arc<LiveSession>,
    disks: Vec<Arc<Disk>>,
    segments_in_ram: usize,
) -> Result<SessionDisks, DiskError> {
    let durable = session.store().and_then(|store| store.committed().durable());
    let ram = durable.map(|durable| durable.files().clone());
    let has_own_record = ram.is_none();
    let Some(first) = disks.first() else {
        return Ok(SessionDisks::default());
    };
    let owner = Ownership {
        session: u64::from(session.id),
        leader: first.name().to_owned(),
        ram_dir: ram.as_ref().map(|files| files.directory().display().to_string()),
    };
    for disk in &disks {
        let weak = Arc::downgrade(session);
        disk.bind(Binding {
            owner: owner.clone(),
            ram: ram.clone().map(|files| RamPlace {
                files,
                share: Arc::new(Share(AtomicUsize::new(segments_in_ram))),
            }),
            index: Arc::new(Share(AtomicUsize::new(usize::MAX))),
            on_loss: Box::new(move |error| {
                if let Some(session) = weak.upgrade() {
                    session.finish(SessionEnd::Disk(error));
                }
            }),
            on_full: Box::new(|_| {}),
            on_base_full: Box::new(|_, _| {}),
            link: None,
        })?;
    }
    Ok(SessionDisks::new(disks, has_own_record))
}
