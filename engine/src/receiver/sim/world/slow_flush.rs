//! The tenant of a guest whose flush takes many turns of the core, as that of a large guest does: the simulated guests are
//! so small that a primary's next pages could not arrive before the end of the flush.

use super::super::rng::Rng;
use crate::receiver::live_session::LiveSession;
use crate::ring::{Region, Tenant};
use std::sync::{Arc, OnceLock, Weak};

/// A session that is attached after its tenants are admitted.
pub(super) type Attached = Arc<OnceLock<Weak<LiveSession>>>;

/// A tenant that takes a step of the flush in one of so many turns.
pub(super) struct SlowFlush {
    pub(super) tenant: Box<dyn Tenant>,
    pub(super) session: Attached,
    pub(super) turns: usize,
    pub(super) rng: Rng,
}

impl SlowFlush {
    fn is_flushing(&self) -> bool {
        let session = self.session.get().and_then(Weak::upgrade);
        session.is_some_and(|session| session.store().is_some_and(|store| store.is_flushing()))
    }
}

impl Tenant for SlowFlush {
    fn id(&self) -> u64 {
        self.tenant.id()
    }

    fn region_limit(&self) -> usize {
        self.tenant.region_limit()
    }

    fn region(&self, position: u16) -> Option<&dyn Region> {
        self.tenant.region(position)
    }

    fn background(&mut self) -> bool {
        let waits = self.is_flushing() && !self.rng.one_in(self.turns);
        waits || self.tenant.background()
    }

    fn has_ended(&self) -> bool {
        self.tenant.has_ended()
    }
}
