//! What a session uses of the receiver that it belongs to.

use super::decode::Workers;
use super::disks::SessionDisks;
use super::guest::Guests;
use super::guest_memory::{GuestMemory, MemoryError};
use super::links::Links;
use super::live_session::LiveSession;
use super::remark::Remark;
use crate::blocks::BlockTable;
use crate::disk::DiskError;
use crate::metrics::SampleQueue;
use crate::store::Flusher;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// Work that takes milliseconds to seconds.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// What all sessions of a receiver share.
pub(super) struct Shared {
    /// The receiver's start: the zero of its times.
    pub(super) started: Instant,
    /// Takes measurements of checkpoints.
    pub(super) samples: SampleQueue,
    /// Flushes the checkpoints of all guests.
    pub(super) flusher: Arc<Flusher>,
    /// Decode compressed payloads of all guests.
    pub(super) workers: Arc<Workers>,
    /// Who the guests of all sessions are.
    pub(super) guests: Arc<Guests>,
    /// Links to guards of primaries.
    pub(super) links: Arc<Links>,
    /// Longest device state that a receiving core writes to its file itself: see [`INLINE_STATE_BYTES`].
    pub(super) inline_state_bytes: usize,
}

/// Twice what was seen of a device state. To copy that takes some tens of microseconds, as long as to wake another thread.
pub(super) const INLINE_STATE_BYTES: usize = 1 << 20;

/// The receiver as its sessions see it. None of this is called per packet.
pub(super) trait Services: Send + Sync {
    /// What all sessions share.
    fn shared(&self) -> &Shared;

    /// Makes the memory of a session's guest. Called once a session, in the background.
    ///
    /// # Errors
    /// If a limit of the receiver or of the host does not allow it.
    fn make_memory(&self, session: u32, table: Arc<BlockTable>) -> Result<GuestMemory, MemoryError>;

    /// Binds the disks of a session that commits for the first time. Does not wait.
    ///
    /// # Errors
    /// If it is not clear which they are, or one of them is not ready.
    fn bind_disks(
        &self,
        session: &Arc<LiveSession>,
        uuid: Option<[u8; 16]>,
    ) -> Result<SessionDisks, DiskError>;

    /// Does work on another thread.
    ///
    /// # Errors
    /// If there is no thread for it.
    fn run_in_background(&self, work: Work) -> io::Result<()>;

    /// Makes the control thread look at its sessions: one of them has changed.
    fn notify_control(&self);

    /// Warns the operator.
    fn warn(&self, remark: Remark);

    /// The same of a session, which anyone can begin: limited for each origin.
    fn warn_of(&self, session: &LiveSession, text: String);
}
