//! Whether sessions make progress: what has stopped is reported, and ended where it protects nothing.

use super::state::{ControlState, Live};
use crate::receiver::Event;
use crate::receiver::end::SessionEnd;
use crate::wire::vmdesc::EndFinder;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a primary may be silent after what looks like device state without vmdesc.
const SUPPRESSED_AFTER: Duration = Duration::from_secs(5);

/// How long a session may be without its block list. A primary sends it as soon as it has all connections.
const BLOCK_LIST_WITHIN: Duration = Duration::from_secs(60);

/// How many of the last intervals between checkpoints say what is usual.
const INTERVALS: usize = 16;

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
    fn allows(self, longest: Duration) -> Duration {
        match self {
            Self::Precopy => Duration::from_secs(30),
            // Longer than it takes to find out that a host has vanished.
            Self::Checkpoint => Duration::from_secs(10).max(longest * 2),
            Self::Between => Duration::from_secs(60).max(longest * 4),
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

    fn observe(&mut self, seen: Seen, now: Instant) -> Option<Change> {
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

    fn longest(&self) -> Duration {
        self.intervals.iter().copied().max().unwrap_or_default()
    }
}

impl Live {
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
    fn overdue(&self, precopy_deadline: Duration, now: Instant) -> Option<SessionEnd> {
        if !self.session.memory_asked.load(Ordering::Relaxed) {
            let is_late = now - self.began > BLOCK_LIST_WITHIN;
            return is_late.then_some(SessionEnd::Silent(BLOCK_LIST_WITHIN));
        }
        let is_precopy = self.watch.seen.phase == Phase::Precopy;
        // While its memory is made, nothing is read.
        let is_late =
            is_precopy && self.session.store().is_some() && self.watch.silent(now) > precopy_deadline;
        is_late.then_some(SessionEnd::NoProgress(precopy_deadline))
    }
}

impl ControlState {
    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        self.expire_connections(now);
        self.context
            .recorder
            .drain(&self.context.services.shared().samples);
        let precopy_deadline = self.context.options.precopy_deadline;
        let events = self.context.events.clone();
        for live in &mut self.live {
            let session = live.session.clone();
            let change = match session.store().is_none() {
                // While its memory is made, nothing is read.
                true => {
                    live.watch.changed = now;
                    None
                }
                false => live.watch.observe(live.seen(), now),
            };
            if session.end().is_none() {
                report(session.id, change, &*events);
            }
            if let Some(end) = live.overdue(precopy_deadline, now) {
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
    }
}

fn report(session: u32, change: Option<Change>, events: &crate::receiver::Events) {
    match change {
        None => {}
        Some(Change::Stalled { silent, phase }) => events(Event::Warning(format!(
            "session {session} is stalled: nothing has come for {:.0} s {}",
            silent.as_secs_f64(),
            phase.in_words()
        ))),
        Some(Change::GoesOn { silent }) => events(Event::Note(format!(
            "session {session} goes on after {:.0} s without progress",
            silent.as_secs_f64()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(watch.observe(standing, after(1)), None);
        assert_eq!(watch.observe(standing, after(10)), None);
        assert_eq!(watch.stalled_ms(after(10)), None);
        let stalled = Change::Stalled {
            silent: Duration::from_secs(11),
            phase: Phase::Checkpoint,
        };
        assert_eq!(watch.observe(standing, after(12)), Some(stalled));
        assert_eq!(watch.observe(standing, after(100)), None);
        assert_eq!(watch.stalled_ms(after(101)), Some(100_000));
        let on = watch.observe(seen(Phase::Checkpoint, 101, 0), after(201));
        let silent = Duration::from_secs(200);
        assert_eq!(on, Some(Change::GoesOn { silent }));
        assert_eq!(watch.stalled_ms(after(201)), None);
    }

    /// A slow one that makes progress is not, nor one whose checkpoints are usually far apart.
    #[test]
    fn what_is_usual_for_a_session_is_not_a_stall() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut now = start;
        for received in 0..100 {
            now += Duration::from_secs(9);
            assert_eq!(watch.observe(seen(Phase::Checkpoint, received, 0), now), None);
        }
        for checkpoint in 1..5 {
            now += Duration::from_secs(50);
            let between = seen(Phase::Between, 1000 * checkpoint, checkpoint);
            assert_eq!(watch.observe(between, now), None, "{checkpoint}");
            assert_eq!(watch.observe(between, now + Duration::from_secs(40)), None);
        }
        let last = watch.seen;
        let usual = now + Duration::from_secs(199);
        assert_eq!(watch.observe(last, usual), None);
        let late = watch.observe(last, usual + Duration::from_secs(5000));
        assert!(matches!(late, Some(Change::Stalled { .. })), "{late:?}");
    }
}
