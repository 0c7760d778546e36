//! What the receiver says about itself.
#![forbid(unsafe_code)]

use super::end::SessionEnd;
use super::guest::Guest;
use super::promotion::Promotion;
use crate::host::Placement;
use crate::metrics::Summary;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Name of the schema of [`StatusReport`].
pub const STATUS_SCHEMA: &str = "colo-ring.status";

/// Its version: raised when a key changes its meaning or goes.
pub const STATUS_VERSION: u32 = 1;

/// The receiver and its sessions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusReport {
    /// Always [`STATUS_SCHEMA`].
    pub schema: String,
    /// See [`STATUS_VERSION`].
    pub schema_version: u32,
    /// Addresses with their real ports.
    pub listen: Vec<String>,
    /// The backend in force.
    pub backend: String,
    /// What io_uring offers, where it is used.
    pub ring: Option<String>,
    /// Cores in use.
    pub cores: Vec<usize>,
    /// On which NUMA nodes they are, and guests' memory is to lie.
    #[serde(default)]
    pub placement: Placement,
    /// Milliseconds since the start.
    pub uptime_ms: u64,
    /// Guest RAM held, in bytes, and how much may be.
    pub ram_held_bytes: u64,
    /// See `--ram-limit`.
    pub ram_limit_bytes: u64,
    /// Running sessions and those whose checkpoint is kept.
    pub sessions: Vec<SessionStatus>,
}

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// The initial state is on its way: nothing can be restored.
    Precopy,
    /// There is a committed checkpoint, and the primary is connected.
    Protected,
    /// The primary is gone. A committed checkpoint, if there is one, is kept.
    Ended,
    /// Its guest was resumed elsewhere from its last checkpoint.
    Promoted,
    /// An earlier receiver's: its committed checkpoint was found in the RAM directory.
    Recovered,
}

/// A RAM block of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestBlock {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// The file that holds its image, absolute, where it has one that a QEMU can map.
    pub file: Option<PathBuf>,
}

impl GuestBlock {
    /// Those of a guest, in its primary's order; none before they are known.
    pub(super) fn all(guest: &Guest) -> Vec<Self> {
        let Some(committed) = guest.committed() else {
            return Vec::new();
        };
        let block = |(id, block): (_, &crate::blocks::RamBlock)| Self {
            name: block.display_name().into_owned(),
            used_length: block.used_length,
            file: committed.image_file(id).map(Into::into),
        };
        committed.table().iter().map(block).collect()
    }
}

/// One session.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its number in this receiver, from 1.
    pub session: u32,
    /// Where its main channel came from.
    pub peer: String,
    /// Where it stands.
    pub state: SessionState,
    /// Why it ended.
    pub end: Option<String>,
    /// Whether it ended as sessions do, and not by an error.
    pub orderly: Option<bool>,
    /// Whether it ended because its primary was lost: not by the receiver's end, and not by a failover.
    #[serde(default)]
    pub lost: bool,
    /// What a failover has done or does with its checkpoint, if one was tried.
    #[serde(default)]
    pub promotion: Option<String>,
    /// The machine type, once known.
    pub machine: Option<String>,
    /// Bytes over all RAM blocks, once known.
    pub ram_bytes: Option<u64>,
    /// The RAM blocks, once known.
    #[serde(default)]
    pub blocks: Vec<GuestBlock>,
    /// The last committed checkpoint; 0 is the state at the end of precopy.
    pub checkpoint: Option<u64>,
    /// Its age in milliseconds.
    pub checkpoint_age_ms: Option<u64>,
    /// The last pause as seen here, in nanoseconds.
    pub last_pause_ns: u64,
    /// Pages received with content, over the whole session.
    pub pages: u64,
    /// Pages received as zero.
    pub zero_pages: u64,
    /// Bytes received on all channels.
    pub bytes: u64,
    /// The pool of cache slots in bytes; none with the placement mirror, and after the session's end.
    pub pool_bytes: Option<u64>,
    /// Slabs of the pool that were made while pages waited for them.
    pub pool_slabs_in_haste: u64,
    /// Steps down from the options asked for: each says what and why.
    pub fallbacks: Vec<String>,
    /// Figures of its checkpoints.
    pub summary: Summary,
}

impl SessionStatus {
    pub(super) fn of(guest: &Guest, summary: Summary) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &guest.counters;
        let checkpoint = guest.committed().and_then(|committed| committed.checkpoint());
        let pool = guest.store().and_then(|store| store.pool_use());
        let now = u64::try_from(guest.services.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let before = u64::try_from(guest.age_at_start.as_nanos()).unwrap_or(u64::MAX);
        let since = now.saturating_sub(read(&counters.committed_at_ns));
        let age = checkpoint.map(|_| since.saturating_add(before) / 1_000_000);
        let promotion = guest.promotion();
        let state = match (guest.end(), checkpoint) {
            _ if *promotion == Promotion::Promoted => SessionState::Promoted,
            (Some(SessionEnd::Recovered), _) => SessionState::Recovered,
            (Some(_), _) => SessionState::Ended,
            (None, None) => SessionState::Precopy,
            (None, Some(_)) => SessionState::Protected,
        };
        Self {
            session: guest.id,
            peer: guest.peer.clone(),
            state,
            end: guest.end().map(ToString::to_string),
            orderly: guest.end().map(|end| end.is_orderly()),
            lost: guest.end().is_some_and(SessionEnd::is_loss),
            promotion: promotion.words(),
            machine: guest.record.get().map(|record| record.machine_type.clone()),
            ram_bytes: guest.committed().map(|committed| committed.table().total_bytes()),
            blocks: GuestBlock::all(guest),
            checkpoint: checkpoint.map(|id| id.0),
            checkpoint_age_ms: age,
            last_pause_ns: read(&counters.pause_ns),
            pages: read(&counters.pages),
            zero_pages: read(&counters.zero_pages),
            bytes: read(&counters.bytes),
            pool_bytes: pool.filter(|_| guest.end().is_none()).map(|pool| pool.bytes),
            pool_slabs_in_haste: pool.map_or(0, |pool| pool.inline_growth),
            fallbacks: guest.fallbacks().to_vec(),
            summary,
        }
    }
}
