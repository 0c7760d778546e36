//! The main channel: feeds what arrives to the session and does what it says.
//!
//! Answers are single non-blocking writes, and quick ACKs are armed again after every read, so that neither side's
//! small writes wait for the other's delayed acknowledgement (spec §2).

use super::end::SessionEnd;
use super::guest::Guest;
use super::timeline::Timeline;
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::ring::{Endpoint, Loss, ReceivePlan, ReceiveStyle, Staging, quick_ack};
use crate::session::{Action, Answer, Page, PageContent, Session, SessionLimits};
use crate::store::Slab;
use crate::units::{CheckpointId, PAGE_SIZE};
use crate::wire::{WireError, xbzrle};
use nix::sys::socket::{MsgFlags, send};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Room for what has arrived and is not parsed yet. In plain mode pages come this way, some dozens at a time.
const STAGING_BYTES: usize = 256 << 10;

/// What the session waits for before its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Bytes,
    Memory,
    Sync,
}

pub(super) struct MainChannel {
    guest: Arc<Guest>,
    session: Session,
    shard: usize,
    style: ReceiveStyle,
    is_tcp: bool,
    plan: Box<ReceivePlan>,
    staging: Staging,
    waiting: Waiting,
    timeline: Timeline,
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
        let mut staging = Staging::new(STAGING_BYTES);
        staging.put(first);
        Self {
            guest,
            session: Session::new(limits),
            shard,
            style,
            is_tcp,
            plan: ReceivePlan::new(),
            staging,
            waiting: Waiting::Bytes,
            timeline: Timeline::new(),
            answer: Vec::with_capacity(Answer::LEN_MAX),
            device_state_bytes: 0,
        }
    }

    /// Steps the session until it waits for something.
    fn drive(&mut self) -> Result<(), SessionEnd> {
        while self.is_wait_over()? {
            let (consumed, action) = self.session.step(self.staging.bytes())?;
            self.staging.consume(consumed);
            match action {
                Action::Continue => {}
                Action::NeedMore => {
                    self.waiting = Waiting::Bytes;
                    self.note_suppressed();
                    return self.account();
                }
                Action::Page(page) => apply(&self.guest, self.shard, page).map_err(|error| {
                    self.session
                        .error_at(self.session.position() - consumed as u64, error)
                })?,
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
            let make = || (guest.around.make_store)(&guest, table);
            // The main channel waits for an answer, whatever happens here.
            let made = catch_unwind(AssertUnwindSafe(make));
            guest.memory_made(made.unwrap_or_else(|_| Err("the thread that made it panicked".into())));
        };
        (self.guest.around.run_apart)(Box::new(make)).map_err(|error| SessionEnd::NoMemory(error.to_string()))
    }

    fn ram_complete(&mut self) -> Result<(), SessionEnd> {
        self.timeline.ram_complete();
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
        if let Some(record) = self.session.record() {
            // The first commit sets it; it stays the same.
            let _ = self.guest.record.set(record.clone());
        }
        let store = self.guest.store().expect("nothing can be complete without RAM");
        if checkpoint == CheckpointId(0) {
            let unseen = store.unseen_pages();
            if unseen > 0 {
                (self.guest.around.warn)(format!(
                    "session {}: {unseen} pages were never sent in precopy; they are taken as zero",
                    self.guest.id
                ));
            }
            store.begin_colo();
        }
        let begin = Instant::now();
        store.commit(
            checkpoint,
            self.session.device_state(),
            &self.guest.around.flusher,
        );
        self.timeline.flushed(begin.elapsed());
        self.session.committed();
    }

    fn send(&mut self, answer: Answer) -> Result<(), SessionEnd> {
        if answer == Answer::Reply {
            // Before the primary can know that it may send pages again.
            self.guest.rendezvous.open_gate();
            self.timeline.requested();
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
            Answer::Loaded => {
                let checkpoint = self.guest.store().and_then(|store| store.committed());
                let checkpoint = checkpoint.unwrap_or(CheckpointId(0));
                let sample = self.timeline.loaded_sent(&self.guest, checkpoint);
                self.guest.around.samples.push(sample);
            }
            Answer::Ready { .. } => self.timeline.ready_sent(&self.guest),
            Answer::Pong(_) => {}
        }
        Ok(())
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

/// Puts a page that came on this channel where it belongs.
fn apply(guest: &Guest, shard: usize, page: Page<'_>) -> Result<(), WireError> {
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
        PageContent::Bytes(bytes) => store.write(shard, page.page, bytes),
        PageContent::Xbzrle(delta) => {
            if !store.was_received(page.page) {
                return Err(WireError::Xbzrle("it changes a page that was never received"));
            }
            let mut content = [0; PAGE_SIZE];
            store.read_newest(page.page, &mut content);
            xbzrle::apply(delta, &mut content)?;
            store.write(shard, page.page, &content);
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
        let (space, free) = self.staging.space()?;
        self.plan.clear();
        self.plan.push(space, free);
        Some(&mut self.plan)
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        self.timeline.bytes_came();
        self.staging.fill(bytes);
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

    fn slabs(&self) -> &[Slab] {
        self.guest.store().map_or(&[], |store| store.slabs())
    }

    // Pages that come this way are written by us, not by the kernel.
    fn use_buffers(&mut self, _first: u16) {}
}

impl Drop for MainChannel {
    fn drop(&mut self) {
        self.guest.leave();
    }
}
