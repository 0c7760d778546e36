//! The guard of a simulated primary: it holds what the guest sends, and the question is what the world has seen.
//!
//! ```text
//!  guest ──frames──► HeldOutput ──► world        every frame: the state that will contain its sending
//!                        ▲
//!        SessionOutput ──┴── link ──► placed     messages wait as long as the seed says, and the link is lost now and then
//! ```

use super::primary::Stage;
use super::rng::Rng;
use crate::link::{HeldOutput, Hello, LINK_VERSION, ToGuard, ToReceiver, Wanted};
use crate::receiver::links::{LinkNumber, Next, SessionOutput};
use crate::units::CheckpointId;
use std::collections::VecDeque;
use std::sync::Arc;

/// Frames that are in its memory at most.
const FRAMES_MAX: u64 = 64;

/// A frame that is held leaves once this state is committed; those of the first copy may leave at any time.
type Frame = usize;

/// How a link ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Both ends know it at once.
    Closed,
    /// The guard hangs, the receiver gives it up, and later the guard goes on with what it has received.
    GivenUp,
}

/// See the module.
pub(super) struct SimGuard {
    output: Arc<SessionOutput>,
    /// As the receiver knows it.
    link: Option<LinkNumber>,
    to_guard: VecDeque<ToGuard>,
    to_receiver: VecDeque<ToReceiver>,
    held: HeldOutput<Frame>,
    /// The last barrier of this link.
    barrier: Option<CheckpointId>,
    /// In how many steps the link is lost, if it is.
    losses: Option<usize>,
    place: Place,
    pub(super) seen: u64,
}

/// Where the guest stands with its guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It has none yet. One that comes now has not begun the session, and holds from its start.
    Unguarded,
    /// Its guard has begun the session, and holds nothing before its first line.
    Beginning,
    /// The receiver knows that its guard holds what it sends.
    Guarded,
    /// Its guard was lost before that: the session must end.
    LostEarly,
}

impl SimGuard {
    pub(super) fn new(rng: &mut Rng, output: &Arc<SessionOutput>) -> Self {
        let mut guard = Self {
            output: output.clone(),
            link: None,
            to_guard: VecDeque::new(),
            to_receiver: VecDeque::new(),
            held: HeldOutput::new(FRAMES_MAX),
            barrier: None,
            losses: rng.one_in(2).then(|| rng.pick(&[20, 100, 1000])),
            place: Place::Unguarded,
            seen: 0,
        };
        if !rng.one_in(4) {
            guard.place = Place::Beginning;
            guard.connect(rng, Wanted::Next);
        }
        guard
    }

    /// A guard of a guest that is protected, or on the way to it without one: it holds from its start.
    fn take_over(&mut self, rng: &mut Rng) -> bool {
        if matches!(self.place, Place::Beginning | Place::LostEarly) {
            return false;
        }
        self.place = Place::Guarded;
        self.held.hold();
        self.connect(rng, Wanted::Running);
        true
    }

    fn connect(&mut self, rng: &mut Rng, wants: Wanted) {
        // What was said on the link before, the guard has forgotten.
        self.to_guard.clear();
        self.to_receiver.clear();
        self.held.forget_barriers();
        self.barrier = None;
        if rng.one_in(2) {
            self.to_receiver.push_back(ToReceiver::Keep { limit_ms: 0 });
        }
        self.link = Some(self.output.attach(&Hello {
            version: LINK_VERSION,
            name: "model".to_owned(),
            uuid: None,
            timeout_ms: 0,
            wants,
        }));
    }

    /// Does something at random, where `state` is the next that the primary will send, and so many are committed. Whether anything was done.
    pub(super) fn step(
        &mut self,
        rng: &mut Rng,
        stage: Stage,
        state: usize,
        committed: usize,
    ) -> Result<bool, String> {
        match rng.below(7) {
            0 | 1 => Ok(self.guest_sends(stage, state)),
            2 => self.look_out(committed).map(|()| true),
            3 if self.losses.is_some_and(|losses| rng.one_in(losses)) => Ok(self.lose(rng)),
            4 if rng.one_in(8) => Ok(self.begin(rng)),
            5 if rng.one_in(16) => Ok(self.keep_ends()),
            // One that is there still is replaced.
            6 if rng.one_in(if self.link.is_none() { 30 } else { 300 }) => Ok(self.take_over(rng)),
            _ => self.go_on(rng),
        }
    }

