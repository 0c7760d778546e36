//! The main channel: feeds what arrives to the session and carries out its actions.
//!
//! Messages to the primary are single non-blocking writes, and quick ACKs are armed again after every read, so that
//! neither side's small writes wait for the other's delayed acknowledgement (spec §2).

use super::checkpoints::{Checkpoints, PageError};
use super::end::SessionEnd;
use super::guest_memory::MemoryError;
use super::live_session::LiveSession;
use super::main_buffer::MainBuffer;
use super::timeline::Timeline;
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::net::quick_ack;
use crate::ring::{Connection, Loss, ReceivePlan, ReceiveStyle};
use crate::session::{Action, Outbound, Session, SessionLimits};
use crate::store::{Phase, StoreError};
use crate::units::CheckpointId;
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
    Flush,
    /// The guard has to draw the line behind the guest's output.
    Output(CheckpointId),
}

pub(super) struct MainChannel {
    session: Arc<LiveSession>,
    protocol: Session,
    /// None up to the answer to [`Action::Memory`].
    checkpoints: Option<Checkpoints>,
    shard: usize,
    style: ReceiveStyle,
    is_tcp: bool,
    /// Pages travel on this channel, because there are no others.
    is_plain: bool,
    /// Pages of the transfer that is under way.
    pages: u64,
    plan: Box<ReceivePlan>,
    buffer: MainBuffer,
    waiting: Waiting,
    timeline: Timeline,
    outbound: Vec<u8>,
    /// Bytes of device state that are taken from the budget.
    device_state_bytes: u64,
}

impl MainChannel {
    /// The channel, of which `first` was already read.
    pub(super) fn new(
        session: Arc<LiveSession>,
        limits: SessionLimits,
        shard: usize,
        style: ReceiveStyle,
        is_tcp: bool,
        first: &[u8],
    ) -> Self {
        Self {
            session,
            protocol: Session::new(limits),
            checkpoints: None,
            shard,
            style,
            is_tcp,
            is_plain: limits.channels == 0,
            pages: 0,
            plan: ReceivePlan::new(),
            buffer: MainBuffer::new(first),
            waiting: Waiting::Bytes,
            timeline: Timeline::new(),
            outbound: Vec::with_capacity(Outbound::LEN_MAX),
            device_state_bytes: 0,
        }
    }

    /// Steps the session until it waits for something.
    fn drive(&mut self) -> Result<(), SessionEnd> {
        while self.is_wait_over()? {
            let (consumed, action) = self.protocol.step(self.buffer.bytes())?;
            self.buffer.consume(consumed);
            match (action, &mut self.checkpoints) {
                (Action::Continue, _) => {}
                (Action::NeedMore, _) => {
                    self.note_suppressed();
                    return self.account();
                }
                (Action::Page(page), Some(checkpoints)) => {
                    self.pages += 1;
                    let applied = checkpoints.apply(&self.buffer, self.shard, page);
                    applied.map_err(|error| match error {
                        PageError::Wire(error) => {
                            let position = self.protocol.position() - consumed as u64;
                            SessionEnd::from(self.protocol.error_at(position, error))
                        }
                        PageError::Store(error) => error.into(),
                    })?;
                }
                (Action::Memory(table), _) => self.make_memory(table)?,
                (Action::Marker, _) => self.waiting = Waiting::Sync,
                (Action::TransferBegins, checkpoints) => {
                    self.timeline.transfer_begins();
                    if let Some(checkpoints) = checkpoints {
                        checkpoints
                            .end_epoch(self.protocol.next_checkpoint())
                            .map_err(|end| self.disk_lost(end))?;
                    }
                }
                (Action::RamComplete, _) => self.ram_complete()?,
                (Action::Commit(checkpoint), Some(checkpoints)) => {
                    self.timeline.everything_here();
                    let committed = checkpoints.commit(checkpoint, &mut self.protocol);
                    committed.map_err(|end| self.disk_lost(end))?;
                    self.waiting = Waiting::Output(checkpoint);
                }
                (Action::FinishFlush, Some(checkpoints)) => {
                    self.timeline.requested();
                    self.session.in_checkpoint.store(true, Ordering::Relaxed);
                    self.waiting = Waiting::Flush;
                    if canary::is_set(Canary::EarlyGate) {
                        self.session.rendezvous.open_gate();
                    }
                    if checkpoints.store().is_flushing() {
                        checkpoints.hurry_flush();
                    }
                }
                (Action::OpenGate, _) => self.session.rendezvous.open_gate(),
                (Action::Send(outbound), _) => self.send(outbound)?,
                // The session does not do that. If it did, a panic here would end the other sessions of the core too.
                (Action::Page(_) | Action::Commit(_) | Action::FinishFlush, None) => {
                    return Err(MemoryError::NoBlockList.into());
                }
            }
        }
        Ok(())
    }

