//! Which line the kernel's plug has, and what it is told at a barrier and at a commit.
//!
//! A plug counts frames: those since the last line, those before it, and those that it may let go. To draw a second line before the
//! first one is released forgets how many there were before the first, and from then on each release lets go of too few. So there is
//! one line at a time. One that is there when the next barrier comes, because the link was lost between, becomes that barrier's:
//! it is before everything of that checkpoint, so what it lets go is committed; what is behind it waits for the next checkpoint.

use colo_ring::units::CheckpointId;

/// The line of a plug that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// None: the next barrier draws one.
    None,
    /// There is one, or may be, that no commit lets go.
    Forgotten,
    /// There is one, of that checkpoint.
    Of(CheckpointId),
}

impl Line {
    /// A barrier. Whether a line is to be drawn; otherwise the one that is there is its own.
    pub(super) fn place(&mut self, checkpoint: CheckpointId) -> bool {
        let is_drawn = *self == Self::None;
        *self = Self::Of(checkpoint);
        is_drawn
    }

    /// Whether the commit of this checkpoint lets go what is before the line.
    pub(super) fn is_released_by(self, checkpoint: CheckpointId) -> bool {
        matches!(self, Self::Of(line) if line <= checkpoint)
    }

    /// The link is lost.
    pub(super) fn forget(&mut self) {
        if let Self::Of(_) = self {
            *self = Self::Forgotten;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A plug as the kernel's documentation says: it counts frames.
    #[derive(Clone, Default)]
    struct Model {
        queue: VecDeque<u64>,
        since_line: usize,
        before_line: usize,
        left: Vec<u64>,
    }

    impl Model {
        fn send(&mut self, frame: u64) {
            self.queue.push_back(frame);
            self.since_line += 1;
        }

        fn buffer(&mut self) {
            self.before_line = std::mem::take(&mut self.since_line);
        }

        fn release_one(&mut self) {
            let count = std::mem::take(&mut self.before_line);
            self.left.extend(self.queue.drain(..count));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send,
        Barrier,
        Commit,
        LoseLink,
        LoseGuard,
    }

    const STEPS: [Step; 5] = [
        Step::Send,
        Step::Barrier,
        Step::Commit,
        Step::LoseLink,
        Step::LoseGuard,
    ];

    struct World {
        plug: Model,
        line: Line,
        sent: u64,
        next: CheckpointId,
        /// Frames that the last checkpoint that has begun has, and the last that is committed.
        begun: u64,
        committed: u64,
        /// Whether a checkpoint has begun that is not committed.
        is_open: bool,
        has_link: bool,
    }

    impl World {
        fn new() -> Self {
            Self {
                plug: Model::default(),
                line: Line::None,
                sent: 0,
                next: CheckpointId(0),
                begun: 0,
                committed: 0,
                is_open: false,
                has_link: true,
            }
        }

        fn step(&mut self, step: Step) {
            match step {
                // A guest that is stopped sends nothing.
                Step::Send if self.is_open => {}
                Step::Send => {
                    self.sent += 1;
                    self.plug.send(self.sent);
                }
                Step::Barrier if self.is_open => {}
                Step::Barrier => {
                    (self.is_open, self.has_link, self.begun) = (true, true, self.sent);
                    if self.line.place(self.next) {
                        self.plug.buffer();
                    }
                }
                Step::Commit if !self.is_open => {}
                Step::Commit => {
                    (self.is_open, self.committed) = (false, self.begun);
                    // A link that is lost does not bring it.
                    if self.has_link && self.line.is_released_by(self.next) {
                        self.plug.release_one();
                        self.line = Line::None;
                    }
                    self.next = CheckpointId(self.next.0 + 1);
                }
                Step::LoseLink => {
                    self.has_link = false;
                    self.line.forget();
                }
                Step::LoseGuard => (self.has_link, self.line) = (false, Line::Forgotten),
            }
        }

        fn check(&self, steps: &[Step]) {
            let left = u64::try_from(self.plug.left.len()).unwrap();
            assert!(
                left <= self.committed,
                "{left} of {} after {steps:?}",
                self.committed
            );
            assert!(
                self.plug.left.iter().copied().eq(1..=left),
                "{:?}",
                self.plug.left
            );
        }

        /// Two checkpoints with a link let go of everything.
        fn settle(&mut self, steps: &[Step]) {
            for _ in 0..2 {
                // One that has begun comes to its end.
                for step in [Step::Commit, Step::Barrier, Step::Commit] {
                    self.step(step);
                    self.check(steps);
                }
            }
            assert_eq!(self.plug.left.len() as u64, self.sent, "{steps:?}");
        }
    }

    /// Every order of so many steps.
    #[test]
    fn nothing_leaves_before_its_commit_and_nothing_stays() {
        const LENGTH: u32 = 8;
        for number in 0..5_usize.pow(LENGTH) {
            let steps: Vec<_> = (0..LENGTH)
                .map(|at| STEPS[number / 5_usize.pow(at) % 5])
                .collect();
            let mut world = World::new();
            for step in &steps {
                world.step(*step);
                world.check(&steps);
            }
            world.settle(&steps);
        }
    }
}
