//! A limit for lines of the log that a peer can cause: a burst at once, then so many in a time, and a count of those left out.

use std::time::{Duration, Instant};

/// How often the lines that were left out are counted up.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    every: Duration,
    left: u32,
    /// What is earned since then is not in `left`.
    earned_at: Instant,
    left_out: u64,
    left_out_since: Instant,
}

impl RateLimit {
    /// Admits `burst` lines at once, and one more for each `every` that passes.
    pub fn new(burst: u32, every: Duration, now: Instant) -> Self {
        Self {
            burst,
            every,
            left: burst,
            earned_at: now,
            left_out: 0,
            left_out_since: now,
        }
    }

    /// Whether a line may be logged now. One that may not is counted.
    pub fn admits(&mut self, now: Instant) -> bool {
        self.earn(now);
        if self.left > 0 {
            self.left -= 1;
            return true;
        }
        if self.left_out == 0 {
            self.left_out_since = now;
        }
        self.left_out += 1;
        false
    }

    /// How many lines were left out, and in how long, if it is time to say so. To be called now and then.
    pub fn summary(&mut self, now: Instant) -> Option<(u64, Duration)> {
        let passed = now.saturating_duration_since(self.left_out_since);
        if self.left_out == 0 || passed < SUMMARY_EVERY {
            return None;
        }
        Some((std::mem::take(&mut self.left_out), passed))
    }

    fn earn(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.earned_at);
        let earned = passed.as_nanos() / self.every.as_nanos().max(1);
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(earned).min(self.burst);
        self.earned_at = match self.left == self.burst {
            true => now,
            false => self.earned_at + self.every * earned,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_so_many_in_a_time() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut limit = RateLimit::new(3, second, start);
        let admitted = |limit: &mut RateLimit, now| (0..10).filter(|_| limit.admits(now)).count();
        assert_eq!(admitted(&mut limit, start), 3);
        assert_eq!(admitted(&mut limit, start + second / 2), 0);
        assert_eq!(admitted(&mut limit, start + second * 3 / 2), 1);
        // Half of a second was kept.
        assert_eq!(admitted(&mut limit, start + second * 2), 1);
        assert_eq!(admitted(&mut limit, start + second * 3600), 3);
    }

    #[test]
    fn what_was_left_out_is_counted_once() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1, Duration::from_secs(100), start);
        assert_eq!(limit.summary(start + SUMMARY_EVERY), None);
        let flood = start + SUMMARY_EVERY;
        let admitted = (0..1000).filter(|_| limit.admits(flood)).count();
        assert_eq!(admitted, 1);
        assert_eq!(limit.summary(flood), None, "not for each of them");
        assert_eq!(limit.summary(flood + SUMMARY_EVERY), Some((999, SUMMARY_EVERY)));
        assert_eq!(limit.summary(flood + SUMMARY_EVERY * 2), None);
    }
}
