//! Whether sessions make progress: what has stopped is reported, and ended where it protects nothing.

use super::state::{ControlState, Live};
use crate::receiver::end::SessionEnd;
use crate::receiver::{Event, Stall};
use crate::wire::vmdesc::EndFinder;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a primary may be silent after what looks like device state without vmdesc.
const SUPPRESSED_AFTER: Duration = Duration::from_secs(5);

/// How long a session may be without its block list. A primary sends it as soon as it has all connections.
const BLOCK_LIST_WITHIN: Duration = Duration::from_secs(60);

/// A first copy that receives less than so many bytes in so long, or than its RAM divided by [`COPY_TIMES`], stands still, whatever drips
/// in: its memory is for guests that need it.
pub(super) const STANDING: (u64, Duration) = (1 << 20, Duration::from_secs(5));

/// A slower trickle is no progress: a guest cannot be protected over a link that is that slow.
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 10;

/// A first copy that takes longer than so many times that long is none: half a day.
const COPY_TIMES: u64 = 10_000;

/// If nobody has looked at sessions for longer, this process or its host has stood still.
const PAUSE_FROM: Duration = Duration::from_secs(1);

/// How many of the last intervals between checkpoints say what is usual.
const INTERVALS: usize = 16;

/// From so many on they are taken to say so.
const KNOWN_FROM: usize = 4;

/// What a session is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Precopy,
    /// Its guest stands, or soon will: bytes are due.
    Checkpoint,
    /// Its guest runs. How long is up to its primary.
    Between,
}

impl Phase {
    fn in_words(self) -> &'static str {
        match self {
            Self::Precopy => "in its first copy",
            Self::Checkpoint => "in the middle of a checkpoint",
            Self::Between => "between checkpoints",
        }
    }

    /// How long nothing may come before that is reported, where checkpoints were at most so far apart.
    fn allows(self, longest: Option<Duration>) -> Duration {
        match self {
            Self::Precopy => Duration::from_secs(30),
            // Longer than it takes to find out that a host has vanished.
            Self::Checkpoint => Duration::from_secs(10).max(longest.unwrap_or_default() * 2),
            Self::Between => match longest {
                // How far apart they will be is not known yet.
                None => Duration::from_secs(60),
                Some(longest) => Duration::from_secs(10).max(longest * 8),
            },
        }
    }
}

/// What a session has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    phase: Phase,
    /// Bytes on all channels.
    received: u64,
    checkpoint: Option<u64>,
}

/// What is to be said of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stalled { silent: Duration, phase: Phase },
    GoesOn { silent: Duration },
}

/// What had been received when, the last time that was much more than before.
#[derive(Clone, Copy)]
struct Mark {
    received: u64,
    at: Instant,
}

impl Mark {
    /// Follows what is received, if that has become so much more.
    fn follow(&mut self, received: u64, enough: u64, now: Instant) {
        if received.saturating_sub(self.received) >= enough {
            *self = Self { received, at: now };
        }
    }

    fn age(self, now: Instant) -> Duration {
        now.saturating_duration_since(self.at)
    }
}

/// What a link that is just fast enough brings in that time.
fn slowest(time: Duration) -> u64 {
    time.as_secs().max(1).saturating_mul(SLOWEST_BYTES_PER_SECOND)
}

/// What was seen of a session's progress.
pub(super) struct Watch {
    seen: Seen,
    /// Its last progress: a step, or enough bytes for the time that its phase allows.
    changed: Instant,
    /// Since then bytes are added up for the next.
    counted: Mark,
    /// By which a first copy stands still.
    pace: Mark,
    /// By which it is past its deadline.
    deadline: Mark,
    /// When the number of the last checkpoint changed, and how long each of the last took; of two that follow each other
    /// faster than this is called, one is seen.
    committed: Instant,
    intervals: [Duration; INTERVALS],
    commits: usize,
    /// Since when it is reported as stalled.
    stalled: Option<Instant>,
}

