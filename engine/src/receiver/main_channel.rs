//! The main channel: feeds what arrives to the session and does what it says.
//!
//! Answers are single non-blocking writes, and quick ACKs are armed again after every read, so that neither side's
//! small writes wait for the other's delayed acknowledgement (spec §2).

use super::end::SessionEnd;
use super::guest::Guest;
use super::intake::Intake;
use super::recovery::encode;
use super::timeline::Timeline;
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::metrics::CheckpointSample;
use crate::ring::{Buffers, Endpoint, Loss, ReceivePlan, ReceiveStyle, quick_ack};
use crate::session::{Action, Answer, Page, PageContent, Session, SessionLimits};
use crate::store::{FlushStep, Phase, PoolTask, Slab, Store, StoreError};
use crate::units::{CheckpointId, PAGE_SIZE};
use crate::wire::{WireError, xbzrle};
use nix::sys::socket::{MsgFlags, send};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the session waits for before its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Bytes,
    Memory,
    Sync,
    /// CHECKPOINT_REPLY: no page may arrive before the last checkpoint's are in the image, and the primary's guest runs on
    /// meanwhile.
    Flush,
}

pub(super) struct MainChannel {
    guest: Arc<Guest>,
    session: Session,
    shard: usize,
    style: ReceiveStyle,
    is_tcp: bool,
    /// Pages come on this channel, and no others are there.
    is_plain: bool,
    /// Those of a transfer that is not over.
    pages: u64,
    plan: Box<ReceivePlan>,
    intake: Intake,
    buffers: Buffers,
    waiting: Waiting,
    timeline: Timeline,
    /// The last checkpoint's, until its flush is over.
    sample: Option<CheckpointSample>,
    /// Slabs of the pool that were made in haste, as far as the operator was told.
    inline_growth: u64,
    answer: Vec<u8>,
    /// Bytes of device state that the budget knows of.
    device_state_bytes: u64,
}

impl MainChannel {
    /// The channel, of which `first` was already read.
    pub(super) fn new(
        guest: Arc<Guest>,
        limits: SessionLimits,
        shard: usize,
        style: ReceiveStyle,
        is_tcp: bool,
        first: &[u8],
    ) -> Self {
        Self {
            guest,
            session: Session::new(limits),
            shard,
            style,
            is_tcp,
            is_plain: limits.channels == 0,
            pages: 0,
            plan: ReceivePlan::new(),
            intake: Intake::new(first),
            buffers: Buffers::default(),
            waiting: Waiting::Bytes,
            timeline: Timeline::new(),
            sample: None,
            inline_growth: 0,
            answer: Vec::with_capacity(Answer::LEN_MAX),
            device_state_bytes: 0,
        }
    }

    /// Steps the session until it waits for something.
    fn drive(&mut self) -> Result<(), SessionEnd> {
        while self.is_wait_over()? {
            let (consumed, action) = self.session.step(self.intake.bytes())?;
            self.intake.consume(consumed);
            match action {
                Action::Continue => {}
                Action::NeedMore => {
                    self.waiting = Waiting::Bytes;
                    self.note_suppressed();
                    return self.account();
                }
                Action::Page(page) => {
                    self.pages += 1;
                    let applied = apply(&self.guest, &self.intake, self.shard, page);
                    applied.map_err(|refusal| match refusal {
                        Refusal::Wire(error) => {
                            let position = self.session.position() - consumed as u64;
                            SessionEnd::from(self.session.error_at(position, error))
                        }
                        Refusal::Store(error) => error.into(),
                    })?;
                }
                Action::Memory(table) => self.make_memory(table)?,
                Action::Marker => self.waiting = Waiting::Sync,
                Action::TransferBegins => self.timeline.transfer_begins(),
                Action::RamComplete => self.ram_complete()?,
                Action::Commit(checkpoint) => self.commit(checkpoint),
                Action::Send(answer) => self.send(answer)?,
            }
        }
        Ok(())
    }

