//! Histograms of a set of checkpoints, and the figures taken from them.

use super::{CheckpointSample, Phase};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Significant decimal digits that histograms keep.
pub const SIGNIFICANT_DIGITS: u8 = 3;

/// The histograms of a set of checkpoints, one per phase, and their sums.
#[derive(Clone, Debug)]
pub struct Accumulator {
    histograms: [Histogram<u64>; Phase::ALL.len()],
    /// Exact sums, for exact means.
    sums_ns: [u128; Phase::ALL.len()],
    checkpoints: u64,
    pages: u64,
    zero_pages: u64,
    bytes: u64,
}

impl Accumulator {
    /// Without any checkpoint yet.
    pub fn new() -> Self {
        let empty = || Histogram::new(SIGNIFICANT_DIGITS).expect("0 to 5 significant digits are allowed");
        Self {
            histograms: std::array::from_fn(|_| empty()),
            sums_ns: [0; Phase::ALL.len()],
            checkpoints: 0,
            pages: 0,
            zero_pages: 0,
            bytes: 0,
        }
    }

    /// Adds a checkpoint.
    pub fn record(&mut self, sample: &CheckpointSample) {
        let kept = self.histograms.iter_mut().zip(&mut self.sums_ns);
        for (phase, (histogram, sum)) in Phase::ALL.into_iter().zip(kept) {
            let nanoseconds = u64::try_from(sample.phase(phase).as_nanos()).unwrap_or(u64::MAX);
            histogram
                .record(nanoseconds)
                .expect("a histogram that resizes itself takes any value");
            *sum += u128::from(nanoseconds);
        }
        self.checkpoints += 1;
        self.pages = self.pages.saturating_add(sample.pages);
        self.zero_pages = self.zero_pages.saturating_add(sample.zero_pages);
        self.bytes = self.bytes.saturating_add(sample.bytes);
    }

    /// The histogram of one phase, in nanoseconds.
    pub fn histogram(&self, phase: Phase) -> &Histogram<u64> {
        &self.histograms[phase as usize]
    }

    /// The figures as they stand.
    pub fn summary(&self) -> Summary {
        Summary {
            checkpoints: self.checkpoints,
            pages: self.pages,
            zero_pages: self.zero_pages,
            bytes: self.bytes,
            phases: Phase::ALL.map(|phase| self.phase_summary(phase)),
        }
    }

    fn phase_summary(&self, phase: Phase) -> PhaseSummary {
        let histogram = self.histogram(phase);
        let mean = self.sums_ns[phase as usize] / u128::from(self.checkpoints.max(1));
        PhaseSummary {
            phase,
            count: histogram.len(),
            mean_ns: u64::try_from(mean).expect("a mean is at most the largest value, which is 64 bits"),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p99_9_ns: histogram.value_at_quantile(0.999),
            max_ns: histogram.max(),
        }
    }
}

impl Default for Accumulator {
    fn default() -> Self {
        Self::new()
    }
}

/// Figures of one phase over a set of checkpoints; all zero for an empty set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseSummary {
    /// Which.
    pub phase: Phase,
    /// Checkpoints measured.
    pub count: u64,
    /// Arithmetic mean.
    pub mean_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile. With fewer than 100 checkpoints it is the maximum.
    pub p99_ns: u64,
    /// 99.9th percentile. With fewer than 1000 checkpoints it is the maximum.
    pub p99_9_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Figures over a set of checkpoints: a session's, or all of a receiver's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Committed checkpoints.
    pub checkpoints: u64,
    /// Pages that came with content.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes received.
    pub bytes: u64,
    /// One entry per phase, in the order of [`Phase::ALL`].
    pub phases: [PhaseSummary; Phase::ALL.len()],
}

impl Summary {
    /// The figures of one phase.
    pub fn phase(&self, phase: Phase) -> &PhaseSummary {
        &self.phases[phase as usize]
    }
}

