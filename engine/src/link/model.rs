//! Every order of events of a primary, a receiver, a link and a guard, within small bounds: the real [`Barriers`] and [`HeldOutput`], and
//! around them what may happen at any time. What the simulation samples in long runs, this explores whole in short ones.
//!
//! After every step: *what the world has seen is in the last committed checkpoint*. Where nothing can happen any more, the primary has all its
//! checkpoints acknowledged: nothing waits for ever.

use super::{Barriers, HeldOutput, ToGuard, ToReceiver};
use crate::canary::{self, Canary};
use crate::units::CheckpointId;
use std::collections::{HashSet, VecDeque};

/// How much may happen, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bounds {
    /// Checkpoints of a run, the end of precopy counted.
    checkpoints: u64,
    frames: u8,
    /// Links that are lost, and guards that are killed.
    losses: u8,
    kills: u8,
    /// Guests that are handed over.
    handovers: u8,
    /// Links on which the guard says that requests are kept.
    keeps: u8,
    /// Checkpoints that it wants at once.
    begins: u8,
}

/// No request is kept.
const ANSWERED: Bounds = Bounds {
    checkpoints: 3,
    frames: 3,
    losses: 2,
    kills: 1,
    handovers: 1,
    keeps: 0,
    begins: 0,
};

/// Requests are kept, and there is less of everything else.
const KEPT: Bounds = Bounds {
    checkpoints: 3,
    frames: 1,
    losses: 1,
    kills: 1,
    handovers: 1,
    keeps: 2,
    begins: 1,
};

/// The primary between and in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Primary {
    Runs,
    /// It asks for a checkpoint, and its guest runs.
    Asks,
    /// It is answered, and its guest runs yet.
    IsAnswered,
    IsStopped,
}

/// A frame: the checkpoint that will contain its sending. Those of the first copy may leave at any time.
type Frame = u64;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Model {
    /// The checkpoint that is next, or under way.
    checkpoint: u64,
    primary: Primary,
    committed: Option<u64>,
    bounds: Bounds,
    /// What may happen yet.
    left: Bounds,
    /// The guard has ended its QEMU.
    has_primary_ended: bool,
    /// The receiver may resume the guest.
    is_handed_over: bool,
    barriers: Barriers,
    /// Sent by the guest, and not read by the guard.
    wire: VecDeque<u64>,
    held: HeldOutput<Frame>,
    /// The guard has a link, as it knows; the receiver may have given it up.
    is_linked: bool,
    /// It has said on this link that requests are kept.
    keeps: bool,
    /// The last barrier on this link.
    barrier: Option<CheckpointId>,
    to_guard: VecDeque<ToGuard>,
    to_receiver: VecDeque<ToReceiver>,
}

/// What may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    GuestSends,
    GuardTakesFrame,
    PrimaryAsks,
    ReceiverReplies,
    PrimaryStops,
    ReceiverCommits,
    ReceiverAcknowledges,
    ReceiverSends,
    GuardReads,
    ReceiverReads,
    FrameLeaves,
    /// The receiver gives the link up, or loses it, and the guard does not know yet.
    ReceiverLoses,
    /// The guard sees that its link is lost, or loses it first.
    GuardLoses,
    GuardConnects,
    /// The guard is killed, and the next begins: what it had read is gone.
    GuardDies,
    /// It says that requests are kept.
    GuardKeeps,
    /// Output waits there.
    GuardBegins,
    /// A request was kept for long enough.
    KeepEnds,
    OperatorHandsOver,
    OperatorGivesUp,
}

const STEPS: [Step; 20] = [
    Step::GuestSends,
    Step::GuardTakesFrame,
    Step::PrimaryAsks,
    Step::ReceiverReplies,
    Step::PrimaryStops,
    Step::ReceiverCommits,
    Step::ReceiverAcknowledges,
    Step::ReceiverSends,
    Step::GuardReads,
    Step::ReceiverReads,
    Step::FrameLeaves,
    Step::ReceiverLoses,
    Step::GuardLoses,
    Step::GuardConnects,
    Step::GuardDies,
    Step::GuardKeeps,
    Step::GuardBegins,
    Step::KeepEnds,
    Step::OperatorHandsOver,
    Step::OperatorGivesUp,
];

