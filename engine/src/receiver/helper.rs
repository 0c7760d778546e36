//! A guest's presence on a core that receives for it only now and then: it keeps the guest's slabs registered with that
//! core's ring, so that a channel may be handed over at any time, and does a part of the flush when a primary waits for it.

use super::guest::Guest;
use crate::ring::{Buffers, Endpoint, Loss, ReceivePlan};
use crate::store::{FlushStep, Slab};
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::Arc;

pub(super) struct Helper {
    guest: Arc<Guest>,
}

impl Helper {
    pub(super) fn new(guest: Arc<Guest>) -> Self {
        Self { guest }
    }
}

impl Endpoint for Helper {
    // Nothing is ever received on it here.
    fn fd(&self) -> RawFd {
        self.guest.main_fd()
    }

    fn guest(&self) -> u64 {
        u64::from(self.guest.id)
    }

    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        None
    }

    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn lost(&mut self, _loss: Loss) {}

    fn resume(&mut self) -> ControlFlow<()> {
        match self.guest.end() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    fn attached(&mut self, _core: usize, _buffers: Buffers) {}

    fn slab_limit(&self) -> usize {
        self.guest.store().map_or(0, |store| store.slab_limit())
    }

    fn slab(&self, position: usize) -> Option<&Slab> {
        self.guest.store()?.slab(position)
    }

    fn use_buffers(&mut self, _buffers: Buffers) {}

    fn background(&mut self) -> bool {
        let store = self.guest.store();
        store.is_some_and(|store| store.help_flush() != FlushStep::Nothing)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.guest.leave();
    }
}
