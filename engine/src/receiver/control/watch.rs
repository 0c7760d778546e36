//! Whether sessions make progress: what has stopped is reported, and ended where it protects nothing.

use super::state::{ControlState, Live};
use crate::budget::BudgetError;
use crate::net::Origin;
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
const STANDING: (u64, Duration) = (1 << 20, Duration::from_secs(5));

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

/// What was seen of a session's progress.
pub(super) struct Watch {
    seen: Seen,
    /// When that changed last.
    changed: Instant,
    /// What had been received when, the last time that was much more than before.
    pace: (u64, Instant),
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
        Self {
            seen: Seen {
                phase: Phase::Precopy,
                received: 0,
                checkpoint: None,
            },
            changed: now,
            pace: (0, now),
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
        self.pace.1 = now;
    }

    /// For so long nobody looked, and nothing was read: this process stood still. That is no silence of the primary's.
    fn postpone(&mut self, by: Duration) {
        self.changed += by;
        self.pace.1 += by;
        self.committed += by;
    }

    /// Whether it is a first copy that stands still.
    fn is_standing(&self, now: Instant) -> bool {
        self.seen.phase == Phase::Precopy && now.saturating_duration_since(self.pace.1) > STANDING.1
    }

    /// `ram`: bytes of the guest's memory.
    fn observe(&mut self, seen: Seen, ram: u64, now: Instant) -> Option<Change> {
        if seen.received.saturating_sub(self.pace.0) >= STANDING.0.max(ram / COPY_TIMES) {
            self.pace = (seen.received, now);
        }
        if seen == self.seen {
            let (silent, longest) = (self.silent(now), self.longest());
            if self.stalled.is_some() || silent < seen.phase.allows(longest) {
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
    fn overdue(&self, precopy_deadline: impl FnOnce() -> Duration, now: Instant) -> Option<SessionEnd> {
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
        (self.watch.silent(now) > deadline).then_some(SessionEnd::NoProgress(deadline))
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

impl ControlState {
    /// There was no memory for a guest of `origin`: first copies that stand still make room, so that it finds some when it tries again.
    /// Those of its own origin do first, and no more than are needed.
    pub(super) fn end_standing_first_copies(&self, origin: Origin, lack: &BudgetError) {
        let now = Instant::now();
        let has_memory = self.live.iter().filter(|live| live.session.store().is_some());
        let (ending, running): (Vec<_>, Vec<_>) = has_memory.partition(|live| live.session.end().is_some());
        // What ends already gives its part back soon.
        let soon = ending.iter().map(|live| live.gives_back(lack));
        let missing = soon.fold(lack.missing(), u64::saturating_sub);
        let standing = running.into_iter().filter(|live| live.watch.is_standing(now));
        let standing = standing.map(|live| Standing {
            is_foreign: live.session.origin.group() != origin.group(),
            since: live.watch.pace.1,
            gives_back: live.gives_back(lack),
            what: live,
        });
        for live in enough(standing.collect(), missing) {
            live.session.finish(SessionEnd::MadeRoom(STANDING.1));
        }
    }
}

impl Live {
    /// What its end gives back at least of that which is missing.
    fn gives_back(&self, lack: &BudgetError) -> u64 {
        let Some(memory) = self.session.memory() else {
            return 0;
        };
        if !lack.is_of_bytes() {
            return memory.leases.mappings();
        }
        memory.store.reserved_bytes()
    }
}

/// A first copy that stands still.
struct Standing<T> {
    /// Of another origin than the guest that was refused.
    is_foreign: bool,
    since: Instant,
    gives_back: u64,
    what: T,
}

/// Those whose ends give so much back, or all: foreign ones last, and those that have stood longest first.
fn enough<T>(mut standing: Vec<Standing<T>>, mut missing: u64) -> Vec<T> {
    standing.sort_by_key(|copy| (copy.is_foreign, copy.since));
    let needed = standing.into_iter().take_while(|copy| {
        let is_needed = missing > 0;
        missing = missing.saturating_sub(copy.gives_back);
        is_needed
    });
    needed.map(|copy| copy.what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 1 << 30;

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
        let on = watch.observe(seen(Phase::Checkpoint, 101, 0), RAM, after(201));
        let silent = Duration::from_secs(200);
        assert_eq!(on, Some(Change::GoesOn { silent }));
        assert_eq!(watch.stalled_ms(after(201)), None);
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

    #[test]
    fn as_many_first_copies_end_as_are_needed_and_foreign_ones_last() {
        let start = Instant::now();
        let copies = || {
            let copy = |what, is_foreign, seconds| Standing {
                is_foreign,
                since: start + Duration::from_secs(seconds),
                gives_back: 100,
                what,
            };
            vec![
                copy("foreign", true, 0),
                copy("own, later", false, 2),
                copy("own", false, 1),
                copy("foreign, later", true, 3),
            ]
        };
        assert!(enough(copies(), 0).is_empty());
        assert_eq!(enough(copies(), 100), ["own"]);
        assert_eq!(enough(copies(), 101), ["own", "own, later"]);
        assert_eq!(enough(copies(), 250), ["own", "own, later", "foreign"]);
        assert_eq!(enough(copies(), u64::MAX).len(), 4);
    }

    /// A slow one that makes progress is not, nor one whose checkpoints are usually far apart.
    #[test]
    fn what_is_usual_for_a_session_is_not_a_stall() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut now = start;
        for received in 0..100 {
            now += Duration::from_secs(9);
            assert_eq!(
                watch.observe(seen(Phase::Checkpoint, received, 0), RAM, now),
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
