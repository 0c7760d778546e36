//! What a session's checkpoints took, as histograms and as a run file.

use super::CheckpointReport;
use crate::run_file::Checkpoint;
use crate::units::nanoseconds;
use colo_ring::metrics::{SIGNIFICANT_DIGITS, display_nanoseconds};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;
use std::time::Duration;

/// A phase's name, and how to read it off a checkpoint.
type Phase = (&'static str, fn(&CheckpointReport) -> Duration);

/// What is recorded of a checkpoint.
const PHASES: [Phase; 5] = [
    ("replied", |report| report.reply),
    ("received", |report| report.received),
    ("loaded", |report| report.loaded),
    ("waited", |report| report.waited),
    ("service", CheckpointReport::service),
];

/// Phases that mean something without a schedule.
const UNSCHEDULED: usize = 3;

/// The sums and histograms of a session.
pub(crate) struct Figures {
    histograms: Vec<(&'static str, Histogram<u64>)>,
    sums_ns: Vec<u128>,
    pub(crate) checkpoints: u64,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes: u64,
    pub(crate) payload_bytes: u64,
    pub(crate) disk_blocks: u64,
    /// See [`CheckpointReport::own_delay`].
    own_delay: Duration,
    own_delay_max: Duration,
}

/// One phase over all checkpoints.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct PhaseFigures {
    /// `received` or `loaded`: VMSTATE_SEND to VMSTATE_RECEIVED or to VMSTATE_LOADED.
    pub(crate) phase: &'static str,
    /// Checkpoints measured.
    count: u64,
    /// Arithmetic mean.
    mean_ns: u64,
    /// Median.
    pub(crate) p50_ns: u64,
    /// 90th percentile.
    p90_ns: u64,
    /// 99th percentile.
    pub(crate) p99_ns: u64,
    /// 99.9th percentile.
    p99_9_ns: u64,
    /// The longest.
    max_ns: u64,
}

/// How late this side was.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct OwnDelay {
    /// On average.
    pub(crate) mean_ns: u64,
    /// At most.
    pub(crate) max_ns: u64,
}

impl Figures {
    /// `scheduled` is whether checkpoints can wait for each other.
    pub(crate) fn new(scheduled: bool) -> Self {
        let count = if scheduled { PHASES.len() } else { UNSCHEDULED };
        let empty = || Histogram::new(SIGNIFICANT_DIGITS).expect("0 to 5 significant digits are allowed");
        Self {
            histograms: PHASES[..count].iter().map(|(name, _)| (*name, empty())).collect(),
            sums_ns: vec![0; count],
            checkpoints: 0,
            pages: 0,
            zero_pages: 0,
            bytes: 0,
            payload_bytes: 0,
            disk_blocks: 0,
            own_delay: Duration::ZERO,
            own_delay_max: Duration::ZERO,
        }
    }

    pub(crate) fn record(&mut self, report: &CheckpointReport) {
        let kept = self.histograms.iter_mut().zip(&mut self.sums_ns);
        for ((_, duration), ((_, histogram), sum)) in PHASES.iter().zip(kept) {
            let value = nanoseconds(duration(report));
            histogram
                .record(value)
                .expect("a histogram that resizes itself takes any value");
            *sum += u128::from(value);
        }
        self.checkpoints += 1;
        self.pages += report.pages - report.zero_pages;
        self.zero_pages += report.zero_pages;
        self.bytes += report.bytes;
        self.payload_bytes += report.payload_bytes;
        self.disk_blocks += report.disk_blocks;
        self.own_delay += report.own_delay;
        self.own_delay_max = self.own_delay_max.max(report.own_delay);
    }

    /// The checkpoint as run files have it.
    pub(crate) fn checkpoint(&self, report: &CheckpointReport) -> Checkpoint {
        let phases = PHASES[..self.histograms.len()].iter();
        Checkpoint {
            n: self.checkpoints,
            at_ns: nanoseconds(report.end),
            phases_ns: phases
                .map(|(name, duration)| ((*name).to_owned(), nanoseconds(duration(report))))
                .collect(),
            pages: report.pages - report.zero_pages,
            zero_pages: report.zero_pages,
            bytes: report.bytes,
            ..Checkpoint::default()
        }
    }

    pub(crate) fn phases(&self) -> Vec<PhaseFigures> {
        let figures = |((phase, histogram), sum): (&(&'static str, Histogram<u64>), &u128)| PhaseFigures {
            phase,
            count: histogram.len(),
            mean_ns: mean(*sum, self.checkpoints),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p99_9_ns: histogram.value_at_quantile(0.999),
            max_ns: histogram.max(),
        };
        self.histograms.iter().zip(&self.sums_ns).map(figures).collect()
    }

    pub(crate) fn own_delay(&self) -> OwnDelay {
        OwnDelay {
            mean_ns: mean(self.own_delay.as_nanos(), self.checkpoints),
            max_ns: nanoseconds(self.own_delay_max),
        }
    }
}

impl PhaseFigures {
    pub(crate) const HEAD: [&str; 8] = ["phase", "n", "mean", "p50", "p90", "p99", "p99.9", "max"];

    /// A row of the table.
    pub(crate) fn row(&self) -> Vec<String> {
        let figures = [
            self.mean_ns,
            self.p50_ns,
            self.p90_ns,
            self.p99_ns,
            self.p99_9_ns,
            self.max_ns,
        ];
        let names = [self.phase.to_owned(), self.count.to_string()];
        names
            .into_iter()
            .chain(figures.map(display_nanoseconds))
            .collect()
    }
}

fn mean(sum: u128, count: u64) -> u64 {
    u64::try_from(sum / u128::from(count.max(1))).unwrap_or(u64::MAX)
}