/// The table for people: a line per phase, and the volume below.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["mean", "p50", "p90", "p99", "p99.9", "max"];
        write!(f, "{:<9} {:>8}", "phase", "n")?;
        for name in head {
            write!(f, " {name:>9}")?;
        }
        writeln!(f)?;
        for line in &self.phases {
            write!(f, "{:<9} {:>8}", line.phase, line.count)?;
            let figures = [
                line.mean_ns,
                line.p50_ns,
                line.p90_ns,
                line.p99_ns,
                line.p99_9_ns,
                line.max_ns,
            ];
            for nanoseconds in figures {
                write!(f, " {:>9}", display_nanoseconds(nanoseconds))?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "{} checkpoints, {} pages, {} zero pages, {:.1} MiB",
            self.checkpoints,
            self.pages,
            self.zero_pages,
            self.bytes as f64 / f64::from(1 << 20),
        )
    }
}

/// Nanoseconds with three significant digits and a fitting unit, for tables.
pub fn display_nanoseconds(nanoseconds: u64) -> String {
    let exact = nanoseconds as f64;
    let (value, unit) = match nanoseconds {
        0..1_000 => return format!("{nanoseconds} ns"),
        1_000..999_500 => (exact / 1e3, "µs"),
        999_500..999_500_000 => (exact / 1e6, "ms"),
        _ => (exact / 1e9, "s"),
    };
    match value {
        v if v >= 99.95 => format!("{v:.0} {unit}"),
        v if v >= 9.995 => format!("{v:.1} {unit}"),
        v => format!("{v:.2} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::test_samples::sample;
    use std::time::Duration;

    #[test]
    fn percentiles_are_those_of_the_samples() {
        let mut accumulator = Accumulator::new();
        for n in 1..=1000 {
            accumulator.record(&sample(1, n, Duration::from_micros(n)));
        }
        let summary = accumulator.summary();
        let pause = summary.phase(Phase::Pause);
        let close = |seen: u64, exact: u64| seen.abs_diff(exact) * 1000 <= exact;
        assert_eq!(pause.count, 1000);
        assert!(close(pause.p50_ns, 500_000), "{pause:?}");
        assert!(close(pause.p90_ns, 900_000), "{pause:?}");
        assert!(close(pause.p99_ns, 990_000), "{pause:?}");
        assert!(close(pause.p99_9_ns, 999_000), "{pause:?}");
        assert!(close(pause.max_ns, 1_000_000), "{pause:?}");
        assert_eq!(pause.mean_ns, 500_500);
        assert!(close(summary.phase(Phase::Transfer).max_ns, 500_000));
        assert_eq!((summary.pages, summary.zero_pages), (10_000, 3_000));
    }

    #[test]
    fn an_hour_and_a_nanosecond_fit_the_same_histogram() {
        let mut accumulator = Accumulator::new();
        accumulator.record(&sample(1, 1, Duration::from_nanos(1)));
        accumulator.record(&sample(1, 2, Duration::from_secs(3600)));
        accumulator.record(&sample(1, 3, Duration::MAX));
        let pause = *accumulator.summary().phase(Phase::Pause);
        assert_eq!(pause.count, 3);
        assert!(
            pause.p50_ns.abs_diff(3_600_000_000_000) <= 3_600_000_000,
            "{pause:?}"
        );
    }

    #[test]
    fn times_read_well() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.00 µs"),
            (45_678, "45.7 µs"),
            (999_400, "999 µs"),
            (999_600, "1.00 ms"),
            (3_400_000, "3.40 ms"),
            (88_000_000, "88.0 ms"),
            (12_345_000_000, "12.3 s"),
        ] {
            assert_eq!(display_nanoseconds(nanoseconds), text);
        }
    }

    #[test]
    fn the_table_has_a_line_per_phase_and_survives_an_empty_set() {
        let empty = Accumulator::new().summary().to_string();
        assert_eq!(empty.lines().count(), 1 + Phase::ALL.len() + 1);
        for phase in Phase::ALL {
            assert!(
                empty.lines().any(|line| line.starts_with(phase.name())),
                "{phase} is missing"
            );
        }
    }
}