    /// Whether the session may be stepped; at a sync that is complete, the channels are released.
    fn is_wait_over(&mut self) -> Result<bool, SessionEnd> {
        match self.waiting {
            Waiting::Bytes => {}
            Waiting::Memory => {
                if self.guest.store().is_none() {
                    return Ok(false);
                }
            }
            Waiting::Sync => {
                if !self.guest.rendezvous.all_arrived() {
                    if self.guest.is_channel_lost() {
                        return Err(SessionEnd::PrimaryLost(self.session.ending()));
                    }
                    return Ok(false);
                }
                self.guest.rendezvous.release();
                self.guest.wake_channels();
            }
            Waiting::Flush => {
                if self.guest.store().is_some_and(|store| store.is_flushing()) {
                    return Ok(false);
                }
                self.deliver_sample();
                self.write(Answer::Reply)?;
            }
        }
        self.waiting = Waiting::Bytes;
        Ok(true)
    }

    fn make_memory(&mut self, table: Arc<BlockTable>) -> Result<(), SessionEnd> {
        self.waiting = Waiting::Memory;
        self.guest.memory_asked.store(true, Ordering::Relaxed);
        let guest = self.guest.clone();
        // Not here: touching a large guest's memory takes seconds, and this thread drives other guests too.
        let make = move || {
            let make = || (guest.services.make_store)(&guest, table);
            // The main channel waits for an answer, whatever happens here.
            let made = catch_unwind(AssertUnwindSafe(make));
            guest.memory_made(made.unwrap_or_else(|_| Err("the thread that made it panicked".into())));
        };
        (self.guest.services.run_in_background)(Box::new(make))
            .map_err(|error| SessionEnd::NoMemory(error.to_string()))
    }

    fn ram_complete(&mut self) -> Result<(), SessionEnd> {
        self.timeline.ram_complete();
        self.pages = 0;
        self.guest
            .rendezvous
            .close_gate()
            .map_err(|channel| SessionEnd::NotQuiet { channel })?;
        if canary::is_set(Canary::EarlyAcknowledge) && self.session.record().is_some() {
            self.send(Answer::Loaded)?;
        }
        Ok(())
    }

    fn commit(&mut self, checkpoint: CheckpointId) {
        self.timeline.everything_here();
        let store = self.guest.store().expect("nothing can be complete without RAM");
        if let Some(record) = self.session.record()
            // The first commit sets it; it stays the same.
            && self.guest.record.set(record.clone()).is_ok()
        {
            store.record_session(|| encode(&self.guest.peer, record));
        }
        if checkpoint == CheckpointId(0) {
            let unseen = store.unseen_pages();
            if unseen > 0 {
                (self.guest.services.warn)(format!(
                    "session {}: {unseen} pages were never sent in precopy; they are taken as zero",
                    self.guest.id
                ));
            }
            store.begin_colo();
        }
        store.commit(
            checkpoint,
            self.session.device_state(),
            &self.guest.services.flusher,
        );
        self.session.committed();
    }

    fn send(&mut self, answer: Answer) -> Result<(), SessionEnd> {
        if answer == Answer::Reply {
            self.timeline.requested();
            if self.guest.store().is_some_and(|store| store.is_flushing()) {
                self.waiting = Waiting::Flush;
                if self.guest.store().is_some_and(|store| store.allow_flush_help()) {
                    self.guest.wake_helpers();
                }
                return Ok(());
            }
            // Others may have ended the flush while this core had no time for it.
            self.deliver_sample();
        }
        self.write(answer)
    }

    fn write(&mut self, answer: Answer) -> Result<(), SessionEnd> {
        if answer == Answer::Reply {
            // Before the primary can know that it may send pages again.
            self.guest.rendezvous.open_gate();
        }
        answer.encode(&mut self.answer);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // The socket's buffer holds thousands of answers and the primary waits for each: a full one is its fault.
        match send(self.guest.main_fd(), &self.answer, flags) {
            Ok(sent) if sent == self.answer.len() => {}
            Ok(_) => return Err(SessionEnd::Answer(io::ErrorKind::WriteZero.into())),
            Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {
                return Err(SessionEnd::PrimaryLost(self.session.ending()));
            }
            Err(error) => return Err(SessionEnd::Answer(error.into())),
        }
        match answer {
            Answer::Reply => self.timeline.reply_sent(),
            Answer::Loaded => self.loaded_sent(),
            Answer::Ready { .. } => self.timeline.ready_sent(&self.guest),
            Answer::Pong(_) => {}
        }
        Ok(())
    }

