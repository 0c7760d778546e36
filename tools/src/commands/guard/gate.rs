//! What holds a guest's output: one gate for each of its network cards.

use super::tap::TapError;
use crate::qmp::QmpError;
use colo_ring::units::CheckpointId;
use nix::poll::PollFlags;
use schemars::JsonSchema;
use serde::Serialize;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use thiserror::Error;

/// Arrivals that are kept apart between two lines; later ones count as one.
const ARRIVALS_MAX: usize = 1 << 12;

/// Most hold times that are kept between two calls of [`OutputGate::take_hold_times_us`].
pub(super) const HOLD_TIMES_MAX: usize = 1 << 16;

/// A gate cannot hold or release output.
#[derive(Debug, Error)]
pub(super) enum GateError {
    #[error("{nic}: {source}")]
    Io { nic: String, source: io::Error },
    #[error("{nic}: {source}")]
    Tap { nic: String, source: TapError },
    #[error("{nic}: {source}")]
    Qmp { nic: String, source: QmpError },
}

/// What passes a gate.
#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
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

    /// Whether it goes on to hold what it has when this guard has ended.
    fn outlives_guard(&self) -> bool {
        true
    }

    /// After a failure: makes the gate one that can hold and release again, if something of it is missing.
    ///
    /// # Errors
    /// If it cannot be yet.
    fn recover(&mut self) -> Result<(), GateError> {
        Ok(())
    }

    /// Now and then: brings up to date what is counted elsewhere.
    ///
    /// # Errors
    /// If it cannot.
    fn count(&mut self) -> Result<(), GateError> {
        Ok(())
    }

    /// Frames that the guest has sent since the last line: they wait for a checkpoint that has not begun.
    fn waiting(&self) -> u64;

    fn counts(&self) -> Counts;

    /// How long frames waited that have left since the last call, in microseconds.
    fn take_hold_times_us(&mut self, into: &mut Vec<u64>);
}

/// How long frames wait, for a gate that sees them come, and not leave.
#[derive(Debug, Default)]
pub(super) struct HoldTimes {
    /// Behind the last line: when frames came, and how many.
    open: Vec<(Instant, u64)>,
    /// Before it.
    lined: Vec<(Instant, u64)>,
    left_us: Vec<u64>,
}

impl HoldTimes {
    /// So many frames have come that are held.
    pub(super) fn came(&mut self, frames: u64) {
        let is_full = self.open.len() == ARRIVALS_MAX;
        match self.open.last_mut() {
            Some((_, last)) if is_full => *last += frames,
            _ if frames > 0 => self.open.push((Instant::now(), frames)),
            _ => {}
        }
    }

    /// A line was drawn.
    pub(super) fn line(&mut self) {
        self.lined.append(&mut self.open);
        // Lines of lost links let nothing go.
        self.lined.truncate(ARRIVALS_MAX);
    }

    /// What was before the line has left.
    pub(super) fn left(&mut self) {
        for (at, frames) in self.lined.drain(..) {
            let held_us = u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
            let room = HOLD_TIMES_MAX.saturating_sub(self.left_us.len());
            let count = usize::try_from(frames).unwrap_or(room).min(room);
            self.left_us.extend(std::iter::repeat_n(held_us, count));
        }
    }

    /// Nothing is held any more.
    pub(super) fn forget(&mut self) {
        self.open.clear();
        self.lined.clear();
    }

    pub(super) fn take_us(&mut self, into: &mut Vec<u64>) {
        into.append(&mut self.left_us);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(times: &mut HoldTimes) -> usize {
        let mut all = Vec::new();
        times.take_us(&mut all);
        all.len()
    }

    #[test]
    fn frames_are_counted_when_their_line_is_released() {
        let mut times = HoldTimes::default();
        times.came(2);
        times.came(0);
        times.left();
        assert_eq!(count(&mut times), 0, "no line was drawn");
        times.line();
        times.came(1);
        times.left();
        assert_eq!(count(&mut times), 2);
        times.line();
        times.forget();
        times.left();
        assert_eq!(count(&mut times), 0);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut times = HoldTimes::default();
        for _ in 0..3 {
            (0..2 * ARRIVALS_MAX).for_each(|_| times.came(1));
            times.line();
        }
        assert_eq!(times.lined.len(), ARRIVALS_MAX);
        times.came(u64::MAX >> 1);
        times.line();
        times.left();
        times.came(u64::MAX >> 1);
        times.line();
        times.left();
        assert_eq!(count(&mut times), HOLD_TIMES_MAX);
    }
}
