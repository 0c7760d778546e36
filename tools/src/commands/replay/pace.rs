//! When each checkpoint of a replay is due.

use super::Pace;
use crate::primary::Schedule;
use crate::streams::Streams;
use std::time::Duration;

/// The schedule of a session. Times are since its first connection.
pub(super) struct Pacer {
    schedule: Schedule,
    /// With the pace of the capture: from READY to each request of the capture, and the length of one pass.
    captured: Option<Captured>,
}

struct Captured {
    ready: Duration,
    requests: Vec<Duration>,
    pass: Duration,
    next: usize,
}

impl Pacer {
    /// The secondary became ready at `ready`.
    pub(super) fn new(pace: Pace, streams: &Streams, ready: Duration) -> Self {
        let (interval, closed_loop) = match pace {
            Pace::Interval { length, closed_loop } => (length, closed_loop),
            Pace::Max | Pace::Original => (Duration::ZERO, false),
        };
        Self {
            schedule: Schedule::new(ready, interval, closed_loop),
            captured: (pace == Pace::Original).then(|| Captured::new(streams, ready)),
        }
    }

    /// When the next checkpoint is due, which could begin now.
    pub(super) fn next(&mut self, now: Duration) -> Duration {
        match &mut self.captured {
            None => self.schedule.next(now),
            Some(captured) => {
                let due = captured.next();
                self.schedule.next_at(due);
                due
            }
        }
    }

    /// The checkpoint begins. Returns how late this side is with it.
    pub(super) fn begin(&mut self, now: Duration) -> Duration {
        self.schedule.begin(now)
    }

    /// The checkpoint has ended. Returns how long it waited for those before it.
    pub(super) fn end(&mut self, now: Duration) -> Duration {
        self.schedule.end(now)
    }
}

impl Captured {
    fn new(streams: &Streams, ready: Duration) -> Self {
        let zero = streams.ready_at();
        let checkpoints = streams.checkpoints.iter();
        let requests: Vec<_> = checkpoints
            .map(|checkpoint| checkpoint.at.saturating_sub(zero))
            .collect();
        let last = requests.last().copied().unwrap_or_default();
        let mean = last / u32::try_from(requests.len().max(1)).unwrap_or(u32::MAX);
        // From the last request to the first one again there is nothing in the capture: the mean distance.
        let pass = last + mean - requests.first().copied().unwrap_or_default();
        Self {
            ready,
            requests,
            pass,
            next: 0,
        }
    }

    fn next(&mut self) -> Duration {
        let position = self.next % self.requests.len().max(1);
        let passes = u32::try_from(self.next / self.requests.len().max(1)).unwrap_or(u32::MAX);
        self.next += 1;
        self.ready + self.requests.get(position).copied().unwrap_or_default() + self.pass * passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn passes_follow_at_the_mean_distance() {
        let mut captured = Captured {
            ready: ms(1000),
            requests: vec![ms(100), ms(250), ms(300)],
            pass: ms(300),
            next: 0,
        };
        let due: Vec<_> = (0..5).map(|_| captured.next()).collect();
        assert_eq!(due, [ms(1100), ms(1250), ms(1300), ms(1400), ms(1550)]);
    }
}
