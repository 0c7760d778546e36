//! What strangers may take of the receiver: places for connections and for sessions.

use super::state::{ControlState, Kept, Live};
use crate::net::{Accepted, Origin};
use crate::receiver::background::WorkKind;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;

/// Most connections that are accepted and not identified, or wait for the rest of their session. Then the oldest silent one
/// makes room for a new one.
pub(super) const PENDING_MAX: usize = 1024;

/// Most of them from one origin: more than one session has connections.
pub(super) const PENDING_OF_ORIGIN_MAX: usize = 512;

/// How long a connection may be silent if channels wait for it: a primary sends its first bytes at once.
pub(super) const SILENCE_ALLOWED: Duration = Duration::from_secs(3);

/// Most sessions at a time: running ones, and ended ones whose checkpoint is kept. More are refused, since each takes
/// descriptors, threads and memory that nothing else limits.
const SESSIONS_MAX: usize = 256;

/// A guest with less RAM than this is nobody's: where all places are taken, its kept checkpoint makes room for a new session.
const TINY_RAM_BYTES: u64 = 16 << 20;

/// Why there is no place for a session.
#[derive(Debug, Error)]
pub(super) enum NoPlace {
    #[error(
        "{SESSIONS_MAX} sessions are running or kept, which is the limit; `colo-ring discard` gives up the checkpoint of an \
         ended one, `colo-ring end` ends one that runs"
    )]
    Full,
    #[error(
        "{0} sessions of its origin are running or kept, which is the limit (--sessions-per-origin); `colo-ring discard` gives \
         up the checkpoint of an ended one, `colo-ring end` ends one that runs"
    )]
    OfOrigin(usize),
}

impl ControlState {
    /// Makes sure that there is a place for a session of this main channel.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn make_place(&mut self, main: &Accepted) -> Result<(), NoPlace> {
        let max = self.context.options.sessions_per_origin;
        let origin = main.peer.origin.group();
        let live = self.live.iter().filter(|live| live.origin() == origin);
        let kept = self.kept.iter().filter(|kept| kept.origin() == Some(origin));
        if live.count() + kept.count() >= max {
            return Err(NoPlace::OfOrigin(max));
        }
        if self.live.len() + self.kept.len() < SESSIONS_MAX {
            return Ok(());
        }
        match self.give_up_tiny() {
            true => Ok(()),
            false => Err(NoPlace::Full),
        }
    }

    /// Gives up the oldest kept checkpoint of a guest that is too small to be one. False if there is none.
    fn give_up_tiny(&mut self) -> bool {
        let tiny = self.kept.iter().filter(|kept| kept.is_tiny());
        let oldest = tiny.map(|kept| kept.checkpoint.session).min();
        let Some(kept) = oldest.and_then(|session| self.take_kept(session)) else {
            return false;
        };
        self.warn(format!(
            "session {}: its checkpoint is given up, because all {SESSIONS_MAX} places are taken and its guest has only {} KiB \
             of RAM",
            kept.checkpoint.session,
            kept.checkpoint.image.table().total_bytes() >> 10
        ));
        let services = self.context.services.clone();
        self.in_background(WorkKind::Release, move || kept.release(&*services));
        true
    }
}

impl Live {
    fn origin(&self) -> Origin {
        self.session.origin.group()
    }
}

impl Kept {
    /// Where its primary was; none for a process of this host.
    fn origin(&self) -> Option<Origin> {
        let peer: SocketAddr = self.checkpoint.peer.parse().ok()?;
        Some(Origin::Host(peer.ip()).group())
    }

    fn is_tiny(&self) -> bool {
        let is_small = self.checkpoint.image.table().total_bytes() < TINY_RAM_BYTES;
        is_small && self.checkpoint.promotion().is_here()
    }
}
