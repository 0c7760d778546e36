//! What holds a guest's output: one gate for each of its network cards.

use crate::qmp::QmpError;
use colo_ring::units::CheckpointId;
use nix::poll::PollFlags;
use serde::Serialize;
use std::io;
use std::os::fd::BorrowedFd;
use thiserror::Error;

/// A gate cannot hold or release output.
#[derive(Debug, Error)]
pub(super) enum GateError {
    #[error("{nic}: {source}")]
    Io { nic: String, source: io::Error },
    #[error("{nic}: {source}")]
    Qmp { nic: String, source: QmpError },
    #[error("{0}: the guest runs already, so its output stays held")]
    Runs(String),
}

/// What passes a gate.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Counts {
    /// Frames that the guest has sent, where the gate sees them.
    pub(super) sent: u64,
    /// Frames that wait now, where it is known.
    pub(super) held: u64,
    /// Their bytes.
    pub(super) held_bytes: u64,
    /// Frames that did not fit and were dropped.
    pub(super) dropped: u64,
}

/// Holds what a guest sends on one network card, from the first line on; and from the beginning where the guest is protected already.
pub(super) trait OutputGate: Send {
    /// The network card, for messages.
    fn nic(&self) -> &str;

    /// The way in which it holds frames: `relay`, `filter`, `plug`.
    fn kind(&self) -> &'static str;

    /// Adds the descriptors that it waits for, with what it waits for.
    fn wait_for<'a>(&'a self, fds: &mut Vec<(BorrowedFd<'a>, PollFlags)>);

    /// Takes what has arrived on any of them. Never blocks.
    ///
    /// # Errors
    /// If the card can no longer be reached.
    fn go_on(&mut self) -> Result<(), GateError>;

    /// The guest is stopped: draws the line of a checkpoint behind everything that it has sent.
    ///
    /// # Errors
    /// If it cannot: then the line is not drawn.
    fn place(&mut self, checkpoint: CheckpointId) -> Result<(), GateError>;

    /// The checkpoint is committed: lets go of what is before its line.
    ///
    /// # Errors
    /// If it cannot.
    fn committed(&mut self, checkpoint: CheckpointId) -> Result<(), GateError>;

    /// The link is lost: no line of it lets anything go any more.
    fn forget_barriers(&mut self);

    /// The guest is not protected: lets everything go, and everything pass.
    ///
    /// # Errors
    /// If it cannot.
    fn open(&mut self) -> Result<(), GateError>;

    /// Whether it can let go only while the guest is stopped.
    fn releases_in_pause(&self) -> bool;

    /// Frames that the guest has sent since the last line: they wait for a checkpoint that has not begun.
    fn waiting(&self) -> u64;

    fn counts(&self) -> Counts;

    /// How long frames waited that have left since the last call, in microseconds.
    fn take_hold_times_us(&mut self, _into: &mut Vec<u64>) {}
}