impl Model {
    /// A guard has connected before precopy.
    fn new(bounds: Bounds) -> Self {
        let mut barriers = Barriers::default();
        barriers.attach(true);
        Self {
            checkpoint: 0,
            primary: Primary::Runs,
            committed: None,
            bounds,
            left: bounds,
            has_primary_ended: false,
            is_handed_over: false,
            barriers,
            wire: VecDeque::new(),
            held: HeldOutput::new(u64::MAX),
            is_linked: true,
            keeps: false,
            barrier: None,
            to_guard: VecDeque::new(),
            to_receiver: VecDeque::new(),
        }
    }

    /// A session whose guard was lost before its first line ends, and its primary is not protected any more.
    fn is_done(&self) -> bool {
        self.checkpoint == self.left.checkpoints || self.has_primary_ended || self.barriers.is_unguarded()
    }

    /// The state after a step; none if it cannot happen.
    fn after(&self, step: Step) -> Result<Option<Self>, String> {
        let mut next = self.clone();
        let happened = match step {
            Step::GuestSends => next.guest_sends(),
            Step::GuardTakesFrame => next.guard_takes_frame(),
            Step::PrimaryAsks => next.primary_asks(),
            Step::ReceiverReplies => next.receiver_replies(),
            Step::GuardKeeps => next.guard_keeps(),
            Step::GuardBegins => next.guard_begins(),
            Step::KeepEnds => next.keep_ends(),
            Step::PrimaryStops => next.primary_stops(),
            Step::ReceiverCommits => next.receiver_commits(),
            Step::ReceiverAcknowledges => next.receiver_acknowledges()?,
            Step::ReceiverSends => next.receiver_sends(),
            Step::GuardReads => next.guard_reads(),
            Step::ReceiverReads => next.receiver_reads()?,
            Step::FrameLeaves => next.frame_leaves()?,
            Step::ReceiverLoses => next.receiver_loses(),
            Step::GuardLoses => next.guard_loses(),
            Step::GuardConnects => next.guard_connects(),
            Step::GuardDies => next.guard_dies(),
            Step::OperatorHandsOver => next.operator_hands_over(),
            Step::OperatorGivesUp => next.operator_gives_up(),
        };
        Ok(happened.then_some(next))
    }

    fn guest_sends(&mut self) -> bool {
        if self.is_stopped() || self.has_primary_ended || self.left.frames == 0 {
            return false;
        }
        self.left.frames -= 1;
        self.wire.push_back(self.checkpoint);
        true
    }

    fn guard_takes_frame(&mut self) -> bool {
        let Some(checkpoint) = self.wire.pop_front() else {
            return false;
        };
        self.held.push(checkpoint, 1)
    }

    fn is_stopped(&self) -> bool {
        self.primary == Primary::IsStopped
    }

    fn primary_asks(&mut self) -> bool {
        if self.primary != Primary::Runs || self.is_done() {
            return false;
        }
        self.primary = match self.checkpoint {
            // The end of precopy is not asked for.
            0 => Primary::IsAnswered,
            _ => Primary::Asks,
        };
        self.barriers.request();
        // Nothing can come in between.
        if self.bounds.keeps == 0 {
            self.primary = Primary::IsAnswered;
            return self.primary_stops();
        }
        true
    }

    fn receiver_replies(&mut self) -> bool {
        let may = self.primary == Primary::Asks && self.barriers.may_begin();
        if may {
            self.primary = Primary::IsAnswered;
        }
        may
    }

    fn guard_keeps(&mut self) -> bool {
        let may = self.is_linked && !self.keeps && self.left.keeps > 0;
        if may {
            self.left.keeps -= 1;
            self.keeps = true;
            self.to_receiver.push_back(ToReceiver::Keep { limit_ms: 0 });
        }
        may
    }

    fn guard_begins(&mut self) -> bool {
        let may = self.is_linked && self.keeps && self.left.begins > 0;
        if may {
            self.left.begins -= 1;
            let after = self.barrier;
            self.to_receiver.push_back(ToReceiver::Begin { after });
        }
        may
    }

    fn keep_ends(&mut self) -> bool {
        let was_kept = self.barriers.keeps_request();
        self.barriers.begin_now();
        was_kept && !self.barriers.keeps_request()
    }

    fn primary_stops(&mut self) -> bool {
        if self.primary != Primary::IsAnswered {
            return false;
        }
        self.primary = Primary::IsStopped;
        self.barriers.ask(CheckpointId(self.checkpoint));
        true
    }