impl Watch {
    pub(super) fn new(now: Instant) -> Self {
        let mark = Mark { received: 0, at: now };
        Self {
            seen: Seen {
                phase: Phase::Precopy,
                received: 0,
                checkpoint: None,
            },
            changed: now,
            counted: mark,
            pace: mark,
            deadline: mark,
            committed: now,
            intervals: [Duration::ZERO; INTERVALS],
            commits: 0,
            stalled: None,
        }
    }

    /// How long it has made no progress, if it is reported as stalled.
    pub(super) fn stalled_ms(&self, now: Instant) -> Option<u64> {
        let silent = now.saturating_duration_since(self.stalled?);
        Some(u64::try_from(silent.as_millis()).unwrap_or(u64::MAX))
    }

    fn silent(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.changed)
    }

    /// Its memory is being made: nothing is read.
    fn not_before(&mut self, now: Instant) {
        self.changed = now;
        (self.counted.at, self.pace.at, self.deadline.at) = (now, now, now);
    }

    /// For so long nobody looked, and nothing was read: this process stood still. That is no silence of the primary's.
    fn postpone(&mut self, by: Duration) {
        self.changed += by;
        self.counted.at += by;
        self.pace.at += by;
        self.deadline.at += by;
        self.committed += by;
    }

    /// Since when it is a first copy that stands still, if it is one.
    pub(super) fn standing_since(&self, now: Instant) -> Option<Instant> {
        let is_standing = self.seen.phase == Phase::Precopy && self.pace.age(now) > STANDING.1;
        is_standing.then_some(self.pace.at)
    }

    /// Whether a first copy has received too little for so long.
    fn is_past(&mut self, deadline: Duration, now: Instant) -> bool {
        self.deadline.follow(self.seen.received, slowest(deadline), now);
        self.seen.phase == Phase::Precopy && self.deadline.age(now) > deadline
    }

    /// `ram`: bytes of the guest's memory.
    fn observe(&mut self, seen: Seen, ram: u64, now: Instant) -> Option<Change> {
        self.pace
            .follow(seen.received, STANDING.0.max(ram / COPY_TIMES), now);
        let allowed = seen.phase.allows(self.longest());
        let is_step = (seen.phase, seen.checkpoint) != (self.seen.phase, self.seen.checkpoint);
        if !is_step && seen.received.saturating_sub(self.counted.received) < slowest(allowed) {
            self.seen = seen;
            if self.stalled.is_some() && self.counted.age(now) >= allowed {
                // A trickle must not add up to progress over hours.
                self.counted = Mark {
                    received: seen.received,
                    at: now,
                };
            }
            let silent = self.silent(now);
            if self.stalled.is_some() || silent < allowed {
                return None;
            }
            self.stalled = Some(self.changed);
            let phase = seen.phase;
            return Some(Change::Stalled { silent, phase });
        }
        if seen.checkpoint != self.seen.checkpoint {
            // The first copy is no interval.
            if self.seen.checkpoint.is_some() {
                self.intervals[self.commits % INTERVALS] = now.saturating_duration_since(self.committed);
                self.commits += 1;
            }
            self.committed = now;
        }
        let silent = self.silent(now);
        self.seen = seen;
        self.changed = now;
        self.counted = Mark {
            received: seen.received,
            at: now,
        };
        self.stalled.take().map(|_| Change::GoesOn { silent })
    }

    /// The longest of the last intervals; none before there were some.
    fn longest(&self) -> Option<Duration> {
        let longest = self.intervals.iter().copied().max();
        longest.filter(|_| self.commits >= KNOWN_FROM)
    }
}

impl Live {
    /// See [`Watch::postpone`].
    fn postpone(&mut self, by: Duration) {
        self.watch.postpone(by);
        self.began += by;
        if let Some((_, since)) = &mut self.suppressed {
            *since += by;
        }
    }

