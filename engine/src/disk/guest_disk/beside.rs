//! A disk of a guest that is protected again, while its last checkpoint is kept: the base is that checkpoint's, and stays as it is.
//!
//! ```text
//!   earlier session, kept              the same disk, a later session
//!   base ◄── its checkpoint            first copy: what differs from the base goes to the log, as epoch 0
//!     │                                checkpoint 0: epoch 0 commits, then 1, 2, … Nothing is applied
//!     │ its checkpoint is given up
//!     └──────────────────────────────► epochs 0, 1, 2, … are applied to the base, in order
//! ```
//!
//! So both checkpoints are whole, until one of them is given up. If it is the later one, its log is dropped. What is to become of the earlier
//! one the control thread decides (`receiver/control/replacement.rs`). The later disk has the base when the earlier one was given up **and** nobody
//! uses it any more: a dump may still read the base.
//!
//! A primary that copies only what has changed since its last full copy must find that one in the base. So a file beside the base,
//! `NAME.~beside`, says that the last full copy was made beside a checkpoint, and goes when that copy comes to the base, or the disk of a later full
//! copy is bound. As long as it is there, only full copies are taken.
//!
//! A kill at any time: the record of the later disk names the log of the earlier one, and as long as a record with that log is needed, recovery
//! applies nothing of the later one.

use super::requests::{Layers, Piece, RequestFailure, Source, Wanted};
use super::{Disk, DiskOptions, Phase};
use crate::disk::DiskError;
use crate::disk::base::Base;
use crate::disk::epoch::{Content, Epoch, Part};
use crate::disk::pool::{RamShare, SegmentPool};
use crate::disk::record::DiskRecord;
use crate::disk::{path_of, recovery};
use crate::files::{self, Readers};
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

/// Blocks of a write that are the base's already take nothing of the log.
const BLOCK_BYTES: usize = 4096;

/// Most bytes of the file that says whose copy is not in the base.
const MARK_MAX: u64 = 64;

/// What is known in the first copy only.
pub(super) struct BesideCopy {
    /// Ranges that the client has made zero, over everything else. A mirror begins with all of the disk, and then writes most of it: what stays
    /// zero goes to the log at the end.
    pub(super) zeroed: Epoch,
    /// Of which indexes are taken.
    pub(super) memory: Arc<dyn RamShare>,
}

impl Disk {
    /// Opens a disk for a connection, whose base an earlier checkpoint has. Indexes are taken of `memory`.
    ///
    /// # Errors
    /// If the base is not at that checkpoint yet, or belongs to a third one, or a QEMU has it open.
    pub(crate) fn open_beside(
        earlier: &Self,
        directory: &Path,
        options: DiskOptions,
        memory: Arc<dyn RamShare>,
        copy: u64,
    ) -> Result<Arc<Self>, DiskError> {
        let name = earlier.name();
        earlier.check_base()?;
        let base = Base::open(&path_of(directory, name))?;
        let files = earlier.files.other();
        let record = DiskRecord::create(directory, name, files, base.size(), Some(earlier.log()))?;
        recovery::remove_logs(directory, name, files)?;
        record.set_copy(copy);
        mark_copy(base.path(), record.log(), copy)?;
        let pool = SegmentPool::new(directory, name, files, options.segment_bytes, options.log_max);
        let disk = Arc::new(Self::new(name, base, files, record, pool, Phase::Copying));
        let mut state = disk.state();
        state.awaits_base = true;
        state.copy = Some(BesideCopy {
            zeroed: Epoch::new(disk.log(), 0),
            memory,
        });
        drop(state);
        earlier.is_followed_by(&disk);
        Ok(disk)
    }

    /// Whether the base is at the last committed checkpoint.
    fn check_base(&self) -> Result<(), DiskError> {
        let state = self.state();
        match (
            state.awaits_base,
            state.phase == Phase::Over && state.committed.is_empty(),
        ) {
            (true, _) => Err(DiskError::AwaitsBase(self.name.clone())),
            (false, false) => Err(DiskError::NotDrained(self.name.clone())),
            (false, true) => Ok(()),
        }
    }

