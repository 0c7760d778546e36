//! The presence of a guest whose flush takes many turns of the core, as that of a large guest does: the simulated guests are
//! so small that a primary's next pages could not arrive before the end of the flush.

use super::super::rng::Rng;
use crate::receiver::live_session::LiveSession;
use crate::ring::{Region, Tenant};
use std::sync::{Arc, OnceLock, Weak};

/// A session that is attached after its presences are admitted.
pub(super) type Attached = Arc<OnceLock<Weak<LiveSession>>>;

/// A presence that takes a step of the flush in one of so many turns.
pub(super) struct SlowFlush {
    pub(super) presence: Box<dyn Tenant>,
    pub(super) guest: Attached,
    pub(super) turns: usize,
    pub(super) rng: Rng,
}

impl SlowFlush {
    fn is_flushing(&self) -> bool {
        let guest = self.guest.get().and_then(Weak::upgrade);
        guest.is_some_and(|guest| guest.store().is_some_and(|store| store.is_flushing()))
    }
}

impl Tenant for SlowFlush {
    fn id(&self) -> u64 {
        self.presence.id()
    }

    fn region_limit(&self) -> usize {
        self.presence.region_limit()
    }

    fn region(&self, position: u16) -> Option<&dyn Region> {
        self.presence.region(position)
    }

    fn background(&mut self) -> bool {
        let waits = self.is_flushing() && !self.rng.one_in(self.turns);
        waits || self.presence.background()
    }

    fn has_ended(&self) -> bool {
        self.presence.has_ended()
    }
}