    fn seen(&self) -> Seen {
        let checkpoint = self.session.checkpoint().and_then(|kept| kept.number());
        let phase = match checkpoint {
            None => Phase::Precopy,
            Some(_) if self.session.in_checkpoint.load(Ordering::Relaxed) => Phase::Checkpoint,
            Some(_) => Phase::Between,
        };
        Seen {
            phase,
            received: self.session.received_bytes(),
            checkpoint: checkpoint.map(|checkpoint| checkpoint.0),
        }
    }

    /// Whether it protects nothing and makes no progress: then how it ends.
    fn overdue(&mut self, precopy_deadline: impl FnOnce() -> Duration, now: Instant) -> Option<SessionEnd> {
        if !self.session.memory_asked.load(Ordering::Relaxed) {
            let is_late = now - self.began > BLOCK_LIST_WITHIN;
            return is_late.then_some(SessionEnd::Silent(BLOCK_LIST_WITHIN));
        }
        let is_precopy = self.watch.seen.phase == Phase::Precopy;
        // While its memory is made, nothing is read.
        if !is_precopy || self.session.store().is_none() {
            return None;
        }
        let deadline = precopy_deadline();
        let is_past = self.watch.is_past(deadline, now);
        is_past.then_some(SessionEnd::NoProgress(deadline))
    }
}

impl ControlState {
    pub(super) fn tick(&mut self) {
        self.live.iter().for_each(|live| live.session.decide_end());
        let now = Instant::now();
        let looked = std::mem::replace(&mut self.ticked, now);
        let paused = now.saturating_duration_since(looked).saturating_sub(PAUSE_FROM);
        if !paused.is_zero() {
            self.live.iter_mut().for_each(|live| live.postpone(paused));
        }
        self.expire_connections(now);
        self.context
            .recorder
            .drain(&self.context.services.shared().samples);
        let precopy_deadline = self.context.options.limits.precopy_deadline;
        let guests = self.context.services.shared().guests.clone();
        let mut changes = Vec::new();
        let mut protected = Vec::new();
        for live in &mut self.live {
            let session = live.session.clone();
            let had_checkpoint = live.watch.seen.checkpoint.is_some();
            let change = match session.store() {
                // While its memory is made, nothing is read.
                None => {
                    live.watch.not_before(now);
                    None
                }
                // Its primary waits for this receiver, which waits for its guard.
                Some(_) if session.output.is_request_kept() => {
                    live.watch.not_before(now);
                    None
                }
                Some(store) => {
                    let ram = store.committed().table().total_bytes();
                    live.watch.observe(live.seen(), ram, now)
                }
            };
            if !had_checkpoint && live.watch.seen.checkpoint.is_some() {
                protected.push((session.guest.title(), now.saturating_duration_since(live.began)));
            }
            if let Some(change) = change.filter(|_| session.end().is_none()) {
                changes.push((session.id, change));
            }
            let deadline = || {
                guests
                    .precopy_deadline(&session.guest)
                    .unwrap_or(precopy_deadline)
            };
            if let Some(end) = live.overdue(deadline, now) {
                session.finish(end);
            }
            let position = session.suppressed_at.load(Ordering::Relaxed);
            match live.suppressed {
                _ if position == 0 => live.suppressed = None,
                Some((same, since)) if same == position => {
                    if now - since > SUPPRESSED_AFTER {
                        session.finish(SessionEnd::Suppressed(EndFinder::suppressed()));
                    }
                }
                _ => live.suppressed = Some((position, now)),
            }
        }
        for (session, after) in protected {
            (self.context.events)(Event::Protected { session, after });
        }
        for (session, change) in changes {
            self.report(session, change);
        }
        self.replace_kept();
    }