    /// The reason for the end of a session that has lost a disk: a primary that died has closed all of its connections.
    fn disk_lost(&self, end: SessionEnd) -> SessionEnd {
        match self.session.is_primary_gone() {
            true => SessionEnd::PrimaryLost(self.protocol.ending()),
            false => end,
        }
    }

    /// Whether the session may be stepped; at a sync that is complete, the channels are released.
    fn is_wait_over(&mut self) -> Result<bool, SessionEnd> {
        match self.waiting {
            Waiting::Bytes => {}
            Waiting::Memory => {
                let Some(store) = self.session.store() else {
                    return Ok(false);
                };
                self.checkpoints = Some(Checkpoints::new(self.session.clone(), store.clone()));
            }
            Waiting::Sync => {
                if !self.session.rendezvous.all_arrived() {
                    if self.session.is_channel_lost() {
                        return Err(SessionEnd::PrimaryLost(self.protocol.ending()));
                    }
                    return Ok(false);
                }
                self.session.rendezvous.release();
                self.session.wake_channels();
            }
            Waiting::Flush => {
                let is_flushed = self.checkpoints.as_mut().is_none_or(Checkpoints::is_flushed);
                if !is_flushed && !canary::is_set(Canary::EarlyFlushEnd) {
                    return Ok(false);
                }
                self.protocol.flush_finished();
            }
            Waiting::Output(checkpoint) => {
                if !self.session.output.may_acknowledge(checkpoint) {
                    return Ok(false);
                }
            }
        }
        self.waiting = Waiting::Bytes;
        Ok(true)
    }

    fn make_memory(&mut self, table: Arc<BlockTable>) -> Result<(), SessionEnd> {
        self.waiting = Waiting::Memory;
        self.session.memory_asked.store(true, Ordering::Relaxed);
        let session = self.session.clone();
        // In the background: touching a large guest's memory takes seconds, and this thread drives other guests too.
        let make = move || {
            let make = || session.services.make_memory(session.id, table);
            // The main channel waits for the result, also if there is a panic.
            let made = catch_unwind(AssertUnwindSafe(make));
            session.memory_made(made.unwrap_or(Err(MemoryError::Panicked)));
        };
        let started = self.session.services.run_in_background(Box::new(make));
        started.map_err(|error| MemoryError::Thread(error).into())
    }

    fn ram_complete(&mut self) -> Result<(), SessionEnd> {
        self.timeline.ram_complete();
        self.pages = 0;
        self.session
            .rendezvous
            .close_gate()
            .map_err(|channel| SessionEnd::NotQuiet { channel })?;
        if canary::is_set(Canary::EarlyAcknowledge) && self.protocol.description().is_some() {
            self.send(Outbound::Loaded)?;
        }
        Ok(())
    }

    fn send(&mut self, outbound: Outbound) -> Result<(), SessionEnd> {
        outbound.encode(&mut self.outbound);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // The socket's buffer holds thousands of messages and the primary waits for each: a full one is its fault.
        match send(self.session.main_fd(), &self.outbound, flags) {
            Ok(sent) if sent == self.outbound.len() => {}
            Ok(_) => return Err(SessionEnd::Answer(io::ErrorKind::WriteZero.into())),
            Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {
                return Err(SessionEnd::PrimaryLost(self.protocol.ending()));
            }
            Err(error) => return Err(SessionEnd::Answer(error.into())),
        }
        let (session, timeline) = (&self.session, &mut self.timeline);
        match (outbound, &mut self.checkpoints) {
            (Outbound::Reply, _) => timeline.reply_sent(),
            (Outbound::Ready { .. }, _) => timeline.ready_sent(session),
            (Outbound::Loaded, Some(checkpoints)) => {
                checkpoints.acknowledged(|checkpoint| timeline.loaded_sent(session, checkpoint));
            }
            (Outbound::Pong(_) | Outbound::Loaded, _) => {}
        }
        Ok(())
    }