    fn receiver_commits(&mut self) -> bool {
        if !self.is_stopped() || self.committed == Some(self.checkpoint) {
            return false;
        }
        self.committed = Some(self.checkpoint);
        self.barriers.committed(CheckpointId(self.checkpoint));
        true
    }

    fn receiver_acknowledges(&mut self) -> Result<bool, String> {
        let is_committed = self.is_stopped() && self.committed == Some(self.checkpoint);
        if !is_committed || !self.barriers.may_acknowledge(CheckpointId(self.checkpoint)) {
            return Ok(false);
        }
        if self.has_primary_ended {
            // To nobody.
            return Ok(false);
        }
        self.primary = Primary::Runs;
        self.checkpoint += 1;
        Ok(true)
    }

    fn operator_hands_over(&mut self) -> bool {
        if self.left.handovers == 0 || self.barriers.begin_handover().is_err() {
            return false;
        }
        self.left.handovers -= 1;
        true
    }

    fn operator_gives_up(&mut self) -> bool {
        let before = self.barriers.clone();
        self.barriers.cancel_handover() && self.barriers != before
    }

    /// The guard's last word on a QEMU is kept: what is resumed here must run nowhere else, and be all that the world has seen.
    fn hand_over(&mut self) -> Result<(), String> {
        let checkpoint = self.barriers.primary_ended().map_err(|error| error.to_string())?;
        self.is_handed_over = true;
        let is_last = self.committed == Some(checkpoint.0) && self.checkpoint == checkpoint.0;
        match self.has_primary_ended && self.is_stopped() && is_last {
            true => Ok(()),
            false => Err(format!(
                "checkpoint {checkpoint} is resumed while its primary runs"
            )),
        }
    }

    fn receiver_sends(&mut self) -> bool {
        let Some(message) = self.barriers.next_message() else {
            return false;
        };
        // What is sent on a link that the guard has left arrives nowhere.
        if self.is_linked {
            self.to_guard.push_back(message);
        }
        true
    }

    fn guard_reads(&mut self) -> bool {
        match self.to_guard.pop_front() {
            Some(ToGuard::Barrier { checkpoint }) => {
                while self.guard_takes_frame() {}
                self.barrier = Some(checkpoint);
                self.held.place(checkpoint);
                self.to_receiver.push_back(ToReceiver::Placed { checkpoint });
            }
            Some(ToGuard::Committed { checkpoint }) => self.held.committed(checkpoint),
            Some(ToGuard::Handover) => self.to_receiver.push_back(ToReceiver::HandoverReady),
            Some(ToGuard::Last { .. }) => {
                self.has_primary_ended = true;
                self.to_receiver.push_back(ToReceiver::PrimaryEnded);
            }
            Some(_) | None => return false,
        }
        true
    }

