//! The status of the receiver and its sessions.

use super::disks::{DiskStatus, UnboundDisk};
use super::end::SessionEnd;
use super::guest::{GuestIdentity, SessionTitle};
use super::kept_checkpoint::KeptCheckpoint;
use super::links::GuardStatus;
use super::live_session::LiveSession;
use super::promotion::Promotion;
use crate::host::Placement;
use crate::metrics::{RecentFigures, Summary};
use crate::store::CommittedImage;
use crate::tls::{ServerCredentials, Validity};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Name of the schema of [`StatusReport`].
pub const STATUS_SCHEMA: &str = "colo-ring.status";

/// Its version: raised when a key changes its meaning or goes.
pub const STATUS_VERSION: u32 = 1;

/// Most RAM blocks of a session in a [`StatusReport`], and most bytes of their names: a report of very many sessions stays small.
const BLOCKS_SHOWN: usize = 64;
const NAMES_SHOWN_BYTES: usize = 8 << 10;

/// Longest text of a session that is gone, in bytes.
const TEXT_MAX: usize = 512;

/// The receiver and its sessions.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
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
    /// What connections have their TLS with, where they have.
    #[serde(default)]
    pub tls: Option<TlsStatus>,
    /// Milliseconds since the start.
    pub uptime_ms: u64,
    /// Memory that guests have taken: all of it, also what is reserved for them.
    pub ram_held_bytes: u64,
    /// How much it may be: `--ram-limit`, or what this host and its cgroups leave.
    pub ram_limit_bytes: u64,
    /// Intervals that are missing in the logs of `--hist`, because they could not be written.
    #[serde(default)]
    pub intervals_lost: u64,
    /// Disks that are connected and that no session has taken yet.
    #[serde(default)]
    pub disks: Vec<UnboundDisk>,
    /// Running sessions and those whose checkpoint is kept.
    pub sessions: Vec<SessionStatus>,
}

/// The TLS of all connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TlsStatus {
    /// The directory of its files.
    pub directory: PathBuf,
    /// The receiver's certificate, and until when it is valid.
    #[serde(flatten)]
    pub validity: Validity,
    /// Whether primaries must have a certificate.
    pub verifies_peer: bool,
    /// Identities that may connect; every one that the CA has signed where there are none.
    pub allowed: Vec<String>,
    /// What opens records: always `user`, this process.
    pub records: String,
}

impl TlsStatus {
    /// As it is now.
    pub fn of(credentials: &ServerCredentials) -> Self {
        Self {
            directory: credentials.directory().to_owned(),
            validity: credentials.validity(),
            verifies_peer: credentials.demands_certificate(),
            allowed: credentials.allowed().identities().to_vec(),
            records: "user".to_owned(),
        }
    }
}

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// The initial state is being received: nothing can be restored.
    Precopy,
    /// There is a committed checkpoint, and the primary is connected.
    Protected,
    /// The primary is gone. A committed checkpoint, if there is one, is kept.
    Ended,
    /// Its guest was resumed elsewhere from its last checkpoint.
    Promoted,
    /// Its checkpoint was given up, by an operator or for want of places.
    Discarded,
    /// An earlier receiver's: its committed checkpoint was found in the RAM directory.
    Recovered,
}

impl SessionState {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Precopy,
        Self::Protected,
        Self::Ended,
        Self::Promoted,
        Self::Discarded,
        Self::Recovered,
    ];

    /// The name in tables, metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Protected => "protected",
            Self::Ended => "ended",
            Self::Promoted => "promoted",
            Self::Discarded => "discarded",
            Self::Recovered => "recovered",
        }
    }
}

/// A RAM block of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuestBlock {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// The file that holds its image, absolute, where it has one that a QEMU can map.
    pub file: Option<PathBuf>,
}

impl GuestBlock {
    /// Those of an image, in its primary's order.
    pub(super) fn all(image: &CommittedImage) -> Vec<Self> {
        let block = |(id, block): (_, &crate::blocks::RamBlock)| Self {
            name: block.name_text(),
            used_length: block.used_length,
            file: image.image_file(id).map(Into::into),
        };
        image.table().iter().map(block).collect()
    }
}

