//! A guest as the tenant of a core: its cache slabs, for the core's ring to register, and its part of the deferred flush.

use super::live_session::LiveSession;
use crate::ring::{Region, Tenant};
use crate::store::{FlushStep, Slab};
use std::sync::Arc;

/// What a core does for the flush when it has nothing to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlushPart {
    /// Its steps one by one: the core that drives the main channel.
    Main,
    /// Steps only while a primary waits for the flush: see [`crate::store::Store::allow_flush_help`].
    Help,
}

pub(super) struct GuestTenant {
    session: Arc<LiveSession>,
    part: FlushPart,
}

impl GuestTenant {
    pub(super) fn new(session: Arc<LiveSession>, part: FlushPart) -> Box<Self> {
        Box::new(Self { session, part })
    }
}

impl Tenant for GuestTenant {
    fn id(&self) -> u64 {
        u64::from(self.session.id)
    }

    fn region_limit(&self) -> usize {
        self.session.store().map_or(0, |store| store.slab_limit())
    }

    fn region(&self, position: u16) -> Option<&dyn Region> {
        let slab = self.session.store()?.slab(usize::from(position))?;
        Some(slab)
    }

    fn background(&mut self) -> bool {
        let step = self.session.store().map(|store| match self.part {
            FlushPart::Main => store.flush_step(),
            FlushPart::Help => store.help_flush(),
        });
        step.is_some_and(|step| step != FlushStep::Nothing)
    }

    fn has_ended(&self) -> bool {
        self.session.end().is_some()
    }
}

impl Drop for GuestTenant {
    fn drop(&mut self) {
        self.session.part_dropped();
    }
}

impl Region for Slab {
    fn base(&self) -> *mut u8 {
        self.base()
    }

    fn bytes(&self) -> usize {
        self.bytes()
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted()
    }

    fn registered(&self) {
        self.registered();
    }

    fn unregistered(&self) {
        self.unregistered();
    }
}