    fn report(&self, session: u32, change: Change) {
        let Some(live) = self.live.iter().find(|live| live.session.id == session) else {
            return;
        };
        let (silent, stall) = match change {
            Change::Stalled { silent, phase } => (silent, Some(phase.in_words())),
            Change::GoesOn { silent } => (silent, None),
        };
        (self.context.events)(Event::Stall(Box::new(Stall {
            status: self.status_of(live),
            silent,
            during: stall,
        })));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 30;

    impl Watch {
        fn is_standing(&self, now: Instant) -> bool {
            self.standing_since(now).is_some()
        }
    }

    fn seen(phase: Phase, received: u64, checkpoint: u64) -> Seen {
        Seen {
            phase,
            received,
            checkpoint: Some(checkpoint),
        }
    }

    #[test]
    fn a_checkpoint_that_stands_is_reported_once_and_its_end_too() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut watch = Watch::new(start);
        let standing = seen(Phase::Checkpoint, 100, 0);
        assert_eq!(watch.observe(standing, RAM, after(1)), None);
        assert_eq!(watch.observe(standing, RAM, after(10)), None);
        assert_eq!(watch.stalled_ms(after(10)), None);
        let stalled = Change::Stalled {
            silent: Duration::from_secs(11),
            phase: Phase::Checkpoint,
        };
        assert_eq!(watch.observe(standing, RAM, after(12)), Some(stalled));
        assert_eq!(watch.observe(standing, RAM, after(100)), None);
        assert_eq!(watch.stalled_ms(after(101)), Some(100_000));
        let on = watch.observe(seen(Phase::Checkpoint, 100 + (40 << 10), 0), RAM, after(201));
        let silent = Duration::from_secs(200);
        assert_eq!(on, Some(Change::GoesOn { silent }));
        assert_eq!(watch.stalled_ms(after(201)), None);
    }

