//! When checkpoints are asked for: at once where output waits, within a share of the guest's time.

use std::time::{Duration, Instant};

/// Pause that may be spent at once after a quiet time, however small the share is.
const CREDIT_MAX: Duration = Duration::from_millis(100);

/// Pause that is owed at most.
const DEBT_MAX: Duration = Duration::from_secs(1);

/// The weight of a new pause in the average.
const NEWEST: f64 = 0.2;

/// The control loop. Pauses are paid from a credit, which grows by the share of the time that passes.
#[derive(Debug)]
pub(super) struct Pace {
    /// The share of the time that the guest may be stopped, above 0 and below 1.
    share: f64,
    /// Longest time between two checkpoints.
    interval_max: Duration,
    /// Seconds of pause that may be spent; negative after a long one.
    credit_s: f64,
    at: Instant,
    /// Average pause, seconds.
    pause_s: Option<f64>,
}

impl Pace {
    pub(super) fn new(share: f64, interval_max: Duration, now: Instant) -> Self {
        Self {
            share,
            interval_max,
            credit_s: CREDIT_MAX.as_secs_f64(),
            at: now,
            pause_s: None,
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.credit_s = (self.credit_s + passed * self.share).min(CREDIT_MAX.as_secs_f64());
        self.at = now;
    }

    /// The guest was stopped for so long, until now.
    pub(super) fn paused(&mut self, pause: Duration, now: Instant) {
        self.refill(now);
        let pause_s = pause.as_secs_f64();
        self.credit_s = (self.credit_s - pause_s).max(-DEBT_MAX.as_secs_f64());
        let average = self.pause_s.unwrap_or(pause_s);
        self.pause_s = Some(average + NEWEST * (pause_s - average));
    }

    /// How long a checkpoint for waiting output has to wait; zero if it may be asked for now.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        match self.credit_s < 0.0 {
            true => Duration::from_secs_f64(-self.credit_s / self.share),
            false => Duration::ZERO,
        }
    }

    /// The time between two checkpoints that nothing else asks for: the longest that is allowed, or longer where pauses are so long
    /// that they would take more than the share.
    pub(super) fn interval(&self) -> Duration {
        let pause_s = self.pause_s.unwrap_or(0.0);
        let at_least = Duration::from_secs_f64(pause_s * (1.0 - self.share) / self.share);
        self.interval_max.max(at_least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_idle_guest_s_output_waits_for_nothing() {
        let mut now = Instant::now();
        let mut pace = Pace::new(0.5, 500 * MS, now);
        for _ in 0..50 {
            assert_eq!(pace.wait(now), Duration::ZERO);
            now += 3 * MS;
            pace.paused(3 * MS, now);
            now += 97 * MS;
        }
        assert_eq!(pace.interval(), 500 * MS);
    }

    #[test]
    fn a_closed_loop_takes_its_share_and_no_more() {
        let start = Instant::now();
        let mut pace = Pace::new(0.5, 500 * MS, start);
        let (mut now, mut stopped) = (start, Duration::ZERO);
        while now < start + 10_000 * MS {
            now += pace.wait(now);
            now += 4 * MS;
            pace.paused(4 * MS, now);
            stopped += 4 * MS;
        }
        let share = stopped.as_secs_f64() / (now - start).as_secs_f64();
        assert!((0.48..0.53).contains(&share), "{share}");
    }

    #[test]
    fn long_pauses_make_the_interval_longer() {
        let now = Instant::now();
        let mut pace = Pace::new(0.2, 500 * MS, now);
        pace.paused(300 * MS, now + 300 * MS);
        assert_eq!(pace.interval(), Duration::from_millis(1200));
        assert!(pace.wait(now + 300 * MS) > 500 * MS);
    }
}
