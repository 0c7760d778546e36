//! The main channel: feeds what arrives to the session and carries out its actions.
//!
//! Messages to the primary are single non-blocking writes, and quick ACKs are armed again after every read, so that
//! neither side's small writes wait for the other's delayed acknowledgement (spec §2).

use super::checkpoints::{Checkpoints, PageError};
use super::device_state::DeviceStateLease;
use super::end::SessionEnd;
use super::guest_memory::MemoryError;
use super::live_session::{LiveSession, SessionPart};
use super::main_buffer::MainBuffer;
use super::silence::Answer;
use super::timeline::{Timeline, Wait};
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::net::quick_ack;
use crate::ring::{Connection, Loss, ReceivePlan, ReceiveStyle};
use crate::session::{Action, Outbound, Session, SessionLimits};
use crate::store::{Phase, StoreError};
use crate::units::{CheckpointId, PAGE_SIZE};
use crate::wire::vmdesc::Evidence;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a channel may do in one turn of its core, in bytes: much more than a message has, and less than others notice.
const TURN_BYTES: usize = 256 << 10;

/// What a step counts for, beside the bytes that it consumes: a record of a few bytes can be as much work as a page.
const STEP_BYTES: usize = PAGE_SIZE;

/// What the session waits for before its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    Bytes,
    /// Its next turn: not all that has arrived was acted on.
    Turn,
    Memory,
    Sync,
    Admission,
    /// What has arrived looks like the end of the initial device state: nothing may follow for a while. No receive is posted meanwhile; the
    /// control thread looks at the socket.
    Silence,
    /// The guard has to say that a checkpoint may begin, for which the primary asks. Its guest runs.
    Begin,
    Flush,
    /// The device state of that checkpoint has to be written to its file.
    DeviceState(CheckpointId),
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
    device_state: DeviceStateLease,
    /// Where the initial device state ends: a position on this channel.
    state_end: u64,
    has_warned_of_end: bool,
}

