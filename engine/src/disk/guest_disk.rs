//! One disk: its base, the open epoch, and committed epochs that are not in the base yet.
//!
//! One connection writes, one write at a time; anyone reads. A session's main channel cuts and commits; a thread of its own applies
//! (`apply.rs`). What its client asks for is in `requests.rs`. The lock is held for steps on the index only, never for I/O, so a commit waits for none.

mod applying;
mod requests;

use super::DiskError;
use super::base::Base;
use super::epoch::Epoch;
use super::pool::{RamPlace, RamShare, SegmentPool};
use super::record::{DiskRecord, Ownership};
use crate::canary::{self, Canary};
pub(crate) use requests::{Piece, RequestFailure, Source, Wanted, WriteTarget};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// How disks keep their logs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskOptions {
    /// Most bytes of one disk's log.
    pub(crate) log_max: u64,
    pub(crate) segment_bytes: u64,
}

/// Where a disk stands: see `mod.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Copying,
    Open,
    Cut,
    Over,
}

/// Takes the name of a disk and the error of its base.
pub(crate) type OnBaseFull = Box<dyn Fn(String, &std::io::Error) + Send + Sync>;

/// What a session that takes a disk gives it.
pub(crate) struct Binding {
    pub(crate) owner: Ownership,
    /// Where its log may lie in memory.
    pub(crate) ram: Option<RamPlace>,
    /// Of which the memory of its log's index is taken.
    pub(crate) index: Arc<dyn RamShare>,
    /// Called once, when the disk is lost to the session.
    pub(crate) on_loss: Box<dyn Fn(Arc<DiskError>) + Send + Sync>,
    /// Called once, when the log is full and the client has to wait.
    pub(crate) on_full: Box<dyn Fn(String) + Send + Sync>,
    /// Called once, when the base has no room for what is committed.
    pub(crate) on_base_full: OnBaseFull,
    /// The client's connection.
    pub(crate) link: Option<Link>,
}

/// The connection of a disk's client.
pub(crate) struct Link {
    /// Ends it.
    pub(crate) hang_up: Box<dyn Fn() + Send + Sync>,
    /// Whether the client has closed it, even if not all that it sent was read. Does not wait.
    pub(crate) is_gone: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Binding {
    fn is_gone(&self) -> bool {
        self.link.as_ref().is_some_and(|link| (link.is_gone)())
    }
}

struct State {
    phase: Phase,
    open: Epoch,
    committed: VecDeque<Arc<Epoch>>,
    /// The last committed checkpoint.
    epoch: Option<u64>,
    /// A write has begun and not ended.
    is_writing: bool,
    is_connected: bool,
    /// The client has changed the base.
    is_changed: bool,
    /// Why the base is not what the client has written.
    copy_failure: Option<RequestFailure>,
    has_warned: bool,
    has_warned_of_base: bool,
    loss: Option<Arc<DiskError>>,
    /// The thread that applies has given up.
    has_apply_failed: bool,
    binding: Option<Arc<Binding>>,
}

impl State {
    /// Takes the memory of the open epoch's index that is not taken yet, and what the entries of one more segment can need. False
    /// if there is none.
    fn lease_index(&mut self, segment_bytes: u64) -> bool {
        match &self.binding {
            None => true,
            Some(binding) => self.open.lease_index(&*binding.index, segment_bytes),
        }
    }
}

/// See the module.
pub(crate) struct Disk {
    name: String,
    base: Base,
    record: DiskRecord,
    pub(super) pool: SegmentPool,
    state: Mutex<State>,
    /// A committed epoch, room in the log, or an end.
    changed: Condvar,
    /// Between the cut of an epoch and its acknowledgement: the primary's guest stands still.
    is_cut: AtomicBool,
    /// Held by a caller that applies again what the thread could not apply.
    applying: Mutex<()>,
    written: AtomicU64,
}

/// Figures for the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskFigures {
    pub(crate) log_bytes: u64,
    pub(crate) lag_bytes: u64,
    pub(crate) lag_epochs: usize,
    pub(crate) epoch: Option<u64>,
    pub(crate) is_lost: bool,
    pub(crate) written_bytes: u64,
}

impl Disk {
    /// Opens a disk for a connection.
    ///
    /// # Errors
    /// If its base cannot be used, or a checkpoint or another receiver has the disk.
    pub(crate) fn open(directory: &Path, name: &str, options: DiskOptions) -> Result<Self, DiskError> {
        let base = Base::open(&super::path_of(directory, name))?;
        let record = DiskRecord::create(directory, name, base.size())?;
        super::recovery::remove_logs(directory, name)?;
        let pool = SegmentPool::new(directory, name, options.segment_bytes, options.log_max);
        Ok(Self::new(name, base, record, pool, Phase::Copying))
    }