    /// Whether its session must end without it.
    pub(super) fn is_lost_early(&self) -> bool {
        self.place == Place::LostEarly
    }

    /// The link's next message, in either direction. Whether there was one.
    pub(super) fn go_on(&mut self, rng: &mut Rng) -> Result<bool, String> {
        let turn = rng.below(3);
        for which in (turn..3).chain(0..turn) {
            let done = match which {
                0 => self.receiver_sends(),
                1 => self.guard_reads(),
                _ => self.receiver_reads()?,
            };
            if done {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn guest_sends(&mut self, stage: Stage, state: usize) -> bool {
        let runs = matches!(stage, Stage::Start | Stage::Idle | Stage::WaitReply | Stage::Done);
        runs && self.place != Place::Unguarded && self.held.push(state, 1)
    }

    /// What may leave does, and the world sees it.
    fn look_out(&mut self, committed: usize) -> Result<(), String> {
        while let Some(frame) = self.held.pop() {
            self.seen += 1;
            if frame > 0 && frame >= committed {
                return Err(format!(
                    "the world has seen output of state {frame} where {committed} states are committed"
                ));
            }
        }
        Ok(())
    }

    fn lose(&mut self, rng: &mut Rng) -> bool {
        let Some(link) = self.link.take() else {
            return false;
        };
        self.output.detach(link);
        if self.place == Place::Beginning {
            self.place = Place::LostEarly;
        }
        self.to_receiver.clear();
        if rng.pick(&[Loss::Closed, Loss::GivenUp]) == Loss::Closed {
            self.to_guard.clear();
            self.held.forget_barriers();
        }
        true
    }

    /// Output waits, as the guard knows, whether or not a checkpoint has begun meanwhile.
    fn begin(&mut self, rng: &mut Rng) -> bool {
        let after = match self.barrier {
            Some(CheckpointId(number @ 1..)) if rng.one_in(3) => Some(CheckpointId(number - 1)),
            barrier => barrier,
        };
        self.to_receiver.push_back(ToReceiver::Begin { after });
        true
    }

    /// A request that the receiver keeps has waited for long enough. Whether there is one.
    pub(super) fn keep_ends(&mut self) -> bool {
        let Some(link) = self.link else { return false };
        let is_kept = self.output.keeps_request(link);
        if is_kept {
            self.output.begin_now(link);
        }
        is_kept
    }

    /// The task of the link at the receiver.
    fn receiver_sends(&mut self) -> bool {
        let Some(link) = self.link else { return false };
        match self.output.next(link) {
            Next::Send(message) => self.to_guard.push_back(message),
            Next::Wait(_) | Next::Ended(_) | Next::Replaced => return false,
        }
        true
    }

    fn guard_reads(&mut self) -> bool {
        match self.to_guard.pop_front() {
            Some(ToGuard::Barrier { checkpoint }) => {
                self.barrier = Some(checkpoint);
                self.held.place(checkpoint);
                self.to_receiver.push_back(ToReceiver::Placed { checkpoint });
            }
            Some(ToGuard::Committed { checkpoint }) => self.held.committed(checkpoint),
            Some(_) => {}
            None => return false,
        }
        true
    }

    fn receiver_reads(&mut self) -> Result<bool, String> {
        let Some(link) = self.link else {
            self.to_receiver.clear();
            return Ok(false);
        };
        match self.to_receiver.pop_front() {
            Some(ToReceiver::Placed { checkpoint }) => {
                let taken = self.output.placed(link, checkpoint);
                taken.map_err(|error| format!("the guard's answer is not taken: {error}"))?;
                self.place = Place::Guarded;
            }
            Some(ToReceiver::Keep { .. }) => self.output.keep(link),
            Some(ToReceiver::Begin { after }) => self.output.begin(link, after),
            _ => return Ok(false),
        }
        Ok(true)
    }
}