    /// The primary's guest runs again: what can wait begins now.
    fn loaded_sent(&mut self) {
        let Some(store) = self.guest.store().cloned() else {
            return;
        };
        let checkpoint = store.committed().unwrap_or(CheckpointId(0));
        self.sample = Some(self.timeline.loaded_sent(&self.guest, checkpoint));
        self.deliver_sample();
        if let Some(error) = store.take_failure() {
            (self.guest.services.warn)(format!(
                "session {}: from checkpoint {checkpoint} on nothing of it outlives this receiver: {error}",
                self.guest.id
            ));
        }
        self.mind_the_pool(&store);
    }

    /// Hands on what was measured, once the flush belongs to the past, too.
    fn deliver_sample(&mut self) {
        let Some(store) = self.guest.store().filter(|store| !store.is_flushing()) else {
            return;
        };
        if let Some(sample) = self.sample.take() {
            let flush = store.flush_time();
            self.guest
                .services
                .samples
                .push(CheckpointSample { flush, ..sample });
        }
    }

    /// Fits the pool to what checkpoints need, and tells if room had to be made in haste.
    fn mind_the_pool(&mut self, store: &Arc<Store>) {
        let task = store.pool_task();
        let hasty = store.pool_use().map_or(0, |pool| pool.inline_growth);
        if hasty > self.inline_growth {
            let advice = match task {
                PoolTask::Grow => "",
                PoolTask::Nothing | PoolTask::Shrink => ". A larger --pool-max avoids that",
            };
            (self.guest.services.warn)(format!(
                "session {}: a checkpoint needed {} cache slabs more than there were; pages waited for their memory, \
                 which made it slower{advice}",
                self.guest.id,
                hasty - self.inline_growth,
            ));
            self.inline_growth = hasty;
        }
        if task == PoolTask::Nothing || self.guest.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let (guest, store) = (self.guest.clone(), store.clone());
        let tend = move || {
            let done = match task {
                PoolTask::Grow => store.grow(),
                PoolTask::Shrink | PoolTask::Nothing => {
                    store.shrink();
                    Ok(())
                }
            };
            if let Err(error) = done {
                (guest.services.warn)(format!("session {}: {error}", guest.id));
            }
            guest.growing.store(false, Ordering::Release);
        };
        // Not here: it takes milliseconds. Where that cannot be had the pool stays as it is.
        let _ = (self.guest.services.run_in_background)(Box::new(tend));
    }

    /// Device state grows by what arrives. It has a budget like RAM: once for this buffer, and once for the committed one
    /// that it is exchanged with.
    fn account(&mut self) -> Result<(), SessionEnd> {
        let bytes = self.session.buffered_bytes() * 2;
        if bytes > self.device_state_bytes {
            self.guest
                .grow(bytes - self.device_state_bytes)
                .map_err(SessionEnd::NoMemory)?;
            self.device_state_bytes = bytes;
        }
        Ok(())
    }

    /// For the control thread, which has a clock: see [`Session::looks_suppressed`].
    fn note_suppressed(&self) {
        let position = if self.session.looks_suppressed() {
            self.session.position()
        } else {
            0
        };
        self.guest.suppressed_at.store(position, Ordering::Relaxed);
    }

    /// Plans the next receive. False if there is no room for it.
    fn prepare(&mut self) -> Result<bool, StoreError> {
        if self.is_plain
            && let Some(store) = self.guest.store()
            && store.phase() == Phase::Colo
        {
            self.intake.move_to_pool(store, self.shard)?;
        }
        let Some(space) = self.intake.space()? else {
            return Ok(false);
        };
        self.plan.clear();
        self.plan.push(space.address, space.bytes);
        self.plan.bulk = self.pages >= self.style.bulk_from_pages;
        self.plan.registered = space.slab.and_then(|slab| self.buffers.index(slab));
        Ok(true)
    }

