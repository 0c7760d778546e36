//! The guard's side of a link: what the guest has sent and may not leave yet.

use crate::canary::{self, Canary};
use crate::units::CheckpointId;
use std::collections::VecDeque;

/// How much is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A line: up to here belongs to a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Line {
    checkpoint: CheckpointId,
    /// Frames before it, counted from the first that ever came.
    frames: u64,
}

/// Frames of the guest in the order in which it has sent them, each of which leaves once the checkpoint of its line is committed. Before
/// the first line, and after [`Self::open`], frames pass.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeldOutput<F> {
    frames: VecDeque<(F, usize)>,
    /// Frames that have left.
    left: u64,
    /// How many may have left, counted from the first that ever came.
    free: u64,
    lines: VecDeque<Line>,
    is_holding: bool,
    held_bytes: u64,
    bytes_max: u64,
    dropped: u64,
}

impl<F> HeldOutput<F> {
    /// Lets frames pass, and will hold at most `bytes_max` bytes of them.
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        Self {
            frames: VecDeque::new(),
            left: 0,
            free: 0,
            lines: VecDeque::new(),
            is_holding: false,
            held_bytes: 0,
            bytes_max,
            dropped: 0,
        }
    }

    /// The guest has sent a frame of that many bytes. One that does not fit is dropped, as by a full queue of a network card: whether
    /// it was taken.
    pub fn push(&mut self, frame: F, bytes: usize) -> bool {
        let after = self.held_bytes.saturating_add(bytes as u64);
        if after > self.bytes_max {
            self.dropped += 1;
            return false;
        }
        self.held_bytes = after;
        self.frames.push_back((frame, bytes));
        if !self.is_holding {
            self.free = self.end();
        }
        true
    }

    /// Draws the line of a checkpoint. The guest is stopped, and everything that it has sent was pushed.
    pub fn place(&mut self, checkpoint: CheckpointId) {
        self.is_holding = true;
        let frames = self.end();
        self.lines.push_back(Line { checkpoint, frames });
        if canary::is_set(Canary::EarlyRelease) {
            self.free = frames;
        }
    }

    /// That checkpoint is committed: what is before its line may leave. Without a line of its own nothing may.
    pub fn committed(&mut self, checkpoint: CheckpointId) {
        while let Some(line) = self.lines.front().copied()
            && line.checkpoint <= checkpoint
        {
            self.lines.pop_front();
            if line.checkpoint == checkpoint {
                self.free = self.free.max(line.frames);
            }
        }
    }

    /// Holds what comes from now on, without a line: a guard that was restarted does not know what the guest has sent before.
    pub fn hold(&mut self) {
        self.is_holding = true;
    }

    /// The link is lost: lines that were drawn on it are of no use on another.
    pub fn forget_barriers(&mut self) {
        self.lines.clear();
    }

    /// The guest is not protected any more: everything may leave, and frames pass from now on.
    pub fn open(&mut self) {
        self.lines.clear();
        self.is_holding = false;
        self.free = self.end();
    }

    /// The next frame that may leave.
    pub fn front(&self) -> Option<&F> {
        let may_leave = self.free > self.left;
        self.frames.front().filter(|_| may_leave).map(|(frame, _)| frame)
    }

    /// Takes the next frame that may leave.
    pub fn pop(&mut self) -> Option<F> {
        if self.free <= self.left {
            return None;
        }
        let (frame, bytes) = self.frames.pop_front()?;
        self.left += 1;
        self.held_bytes -= bytes as u64;
        Some(frame)
    }

    /// Whether frames are held, once they come.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.is_holding
    }

    /// What waits for a commit.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            frames: self.end().saturating_sub(self.free.max(self.left)),
            bytes: self.held_bytes,
        }
    }

    /// Frames that did not fit.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Frames that ever came and fitted.
    fn end(&self) -> u64 {
        self.left + self.frames.len() as u64
    }
}