/// One session.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SessionStatus {
    /// Its number in this receiver, from 1.
    pub session: u32,
    /// Its guest's name: the operator's, or its UUID; none if it has neither.
    #[serde(default)]
    pub guest: Option<String>,
    /// Whether that name is one of a rule of this receiver: what a guard says proves nothing.
    #[serde(skip)]
    pub is_named_by_rule: bool,
    /// Its guest's UUID.
    #[serde(default)]
    pub uuid: Option<String>,
    /// The address that its main channel came to.
    #[serde(default)]
    pub listener: Option<String>,
    /// Where its main channel came from.
    pub peer: String,
    /// Whose certificate its connections have, with TLS.
    #[serde(default)]
    pub identity: Option<String>,
    /// Version and cipher of its TLS.
    #[serde(default)]
    pub tls: Option<String>,
    /// Where it stands.
    pub state: SessionState,
    /// Why it ended.
    pub end: Option<String>,
    /// Whether it ended in an orderly way, and not by an error.
    pub orderly: Option<bool>,
    /// Milliseconds without progress, if it is stalled: longer than is usual for it.
    #[serde(default)]
    pub stalled_ms: Option<u64>,
    /// Whether it ended because its primary was lost: not by the receiver's end, and not by a failover.
    #[serde(default)]
    pub lost: bool,
    /// The state of a failover to its checkpoint, if one was tried.
    #[serde(default)]
    pub promotion: Option<String>,
    /// The machine type, once known.
    pub machine: Option<String>,
    /// Bytes over all RAM blocks, once known.
    pub ram_bytes: Option<u64>,
    /// The RAM blocks, once known; in a [`StatusReport`] the largest 64 at most, fewer if their names are very long.
    #[serde(default)]
    pub blocks: Vec<GuestBlock>,
    /// Its guard, if there is or was one.
    #[serde(default)]
    pub guard: Option<GuardStatus>,
    /// The guest's disks, from the first commit on.
    #[serde(default)]
    pub disks: Vec<DiskStatus>,
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
    /// The pool of cache slots in bytes; none with a mirror, and after the session's end.
    pub pool_bytes: Option<u64>,
    /// As much of it is in use just now.
    #[serde(default)]
    pub pool_used_bytes: Option<u64>,
    /// Slabs of the pool that were made while pages waited for them.
    pub pool_slabs_inline: u64,
    /// Steps down from the options asked for: each says what and why.
    pub fallbacks: Vec<String>,
    /// Its pauses of the last minutes, while it runs.
    #[serde(default)]
    pub recent: Option<RecentFigures>,
    /// Figures of its checkpoints.
    pub summary: Summary,
}

impl SessionStatus {
    /// How messages call it. A UUID is no name of the operator's, and too long for every line.
    pub fn title(&self) -> SessionTitle {
        let name = self.guest.as_ref().filter(|_| self.guest != self.uuid);
        SessionTitle {
            session: self.session,
            name: name.and_then(|name| name.parse().ok()),
            uuid: self.uuid.as_ref().and_then(|uuid| uuid.parse().ok()),
        }
    }

