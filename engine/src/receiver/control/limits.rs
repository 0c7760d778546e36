//! What strangers may take of the receiver: places for connections and for sessions.

use super::make_room::Lack;
use super::state::{ControlState, Kept, Live};
use crate::budget::{BudgetError, Lease};
use crate::net::Origin;
use crate::receiver::background::WorkKind;
use crate::receiver::connected::Connected;
use crate::receiver::guest_memory::session_bytes;
use crate::receiver::live_session::LiveSession;
use crate::receiver::main_buffer::MainBuffer;
use crate::receiver::remark::Remark;
use crate::text::mebibytes;
use crate::wire::stream::MAIN_MAGIC;
use std::collections::TryReserveError;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;

/// Most connections that are accepted and not identified, or wait for the rest of their session. Then the oldest silent one
/// makes room for a new one.
pub(super) const PENDING_MAX: usize = 1024;

/// Most of them from one origin: more than one session has connections.
pub(super) const PENDING_OF_ORIGIN_MAX: usize = 512;

/// How long a connection of a primary may take to say what it is: another makes room before it, if there is one.
pub(super) const SILENCE_OF_A_PRIMARY: Duration = Duration::from_secs(1);

/// How long a connection may be silent if channels wait for it: a primary sends its first bytes at once.
pub(super) const SILENCE_ALLOWED: Duration = Duration::from_secs(3);

/// Most sessions at a time: running ones, and ended ones whose checkpoint is kept. More are refused, since each takes
/// descriptors, threads and memory that nothing else limits.
const SESSIONS_MAX: usize = 256;

/// A guest with less RAM than this is nobody's: where all places are taken, its kept checkpoint makes room for a new session.
const TINY_RAM_BYTES: u64 = 16 << 20;

/// Guests of so little RAM that may exist nowhere else: so many are kept of one origin, and so many of all. Anyone can begin and end such
/// migrations, and what is the only copy is given up for nothing else.
const TINY_ONLY_COPIES_MAX: [usize; 2] = [8, 64];

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
    #[error(transparent)]
    Budget(#[from] BudgetError),
    #[error("there is no memory for a session: {0}")]
    Memory(#[from] TryReserveError),
}

impl NoPlace {
    /// What first copies that stand still could make room for.
    pub(super) fn lack(&self) -> Option<Lack<'_>> {
        match self {
            Self::Full => Some(Lack::Place),
            Self::OfOrigin(_) => Some(Lack::PlaceOfOrigin),
            Self::Budget(lack) => Some(Lack::Budget(lack)),
            Self::Memory(_) => None,
        }
    }
}

impl ControlState {
    /// A place for a session of this main channel: what it takes of the budget, and a buffer for that channel.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn make_place(&mut self, main: &Connected) -> Result<(Lease, MainBuffer), NoPlace> {
        self.make_room_for_session(main)?;
        let lease = self
            .context
            .budget
            .take(session_bytes(self.context.options.channels, main.tls.is_some()))?;
        Ok((lease, MainBuffer::new(&MAIN_MAGIC)?))
    }

    fn make_room_for_session(&mut self, main: &Connected) -> Result<(), NoPlace> {
        let max = self.context.options.limits.sessions_per_origin;
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

    /// Gives up the oldest kept checkpoint of a guest that is too small to be one, and that exists elsewhere. False if there is none.
    fn give_up_tiny(&mut self) -> bool {
        let tiny = self
            .kept
            .iter()
            .filter(|kept| kept.is_tiny() && !kept.is_only_copy);
        let oldest = tiny.map(|kept| kept.checkpoint.session).min();
        let Some(kept) = oldest.and_then(|session| self.take_kept(session)) else {
            return false;
        };
        let title = kept.checkpoint.guest.title();
        let text = format!(
            "session {title}: its checkpoint is given up, because all {SESSIONS_MAX} places are taken and its guest has only {} \
             of RAM",
            mebibytes(kept.checkpoint.image.table().total_bytes())
        );
        self.warn(Remark::of(&title, text));
        let services = self.context.services.clone();
        self.in_background(WorkKind::Release, move || kept.release(&*services));
        true
    }
}

impl ControlState {
    /// One more guest that may exist nowhere else is to be kept. If it is tiny, and there are many such, the oldest goes: of its own origin, or
    /// of all.
    pub(super) fn make_room_for_only_copy(&mut self, session: &LiveSession) {
        let bytes = session
            .store()
            .map_or(0, |store| store.committed().table().total_bytes());
        if bytes >= TINY_RAM_BYTES {
            return;
        }
        let origin = match session.origin.group() {
            host @ Origin::Host(_) => Some(host),
            Origin::Process(_) => None,
        };
        let [of_origin_max, all_max] = TINY_ONLY_COPIES_MAX;
        let tiny = self
            .kept
            .iter()
            .filter(|kept| kept.is_tiny() && kept.is_only_copy);
        let tiny: Vec<_> = tiny
            .map(|kept| (kept.checkpoint.session, kept.origin()))
            .collect();
        let of_origin = tiny.iter().filter(|(_, other)| *other == origin);
        let of_origin: Vec<_> = of_origin.map(|(session, _)| *session).collect();
        let oldest = match () {
            () if of_origin.len() >= of_origin_max => of_origin.into_iter().min(),
            () if tiny.len() >= all_max => tiny.into_iter().map(|(session, _)| session).min(),
            () => None,
        };
        let Some(kept) = oldest.and_then(|session| self.take_kept(session)) else {
            return;
        };
        let title = kept.checkpoint.guest.title();
        let text = format!(
            "session {title}: its checkpoint is given up, because its guest has only {} of RAM, and more such guests than {of_origin_max} of \
             one host, or {all_max} of all, have migrated here without COLO",
            mebibytes(kept.checkpoint.image.table().total_bytes())
        );
        self.warn(Remark::of(&title, text));
        let services = self.context.services.clone();
        self.in_background(WorkKind::Release, move || kept.release(&*services));
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
        let peer: SocketAddr = self.checkpoint.guest.peer.parse().ok()?;
        Some(Origin::Host(peer.ip()).group())
    }

    fn is_tiny(&self) -> bool {
        let is_small = self.checkpoint.image.table().total_bytes() < TINY_RAM_BYTES;
        is_small && self.checkpoint.promotion().is_here()
    }
}