    fn end_if_err(&mut self, result: Result<(), SessionEnd>) -> ControlFlow<()> {
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(end) => {
                self.guest.finish(end);
                ControlFlow::Break(())
            }
        }
    }
}

/// Why a page was not taken.
enum Refusal {
    Wire(WireError),
    Store(StoreError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Puts a page that came on this channel where it belongs.
fn apply(guest: &Guest, intake: &Intake, shard: usize, page: Page<'_>) -> Result<(), Refusal> {
    let store = guest
        .store()
        .expect("the session gives pages only after Action::Memory was answered");
    let counters = &guest.counters;
    match page.content {
        PageContent::Zero => {
            store.zero(shard, page.page);
            counters.zero_pages.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        PageContent::Bytes(bytes) => intake.keep(store, shard, page.page, bytes)?,
        PageContent::Xbzrle(delta) => {
            if !store.was_received(page.page) {
                let error = WireError::Xbzrle("it changes a page that was never received");
                return Err(Refusal::Wire(error));
            }
            let mut content = [0; PAGE_SIZE];
            store.read_newest(page.page, &mut content);
            xbzrle::apply(delta, &mut content).map_err(Refusal::Wire)?;
            store.write(shard, page.page, &content)?;
        }
    }
    counters.pages.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

impl Endpoint for MainChannel {
    fn fd(&self) -> RawFd {
        self.guest.main_fd()
    }

    fn guest(&self) -> u64 {
        u64::from(self.guest.id)
    }

    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        if self.waiting != Waiting::Bytes && !self.style.read_ahead {
            return None;
        }
        match self.prepare() {
            Ok(true) => Some(&mut self.plan),
            Ok(false) => None,
            Err(error) => {
                self.guest.finish(error.into());
                None
            }
        }
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        self.timeline.bytes_came();
        self.intake.fill(bytes);
        self.guest
            .counters
            .bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        let flow = self.resume();
        if self.is_tcp {
            // The kernel goes back to delayed acknowledgements by itself; the primary's next small write would wait.
            quick_ack(self.guest.main_fd());
        }
        flow
    }

    fn lost(&mut self, loss: Loss) {
        let ending = self.session.ending();
        self.guest.finish(match loss {
            Loss::Error(error) if error.kind() != io::ErrorKind::ConnectionReset => {
                SessionEnd::Broken { error, ending }
            }
            Loss::Eof | Loss::Error(_) => SessionEnd::PrimaryLost(ending),
        });
    }

    fn resume(&mut self) -> ControlFlow<()> {
        if self.guest.end().is_some() {
            return ControlFlow::Break(());
        }
        let result = self.drive();
        self.end_if_err(result)
    }

    fn attached(&mut self, core: usize, buffers: Buffers) {
        self.shard = core;
        self.buffers = buffers;
    }

    fn slab_limit(&self) -> usize {
        self.guest.store().map_or(0, |store| store.slab_limit())
    }

    fn slab(&self, position: usize) -> Option<&Slab> {
        self.guest.store()?.slab(position)
    }

    fn use_buffers(&mut self, buffers: Buffers) {
        self.buffers = buffers;
    }

    fn background(&mut self) -> bool {
        let store = self.guest.store();
        let busy = store.is_some_and(|store| store.flush_step() != FlushStep::Nothing);
        self.deliver_sample();
        busy
    }
}

impl Drop for MainChannel {
    fn drop(&mut self) {
        // The flush goes on when everybody has left; what was measured of it is what counts.
        if let (Some(store), Some(sample)) = (self.guest.store(), self.sample.take()) {
            let flush = store.flush_time();
            self.guest
                .services
                .samples
                .push(CheckpointSample { flush, ..sample });
        }
        self.guest.leave();
    }
}
