//! A limit for lines of the log that a peer can cause: a burst at once, then so many in a time, and a count of those left out.

use std::time::{Duration, Instant};

/// How soon lines that were left out are counted up for the first time. While more are left out, each count comes twice as late as the
/// one before: what goes on for days makes few lines.
const SUMMARY_FIRST: Duration = Duration::from_secs(10);

/// How often they are counted up at least.
const SUMMARY_LAST: Duration = Duration::from_secs(3600);

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
    summary_every: Duration,
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
            summary_every: SUMMARY_FIRST,
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
            // After a pause that was long enough it begins anew.
            if now.saturating_duration_since(self.left_out_since) > self.summary_every {
                self.summary_every = SUMMARY_FIRST;
            }
            self.left_out_since = now;
        }
        self.left_out += 1;
        false
    }

    /// How many lines were left out, and in how long, if it is time to say so. To be called now and then.
    pub fn summary(&mut self, now: Instant) -> Option<(u64, Duration)> {
        let passed = now.saturating_duration_since(self.left_out_since);
        if self.left_out == 0 || passed < self.summary_every {
            return None;
        }
        self.summary_every = (self.summary_every * 2).min(SUMMARY_LAST);
        self.left_out_since = now;
        Some((std::mem::take(&mut self.left_out), passed))
    }

    /// Whether nothing is known that would be forgotten with it: it would admit all of its burst, and there is nothing to count up.
    pub fn is_idle(&mut self, now: Instant) -> bool {
        self.earn(now);
        self.left == self.burst && self.left_out == 0
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
        assert_eq!(limit.summary(start + SUMMARY_FIRST), None);
        let flood = start + SUMMARY_FIRST;
        let admitted = (0..1000).filter(|_| limit.admits(flood)).count();
        assert_eq!(admitted, 1);
        assert_eq!(limit.summary(flood), None, "not for each of them");
        assert_eq!(limit.summary(flood + SUMMARY_FIRST), Some((999, SUMMARY_FIRST)));
        assert_eq!(limit.summary(flood + SUMMARY_FIRST * 2), None);
    }

    /// A check of another host's, every 5 seconds, for a week.
    #[test]
    fn what_never_ends_is_counted_up_ever_less_often() {
        let start = Instant::now();
        let mut limit = RateLimit::new(5, Duration::from_secs(600), start);
        let (mut lines, mut left_out) = (0, 0);
        let checks = 7 * 24 * 3600 / 5;
        for check in 0..checks {
            let now = start + Duration::from_secs(5) * check;
            lines += u32::from(limit.admits(now));
            if let Some((count, passed)) = limit.summary(now) {
                assert!(passed <= SUMMARY_LAST + Duration::from_secs(5), "{passed:?}");
                (lines, left_out) = (lines + 1, left_out + count);
            }
        }
        // One in 10 minutes, and a count each hour.
        assert!((1000..1300).contains(&lines), "{lines}");
        assert!(left_out + 1300 > u64::from(checks), "{left_out}");
        // After a pause the first count comes soon again.
        let later = start + Duration::from_secs(8 * 24 * 3600);
        limit.summary(later);
        let again = later + SUMMARY_LAST * 2;
        assert!((0..10).filter(|_| limit.admits(again)).count() == 5 && !limit.is_idle(again));
        assert_eq!(limit.summary(again + SUMMARY_FIRST), Some((5, SUMMARY_FIRST)));
        assert!(limit.is_idle(again + SUMMARY_LAST));
    }
}