    fn receiver_reads(&mut self) -> Result<bool, String> {
        let checkpoint = match self.to_receiver.pop_front() {
            Some(ToReceiver::Placed { checkpoint }) => checkpoint,
            Some(ToReceiver::Keep { .. }) => {
                self.barriers.keep();
                return Ok(true);
            }
            Some(ToReceiver::Begin { after }) => {
                self.barriers.begin(after);
                return Ok(true);
            }
            Some(ToReceiver::HandoverReady) => {
                self.barriers.handover_ready();
                return Ok(true);
            }
            Some(ToReceiver::PrimaryEnded) if self.barriers.is_attached() => {
                return self.hand_over().map(|()| true);
            }
            _ => return Ok(false),
        };
        // A link that was given up is closed.
        if self.barriers.is_attached() {
            match self.barriers.placed(checkpoint) {
                Ok(()) => {}
                // One that goes on too early is answered late, and ends the link by that.
                Err(_) if canary::is_set(Canary::EarlyLoaded) => self.barriers.detach(),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(true)
    }

    fn frame_leaves(&mut self) -> Result<bool, String> {
        match self.held.pop() {
            None => Ok(false),
            Some(checkpoint @ 1..) if Some(checkpoint) > self.committed => Err(format!(
                "the world has seen output of checkpoint {checkpoint} where {:?} is committed",
                self.committed
            )),
            Some(_) => Ok(true),
        }
    }

    fn receiver_loses(&mut self) -> bool {
        // A guard that is gone has closed its end.
        let is_loss = self.is_linked;
        if !self.barriers.is_attached() || (is_loss && self.left.losses == 0) {
            return false;
        }
        self.left.losses -= u8::from(is_loss);
        self.barriers.detach();
        self.to_receiver.clear();
        true
    }

    fn guard_loses(&mut self) -> bool {
        // It notices what the receiver has given up at any time, and may lose a link by itself.
        let is_own_loss = self.barriers.is_attached();
        if !self.is_linked || (is_own_loss && self.left.losses == 0) {
            return false;
        }
        self.left.losses -= u8::from(is_own_loss);
        self.is_linked = false;
        self.to_guard.clear();
        self.held.forget_barriers();
        true
    }

    /// The receiver may have the old link still: it is replaced. A guard that has lost its link in the first copy ends the protection, and one
    /// that begins in it would have another session.
    fn guard_connects(&mut self) -> bool {
        if self.is_linked || self.checkpoint == 0 {
            return false;
        }
        (self.is_linked, self.keeps, self.barrier) = (true, false, None);
        self.to_receiver.clear();
        self.barriers.attach(false);
        true
    }

    fn guard_dies(&mut self) -> bool {
        if self.left.kills == 0 {
            return false;
        }
        self.left.kills -= 1;
        self.is_linked = false;
        self.to_guard.clear();
        self.wire.clear();
        self.held = HeldOutput::new(u64::MAX);
        // The next one finds the guest protected, or on the way to it, and holds from its start.
        self.held.hold();
        true
    }
}

/// Explores every state. Returns how many there are.
///
/// # Errors
/// The steps that lead to what is wrong.
fn explore(bounds: Bounds) -> Result<usize, String> {
    let start = Model::new(bounds);
    let mut known = HashSet::from([start.clone()]);
    let mut open = VecDeque::from([(start, Vec::new())]);
    while let Some((state, way)) = open.pop_front() {
        let mut is_end = true;
        for step in STEPS {
            let way = || [&way[..], &[step]].concat();
            let next = state
                .after(step)
                .map_err(|error| format!("{error}, after {:?}", way()))?;
            let Some(next) = next else { continue };
            // A link need not be lost, and a guard need not die; but the end of one that is gone is noticed.
            is_end &= matches!(
                step,
                Step::GuardDies
                    | Step::GuardKeeps
                    | Step::GuardBegins
                    | Step::OperatorHandsOver
                    | Step::OperatorGivesUp
            ) || (step == Step::ReceiverLoses && state.is_linked);
            if known.insert(next.clone()) {
                open.push_back((next, way()));
            }
        }
        if is_end && !state.is_done() {
            return Err(format!("nothing goes on after {way:?}"));
        }
    }
    Ok(known.len())
}

#[test]
fn no_order_of_events_shows_what_is_not_committed() {
    for bounds in [ANSWERED, KEPT] {
        let states = explore(bounds).unwrap_or_else(|error| panic!("{error}"));
        println!("{states} states");
        // A model in which little can happen proves little.
        assert!(states > 10_000, "{states} states");
    }
}

#[test]
fn a_guest_in_two_places_is_found() {
    canary::set(Some(Canary::TwoGuests));
    let found = explore(ANSWERED);
    canary::set(None);
    let error = found.expect_err("a break that must be found");
    println!("{error}");
    assert!(error.contains("while its primary runs"), "{error}");
}

/// A request is answered also if the guard says nothing more.
#[test]
fn a_request_that_is_kept_for_ever_is_found() {
    canary::set(Some(Canary::EndlessKeep));
    let found = explore(KEPT);
    canary::set(None);
    let error = found.expect_err("a break that must be found");
    println!("{error}");
    assert!(error.contains("nothing goes on"), "{error}");
}

#[test]
fn an_early_guard_or_receiver_is_found() {
    for canary in [
        Canary::EarlyRelease,
        Canary::EarlyCommitted,
        Canary::EarlyLoaded,
        Canary::UnguardedBeginning,
    ] {
        canary::set(Some(canary));
        // A guest in two places would be found first.
        let found = explore(Bounds {
            handovers: 0,
            ..ANSWERED
        });
        canary::set(None);
        let error = found.expect_err("a break that must be found");
        println!("{canary:?}: {error}");
        assert!(error.contains("the world has seen"), "{canary:?}: {error}");
    }
}