impl MainChannel {
    /// The channel, of which the first bytes are in `buffer`.
    pub(super) fn new(
        session: Arc<LiveSession>,
        limits: SessionLimits,
        shard: usize,
        style: ReceiveStyle,
        is_tcp: bool,
        buffer: MainBuffer,
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
            buffer,
            waiting: Waiting::Bytes,
            timeline: Timeline::new(),
            outbound: Vec::with_capacity(Outbound::LEN_MAX),
            device_state: DeviceStateLease::default(),
            state_end: 0,
            has_warned_of_end: false,
        }
    }

    /// Steps the session until it waits for something, at the latest for its next turn.
    fn drive(&mut self) -> Result<(), SessionEnd> {
        let mut work = 0;
        while self.is_wait_over()? {
            if work >= TURN_BYTES {
                self.waiting = Waiting::Turn;
                return Ok(());
            }
            let state_bytes = self.protocol.state_bytes_after(self.buffer.bytes().len());
            let reserved = self.device_state.reserve(&self.session, state_bytes);
            reserved.map_err(MemoryError::from)?;
            let is_end_in_doubt = self.protocol.is_end_in_doubt();
            let step = self.protocol.step(self.buffer.bytes());
            let (consumed, action) = step.map_err(|error| match is_end_in_doubt {
                true => self.false_end(),
                false => error.into(),
            })?;
            self.buffer.consume(consumed);
            work += STEP_BYTES + consumed;
            match (action, &mut self.checkpoints) {
                (Action::Continue, _) => {}
                (Action::NeedMore, _) => {
                    self.note_suppressed();
                    return Ok(());
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
                (Action::Memory(table), _) => {
                    if self.is_plain {
                        self.ask_admission();
                    }
                    self.make_memory(table)?;
                }
                (Action::Marker, _) => {
                    // Early, so that it need not be waited for: the primary's channels are all connected at its first sync.
                    self.ask_admission();
                    self.waiting = Waiting::Sync;
                }
                (Action::TransferBegins, checkpoints) => {
                    self.timeline.transfer_begins();
                    if let Some(checkpoints) = checkpoints {
                        checkpoints
                            .end_epoch(self.protocol.next_checkpoint())
                            .map_err(|end| self.disk_lost(end))?;
                    }
                }
                (Action::RamComplete, _) => self.ram_complete()?,
                (Action::LooksEnded(evidence), _) => self.await_silence(evidence),
                // A channel that has failed may have arrived all the same: what it was to receive is not whole.
                (Action::Commit(_), Some(_)) if self.session.end().is_some() => return Ok(()),
                (Action::Commit(checkpoint), Some(checkpoints)) => {
                    let admitted = self.session.admission.begin_commit();
                    admitted.map_err(|channel| SessionEnd::Contradicted { channel })?;
                    self.timeline.everything_here();
                    if checkpoint == CheckpointId(0) {
                        let most = self.protocol.device_state_max();
                        let reserved = self.device_state.reserve_ahead(&self.session, most);
                        reserved.map_err(MemoryError::from)?;
                    }
                    match checkpoints.write_apart(checkpoint, &mut self.protocol) {
                        true => self.waiting = Waiting::DeviceState(checkpoint),
                        false => self.commit(checkpoint)?,
                    }
                }
                (Action::FinishFlush, Some(checkpoints)) => {
                    self.timeline.requested(checkpoints.store().is_flushing());
                    match self.session.output.request() {
                        true => self.begin(),
                        false => self.waiting = Waiting::Begin,
                    }
                }
                (Action::OpenGate, _) => self.session.rendezvous.open_gate(),
                (Action::Send(outbound), _) => {
                    // It has sent more before it could have that.
                    if is_end_in_doubt && !self.buffer.bytes().is_empty() {
                        return Err(self.false_end());
                    }
                    self.send(outbound)?;
                }
                // The session does not do that. If it did, a panic here would end the other sessions of the core too.
                (Action::Page(_) | Action::Commit(_) | Action::FinishFlush, None) => {
                    return Err(MemoryError::NoBlockList.into());
                }
            }
        }
        Ok(())
    }

    /// The checkpoint begins for which the primary has asked, as soon as the last one is flushed.
    fn begin(&mut self) {
        self.session.in_checkpoint.store(true, Ordering::Relaxed);
        self.waiting = Waiting::Flush;
        if canary::is_set(Canary::EarlyGate) {
            self.session.rendezvous.open_gate();
        }
        if let Some(checkpoints) = &mut self.checkpoints
            && checkpoints.store().is_flushing()
        {
            checkpoints.hurry_flush();
        }
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Result<(), SessionEnd> {
        if let Some(checkpoints) = &self.checkpoints {
            let committed = checkpoints.commit(checkpoint, &mut self.protocol);
            committed.map_err(|end| self.disk_lost(end))?;
            self.timeline.committed();
            self.waiting = Waiting::Output(checkpoint);
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
            Waiting::Bytes | Waiting::Turn => {}
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
            Waiting::Admission => {
                if !self.session.admission.is_decided() {
                    return Ok(false);
                }
            }
            Waiting::Silence => {
                let has_come = !self.buffer.bytes().is_empty() || self.session.main_holds_back();
                match self.session.silence.answer() {
                    // By a receive that was posted before.
                    _ if has_come => self.session.silence.withdraw(),
                    None if canary::is_set(Canary::EarlyEnd) => self.protocol.silence(),
                    None => return Ok(false),
                    Some(Answer::Silent) => {
                        self.state_end = self.protocol.position();
                        self.protocol.silence();
                    }
                    Some(Answer::Broken) => {}
                }
            }
            Waiting::Begin => {
                if !self.session.output.may_begin() {
                    return Ok(false);
                }
                let is_flushing = self
                    .checkpoints
                    .as_ref()
                    .is_some_and(|checkpoints| checkpoints.store().is_flushing());
                self.timeline.kept(is_flushing);
                self.begin();
                return self.is_wait_over();
            }
            Waiting::Flush => {
                let is_flushed = self.checkpoints.as_mut().is_none_or(Checkpoints::is_flushed);
                if !is_flushed && !canary::is_set(Canary::EarlyFlushEnd) {
                    return Ok(false);
                }
                self.protocol.flush_finished();
            }
            Waiting::DeviceState(checkpoint) => {
                let Some(device_state) = self.session.written_device_state() else {
                    self.timeline.waits(Wait::Apart);
                    return Ok(false);
                };
                self.timeline.goes_on();
                *self.protocol.device_state() = device_state;
                self.commit(checkpoint)?;
                return self.is_wait_over();
            }
            Waiting::Output(checkpoint) => {
                if self.session.output.is_unguarded() {
                    return Err(SessionEnd::GuardLost);
                }
                if !self.session.output.may_acknowledge(checkpoint) {
                    self.timeline.waits(Wait::Guard);
                    return Ok(false);
                }
                self.timeline.goes_on();
            }
        }
        self.waiting = Waiting::Bytes;
        Ok(true)
    }

    fn ask_admission(&self) {
        if self.session.admission.ask() {
            self.session.services.notify_control();
        }
    }

    fn await_silence(&mut self, evidence: Evidence) {
        let question = self.session.silence.ask(evidence);
        self.waiting = Waiting::Silence;
        self.session.services.notify_control();
        if let Evidence::Undescribed(mismatch) = evidence
            && !std::mem::replace(&mut self.has_warned_of_end, true)
        {
            self.session.warn(format!(
                "what looks like the end of its initial device state has a description of other sections ({mismatch}). It \
                 is taken for the end if nothing follows for {} ms, in which the guest is stopped",
                question.allowed().as_millis()
            ));
        }
    }

    fn false_end(&self) -> SessionEnd {
        SessionEnd::FalseEnd {
            position: self.state_end,
        }
    }

    fn make_memory(&mut self, table: Arc<BlockTable>) -> Result<(), SessionEnd> {
        self.waiting = Waiting::Memory;
        self.session.memory_asked.store(true, Ordering::Relaxed);
        // The session is over only after this: a receiver that ends would leave files of memory that is still being made.
        let session = SessionPart::new(&self.session);
        // In the background: touching a large guest's memory takes seconds, and this thread drives other guests too.
        let make = move || {
            let make = || session.services.make_memory(session.id, table);
            // The main channel waits for the result, also if there is a panic.
            let made = catch_unwind(AssertUnwindSafe(make));
            if let Ok(Ok(memory)) = &made {
                memory
                    .fallbacks
                    .iter()
                    .for_each(|note| session.warn(note.clone()));
            }
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
        if !self.session.admission.is_decided() {
            self.waiting = Waiting::Admission;
            self.ask_admission();
        }
        if canary::is_set(Canary::EarlyAcknowledge) && self.protocol.description().is_some() {
            self.send(Outbound::Loaded)?;
        }
        Ok(())
    }

    fn send(&mut self, outbound: Outbound) -> Result<(), SessionEnd> {
        outbound.encode(&mut self.outbound);
        // The socket's buffer holds thousands of messages and the primary waits for each: a full one is its fault.
        match self.session.send_main(&self.outbound) {
            Ok(()) => {}
            Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {
                return Err(SessionEnd::PrimaryLost(self.protocol.ending()));
            }
            Err(error) => return Err(SessionEnd::Answer(error.into())),
        }
        let (session, timeline) = (&self.session, &mut self.timeline);
        match (outbound, &mut self.checkpoints) {
            (Outbound::Reply, _) => timeline.reply_sent(session),
            (Outbound::Ready { .. }, _) => timeline.ready_sent(session),
            (Outbound::Loaded, Some(checkpoints)) => {
                checkpoints.acknowledged(|checkpoint| timeline.loaded_sent(session, checkpoint));
            }
            (Outbound::Pong(_) | Outbound::Loaded, _) => {}
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
        // What is read before its admission could be the end of a migration without COLO, of which this is the only copy.
        let reads_ahead =
            self.style.read_ahead && self.session.admission.is_decided() && self.waiting != Waiting::Silence;
        if self.waiting == Waiting::Turn || (self.waiting != Waiting::Bytes && !reads_ahead) {
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

    fn has_more(&self) -> bool {
        self.waiting == Waiting::Turn
    }

    fn leaked(&mut self) {
        self.session.close_main();
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
        let lease = std::mem::take(&mut self.device_state);
        self.session
            .leave_device_states(self.protocol.take_device_states(), lease);
        self.session.close_main();
        self.session.part_dropped();
    }
}
