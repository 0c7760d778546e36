//! A synthetic primary: speaks to any COLO secondary as a QEMU primary does, with a guest that is only memory.
//!
//! It owns the guest's RAM model, its sockets and one thread per multifd channel. It follows QEMU where a secondary
//! could notice: what is sent on which channel and in which order, where the main channel is flushed, Nagle's
//! algorithm left on for the main channel and off for the others, one `writev` per packet from guest memory. It does
//! not where that would only cost time: pages are known to be zero without being searched, and packets go to the
//! channels in turn, so that one seed gives one session.
//!
//! The guest is changed between checkpoints only. So whenever [`SynthPrimary::checkpoint`] has returned, the model
//! is what the secondary must have committed, see [`SynthPrimary::image`].
#![forbid(unsafe_code)]

mod address;
mod device;
mod guest;
mod link;
mod rng;
mod sender;
mod session;
#[cfg(test)]
mod tests;

pub use address::Address;
pub use guest::Image;
pub use session::SynthPrimary;

use colo_ring::units::PAGE_BYTES;
use std::time::Duration;
use thiserror::Error;

/// Which pages the guest dirties before a checkpoint. They are sent in the order of their addresses, as QEMU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Single pages anywhere.
    Random,
    /// The next pages after those of the checkpoint before.
    Sequential,
    /// Runs of so many neighbouring pages, anywhere.
    Runs(u64),
}

/// Which QEMU the session looks like on the wire (spec §18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 11.1: return path with PING, no ENABLE_COLO, SWITCHOVER_START before the guest's last precopy pages.
    V11_1,
    /// 10.0: ENABLE_COLO, no return path, SWITCHOVER_START in each checkpoint too.
    V10_0,
    /// 7.2: ENABLE_COLO, no return path, SYNC on packets with pages, stale fields in empty ones, pages sent twice.
    V7_2,
}

/// What marks a sync point on the main channel (spec §10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// MULTIFD_FLUSH records: machine types from 8.1.
    PerRound,
    /// The EOS of every section: machine types up to 8.0, and QEMU 7.2.
    PerSection,
}

/// The session to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthOptions {
    /// Bytes of the guest's main RAM block, a multiple of the page size. Five small blocks come on top.
    pub ram_bytes: u64,
    /// Multifd channels; 0 sends all pages on the main channel.
    pub channels: u8,
    /// Pages that the guest dirties before each checkpoint.
    pub dirty_pages: u64,
    /// Share of pages, initial and dirtied, that are all zero: 0 to 1.
    pub zero_share: f64,
    /// Where the dirtied pages are.
    pub pattern: Pattern,
    /// From the request of one checkpoint to that of the next; longer if a checkpoint takes longer.
    pub interval: Duration,
    /// Checkpoints that [`run`] takes.
    pub checkpoints: u64,
    /// Decides everything that is random.
    pub seed: u64,
    /// Which QEMU to look like.
    pub version: Version,
    /// What marks a sync point.
    pub sync_mode: SyncMode,
    /// Zero pages as records on the main channel instead of in the packets (`zero-page-detection=legacy`).
    pub zero_pages_on_main: bool,
    /// The guest's UUID, in every init packet.
    pub uuid: [u8; 16],
    /// How long to wait for an answer, or for room in a socket, before the session counts as failed. QEMU waits for ever.
    pub patience: Duration,
}

impl SynthOptions {
    /// A session as this version's newest machine type makes it: 64 MiB, 4 channels, 1000 dirty pages, a tenth of the
    /// pages zero, 20 checkpoints 100 ms apart.
    pub fn new(version: Version) -> Self {
        let old = version == Version::V7_2;
        Self {
            ram_bytes: 64 << 20,
            channels: 4,
            dirty_pages: 1000,
            zero_share: 0.1,
            pattern: Pattern::Random,
            interval: Duration::from_millis(100),
            checkpoints: 20,
            seed: 1,
            version,
            sync_mode: if old {
                SyncMode::PerSection
            } else {
                SyncMode::PerRound
            },
            zero_pages_on_main: old,
            uuid: [0; 16],
            patience: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), SynthError> {
        if self.ram_bytes == 0 || !self.ram_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(SynthError::Options(
                "ram_bytes must be a positive multiple of 4096",
            ));
        }
        if !(0.0..=1.0).contains(&self.zero_share) {
            return Err(SynthError::Options("zero_share must be between 0 and 1"));
        }
        if self.dirty_pages > self.ram_bytes / PAGE_BYTES {
            return Err(SynthError::Options(
                "dirty_pages must not exceed the pages of ram_bytes",
            ));
        }
        if self.pattern == Pattern::Runs(0) {
            return Err(SynthError::Options("a run must have at least one page"));
        }
        if self.patience.is_zero() {
            return Err(SynthError::Options("patience must not be zero"));
        }
        Ok(())
    }

    /// The machine type whose habits these are.
    fn machine_type(&self) -> &'static str {
        match (self.version, self.sync_mode) {
            (Version::V7_2, _) => "pc-i440fx-7.2",
            (_, SyncMode::PerSection) => "pc-i440fx-8.0",
            (Version::V10_0, SyncMode::PerRound) => "pc-i440fx-10.0",
            (Version::V11_1, SyncMode::PerRound) => "pc-i440fx-11.1",
        }
    }
}

/// One checkpoint, on the primary's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointReport {
    /// Distinct pages sent, zero pages included.
    pub pages: u64,
    /// Those of them that were zero.
    pub zero_pages: u64,
    /// Bytes of device state.
    pub vmstate_bytes: u64,
    /// VMSTATE_SEND written to RECEIVED read.
    pub received: Duration,
    /// VMSTATE_SEND written to LOADED read: the guest's pause but for the two ends of it.
    pub loaded: Duration,
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
    /// The address is neither `tcp:HOST:PORT` nor `unix:PATH`.
    #[error("\"{0}\" is no address: use tcp:HOST:PORT or unix:PATH")]
    Address(String),
    /// No connection.
    #[error("cannot connect {what} to {address}: {source}; is the secondary listening there?")]
    Connect {
        /// Which channel.
        what: String,
        /// The secondary's address.
        address: String,
        /// What the system said.
        source: std::io::Error,
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
    /// The secondary closed the main channel.
    #[error("the secondary closed the main channel while {expected} was expected; its log says why")]
    Closed {
        /// The message waited for.
        expected: String,
    },
    /// The secondary said nothing.
    #[error("the secondary did not send {expected} within {waited:?}")]
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