    /// A disk of an earlier receiver, whose base is at a checkpoint.
    pub(super) fn recovered(
        directory: &Path,
        name: &str,
        base: Base,
        record: DiskRecord,
        checkpoint: u64,
    ) -> Self {
        let pool = SegmentPool::new(directory, name, super::segment::SEGMENT_BYTES, 0);
        let disk = Self::new(name, base, record, pool, Phase::Over);
        disk.state().epoch = Some(checkpoint);
        disk
    }

    fn new(name: &str, base: Base, record: DiskRecord, pool: SegmentPool, phase: Phase) -> Self {
        let state = State {
            phase,
            open: Epoch::new(record.log(), 0),
            committed: VecDeque::new(),
            epoch: None,
            is_writing: false,
            is_connected: phase == Phase::Copying,
            is_changed: false,
            copy_failure: None,
            has_warned: false,
            has_warned_of_base: false,
            loss: None,
            has_apply_failed: false,
            binding: None,
        };
        Self {
            name: name.to_owned(),
            base,
            record,
            pool,
            state: Mutex::new(state),
            changed: Condvar::new(),
            is_cut: AtomicBool::new(false),
            applying: Mutex::new(()),
            written: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What panicked has lost the disk (`connection.rs`), so its state decides nothing any more.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    pub(crate) fn log(&self) -> u64 {
        self.record.log()
    }

    pub(crate) fn figures(&self) -> DiskFigures {
        let state = self.state();
        DiskFigures {
            log_bytes: self.pool.bytes(),
            lag_bytes: state.committed.iter().map(|epoch| epoch.bytes()).sum(),
            lag_epochs: state.committed.len(),
            epoch: state.epoch,
            is_lost: !state.is_connected || state.loss.is_some(),
            written_bytes: self.written.load(Ordering::Relaxed),
        }
    }

    /// Whether no session has taken it yet.
    pub(crate) fn is_copying(&self) -> bool {
        self.state().phase == Phase::Copying
    }

    /// Whether its client has changed its base, or tried to.
    pub(crate) fn is_changed(&self) -> bool {
        let state = self.state();
        state.is_changed || state.copy_failure.is_some()
    }

    // --- a session -------------------------------------------------------------------------------------------------

    /// A session takes the disk: its writes go to the log from now on, and commit with checkpoint 1.
    ///
    /// # Errors
    /// If a write is under way or has failed, or the connection is gone.
    pub(crate) fn bind(&self, binding: Binding) -> Result<(), DiskError> {
        let is_gone = binding.is_gone();
        let mut state = self.state();
        if state.is_writing {
            return Err(self.unfinished(0));
        }
        if let Some(failure) = state.copy_failure {
            return Err(DiskError::CopyFailed {
                disk: self.name.clone(),
                reason: failure.to_string(),
            });
        }
        if is_gone || !state.is_connected {
            return Err(self.closed_before(0));
        }
        self.record.bind(&binding.owner);
        let mut binding = binding;
        if let Some(ram) = binding.ram.take() {
            self.pool.use_ram(ram);
        }
        state.binding = Some(Arc::new(binding));
        state.open = Epoch::new(self.record.log(), 1);
        state.phase = Phase::Open;
        Ok(())
    }

    fn closed_before(&self, checkpoint: u64) -> DiskError {
        DiskError::ConnectionLost {
            disk: self.name.clone(),
            reason: format!("before checkpoint {checkpoint}"),
        }
    }

    fn unfinished(&self, checkpoint: u64) -> DiskError {
        DiskError::Unfinished {
            disk: self.name.clone(),
            checkpoint,
        }
    }

    /// The epoch of `checkpoint` is complete: the primary has stopped its guest.
    ///
    /// # Errors
    /// If it is not.
    pub(crate) fn cut(&self, checkpoint: u64) -> Result<(), Arc<DiskError>> {
        // The connection's own thread may not have noticed yet.
        let binding = self.state().binding.clone();
        if binding.is_some_and(|binding| binding.is_gone()) {
            return Err(self.note_loss(self.closed_before(checkpoint)));
        }
        let mut state = self.state();
        if let Some(loss) = loss_of(&state) {
            return Err(loss.clone());
        }
        if state.is_writing {
            return Err(Arc::new(self.unfinished(checkpoint)));
        }
        self.check_epoch(&state, checkpoint)?;
        if !canary::is_set(Canary::LateCut) {
            state.phase = Phase::Cut;
        }
        self.is_cut.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn check_epoch(&self, state: &State, checkpoint: u64) -> Result<(), Arc<DiskError>> {
        match state.phase {
            Phase::Open | Phase::Cut if state.open.checkpoint == checkpoint => Ok(()),
            _ => Err(Arc::new(DiskError::OtherEpoch {
                disk: self.name.clone(),
                at: state.epoch,
                checkpoint,
            })),
        }
    }

    /// Whether the epoch of `checkpoint` may be committed.
    ///
    /// # Errors
    /// If it may not.
    pub(crate) fn check_commit(&self, checkpoint: u64) -> Result<(), Arc<DiskError>> {
        let state = self.state();
        match loss_of(&state) {
            Some(loss) => Err(loss.clone()),
            None => self.check_epoch(&state, checkpoint),
        }
    }

    /// The record has committed `checkpoint`: what was cut is to be applied, and writes go to a new epoch. `is_leader`: its record has the word of
    /// a session whose RAM has no record.
    pub(crate) fn commit(&self, checkpoint: u64, is_leader: bool) {
        if checkpoint == 0 {
            self.record.set_needed();
        }
        if is_leader {
            self.record.commit(checkpoint);
        }
        let mut state = self.state();
        state.epoch = Some(checkpoint);
        if checkpoint > 0 {
            let next = Epoch::new(self.record.log(), checkpoint + 1);
            let mut cut = std::mem::replace(&mut state.open, next);
            if let Some(binding) = &state.binding {
                cut.lease_whole_index(&*binding.index);
            }
            if !cut.is_empty() {
                state.committed.push_back(Arc::new(cut));
            }
        }
        if state.phase == Phase::Cut {
            state.phase = Phase::Open;
        }
    }

    /// A checkpoint is acknowledged: its log is applied now.
    pub(crate) fn acknowledged(&self) {
        self.is_cut.store(false, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// The session is over: what is not committed is dropped, and the connection ends.
    pub(crate) fn end_session(&self) {
        let mut state = self.state();
        if state.phase == Phase::Over {
            return;
        }
        state.phase = Phase::Over;
        let log = self.record.log();
        let open = std::mem::replace(&mut state.open, Epoch::new(log, 0));
        if !canary::is_set(Canary::AppliedEarly) || open.is_empty() {
            open.segments.iter().for_each(|segment| segment.free());
            self.pool.put(open.segments);
        } else {
            state.committed.push_back(Arc::new(open));
        }
        let binding = state.binding.clone();
        drop(state);
        self.acknowledged();
        if let Some(link) = binding.as_ref().and_then(|binding| binding.link.as_ref()) {
            (link.hang_up)();
        }
    }

    /// Keeps the files for the next receiver: a checkpoint needs the disk.
    pub(crate) fn keep_files(&self) {
        self.record.keep();
        self.pool.keep(true);
    }

    /// Its checkpoint is about to be removed. What is committed of it is in the base.
    pub(crate) fn give_up(&self) {
        self.record.give_up();
    }

    /// Removes the files of a disk that no checkpoint needs any more.
    pub(crate) fn remove_files(&self) {
        self.pool.keep(false);
        self.pool.trim_all();
        self.record.remove();
    }

    /// The connection has ended. Returns whether a session has lost the disk by it, which [`Self::lose`] is to report.
    pub(crate) fn disconnected(&self) -> bool {
        let mut state = self.state();
        state.is_connected = false;
        matches!(state.phase, Phase::Open | Phase::Cut) && state.loss.is_none()
    }

    /// No further epoch can be cut, though the session may not have ended yet.
    pub(crate) fn note_loss(&self, error: DiskError) -> Arc<DiskError> {
        let mut state = self.state();
        let loss = state.loss.get_or_insert_with(|| Arc::new(error)).clone();
        drop(state);
        self.changed.notify_all();
        loss
    }

    /// The disk is lost to its session, which ends by that.
    pub(crate) fn lose(&self, error: DiskError) {
        let loss = self.note_loss(error);
        let binding = self.state().binding.clone();
        if let Some(binding) = binding {
            (binding.on_loss)(loss);
        }
    }

    /// Whether the primary's guest stands still for a checkpoint.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Relaxed)
    }
}

/// Why its session cannot have it any more, if that is so.
fn loss_of(state: &State) -> Option<&Arc<DiskError>> {
    state
        .loss
        .as_ref()
        .filter(|_| !canary::is_set(Canary::IgnoredLoss))
}
