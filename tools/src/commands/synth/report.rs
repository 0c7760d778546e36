//! What `colo-ring synth` reports: the options in force, and what came of the session.

use crate::options::Size;
use crate::output::{mebibytes, table};
use crate::page_compression::PageCompression;
use crate::primary::{Content, Distribution, Figures, OwnDelay, Pattern, PhaseFigures, Preset, Version};
use colo_ring::host::Machine;
use colo_ring::metrics::{display_nanoseconds, with_suffix};
use colo_ring::units::PAGE_BYTES;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// What decides when checkpoints begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Schedule {
    /// The clock: a slow checkpoint makes those after it wait.
    OpenLoop,
    /// The clock, which a slow checkpoint moves.
    ClosedLoop,
    /// The answers: each begins when the one before has ended.
    None,
}

/// The options in force, as reports echo them.
#[derive(Serialize, JsonSchema)]
pub(super) struct Described {
    /// The preset; null without one.
    pub(super) preset: Option<Preset>,
    /// The guest's RAM.
    pub(super) ram_bytes: u64,
    /// multifd channels; 0 is plain mode.
    pub(super) channels: u8,
    /// How many pages a checkpoint has, as `--pages` writes it.
    #[schemars(with = "String")]
    pub(super) pages: Distribution,
    /// Which pages are written, as `--pattern` writes it.
    #[schemars(with = "String")]
    pub(super) pattern: Pattern,
    /// The share of zero pages.
    pub(super) zero_share: f64,
    /// What pages hold.
    pub(super) content: Content,
    #[serde(flatten)]
    pub(super) compression: PageCompression,
    /// Whether pages are sent as differences.
    pub(super) xbzrle: bool,
    /// Time between two checkpoints.
    pub(super) interval_ms: u128,
    /// What decides when checkpoints begin.
    pub(super) schedule: Schedule,
    /// Checkpoints to make.
    pub(super) checkpoints: u64,
    /// Seed of all that is random.
    pub(super) seed: u64,
    /// The version of QEMU whose stream is made.
    #[schemars(with = "String")]
    pub(super) version: Version,
    /// Disks that are mirrored.
    pub(super) disks: u8,
    /// Writes to each disk between two checkpoints.
    pub(super) disk_writes: u32,
}

/// What a session has sent.
#[derive(Serialize, JsonSchema)]
pub(super) struct Sent {
    /// Checkpoints.
    pub(super) checkpoints: u64,
    /// Pages with content.
    pub(super) pages: u64,
    /// Zero pages.
    pub(super) zero_pages: u64,
    /// Bytes on all channels.
    pub(super) bytes: u64,
    /// Content of pages, before it was compressed and on the wire.
    pub(super) page_bytes: u64,
    /// The same, on the wire.
    pub(super) payload_bytes: u64,
}

impl Sent {
    pub(super) fn of(figures: &Figures) -> Self {
        Self {
            checkpoints: figures.checkpoints,
            pages: figures.pages,
            zero_pages: figures.zero_pages,
            bytes: figures.bytes,
            page_bytes: figures.pages * PAGE_BYTES,
            payload_bytes: figures.payload_bytes,
        }
    }

    /// Its sums in words.
    pub(super) fn render(&self, options: &Described) -> String {
        let mut text = format!(
            "{} pages, {} zero pages, {:.1} MiB on the wire",
            self.pages,
            self.zero_pages,
            mebibytes(self.bytes)
        );
        if options.compression.is_some() || options.xbzrle {
            text.push_str(&format!(
                ", {:.1} MiB of pages in {:.1} MiB of payload ({:.2} to 1)",
                mebibytes(self.page_bytes),
                mebibytes(self.payload_bytes),
                self.page_bytes as f64 / self.payload_bytes.max(1) as f64
            ));
        }
        text
    }
}

/// What came of a live session.
#[derive(Serialize, JsonSchema)]
pub(crate) struct LiveReport {
    pub(super) schema: &'static str,
    pub(super) schema_version: u32,
    /// The secondary's address.
    pub(super) to: String,
    /// The options in force.
    pub(super) options: Described,
    /// Where it ran.
    pub(super) machine: Machine,
    /// How long the first copy took.
    pub(super) precopy_ns: u64,
    #[serde(flatten)]
    pub(super) sent: Sent,
    /// Blocks that were written to disks.
    pub(super) disk_blocks: u64,
    /// Figures by phase, by the primary's clock.
    pub(super) phases: Vec<PhaseFigures>,
    /// By how much checkpoints began late because of this side.
    pub(super) own_delay: OwnDelay,
    /// What a reader of the figures must know.
    pub(super) warnings: Vec<String>,
}

/// What came of a capture.
#[derive(Serialize, JsonSchema)]
pub(crate) struct CaptureReport<'a> {
    pub(super) schema: &'static str,
    pub(super) schema_version: u32,
    /// The capture file.
    pub(super) out: &'a Path,
    /// The options in force.
    pub(super) options: Described,
    /// Where it ran.
    pub(super) machine: Machine,
    #[serde(flatten)]
    pub(super) sent: Sent,
}

pub(super) const SCHEMA: &str = "colo-ring.synth";
pub(super) const SCHEMA_VERSION: u32 = 1;

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "as QEMU {}, {} of RAM, {} channels; {} pages a checkpoint, {}, {} % zero, the others {}; ",
            self.version,
            Size(self.ram_bytes),
            self.channels,
            self.pages,
            self.pattern,
            self.zero_share * 100.0,
            self.content,
        )?;
        if self.disks > 0 {
            write!(f, "{} blocks to each of {} disks; ", self.disk_writes, self.disks)?;
        }
        if self.compression.is_some() {
            write!(f, "compressed with {}; ", self.compression)?;
        }
        if self.xbzrle {
            f.write_str("deltas of pages that are sent again (XBZRLE); ")?;
        }
        match self.schedule {
            Schedule::OpenLoop => write!(f, "every {} ms, open loop", self.interval_ms)?,
            Schedule::ClosedLoop => write!(f, "every {} ms, closed loop", self.interval_ms)?,
            Schedule::None => f.write_str("as fast as it goes")?,
        }
        write!(f, "; seed {}", self.seed)
    }
}

impl LiveReport {
    pub(super) fn render(&self, run: Option<&Path>) -> String {
        let head = PhaseFigures::HEAD.map(str::to_owned).to_vec();
        let rows: Vec<_> = std::iter::once(head)
            .chain(self.phases.iter().map(PhaseFigures::row))
            .collect();
        let counted = match self.options.schedule {
            Schedule::OpenLoop => {
                "received, loaded: from when SEND was due to RECEIVED and LOADED. waited: the part of it before the \
                 checkpoint's turn,\nbecause others took longer than the interval. service: SEND written to LOADED."
            }
            Schedule::ClosedLoop => {
                "received, loaded: SEND to RECEIVED and LOADED. A stall is counted once, however many checkpoints it \
                 moved."
            }
            Schedule::None => {
                "received, loaded: SEND to RECEIVED and LOADED. There is no schedule that anything could wait for."
            }
        };
        let mut text = format!(
            "{}\n{}: {}\nprecopy in {}\n\n{}\n{}\nreply: REQUEST to REPLY. {counted}\n",
            self.machine,
            self.to,
            self.options,
            display_nanoseconds(self.precopy_ns),
            table(&rows),
            self.sent.render(&self.options),
        );
        if let Some(prefix) = run {
            text.push_str(&format!("run: {}\n", with_suffix(prefix, ".run.json").display()));
        }
        text
    }
}
