//! What `colo-ring synth` reports: the options in force, and what came of the session.

use crate::options::Size;
use crate::output::{mebibytes, table};
use crate::page_compression::PageCompression;
use crate::primary::{Content, Distribution, Figures, OwnDelay, Pattern, PhaseFigures, Preset, Version};
use colo_ring::host::Machine;
use colo_ring::metrics::{display_nanoseconds, with_suffix};
use colo_ring::units::PAGE_BYTES;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// What decides when checkpoints begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Schedule {
    OpenLoop,
    ClosedLoop,
    None,
}

/// The options in force, as reports echo them.
#[derive(Serialize)]
pub(super) struct Described {
    pub(super) preset: Option<Preset>,
    pub(super) ram_bytes: u64,
    pub(super) channels: u8,
    pub(super) pages: Distribution,
    pub(super) pattern: Pattern,
    pub(super) zero_share: f64,
    pub(super) content: Content,
    #[serde(flatten)]
    pub(super) compression: PageCompression,
    pub(super) xbzrle: bool,
    pub(super) interval_ms: u128,
    pub(super) schedule: Schedule,
    pub(super) checkpoints: u64,
    pub(super) seed: u64,
    pub(super) version: Version,
    pub(super) disks: u8,
    pub(super) disk_writes: u32,
}

/// What a session has sent.
#[derive(Serialize)]
pub(super) struct Sent {
    pub(super) checkpoints: u64,
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) bytes: u64,
    /// Content of pages, before it was compressed and on the wire.
    pub(super) page_bytes: u64,
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
#[derive(Serialize)]
pub(super) struct LiveReport {
    pub(super) schema: &'static str,
    pub(super) schema_version: u32,
    pub(super) to: String,
    pub(super) options: Described,
    pub(super) machine: Machine,
    pub(super) precopy_ns: u64,
    #[serde(flatten)]
    pub(super) sent: Sent,
    pub(super) disk_blocks: u64,
    pub(super) phases: Vec<PhaseFigures>,
    pub(super) own_delay: OwnDelay,
    pub(super) warnings: Vec<String>,
}

/// What came of a capture.
#[derive(Serialize)]
pub(super) struct CaptureReport<'a> {
    pub(super) schema: &'static str,
    pub(super) schema_version: u32,
    pub(super) out: &'a Path,
    pub(super) options: Described,
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