    /// However many hours.
    #[test]
    fn bytes_that_drip_are_no_progress() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        for phase in [Phase::Precopy, Phase::Checkpoint, Phase::Between] {
            let mut watch = Watch::new(start);
            watch.observe(seen(phase, 100, 0), RAM, start);
            let mut changes = Vec::new();
            for second in 1..40_000 {
                let dripped = seen(phase, 100 + second, 0);
                changes.extend(watch.observe(dripped, RAM, after(second)));
            }
            assert!(
                matches!(changes[..], [Change::Stalled { phase: of, .. }] if of == phase),
                "{changes:?}"
            );
            let silent = Duration::from_secs(40_000);
            assert_eq!(watch.stalled_ms(after(40_000)), Some(40_000_000));
            let step = seen(phase, 100 + 40_000, 1);
            let on = watch.observe(step, RAM, after(40_000));
            assert_eq!(on, Some(Change::GoesOn { silent }));
        }
    }

    /// One byte before each deadline kept a place for ever.
    #[test]
    fn a_first_copy_that_drips_is_past_its_deadline() {
        let start = Instant::now();
        let deadline = Duration::from_secs(300);
        let mut first_copies: Vec<_> = [1, 4000 * 299, 4096 * 299]
            .into_iter()
            .map(|bytes_in_299_s| (Watch::new(start), bytes_in_299_s, None))
            .collect();
        for second in 1..2000 {
            let now = start + Duration::from_secs(second);
            for (watch, bytes, past) in &mut first_copies {
                watch.observe(seen(Phase::Precopy, *bytes * second / 299, 0), RAM, now);
                if watch.is_past(deadline, now) {
                    past.get_or_insert(second);
                }
            }
        }
        let past: Vec<_> = first_copies.into_iter().map(|(_, _, past)| past).collect();
        assert_eq!(past, [Some(301), Some(301), None]);
    }

    /// The process was stopped, say: its own absence is nobody's silence.
    #[test]
    fn what_nobody_looked_at_is_no_silence() {
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let standing = seen(Phase::Checkpoint, 100, 0);
        let of_a_first_copy = seen(Phase::Precopy, 100, 0);
        for seen in [standing, of_a_first_copy] {
            let mut watch = Watch::new(start);
            watch.observe(seen, RAM, after(1));
            watch.postpone(Duration::from_secs(1000));
            assert_eq!(watch.observe(seen, RAM, after(1002)), None);
            assert!(!watch.is_standing(after(1002)) && watch.silent(after(1002)) < Duration::from_secs(2));
            assert!(watch.observe(seen, RAM, after(1040)).is_some());
        }
    }

    /// A large guest's first copy must get on as a large one.
    #[test]
    fn a_large_first_copy_must_end_some_day() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let large = 1 << 40;
        let mut now = start;
        for mebibytes in 1..10 {
            now += Duration::from_secs(2);
            watch.observe(seen(Phase::Precopy, mebibytes << 20, 0), large, now);
        }
        assert!(watch.is_standing(now));
        watch.observe(seen(Phase::Precopy, 1 << 30, 0), large, now);
        assert!(!watch.is_standing(now));
    }

    #[test]
    fn a_first_copy_that_drips_stands_still() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut now = start;
        let mut receive = |watch: &mut Watch, received, phase| {
            now += Duration::from_secs(2);
            watch.observe(seen(phase, received, 0), RAM, now);
            watch.is_standing(now)
        };
        for mebibytes in 1..10 {
            assert!(!receive(&mut watch, mebibytes << 20, Phase::Precopy));
        }
        let dripped: Vec<_> = (1..5)
            .map(|drop| receive(&mut watch, (9 << 20) + drop, Phase::Precopy))
            .collect();
        assert_eq!(dripped, [false, false, true, true]);
        assert!(!receive(&mut watch, 10 << 20, Phase::Precopy));
        // A protected guest may be idle.
        for _ in 0..10 {
            assert!(!receive(&mut watch, 10 << 20, Phase::Between));
        }
    }

    /// A slow one that makes progress is not, nor one whose checkpoints are usually far apart.
    #[test]
    fn what_is_usual_for_a_session_is_not_a_stall() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut now = start;
        for part in 0..100 {
            now += Duration::from_secs(9);
            assert_eq!(
                watch.observe(seen(Phase::Checkpoint, part * (40 << 10), 0), RAM, now),
                None
            );
        }
        for checkpoint in 1..5 {
            now += Duration::from_secs(50);
            let between = seen(Phase::Between, 1000 * checkpoint, checkpoint);
            assert_eq!(watch.observe(between, RAM, now), None, "{checkpoint}");
            assert_eq!(watch.observe(between, RAM, now + Duration::from_secs(40)), None);
        }
        let last = watch.seen;
        let usual = now + Duration::from_secs(399);
        assert_eq!(watch.observe(last, RAM, usual), None);
        let late = watch.observe(last, RAM, usual + Duration::from_secs(8000));
        assert!(matches!(late, Some(Change::Stalled { .. })), "{late:?}");
    }

    /// A primary with three checkpoints a second, that hangs between two of them.
    #[test]
    fn a_primary_that_hangs_between_checkpoints_is_found_soon() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut now = start;
        for checkpoint in 0..20 {
            now += Duration::from_millis(300);
            watch.observe(seen(Phase::Between, 1000 * checkpoint, checkpoint), RAM, now);
        }
        let last = watch.seen;
        assert_eq!(watch.observe(last, RAM, now + Duration::from_secs(9)), None);
        let late = watch.observe(last, RAM, now + Duration::from_secs(11));
        assert!(
            matches!(
                late,
                Some(Change::Stalled {
                    phase: Phase::Between,
                    ..
                })
            ),
            "{late:?}"
        );
        // One of which too little is known may have long intervals.
        let mut watch = Watch::new(start);
        watch.observe(seen(Phase::Between, 1000, 0), RAM, start);
        watch.observe(seen(Phase::Between, 2000, 1), RAM, start + Duration::from_secs(1));
        let last = watch.seen;
        assert_eq!(watch.observe(last, RAM, start + Duration::from_secs(50)), None);
        assert!(
            watch
                .observe(last, RAM, start + Duration::from_secs(70))
                .is_some()
        );
    }
}
