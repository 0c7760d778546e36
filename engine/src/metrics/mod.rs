//! Measurements of checkpoints, by phase: taken on the cores, kept as histograms, written as interval logs.
//!
//! The cores make one [`CheckpointSample`] per checkpoint and push it to the [`SampleQueue`], which neither
//! allocates nor blocks. The control thread alone owns the [`Recorder`]: it drains the queue and keeps the histograms. A thread
//! of its own writes the files. Nothing here is touched once per packet.
//!
//! All times are of the receiver's monotonic clock, in nanoseconds; histograms keep three significant digits.

mod earlier;
mod files;
mod log;
mod queue;
mod recent;
mod recorder;
mod summary;
mod writer;

pub use earlier::{RUNS_KEPT, set_aside_logs};
pub use files::{with_suffix, write_json};
pub use log::{IntervalLog, VALUES_PER_LOGGED_UNIT};
pub use queue::{SAMPLES_MAX, SampleQueue};
pub use recent::{PauseFigures, RecentFigures, RecentPauses, WINDOW, WINDOWS};
pub use recorder::{
    INTERVAL, MetricsError, Recorder, Report, RunDescription, SCHEMA, SCHEMA_VERSION, SESSIONS_KEPT,
};
pub use summary::{Accumulator, PhaseSummary, SIGNIFICANT_DIGITS, Summary, display_nanoseconds};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A part of a checkpoint, measured by the receiver's clock. The names are the same in logs, reports and options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// CHECKPOINT_REQUEST read, or not kept any more for a guard, until CHECKPOINT_REPLY is sent.
    Reply,
    /// VMSTATE_SEND read, until all pages are here and every channel is synced.
    Transfer,
    /// From there until the device state is complete.
    Vmstate,
    /// From there until VMSTATE_LOADED is sent.
    Commit,
    /// CHECKPOINT_REPLY sent, until VMSTATE_LOADED is sent: the part of the guest's pause that the receiver sees.
    Pause,
    /// The copying of pages to the RAM image, wherever it happens.
    Flush,
}

impl Phase {
    /// Every phase, in the order of the checkpoint.
    pub const ALL: [Self; 6] = [
        Self::Reply,
        Self::Transfer,
        Self::Vmstate,
        Self::Commit,
        Self::Pause,
        Self::Flush,
    ];

    /// The name in files, tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reply => "reply",
            Self::Transfer => "transfer",
            Self::Vmstate => "vmstate",
            Self::Commit => "commit",
            Self::Pause => "pause",
            Self::Flush => "flush",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// One checkpoint as it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointSample {
    /// Number of the session in this receiver.
    pub session: u32,
    /// Number of the checkpoint in its session.
    pub checkpoint: u64,
    /// When it was committed, since the receiver's start.
    pub end: Duration,
    /// See [`Phase::Reply`].
    pub reply: Duration,
    /// See [`Phase::Transfer`].
    pub transfer: Duration,
    /// See [`Phase::Vmstate`].
    pub vmstate: Duration,
    /// See [`Phase::Commit`].
    pub commit: Duration,
    /// See [`Phase::Pause`].
    pub pause: Duration,
    /// See [`Phase::Flush`].
    pub flush: Duration,
    /// Pages that came with content.
    pub pages: u64,
    /// Pages announced as zero, from packets and from the main channel.
    pub zero_pages: u64,
    /// Bytes of this checkpoint on all channels, framing and device state included.
    pub bytes: u64,
}

impl CheckpointSample {
    /// The duration of one phase.
    pub const fn phase(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Reply => self.reply,
            Phase::Transfer => self.transfer,
            Phase::Vmstate => self.vmstate,
            Phase::Commit => self.commit,
            Phase::Pause => self.pause,
            Phase::Flush => self.flush,
        }
    }
}

#[cfg(test)]
pub(crate) mod test_samples {
    use super::*;

    /// A sample whose phases are `pause` split in fixed parts.
    pub fn sample(session: u32, checkpoint: u64, pause: Duration) -> CheckpointSample {
        CheckpointSample {
            session,
            checkpoint,
            end: Duration::from_millis(checkpoint * 10),
            reply: pause / 100,
            transfer: pause / 2,
            vmstate: pause / 4,
            commit: pause / 5,
            pause,
            flush: pause / 10,
            pages: 10,
            zero_pages: 3,
            bytes: 41_000,
        }
    }
}
