//! When things happened in the current checkpoint: makes its sample (phases of the receiver's clock).

use super::live_session::LiveSession;
use crate::metrics::CheckpointSample;
use crate::units::CheckpointId;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Totals at a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    pages: u64,
    zero_pages: u64,
    bytes: u64,
}

impl Totals {
    fn of(session: &LiveSession) -> Self {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &session.counters;
        Self {
            pages: read(&counters.pages),
            zero_pages: read(&counters.zero_pages),
            bytes: read(&counters.bytes),
        }
    }
}

/// The moments of one checkpoint, each set when it is reached.
#[derive(Debug)]
pub(super) struct Timeline {
    bytes_came: Instant,
    requested: Instant,
    reply_sent: Instant,
    transfer_begins: Instant,
    ram_complete: Instant,
    everything_here: Instant,
    before: Totals,
}

impl Timeline {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            bytes_came: now,
            requested: now,
            reply_sent: now,
            transfer_begins: now,
            ram_complete: now,
            everything_here: now,
            before: Totals::default(),
        }
    }

    /// Bytes were received on the main channel: messages in them are as old as that.
    pub(super) fn bytes_came(&mut self) {
        self.bytes_came = Instant::now();
    }

    pub(super) fn requested(&mut self) {
        self.requested = self.bytes_came;
    }

    pub(super) fn reply_sent(&mut self) {
        self.reply_sent = Instant::now();
    }

    pub(super) fn transfer_begins(&mut self) {
        self.transfer_begins = self.bytes_came;
    }

    pub(super) fn ram_complete(&mut self) {
        self.ram_complete = Instant::now();
    }

    pub(super) fn everything_here(&mut self) {
        self.everything_here = Instant::now();
    }

    /// The initial state is committed: what is counted from here on belongs to checkpoints.
    pub(super) fn ready_sent(&mut self, session: &LiveSession) {
        self.before = Totals::of(session);
        session.note_commit(Duration::ZERO);
    }

    /// The checkpoint is over, but for its flush, which is not in the sample.
    pub(super) fn loaded_sent(
        &mut self,
        session: &LiveSession,
        checkpoint: CheckpointId,
    ) -> CheckpointSample {
        let now = Instant::now();
        let totals = Totals::of(session);
        let before = std::mem::replace(&mut self.before, totals);
        let pause = now - self.reply_sent;
        session.note_commit(pause);
        CheckpointSample {
            session: session.id,
            checkpoint: checkpoint.0,
            end: now - session.services.shared().started,
            reply: self.reply_sent - self.requested,
            transfer: self.ram_complete - self.transfer_begins,
            vmstate: self.everything_here - self.ram_complete,
            commit: now - self.everything_here,
            pause,
            flush: Duration::ZERO,
            pages: totals.pages - before.pages,
            zero_pages: totals.zero_pages - before.zero_pages,
            bytes: totals.bytes - before.bytes,
        }
    }
}
