//! How long the guest was stopped, and its frames were held.

use super::GuardArgs;
use super::logs::Logs;
use super::report::Times;
use crate::metrics_server::PhaseHistogram;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

/// How often the logs get an interval.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was measured in an interval that has ended, in nanoseconds. Its start counts from the guard's.
pub(super) struct Interval {
    pub(super) start: Duration,
    pub(super) length: Duration,
    pub(super) stopped: Histogram<u64>,
    pub(super) held: Histogram<u64>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are possible")
}

/// A measured time, all of it and that of the interval.
struct Measured {
    all: Histogram<u64>,
    interval: Histogram<u64>,
    /// What `--metrics` shows.
    shown: PhaseHistogram,
}

impl Measured {
    fn new() -> Self {
        Self {
            all: histogram(),
            interval: histogram(),
            shown: PhaseHistogram::default(),
        }
    }

    fn record(&mut self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // It grows as it is needed.
        let _ = self.all.record(nanoseconds);
        let _ = self.interval.record(nanoseconds);
        self.shown.record(time);
    }

    fn take_interval(&mut self) -> Histogram<u64> {
        std::mem::replace(&mut self.interval, histogram())
    }
}

/// See the module.
pub(super) struct Measurements {
    started: Instant,
    written: Instant,
    stopped: Measured,
    held: Measured,
    /// Since [`Self::written`], and as a share of the time before that.
    stopped_lately: Duration,
    stopped_share: f64,
    logs: Option<Logs>,
}

impl Measurements {
    pub(super) fn new(args: &GuardArgs) -> Self {
        let now = Instant::now();
        Self {
            started: now,
            written: now,
            stopped: Measured::new(),
            held: Measured::new(),
            stopped_lately: Duration::ZERO,
            stopped_share: 0.0,
            logs: Logs::start(args),
        }
    }

    pub(super) fn stopped(&mut self, time: Duration) {
        self.stopped.record(time);
        self.stopped_lately += time;
    }

    pub(super) fn held(&mut self, times_us: Vec<u64>) {
        times_us
            .into_iter()
            .for_each(|time| self.held.record(Duration::from_micros(time)));
    }

    /// Has an interval written when it is due.
    pub(super) fn write_if_due(&mut self) {
        let length = self.written.elapsed();
        if length < INTERVAL {
            return;
        }
        let start = self.written - self.started;
        self.written += length;
        let share = std::mem::take(&mut self.stopped_lately).as_secs_f64() / length.as_secs_f64();
        // Three digits.
        self.stopped_share = (share.min(1.0) * 1000.0).round() / 1000.0;
        let (stopped, held) = (self.stopped.take_interval(), self.held.take_interval());
        if let Some(logs) = &mut self.logs {
            logs.put(Interval {
                start,
                length,
                stopped,
                held,
            });
        }
    }

    /// What `--metrics` shows of [`Self::stopped`] and [`Self::held`].
    pub(super) fn histograms(&self) -> (PhaseHistogram, PhaseHistogram) {
        (self.stopped.shown.clone(), self.held.shown.clone())
    }

    /// The share of its time that the guest was stopped, of the last second or so.
    pub(super) fn stopped_share(&self) -> f64 {
        self.stopped_share
    }

    /// What was measured.
    pub(super) fn times(&self) -> (Times, Times) {
        (Times::of(&self.stopped.all), Times::of(&self.held.all))
    }
}
