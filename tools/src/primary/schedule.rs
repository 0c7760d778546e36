//! When checkpoints are due, and how long each waited because those before it took too long.
//!
//! A measurement that waits for a slow secondary before it asks again leaves out what would have been asked meanwhile,
//! so that one long stall counts once (coordinated omission). Here, as long as the loop is *open*, every checkpoint
//! has its place in time, `start + n · interval`, and one that comes late because the last one was still running has
//! waited. The waiting is worked out by Lindley's recursion: a checkpoint begins when it is due or when the one
//! before ends, whichever is later, and takes what it was measured to take. What *this* side is late by, because the
//! guest's pages were not ready or the timer came late, is thereby in no checkpoint's waiting, but counted apart.
//!
//! No clock is read here: all times are given, since one common moment.

use std::time::Duration;

/// The schedule of a session's checkpoints.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// Zero: there is no schedule, each checkpoint is due as soon as it can begin.
    interval: Duration,
    closed_loop: bool,
    /// When the current checkpoint was due.
    due: Duration,
    /// When the secondary would have been done with everything before, had nothing begun late.
    free: Duration,
    /// When the last checkpoint really began and ended.
    began: Duration,
    ended: Duration,
}

impl Schedule {
    /// The first checkpoint is due an interval after `start`.
    pub(crate) fn new(start: Duration, interval: Duration, closed_loop: bool) -> Self {
        Self {
            interval,
            closed_loop,
            due: start,
            free: start,
            began: start,
            ended: start,
        }
    }

    /// The next checkpoint could begin `now`. Returns when it is due: a moment that has passed, if it is overdue.
    pub(crate) fn next(&mut self, now: Duration) -> Duration {
        self.due = if self.interval.is_zero() {
            now
        } else if self.closed_loop {
            now.max(self.began + self.interval)
        } else {
            self.due + self.interval
        };
        self.due
    }

    /// The next checkpoint is due at this moment, whatever the interval.
    pub(crate) fn next_at(&mut self, due: Duration) {
        self.due = due;
    }

    /// The checkpoint begins. Returns how late this side is with it: later than it was due, and than the last one ended.
    pub(crate) fn begin(&mut self, now: Duration) -> Duration {
        self.began = now;
        now.saturating_sub(self.due.max(self.ended))
    }

    /// The checkpoint has ended. Returns how long it waited for those before it.
    pub(crate) fn end(&mut self, now: Duration) -> Duration {
        self.ended = now;
        let waited = self.free.saturating_sub(self.due);
        self.free = self.due + waited + (now - self.began);
        waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Takes checkpoints of these lengths on a fake clock, this side being late by `late` each time. Returns what
    /// each waited, in ms, and when the last one ended.
    fn take(mut schedule: Schedule, lengths: &[u64], late: Duration) -> (Vec<u128>, Duration) {
        let mut now = Duration::ZERO;
        let one = |&length: &u64| {
            now = now.max(schedule.next(now)) + late;
            assert_eq!(schedule.begin(now), late);
            now += ms(length);
            schedule.end(now).as_millis()
        };
        let waited = lengths.iter().map(one).collect();
        (waited, now)
    }

    fn open() -> Schedule {
        Schedule::new(Duration::ZERO, ms(10), false)
    }

    #[test]
    fn an_open_loop_shows_a_stall_in_every_checkpoint_that_it_delays() {
        let (waited, end) = take(open(), &[1, 35, 1, 1, 1, 1, 1], Duration::ZERO);
        // Due at 30, 40 and 50; the stall ends at 55.
        assert_eq!(waited, [0, 0, 25, 16, 7, 0, 0]);
        assert_eq!(end, ms(71));
    }

    #[test]
    fn a_closed_loop_shows_it_once() {
        let schedule = Schedule::new(Duration::ZERO, ms(10), true);
        let (waited, end) = take(schedule, &[1, 35, 1, 1], Duration::ZERO);
        assert_eq!(waited, [0; 4]);
        // Begun at 10, 20, 55 and 65.
        assert_eq!(end, ms(66));
    }

    #[test]
    fn what_this_side_is_late_by_is_not_charged_to_the_secondary() {
        let (waited, end) = take(open(), &[1, 35, 1, 1, 1, 1, 1], ms(2));
        assert_eq!(waited, [0, 0, 25, 16, 7, 0, 0]);
        assert_eq!(end, ms(73));
        // Even where this side alone keeps the schedule from being met.
        let (waited, end) = take(open(), &[1; 5], ms(30));
        assert_eq!(waited, [0; 5]);
        assert_eq!(end, ms(165));
    }

    #[test]
    fn an_overloaded_secondary_falls_behind_for_ever() {
        let (waited, _) = take(open(), &[15; 6], Duration::ZERO);
        assert_eq!(waited, [0, 5, 10, 15, 20, 25]);
    }

    #[test]
    fn without_an_interval_there_is_nothing_to_wait_for() {
        let schedule = Schedule::new(Duration::ZERO, Duration::ZERO, false);
        let (waited, end) = take(schedule, &[5, 50, 5], Duration::ZERO);
        assert_eq!((waited, end), (vec![0; 3], ms(60)));
    }
}
