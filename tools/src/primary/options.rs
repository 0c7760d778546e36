//! The session to be made, as options.

use super::shape::RATIOS;
use super::{Content, DiskOptions, Distribution, Pattern, SynthError};
use crate::page_compression::PageCompression;
use clap::ValueEnum;
use colo_ring::units::PAGE_BYTES;
use serde::{Serialize, Serializer};
use std::fmt;
use std::time::Duration;

/// Most RAM of a guest: what 64-bit sums over its pages allow, and more than any machine has.
pub const RAM_BYTES_MAX: u64 = 16 << 40;

/// Which QEMU the session looks like on the wire (spec §18).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Version {
    /// 11.1: return path with PING, no ENABLE_COLO, SWITCHOVER_START before the guest's last precopy pages.
    #[value(name = "11.1")]
    V11_1,
    /// 10.0: ENABLE_COLO, no return path, SWITCHOVER_START in each checkpoint too.
    #[value(name = "10.0")]
    V10_0,
    /// 7.2: ENABLE_COLO, no return path, SYNC on packets with pages, stale fields in empty ones, pages sent twice.
    #[value(name = "7.2")]
    V7_2,
}

impl Version {
    /// As it is written on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V11_1 => "11.1",
            Self::V10_0 => "10.0",
            Self::V7_2 => "7.2",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
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
    pub dirty_pages: Distribution,
    /// Share of pages, initial and dirtied, that are all zero: 0 to 1.
    pub zero_share: f64,
    /// Where the dirtied pages are.
    pub pattern: Pattern,
    /// What they hold.
    pub content: Content,
    /// How the multifd channels compress pages.
    pub compression: PageCompression,
    /// Whether pages that are sent again on the main channel are sent as deltas. Of a page that has content the guest changes a
    /// part then. Only without multifd channels.
    pub xbzrle: bool,
    /// From when one checkpoint is due to when the next one is; zero: each begins as soon as the last one has ended.
    pub interval: Duration,
    /// Whether a checkpoint that takes longer than the interval moves those after it, instead of making them wait.
    pub closed_loop: bool,
    /// Checkpoints that `run` takes.
    pub checkpoints: u64,
    /// Decides everything that is random.
    pub seed: u64,
    /// Which QEMU to look like.
    pub version: Version,
    /// What marks a sync point.
    pub sync_mode: SyncMode,
    /// Zero pages as records on the main channel instead of in the packets (`zero-page-detection=legacy`).
    pub zero_pages_on_main: bool,
    /// Its disks; a recording has none.
    pub disks: Option<DiskOptions>,
    /// The guest's UUID, in every init packet.
    pub uuid: [u8; 16],
    /// How long to wait for an answer, or for room in a socket, before the session counts as failed. QEMU waits without limit.
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
            dirty_pages: Distribution::Fixed(1000),
            zero_share: 0.1,
            pattern: Pattern::Random,
            content: Content::Random,
            compression: PageCompression::default(),
            xbzrle: false,
            interval: Duration::from_millis(100),
            closed_loop: false,
            checkpoints: 20,
            seed: 1,
            version,
            sync_mode: if old {
                SyncMode::PerSection
            } else {
                SyncMode::PerRound
            },
            zero_pages_on_main: old,
            disks: None,
            uuid: [0; 16],
            patience: Duration::from_secs(30),
        }
    }

    pub(crate) fn check(&self) -> Result<(), SynthError> {
        if self.ram_bytes == 0 || !self.ram_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(SynthError::Options(
                "the guest's RAM must be a positive multiple of 4096 bytes",
            ));
        }
        if !(0.0..=1.0).contains(&self.zero_share) {
            return Err(SynthError::Options(
                "the share of zero pages must be between 0 and 1",
            ));
        }
        if self.ram_bytes > RAM_BYTES_MAX {
            return Err(SynthError::Options("the guest's RAM must not exceed 16 TiB"));
        }
        if !self.dirty_pages.is_possible()
            || self.dirty_pages.largest_parameter() > self.ram_bytes / PAGE_BYTES
        {
            return Err(SynthError::Options(
                "the pages of a checkpoint must be a distribution, and not more than the guest's RAM has",
            ));
        }
        if self.compression.is_some() && self.channels == 0 {
            return Err(SynthError::Options(
                "pages are compressed on multifd channels only, and there are none",
            ));
        }
        if self.xbzrle && self.channels > 0 {
            return Err(SynthError::Options(
                "deltas are sent on the main channel, and with multifd channels no page is",
            ));
        }
        if !self.content.is_possible() {
            return Err(SynthError::Options(RATIOS));
        }
        if !self.pattern.is_possible() {
            return Err(SynthError::Options(
                "a pattern needs runs of at least one page, or shares between 0 and 1",
            ));
        }
        if self.patience.is_zero() {
            return Err(SynthError::Options("the patience must not be zero"));
        }
        Ok(())
    }

    /// The machine type whose habits these are.
    pub(super) fn machine_type(&self) -> &'static str {
        match (self.version, self.sync_mode) {
            (Version::V7_2, _) => "pc-i440fx-7.2",
            (_, SyncMode::PerSection) => "pc-i440fx-8.0",
            (Version::V10_0, SyncMode::PerRound) => "pc-i440fx-10.0",
            (Version::V11_1, SyncMode::PerRound) => "pc-i440fx-11.1",
        }
    }
}