    /// Device state grows by what arrives. It is taken from the budget like RAM: once for this buffer, and once for the
    /// committed one that it is exchanged with.
    fn account(&mut self) -> Result<(), SessionEnd> {
        let bytes = self.protocol.buffered_bytes() * 2;
        if bytes > self.device_state_bytes {
            self.session
                .grow_device_state(bytes - self.device_state_bytes)
                .map_err(MemoryError::from)?;
            self.device_state_bytes = bytes;
        }
        Ok(())
    }

    /// For the control thread, which has a clock: see [`Session::looks_suppressed`].
    fn note_suppressed(&self) {
        let position = if self.protocol.looks_suppressed() {
            self.protocol.position()
        } else {
            0
        };
        self.session.suppressed_at.store(position, Ordering::Relaxed);
    }

    /// Plans the next receive. False if there is no room for it.
    fn prepare(&mut self) -> Result<bool, StoreError> {
        if self.is_plain
            && let Some(store) = self.checkpoints.as_ref().map(Checkpoints::store)
            && store.phase() == Phase::Colo
        {
            self.buffer.move_to_pool(store, self.shard)?;
        }
        let Some(space) = self.buffer.space()? else {
            return Ok(false);
        };
        self.plan.clear();
        self.plan.push(space.address, space.bytes);
        self.plan.bulk = self.pages >= self.style.bulk_from_pages;
        self.plan.region = space.slab.map(|slab| slab.0);
        Ok(true)
    }

    fn end_if_err(&mut self, result: Result<(), SessionEnd>) -> ControlFlow<()> {
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(end) => {
                self.session.finish(end);
                ControlFlow::Break(())
            }
        }
    }
}

impl Connection for MainChannel {
    fn fd(&self) -> RawFd {
        self.session.main_fd()
    }

    fn tenant(&self) -> u64 {
        u64::from(self.session.id)
    }

    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        if self.waiting != Waiting::Bytes && !self.style.read_ahead {
            return None;
        }
        match self.prepare() {
            Ok(true) => Some(&mut self.plan),
            Ok(false) => None,
            Err(error) => {
                self.session.finish(error.into());
                None
            }
        }
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        self.timeline.bytes_came();
        self.buffer.fill(bytes);
        self.session.main_received(bytes);
        self.session
            .counters
            .bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        let flow = self.resume();
        if self.is_tcp {
            // The kernel goes back to delayed acknowledgements by itself; the primary's next small write would wait.
            quick_ack(self.session.main_fd());
        }
        flow
    }

    fn lost(&mut self, loss: Loss) {
        let ending = self.protocol.ending();
        self.session.finish(match loss {
            Loss::Error(error) if error.kind() != io::ErrorKind::ConnectionReset => {
                SessionEnd::Broken { error, ending }
            }
            Loss::Eof | Loss::Error(_) => SessionEnd::PrimaryLost(ending),
        });
    }

    fn resume(&mut self) -> ControlFlow<()> {
        if self.session.end().is_some() {
            return ControlFlow::Break(());
        }
        if let Some(checkpoints) = &mut self.checkpoints {
            // The end of a flush wakes this channel.
            checkpoints.deliver_if_flushed();
        }
        let result = self.drive();
        self.end_if_err(result)
    }

    fn leaked(&mut self) {
        self.session.part_dropped();
    }

    fn attached(&mut self, core: usize) {
        self.shard = core;
    }
}

impl Drop for MainChannel {
    fn drop(&mut self) {
        // The guest's memory is no longer in use once the last connection is dropped.
        self.checkpoints = None;
        self.session.part_dropped();
    }
}