    fn later_lock(&self) -> MutexGuard<'_, Weak<Self>> {
        // Nothing that panics is done under it.
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That disk is copied beside this one.
    pub(crate) fn is_followed_by(&self, later: &Arc<Self>) {
        *self.later_lock() = Arc::downgrade(later);
    }

    /// The one that is copied beside it.
    pub(crate) fn later(&self) -> Option<Arc<Self>> {
        self.later_lock().upgrade()
    }

    /// Whether the base is still another checkpoint's.
    pub(crate) fn awaits_base(&self) -> bool {
        self.state().awaits_base
    }

    /// The log of the checkpoint beside which it was copied.
    pub(crate) fn beside(&self) -> Option<u64> {
        self.record.beside()
    }

    /// The earlier disk is given up, and not used any more.
    pub(super) fn take_base(&self) {
        unmark_copy(self.base.path(), self.log());
        self.state().awaits_base = false;
        self.changed.notify_all();
    }

    /// Whether the base is that of the last full copy, which a client needs that copies less.
    ///
    /// # Errors
    /// If it is not.
    pub(crate) fn check_copy(directory: &Path, name: &str) -> Result<(), DiskError> {
        match is_marked(&path_of(directory, name)) {
            true => Err(DiskError::CopyIsGone(name.to_owned())),
            false => Ok(()),
        }
    }

    /// The client copies all of the disk, and calls that copy so.
    pub(crate) fn is_copied_as(&self, number: u64) {
        self.record.set_copy(number);
    }

    /// Whether a copy of this number is none: the client's mirror has lost its connection since it began, and connects again.
    pub(crate) fn knows_copy(&self, number: u64) -> bool {
        let of_mark = read_mark(self.base.path()).map(|(_, copy)| copy);
        self.record.copy() == number || of_mark == Some(number)
    }

    /// All of the disk was copied to the base.
    pub(super) fn unmark(&self) {
        // It fails if the file is gone, which is what is wanted.
        drop(std::fs::remove_file(mark_beside(self.base.path())));
    }

    /// The base is to be given to a QEMU, as the earlier checkpoint's: no session can take this copy any more. False if one has it already.
    pub(crate) fn give_way(&self) -> bool {
        let mut state = self.state();
        match state.phase {
            Phase::Copying => {
                state.is_connected = false;
                true
            }
            Phase::Open | Phase::Cut => false,
            // One without a checkpoint is on its way out.
            Phase::Over => state.epoch.is_none() || self.is_given_up.load(Ordering::Relaxed),
        }
    }

    /// Why a session cannot take the copy, where its client is not told as much.
    pub(crate) fn copy_loss(&self) -> Option<Arc<DiskError>> {
        let state = self.state();
        state.loss.clone().filter(|_| state.phase == Phase::Copying)
    }

    // --- the first copy ------------------------------------------------------------------------------------------------

    /// Takes data of the first copy: what differs from the base goes to the log.
    ///
    /// # Errors
    /// What to answer.
    pub(crate) fn write_compared(&self, bytes: &[u8], offset: u64) -> Result<(), RequestFailure> {
        let mut logged = vec![0; bytes.len()];
        self.read_logged(offset, &mut logged)?;
        let mut at = 0;
        while at < bytes.len() {
            let is_equal = |at: usize| {
                let end = (at + BLOCK_BYTES).min(bytes.len());
                bytes[at..end] == logged[at..end]
            };
            let from = at;
            while at < bytes.len() && !is_equal(at) {
                at = (at + BLOCK_BYTES).min(bytes.len());
            }
            if at > from {
                self.log_copied(&bytes[from..at], offset + from as u64)?;
            }
            at += BLOCK_BYTES;
        }
        if let Some(copy) = &mut self.state().copy {
            copy.zeroed.forget(offset, bytes.len() as u64);
        }
        Ok(())
    }

