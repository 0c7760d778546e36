//! Slow checkpoints, and whose time they were: what `colo-ring slow`, `inspect` and `compare` say of a flight recorder.
//!
//! [`SlowReport`] is made of a [`FlightLog`]; it is printed as a table, as JSON, or drawn (`timeline.rs`).

mod cause;
pub mod file;
mod page;
mod table;
mod timeline;

pub use cause::{Cause, Whose};
pub use page::{page, section};

use cause::{Parts, Usual, median};
use clap::ValueEnum;
use colo_ring::store::{FLIGHT_CHANNELS, FlightLog, FlightRecord, LastChannel, PauseSplit};
use schemars::JsonSchema;
use serde::Serialize;

/// Name and version of the schema of `slow --json`.
const SCHEMA: &str = "colo-ring.slow";
const SCHEMA_VERSION: u32 = 1;

/// How many checkpoints are shown unless something else is said.
pub const TOP: usize = 20;

/// By which of its phases a checkpoint is slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// CHECKPOINT_REPLY to VMSTATE_LOADED, the guest's pause
    #[default]
    Pause,
    /// CHECKPOINT_REQUEST to CHECKPOINT_REPLY, which waits for the flush; the guest runs meanwhile
    Reply,
}

impl By {
    fn of(self, record: &FlightRecord) -> u64 {
        match self {
            Self::Pause => record.pause_ns(),
            Self::Reply => record.reply_ns,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Reply => "reply",
        }
    }
}

/// One slow checkpoint.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct SlowCheckpoint {
    /// The pause, or the reply.
    pub duration_ns: u64,
    /// Whose it was; see [`Cause`].
    #[serde(flatten)]
    pub cause: Cause,
    /// Where the pause went, if the kernel says it.
    pub split: Option<PauseSplit>,
    /// Of two and more multifd channels, the one whose last byte came last.
    pub last: Option<LastChannel>,
    /// All that was recorded.
    pub record: FlightRecord,
}

/// Sums of the slowest checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Sums {
    /// All of it.
    pub all_ns: u64,
    /// The primary's, its guard's and the network's.
    pub primary_ns: u64,
    /// This host's: a core could have run, and another thread did.
    pub host_ns: u64,
    /// This receiver's.
    pub ours_ns: u64,
    /// Not known.
    pub unknown_ns: u64,
}

impl Sums {
    fn add(&mut self, parts: &Parts) {
        self.all_ns += parts.all();
        self.primary_ns += parts.primary + parts.guard;
        self.host_ns += parts.host;
        self.ours_ns += parts.working + parts.waiting;
        self.unknown_ns += parts.unknown;
    }
}

/// Figures of one duration over all recorded checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Quantiles {
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// How far apart the channels of a checkpoint were complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ChannelSpread {
    /// In the median checkpoint.
    pub usual_ns: u64,
    /// In the median one of the slowest.
    pub of_slowest_ns: u64,
    /// The channel that was last in most of the slowest.
    pub last_channel: u8,
    /// In how many of them it was.
    pub last_count: u64,
}

impl ChannelSpread {
    fn of(records: &[FlightRecord], slowest: &[SlowCheckpoint]) -> Option<Self> {
        let usual = records.iter().filter_map(|record| record.channels.last());
        let last = slowest.iter().filter_map(|slow| slow.last);
        let mut counts = [0u64; FLIGHT_CHANNELS];
        for channel in last.clone() {
            counts[usize::from(channel.channel)] += 1;
        }
        // Of those that are equal the first.
        let most = (0u8..)
            .zip(counts)
            .min_by_key(|(_, count)| std::cmp::Reverse(*count));
        let (last_channel, last_count) = most.filter(|(_, count)| *count > 0)?;
        Some(Self {
            usual_ns: median(usual.map(|last| last.behind_first_ns)),
            of_slowest_ns: median(last.map(|last| last.behind_first_ns)),
            last_channel,
            last_count,
        })
    }
}

/// The slowest checkpoints of a session, and whose time they were.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct SlowReport {
    schema: &'static str,
    schema_version: u32,
    /// The session, as its receiver numbers it.
    pub session: u32,
    /// Its guest's name, if that is known.
    pub guest: Option<String>,
    /// By which phase they are slow.
    pub by: By,
    /// Start of the receiver, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Checkpoints in the recorder, and how many it has room for.
    pub checkpoints: u64,
    /// See `checkpoints`.
    pub capacity: u64,
    /// Records that were damaged, or being written, and are left out.
    pub damaged: u64,
    /// Over all of them.
    pub durations: Quantiles,
    /// The median checkpoint, part by part.
    pub usual: Sums,
    /// The slowest, the slowest first.
    pub slowest: Vec<SlowCheckpoint>,
    /// Sums of these.
    pub of_slowest: Sums,
    /// From the last byte of the channel that is complete first to the last byte of the one that is last; none with fewer than two channels.
    pub channels: Option<ChannelSpread>,
    /// Checkpoints whose reply waited for a flush.
    pub waited_for_flush: u64,
}

impl SlowReport {
    /// The `top` slowest of a recorder.
    pub fn of(log: &FlightLog, guest: Option<String>, top: usize, by: By) -> Self {
        let mut order: Vec<&FlightRecord> = log.records.iter().collect();
        order.sort_by_key(|record| (std::cmp::Reverse(by.of(record)), record.checkpoint));
        let at = |percent: usize| {
            // The smallest that so many do not exceed, counted from the slowest.
            let exceeding = order.len() * (100 - percent) / 100;
            order.get(exceeding).map_or(0, |record| by.of(record))
        };
        let usual = Usual::of(&log.records, by);
        let slow = |record: &&FlightRecord| SlowCheckpoint {
            duration_ns: by.of(record),
            cause: usual.cause(record, by),
            split: record.split(),
            last: record.channels.last(),
            record: **record,
        };
        let slowest: Vec<_> = order.iter().take(top).map(slow).collect();
        let mut of_slowest = Sums::default();
        for checkpoint in &slowest {
            of_slowest.add(&Parts::of(&checkpoint.record, by));
        }
        let mut usual_sums = Sums::default();
        usual_sums.add(&usual.parts);
        let waited = log.records.iter().filter(|record| record.waited_for_flush);
        let channels = ChannelSpread::of(&log.records, &slowest);
        Self {
            schema: SCHEMA,
            schema_version: SCHEMA_VERSION,
            session: log.session,
            guest,
            by,
            started_unix_ms: log.started_unix_ns / 1_000_000,
            checkpoints: log.records.len() as u64,
            capacity: log.capacity,
            damaged: log.damaged,
            durations: Quantiles {
                p50_ns: at(50),
                p99_ns: at(99),
                max_ns: at(100),
            },
            usual: usual_sums,
            of_slowest,
            channels,
            slowest,
            waited_for_flush: waited.count() as u64,
        }
    }
}

#[cfg(test)]
mod tests;
