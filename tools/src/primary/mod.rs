//! A synthetic primary: speaks to a COLO secondary as a QEMU primary does, with a guest that is only memory. QEMU itself
//! cannot be that secondary: it would have to load the device state, which only has the form of one.
//!
//! It owns the guest's RAM model, its sockets and one thread per multifd channel. It follows QEMU where a secondary
//! could notice: what is sent on which channel and in which order, where the main channel is flushed, Nagle's
//! algorithm left on for the main channel and off for the others, one `writev` per packet from guest memory. It does
//! not where that would only cost time: pages are known to be zero without being searched, and packets go to the
//! channels in turn, so that one seed gives one session.
//!
//! The guest is changed between checkpoints only. So whenever [`SynthPrimary::checkpoint`] has returned, the model
//! is what the secondary must have committed, see [`SynthPrimary::image`].

mod content;
mod deltas;
mod device;
mod disks;
mod figures;
mod guest;
mod link;
mod options;
mod preset;
mod recording;
mod schedule;
mod sender;
mod session;
mod shape;
#[cfg(test)]
mod tests;

pub use content::fill as fill_page;
pub use device::state as device_state_at;
pub use disks::{DISK_BLOCK_BYTES, DiskCheckError, DiskOptions, check_disk};
pub(crate) use figures::{Figures, OwnDelay, PhaseFigures};
pub use guest::Image;
pub(crate) use link::{Answer, MainLink};
pub use options::{RAM_BYTES_MAX, SyncMode, SynthOptions, Version};
pub use preset::Preset;
pub(crate) use schedule::Schedule;
pub use session::SynthPrimary;
pub use shape::{Content, Distribution, Pattern, ShapeError};

use crate::capture_file::CaptureError;
use crate::nbd::NbdError;
use crate::net::{Address, ConnectError};
use colo_ring::text::elapsed;
use std::time::Duration;
use thiserror::Error;

/// One checkpoint, on the primary's clock.
///
/// `received` and `loaded` are counted from when VMSTATE_SEND would have been written had the checkpoint begun when it
/// was due: from the real moment, less what it [`waited`](Self::waited). Where there is no schedule (a closed loop, no
/// interval) nothing waits, and both are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointReport {
    /// Distinct pages sent, zero pages included.
    pub pages: u64,
    /// Those of them that were zero.
    pub zero_pages: u64,
    /// Blocks that were written to the disks.
    pub disk_blocks: u64,
    /// Bytes of device state.
    pub vmstate_bytes: u64,
    /// Bytes written on all channels, framing and device state included.
    pub bytes: u64,
    /// Those of them that hold the content of pages, compressed or not.
    pub payload_bytes: u64,
    /// When it ended, since CHECKPOINT_READY was read.
    pub end: Duration,
    /// CHECKPOINT_REQUEST written to CHECKPOINT_REPLY read.
    pub reply: Duration,
    /// VMSTATE_SEND due to RECEIVED read.
    pub received: Duration,
    /// VMSTATE_SEND due to LOADED read.
    pub loaded: Duration,
    /// How long it waited for its turn because checkpoints before it took longer than the interval.
    pub waited: Duration,
    /// How late this side was, which no other figure includes: pages were not ready, or the timer came late.
    pub own_delay: Duration,
}

impl CheckpointReport {
    /// VMSTATE_SEND written to LOADED read: the guest's pause but for the two ends of it.
    pub fn service(&self) -> Duration {
        self.loaded - self.waited
    }
}

/// A whole session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthReport {
    /// First byte sent to CHECKPOINT_READY read.
    pub precopy: Duration,
    /// The checkpoints in order.
    pub checkpoints: Vec<CheckpointReport>,
}

/// Runs a whole session against the secondary at `address` and closes it.
///
/// # Errors
/// See [`SynthError`].
pub fn run(address: &Address, options: &SynthOptions) -> Result<SynthReport, SynthError> {
    let mut primary = SynthPrimary::connect(address, options)?;
    let checkpoints = (0..options.checkpoints)
        .map(|_| primary.checkpoint())
        .collect::<Result<_, _>>()?;
    let precopy = primary.precopy();
    primary.close()?;
    Ok(SynthReport { precopy, checkpoints })
}

/// Why a session could not be made or failed.
#[derive(Debug, Error)]
pub enum SynthError {
    /// The options contradict each other or themselves.
    #[error("{0}")]
    Options(&'static str),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A disk's connection.
    #[error(transparent)]
    Disk(#[from] NbdError),
    /// A disk does not have what was written to it.
    #[error("disk {disk}: block {block} is not read as it was written just before")]
    DiskReads {
        /// Which disk.
        disk: u8,
        /// Which block.
        block: u64,
    },
    /// A connection failed.
    #[error("{what}: {doing}: {source}")]
    Io {
        /// Which channel.
        what: String,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The capture cannot be written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The secondary closed the main channel.
    #[error("the secondary closed the main channel while {expected} was expected; its log says why")]
    Closed {
        /// The message waited for.
        expected: String,
    },
    /// The secondary said nothing.
    #[error("the secondary did not send {expected} within {}", elapsed(*.waited))]
    Silent {
        /// The message waited for.
        expected: String,
        /// How long.
        waited: Duration,
    },
    /// The secondary said something else.
    #[error("the secondary sent {seen} where {expected} was expected")]
    Unexpected {
        /// The message waited for.
        expected: String,
        /// What came.
        seen: String,
    },
}

impl SynthError {
    /// A failure of the channel `what`; that of a recording carries its own error.
    fn io(what: &str, doing: &'static str, source: std::io::Error) -> Self {
        let what = what.to_owned();
        source
            .downcast()
            .map_or_else(|source| Self::Io { what, doing, source }, Self::Capture)
    }
}
