//! For tests: a connection that receives nothing, and what happens to it.

use super::{Connection, Loss, Move, ReceivePlan};
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What happened to connections.
#[derive(Debug, Default)]
pub(super) struct ParkedFate {
    losses: AtomicUsize,
    drops: AtomicUsize,
    /// The core that drives the newest one.
    core: AtomicUsize,
}

impl ParkedFate {
    pub(super) fn losses_and_drops(&self) -> (usize, usize) {
        (
            self.losses.load(Ordering::Relaxed),
            self.drops.load(Ordering::Relaxed),
        )
    }

    pub(super) fn core(&self) -> usize {
        self.core.load(Ordering::Relaxed)
    }
}

/// Parked, until it is released: a channel at a sync, which its home core wakes.
pub(super) struct Parked {
    pub(super) home: usize,
    pub(super) fate: Arc<ParkedFate>,
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.fate.drops.fetch_add(1, Ordering::Relaxed);
    }
}

impl Connection for Parked {
    fn fd(&self) -> RawFd {
        -1
    }
    fn tenant(&self) -> u64 {
        1
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        None
    }
    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn lost(&mut self, _loss: Loss) {
        self.fate.losses.fetch_add(1, Ordering::Relaxed);
    }
    fn resume(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn attached(&mut self, core: usize) {
        self.fate.core.store(core, Ordering::Relaxed);
    }
    fn moves_to(&self) -> Option<Move> {
        Some(Move {
            core: self.home,
            from_queued: 0,
        })
    }
}