    /// What is in the log, and else in the base.
    fn read_logged(&self, offset: u64, out: &mut [u8]) -> Result<(), RequestFailure> {
        let (mut pieces, mut done): (Vec<Piece>, usize) = (Vec::new(), 0);
        while done < out.len() {
            let at = offset + done as u64;
            self.pieces_of(at, (out.len() - done) as u64, Layers::Logged, &mut pieces);
            for piece in &pieces {
                // At most what is asked for.
                let length = usize::try_from(piece.length).unwrap_or(0);
                let out = &mut out[done..done + length];
                match &piece.source {
                    Source::Segment(segment, place) => segment.read(*place, out),
                    Source::Zero => out.fill(0),
                    Source::Base => {
                        let read = self.base.read(out, piece.offset);
                        read.map_err(|error| RequestFailure::from(&error))?;
                    }
                }
                done += length;
            }
        }
        Ok(())
    }

    fn log_copied(&self, bytes: &[u8], offset: u64) -> Result<(), RequestFailure> {
        let mut wanted = Wanted::default();
        drop(self.place(self.writable()?, (offset, bytes.len() as u64), &mut wanted)?);
        let mut rest = bytes;
        for stretch in wanted.stretches() {
            let (now, later) = rest.split_at(stretch.length);
            stretch.segment.write(stretch.place, now);
            rest = later;
        }
        self.take_written(&mut *self.writable()?, &wanted)
    }

    /// Makes a range zero, if the disk is copied beside a checkpoint.
    pub(super) fn zero_copied(&self, part: Part) -> Option<Result<(), RequestFailure>> {
        let mut state = self.state();
        let copy = state.copy.as_mut()?;
        copy.zeroed.insert(part);
        let memory = copy.memory.clone();
        if copy.zeroed.lease_used(&*memory) {
            return Some(Ok(()));
        }
        drop(state);
        self.note_loss(DiskError::NoRoom {
            disk: self.name.clone(),
            source: Box::new(DiskError::NoIndex),
        });
        Some(Err(RequestFailure::NoSpace))
    }

    /// The first copy is whole: what is zero goes to the log, too.
    pub(super) fn log_zeroed(&self) -> Result<(), RequestFailure> {
        loop {
            let first = self
                .state()
                .copy
                .as_ref()
                .and_then(|copy| copy.zeroed.parts().next());
            let Some(
                part @ Part {
                    content: Content::Zero { may_punch },
                    ..
                },
            ) = first
            else {
                return Ok(());
            };
            self.log_zero(part.offset, part.length, may_punch)?;
            if let Some(copy) = &mut self.state().copy {
                copy.zeroed.forget(part.offset, part.length);
            }
        }
    }
}

/// The copy with that log does not come to the base for the time being.
fn mark_copy(base: &Path, log: u64, copy: u64) -> Result<(), DiskError> {
    let path = mark_beside(base);
    // It fails if there is none, which is what is wanted.
    drop(std::fs::remove_file(&path));
    let made = files::create_new(&path, Readers::Owner);
    let written = made.and_then(|mut file| file.write_all(format!("{log} {copy}").as_bytes()));
    written.map_err(|source| DiskError::File { path, source })
}

pub(super) fn is_marked(base: &Path) -> bool {
    mark_beside(base).symlink_metadata().is_ok()
}

fn mark_beside(base: &Path) -> PathBuf {
    base.with_extension("~beside")
}

/// The copy with that log comes to the base.
pub(in crate::disk) fn unmark_copy(base: &Path, log: u64) {
    if read_mark(base).is_some_and(|(marked, _)| marked == log) {
        // If it stays, only a full copy is taken next.
        drop(std::fs::remove_file(mark_beside(base)));
    }
}

/// The log and the number of the copy that is not in the base.
fn read_mark(base: &Path) -> Option<(u64, u64)> {
    let mut options = File::options();
    options.read(true);
    // Never through a link, nor waiting for a pipe: other users may write to the directory.
    options.custom_flags(OFlag::O_NOFOLLOW.bits() | OFlag::O_NONBLOCK.bits());
    let (mut text, file) = (String::new(), options.open(mark_beside(base)).ok()?);
    file.take(MARK_MAX).read_to_string(&mut text).ok()?;
    let (log, copy) = text.split_once(' ')?;
    log.parse().ok().zip(copy.parse().ok())
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.is_given_up.load(Ordering::Relaxed)
            && let Some(later) = self.later()
        {
            later.take_base();
        }
    }
}