    /// Of a live session, or of one that has just ended.
    pub(super) fn of(session: &LiveSession, summary: Summary) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (counters, end) = (&session.counters, session.end());
        let image = session.store().map(|store| &**store.committed());
        let pool = session.store().and_then(|store| store.pool_use());
        let own = Self {
            end: end.map(ToString::to_string),
            orderly: end.map(SessionEnd::is_orderly),
            lost: end.is_some_and(SessionEnd::is_loss),
            ram_bytes: image.map(|image| image.table().total_bytes()),
            blocks: image.map_or_else(Vec::new, GuestBlock::all),
            last_pause_ns: read(&counters.pause_ns),
            pages: read(&counters.pages),
            zero_pages: read(&counters.zero_pages),
            bytes: read(&counters.bytes),
            pool_bytes: pool.filter(|_| end.is_none()).map(|pool| pool.bytes),
            pool_used_bytes: pool.filter(|_| end.is_none()).map(|pool| pool.used_bytes()),
            pool_slabs_inline: pool.map_or(0, |pool| pool.inline_growth),
            fallbacks: session.fallbacks().to_vec(),
            guard: session.output.guard(),
            identity: session
                .tls
                .as_ref()
                .and_then(|tls| tls.identity.as_ref())
                .map(ToString::to_string),
            tls: session.tls.as_ref().map(|tls| tls.suite.clone()),
            ..Self::new(session.id, &session.guest, summary)
        };
        let is_ended = end.is_some();
        let own = match session.checkpoint() {
            Some(checkpoint) => own.with(checkpoint, session.uptime()),
            None => own,
        };
        let state = match (own.state, own.checkpoint) {
            (SessionState::Promoted, _) => SessionState::Promoted,
            _ if is_ended => SessionState::Ended,
            (_, None) => SessionState::Precopy,
            (_, Some(_)) => SessionState::Protected,
        };
        Self { state, ..own }
    }

    /// Of a session of an earlier receiver.
    pub(super) fn recovered(checkpoint: &KeptCheckpoint, summary: Summary, uptime: Duration) -> Self {
        let end = SessionEnd::Recovered;
        Self {
            state: SessionState::Recovered,
            end: Some(end.to_string()),
            orderly: Some(end.is_orderly()),
            lost: end.is_loss(),
            ram_bytes: Some(checkpoint.image.table().total_bytes()),
            blocks: GuestBlock::all(&checkpoint.image),
            ..Self::new(checkpoint.session, &checkpoint.guest, summary)
        }
        .with(checkpoint, uptime)
    }

    /// The same, with what the checkpoint is now.
    #[must_use]
    pub(super) fn with(self, checkpoint: &KeptCheckpoint, uptime: Duration) -> Self {
        let (number, promotion) = (checkpoint.number(), checkpoint.promotion());
        let age = checkpoint.age(uptime).as_millis();
        Self {
            state: match *promotion {
                Promotion::Promoted => SessionState::Promoted,
                _ => self.state,
            },
            promotion: promotion.description(),
            guest: checkpoint.guest.name().map(String::from),
            is_named_by_rule: checkpoint.guest.has_rule(),
            disks: checkpoint.disks.statuses(),
            machine: Some(checkpoint.description.machine_type.clone()),
            checkpoint: number.map(|id| id.0),
            checkpoint_age_ms: number.map(|_| u64::try_from(age).unwrap_or(u64::MAX)),
            ..self
        }
    }

    /// What stays of a session that is gone: its figures, and no texts that its primary has chosen.
    #[must_use]
    pub(super) fn without_details(mut self) -> Self {
        self.blocks = Vec::new();
        self.fallbacks = Vec::new();
        self.disks = Vec::new();
        for text in [&mut self.end, &mut self.promotion, &mut self.machine]
            .into_iter()
            .flatten()
        {
            let end = (0..=text.len().min(TEXT_MAX)).rfind(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or(0));
        }
        self
    }

    /// Without the small ones of very many RAM blocks, or of such with very long names.
    #[must_use]
    pub(super) fn with_few_blocks(mut self) -> Self {
        let lengths = self.blocks.iter().map(|block| block.name.len());
        if self.blocks.len() > BLOCKS_SHOWN || lengths.sum::<usize>() > NAMES_SHOWN_BYTES {
            self.blocks
                .sort_by_key(|block| std::cmp::Reverse(block.used_length));
            let mut names_bytes = 0;
            let is_shown = |block: &GuestBlock| {
                names_bytes += block.name.len();
                names_bytes <= NAMES_SHOWN_BYTES
            };
            let shown = self.blocks.iter().take(BLOCKS_SHOWN).map(is_shown);
            let shown = shown.take_while(|is_shown| *is_shown).count();
            self.blocks.truncate(shown);
            self.blocks.shrink_to_fit();
        }
        self
    }

    /// Of a session of which nothing is known.
    fn new(session: u32, guest: &GuestIdentity, summary: Summary) -> Self {
        Self {
            session,
            guest: guest.name().map(String::from),
            is_named_by_rule: guest.has_rule(),
            uuid: guest.uuid().map(String::from),
            listener: guest.listener.clone(),
            peer: guest.peer.clone(),
            identity: None,
            tls: None,
            state: SessionState::Precopy,
            end: None,
            orderly: None,
            stalled_ms: None,
            lost: false,
            promotion: None,
            machine: None,
            ram_bytes: None,
            blocks: Vec::new(),
            guard: None,
            disks: Vec::new(),
            checkpoint: None,
            checkpoint_age_ms: None,
            last_pause_ns: 0,
            pages: 0,
            zero_pages: 0,
            bytes: 0,
            pool_bytes: None,
            pool_used_bytes: None,
            pool_slabs_inline: 0,
            fallbacks: Vec::new(),
            recent: None,
            summary,
        }
    }
}
