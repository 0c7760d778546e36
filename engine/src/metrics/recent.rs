//! Pauses of the last minutes: in windows, since figures from a guest's beginning say little about now.

use super::CheckpointSample;
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// Length of a window.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Windows that are kept: five minutes.
pub const WINDOWS: usize = 30;

/// Digits of their histograms: within 7 % of a value, in a few KiB for each window.
const DIGITS: u8 = 1;

/// Pauses of one session by windows, of which the last one is still running.
#[derive(Debug, Default)]
pub struct RecentPauses {
    /// None of a window without a checkpoint. The newest is the last.
    windows: VecDeque<Option<Histogram<u32>>>,
}

/// Figures of pauses over some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PauseFigures {
    /// Checkpoints in it.
    pub checkpoints: u64,
    /// Median, in nanoseconds; like the others 0 without a checkpoint.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// The pauses of a session lately.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RecentFigures {
    /// Of the running window and the one before it: 10 to 20 seconds.
    pub now: PauseFigures,
    /// Of five minutes.
    pub minutes: PauseFigures,
    /// The 99th percentile of each window of 10 seconds, in nanoseconds, the newest last; 0 without a checkpoint.
    pub p99_ns: Vec<u64>,
}

impl RecentPauses {
    /// Adds a checkpoint to the running window.
    pub fn record(&mut self, sample: &CheckpointSample) {
        if self.windows.is_empty() {
            self.windows.push_back(None);
        }
        let pause = u64::try_from(sample.pause.as_nanos()).unwrap_or(u64::MAX);
        if let Some(window) = self.windows.back_mut() {
            let histogram = window.get_or_insert_with(|| {
                Histogram::new(DIGITS).expect("0 to 5 significant digits are allowed")
            });
            histogram
                .record(pause)
                .expect("a histogram that resizes itself takes any value");
        }
    }

    /// Ends the running window.
    pub fn turn(&mut self) {
        // Before the first checkpoint there is nothing to show.
        if self.windows.is_empty() {
            return;
        }
        if self.windows.len() == WINDOWS {
            self.windows.pop_front();
        }
        self.windows.push_back(None);
    }

    /// The figures as they stand.
    pub fn figures(&self) -> RecentFigures {
        let of = |window: &Option<Histogram<u32>>| {
            window.as_ref().map_or(0, |window| window.value_at_quantile(0.99))
        };
        RecentFigures {
            now: self.last(2),
            minutes: self.last(WINDOWS),
            p99_ns: self.windows.iter().map(of).collect(),
        }
    }

    /// Over so many windows.
    fn last(&self, windows: usize) -> PauseFigures {
        let mut all = Histogram::<u32>::new(DIGITS).expect("0 to 5 significant digits are allowed");
        for window in self.windows.iter().rev().take(windows).flatten() {
            all.add(window)
                .expect("a histogram that resizes itself takes any value");
        }
        PauseFigures {
            checkpoints: all.len(),
            p50_ns: all.value_at_quantile(0.5),
            p99_ns: all.value_at_quantile(0.99),
            max_ns: all.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::test_samples::sample;

    fn is_about(value: u64, milliseconds: u64) -> bool {
        value.abs_diff(milliseconds * 1_000_000) <= milliseconds * 100_000
    }

    #[test]
    fn old_pauses_are_forgotten() {
        let mut recent = RecentPauses::default();
        recent.turn();
        assert_eq!(recent.figures(), RecentFigures::default());
        (0..100).for_each(|n| recent.record(&sample(1, n, Duration::from_millis(50))));
        assert!(is_about(recent.figures().now.p99_ns, 50));
        recent.turn();
        (0..300).for_each(|n| recent.record(&sample(1, n, Duration::from_millis(2))));
        recent.turn();
        (0..300).for_each(|n| recent.record(&sample(1, n, Duration::from_millis(2))));
        let figures = recent.figures();
        assert!(is_about(figures.now.p99_ns, 2), "{figures:?}");
        assert!(is_about(figures.now.p50_ns, 2));
        assert!(is_about(figures.minutes.p99_ns, 50));
        assert_eq!((figures.now.checkpoints, figures.minutes.checkpoints), (600, 700));
        assert_eq!(figures.p99_ns.len(), 3);
        (0..WINDOWS).for_each(|_| recent.turn());
        let figures = recent.figures();
        assert_eq!(
            (figures.minutes.checkpoints, figures.p99_ns),
            (0, vec![0; WINDOWS])
        );
    }
}
