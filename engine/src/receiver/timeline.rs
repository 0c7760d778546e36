//! When things happened in the current checkpoint: makes its sample (phases of the receiver's clock) and its record for the flight
//! recorder.

use super::live_session::LiveSession;
use crate::host::thread_times::{self, ThreadTimes};
use crate::metrics::CheckpointSample;
use crate::store::{ChannelBytes, FlightRecord, SchedulerTimes};
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

/// What the main channel waits for that is no byte of the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// A thread that writes the device state.
    Apart,
    /// The guard.
    Guard,
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
    committed: Instant,
    /// Of the thread that drives the main channel, when the reply was sent.
    times: Option<ThreadTimes>,
    /// Whether the reply has to wait for a flush; the times of that thread when it began, and how long it was not let run.
    waits_for_flush: bool,
    times_at_request: Option<ThreadTimes>,
    reply_runnable: Duration,
    waiting: Option<(Wait, Instant)>,
    apart: Duration,
    guard: Duration,
    before: Totals,
}

/// What is known of a checkpoint when it is acknowledged: all but the time of its flush.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) sample: CheckpointSample,
    pub(super) record: FlightRecord,
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
            committed: now,
            times: None,
            waits_for_flush: false,
            times_at_request: None,
            reply_runnable: Duration::ZERO,
            waiting: None,
            apart: Duration::ZERO,
            guard: Duration::ZERO,
            before: Totals::default(),
        }
    }

    /// Bytes were received on the main channel: messages in them are as old as that.
    pub(super) fn bytes_came(&mut self) {
        self.bytes_came = Instant::now();
    }

    /// A checkpoint was asked for, while the one before is being flushed, or not.
    pub(super) fn requested(&mut self, is_flushing: bool) {
        self.requested = self.bytes_came;
        self.waits_for_flush = is_flushing;
        self.times_at_request = is_flushing.then(thread_times::read).flatten();
    }

    /// The request was kept for a guard up to now.
    pub(super) fn kept(&mut self, is_flushing: bool) {
        self.bytes_came = Instant::now();
        self.requested(is_flushing);
    }

    /// Outside of the guest's pause as the primary sees it: what this does after the reply is sent delays nobody.
    pub(super) fn reply_sent(&mut self, session: &LiveSession) {
        self.reply_sent = Instant::now();
        session.checkpoint_begins();
        self.waiting = None;
        (self.apart, self.guard) = (Duration::ZERO, Duration::ZERO);
        self.times = thread_times::read();
        let waited = self.times_at_request.take().zip(self.times);
        self.reply_runnable = waited.map_or(Duration::ZERO, |(before, after)| {
            after.runnable.saturating_sub(before.runnable)
        });
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

    pub(super) fn committed(&mut self) {
        self.committed = Instant::now();
    }

    /// The main channel has to wait. Called as often as it finds that it has.
    pub(super) fn waits(&mut self, wait: Wait) {
        if self.waiting.is_none() {
            self.waiting = Some((wait, Instant::now()));
        }
    }

    /// It waits no longer.
    pub(super) fn goes_on(&mut self) {
        match self.waiting.take() {
            Some((Wait::Apart, since)) => self.apart += since.elapsed(),
            Some((Wait::Guard, since)) => self.guard += since.elapsed(),
            None => {}
        }
    }

    /// The initial state is committed: what is counted from here on belongs to checkpoints.
    pub(super) fn ready_sent(&mut self, session: &LiveSession) {
        self.before = Totals::of(session);
        session.note_commit(Duration::ZERO);
    }

    /// The checkpoint is over, but for its flush.
    pub(super) fn loaded_sent(&mut self, session: &LiveSession, checkpoint: CheckpointId) -> Measured {
        let now = Instant::now();
        let times = thread_times::read();
        let totals = Totals::of(session);
        let before = std::mem::replace(&mut self.before, totals);
        let pause = now - self.reply_sent;
        session.note_commit(pause);
        let sample = CheckpointSample {
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
        };
        let scheduler = self.times.zip(times).map(|(before, after)| SchedulerTimes {
            ran_ns: nanoseconds(after.ran.saturating_sub(before.ran)),
            runnable_ns: nanoseconds(after.runnable.saturating_sub(before.runnable)),
        });
        let record = self.record(session, &sample, now, scheduler);
        Measured { sample, record }
    }

    fn record(
        &self,
        session: &LiveSession,
        sample: &CheckpointSample,
        loaded: Instant,
        scheduler: Option<SchedulerTimes>,
    ) -> FlightRecord {
        let requested_at_ns = nanoseconds(self.requested - session.services.shared().started);
        let since = |moment: Instant| nanoseconds(moment.saturating_duration_since(self.requested));
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let mut record = FlightRecord {
            checkpoint: sample.checkpoint,
            requested_at_ns,
            reply_ns: since(self.reply_sent),
            // A primary that sends before it may is not taken for damage.
            send_ns: since(self.transfer_begins.max(self.reply_sent)),
            ram_ns: since(self.ram_complete),
            device_state_ns: since(self.everything_here),
            committed_ns: since(self.committed),
            loaded_ns: since(loaded),
            scheduler,
            away_ran_ns: read(&session.away.ran_ns),
            away_runnable_ns: read(&session.away.runnable_ns),
            apart_ns: nanoseconds(self.apart),
            guard_ns: nanoseconds(self.guard),
            waited_for_flush: self.waits_for_flush,
            reply_runnable_ns: nanoseconds(self.reply_runnable),
            pages: sample.pages,
            zero_pages: sample.zero_pages,
            bytes: sample.bytes,
            ..FlightRecord::default()
        };
        for times in session.channel_times() {
            let [first, last, sync] = [times.first_ns, times.last_ns, times.sync_ns]
                .map(|moment| moment.saturating_sub(requested_at_ns));
            record.channels.set(ChannelBytes {
                channel: times.channel,
                first_byte_ns: first,
                last_byte_ns: last,
            });
            if record.first_byte_ns.is_none_or(|earlier| first < earlier) {
                record.first_byte_ns = Some(first);
                record.first_channel = Some(times.channel);
            }
            record.last_begin_ns = record.last_begin_ns.max(Some(first));
            record.last_byte_ns = record.last_byte_ns.max(Some(last));
            record.first_sync_ns = Some(record.first_sync_ns.map_or(sync, |earlier| earlier.min(sync)));
            if record.last_sync_ns.is_none_or(|earlier| sync >= earlier) {
                record.last_sync_ns = Some(sync);
                record.last_channel = Some(times.channel);
            }
        }
        record
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
