//! The event loop of one core: drives its connections over a backend that posts receives and reports completions.
//!
//! Contract with the backend: each slot has at most one receive posted; its connection, and with it the plan, lives until
//! that receive has completed, whatever happens to the session meanwhile. If a core ends before that, because its backend
//! has failed or a panic unwinds, the connection is leaked ([`Slots`]). Nothing is allocated here once all connections are
//! attached.

use super::backend::{Backend, Completion, Wait};
use super::inbox::{Arrival, CoreHandle, Inbox, Refused, guarded};
use super::slots::{Slot, Slots};
use super::tenants::Tenants;
use super::wake::{CoreWake, Woken};
use super::{Connection, Loss};
use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// Wake-ups that are acted on in one turn: as many as some guests have at a sync. The others are the next turn's, after what has
/// been received meanwhile.
const WOKEN_A_TURN: usize = 64;

/// Takes a message for the operator.
pub(super) type Warn = Arc<dyn Fn(String) + Send + Sync>;

pub(super) struct Core<B> {
    /// Dropped before the slots.
    backend: B,
    /// All cores of the plane, and which of them this is.
    cores: Arc<[CoreHandle]>,
    position: usize,
    slots: Slots,
    tenants: Tenants,
    /// Completions that were taken from the backend and not handled yet: a field, so that a panic loses none.
    done: Vec<Completion>,
    /// Whether there is something to do without waiting for it.
    busy: bool,
    /// Slots whose connections the next turn resumes although nothing wakes them: they have had their part of this turn, or are
    /// parked here only because the core that they wait for had no room for them.
    unfinished: VecDeque<usize>,
    /// Slots of connections whose guests are not present here: their sessions have ended, or nothing is ever registered here.
    guestless: Vec<usize>,
    /// Since when bytes gather in sockets, if they do in any.
    coalescing_since: Option<Instant>,
    /// The slots of these sockets.
    coalescing: Vec<usize>,
    warn: Warn,
}

impl<B: Backend> Core<B> {
    pub(super) fn new(backend: B, cores: Arc<[CoreHandle]>, position: usize, warn: Warn) -> Self {
        Self {
            backend,
            cores,
            position,
            slots: Slots::default(),
            tenants: Tenants::default(),
            done: Vec::with_capacity(256),
            busy: false,
            unfinished: VecDeque::new(),
            guestless: Vec::new(),
            coalescing_since: None,
            coalescing: Vec::new(),
            warn,
        }
    }

    /// Drives connections until the plane stops and the last one has ended.
    ///
    /// # Errors
    /// If the backend fails, or a second panic interrupts the clean-up after a first one. All sessions on this core have
    /// ended then.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.wake().adopt();
        loop {
            let failure = match catch_unwind(AssertUnwindSafe(|| self.drive())) {
                Ok(Ok(())) => {
                    self.inbox().close(|| io::Error::other("the receiver ends"));
                    return Ok(());
                }
                Ok(Err(error)) => error,
                Err(_) => match self.close_all() {
                    Ok(()) => {
                        // This thread's own wake-ups, of which that made some, do not end a wait.
                        self.busy = true;
                        continue;
                    }
                    Err(error) => error,
                },
            };
            self.abandon(&failure);
            return Err(failure);
        }
    }

    fn wake(&self) -> &CoreWake {
        &self.cores[self.position].wake
    }

    fn inbox(&self) -> &Inbox {
        &self.cores[self.position].inbox
    }

    fn drive(&mut self) -> io::Result<()> {
        loop {
            self.turn()?;
            let stop = self.inbox().stops() && self.inbox().is_empty();
            if stop && self.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes what has completed since the last turn, or waits for it, and acts on it; then does a small part of the background
    /// work.
    ///
    /// What it costs depends on the connections that have received something, were woken or are unfinished, not on how many
    /// there are; and what each of these costs is bounded: a packet, or [`Connection::has_more`].
    pub(super) fn turn(&mut self) -> io::Result<()> {
        let wait = match (self.busy, self.coalescing_since) {
            (true, _) => Wait::Poll,
            (false, Some(_)) => Wait::Coalesce,
            (false, None) => Wait::Block,
        };
        let woken = self.backend.wait(wait, &mut self.done)?;
        let idle = !woken && self.done.is_empty();
        let unfinished = self.unfinished.len();
        while let Some(completion) = self.done.pop() {
            self.completed(completion);
        }
        if woken {
            self.take_arrivals();
        }
        self.resume_woken();
        self.resume_unfinished(unfinished);
        self.end_coalescing();
        let mut worked = self.tenants.register_one(&mut self.backend, &self.warn);
        if idle || !worked {
            worked |= self.tenants.background_one();
        }
        self.busy = worked || !self.unfinished.is_empty() || self.wake().has_some();
        Ok(())
    }

    fn take_arrivals(&mut self) {
        while let Some(arrival) = self.inbox().pop() {
            // What would have woken it here may have happened before it came.
            match arrival {
                Arrival::Tenant(tenant) => {
                    let tenant = self.tenants.admit(tenant);
                    self.tenants.remove_if_over(tenant, &mut self.backend);
                }
                Arrival::Connection(connection) => {
                    let index = self.attach(connection);
                    self.resume(index);
                }
            }
        }
    }

    /// Whether it has something to do without being woken for it.
    #[cfg(test)]
    pub(super) fn is_busy(&self) -> bool {
        self.busy || self.coalescing_since.is_some()
    }

    /// Whether it has neither connections nor tenants.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.tenants.is_empty()
    }

    /// Returns the connection's slot.
    fn attach(&mut self, connection: Box<dyn Connection>) -> usize {
        let id = connection.tenant();
        let index = self.slots.insert(connection);
        let tenant = self.tenants.attach(id, index);
        if tenant.is_none() {
            self.guestless.push(index);
        }
        // So that nothing is allocated on a packet's way.
        self.unfinished.reserve(self.slots.len());
        self.coalescing.reserve(self.slots.len());
        if let Some(slot) = self.slots.get_mut(index) {
            slot.tenant = tenant;
            slot.connection.attached(self.position);
        }
        self.post(index);
        index
    }

    fn completed(&mut self, completion: Completion) {
        let index = completion.slot;
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.posted = false;
        if let Some(tenant) = slot.tenant {
            self.tenants.activate(tenant);
        }
        if slot.closing {
            return drop(self.detach(index));
        }
        let flow = match completion.result {
            Ok(0) => {
                slot.connection.lost(Loss::Eof);
                ControlFlow::Break(())
            }
            Ok(bytes) => {
                slot.is_drained = bytes < slot.asked;
                slot.connection.received(bytes)
            }
            Err(error) => {
                slot.connection.lost(Loss::Error(error));
                ControlFlow::Break(())
            }
        };
        self.go_on(index, flow);
    }

    fn resume(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index)
            && !slot.closing
        {
            let flow = slot.connection.resume();
            self.go_on(index, flow);
        }
    }

    /// Resumes the connections of a tenant.
    fn resume_tenant(&mut self, tenant: usize) {
        self.tenants.activate(tenant);
        // From the last one on: those that leave give their places to some that were resumed.
        for position in (0..self.tenants.connections(tenant)).rev() {
            if let Some(index) = self.tenants.connection(tenant, position) {
                self.resume(index);
            }
        }
        self.tenants.remove_if_over(tenant, &mut self.backend);
    }

    /// Resumes the connections of a guest, whose tenant may be somewhere else.
    fn resume_guest(&mut self, id: u64) {
        if let Some(tenant) = self.tenants.find(id) {
            return self.resume_tenant(tenant);
        }
        // From the last one on, as above.
        for position in (0..self.guestless.len()).rev() {
            let index = self.guestless[position];
            if self
                .slots
                .get_mut(index)
                .is_some_and(|slot| slot.connection.tenant() == id)
            {
                self.resume(index);
            }
        }
    }

    fn resume_all(&mut self) {
        for index in 0..self.slots.len() {
            self.resume(index);
        }
        for tenant in 0..self.tenants.len() {
            self.tenants.activate(tenant);
            self.tenants.remove_if_over(tenant, &mut self.backend);
        }
    }

    fn resume_woken(&mut self) {
        for _ in 0..WOKEN_A_TURN {
            match self.wake().take() {
                None => return,
                Some(Woken::Tenant(id)) => self.resume_guest(id),
                Some(Woken::All) => self.resume_all(),
            }
        }
    }

    /// Resumes the first so many that an earlier turn has left unfinished.
    fn resume_unfinished(&mut self, count: usize) {
        for _ in 0..count {
            let Some(index) = self.unfinished.pop_front() else {
                return;
            };
            if let Some(slot) = self.slots.get_mut(index)
                && std::mem::take(&mut slot.is_unfinished)
            {
                self.resume(index);
            }
        }
    }

    fn leave_unfinished(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index)
            && !std::mem::replace(&mut slot.is_unfinished, true)
        {
            self.unfinished.push_back(index);
        }
    }

    fn go_on(&mut self, index: usize, flow: ControlFlow<()>) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if flow.is_break() {
            slot.closing = true;
            // It stays if a receive is posted.
            return drop(self.detach(index));
        }
        if slot.connection.has_more() {
            return self.leave_unfinished(index);
        }
        match self.other_core(index) {
            Some(core) => self.hand_over(index, core),
            None => self.post(index),
        }
    }

    /// The core that should drive the connection, if it is another one that can, and nothing is posted.
    fn other_core(&mut self, index: usize) -> Option<usize> {
        let slot = self.slots.get_mut(index).filter(|slot| !slot.posted)?;
        let wanted = slot.connection.moves_to()?;
        let is_other = wanted.core != self.position;
        let is_behind =
            || wanted.from_queued == 0 || self.backend.queued(slot.connection.fd()) >= wanted.from_queued;
        let has_ended = || self.cores[wanted.core].inbox.is_closed();
        (is_other && is_behind() && !has_ended()).then_some(wanted.core)
    }

    /// Another core drives the connection from now on; if that cannot take it, this one goes on.
    fn hand_over(&mut self, index: usize, core: usize) {
        let Some(slot) = self.detach(index) else {
            return;
        };
        let refused = self.cores[core].push(Arrival::Connection(slot.connection));
        if let Err(Refused::Full(Arrival::Connection(connection))) = refused {
            let index = self.attach(connection);
            // A parked connection is woken on that core, not on this one.
            if self.slots.get_mut(index).is_some_and(|slot| !slot.posted) {
                self.leave_unfinished(index);
            }
        } else if let Err(Refused::Closed(Arrival::Connection(connection))) = refused {
            let index = self.attach(connection);
            self.resume(index);
        }
    }

    fn post(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if slot.posted || slot.is_coalescing {
            return;
        }
        let fd = slot.connection.fd();
        let Some(plan) = slot.connection.plan() else {
            return;
        };
        if plan.bulk && slot.is_drained {
            slot.is_coalescing = true;
            self.coalescing.push(index);
            self.coalescing_since.get_or_insert_with(Instant::now);
            return;
        }
        let place = slot.tenant.zip(plan.region);
        plan.registered = place.and_then(|(tenant, region)| self.tenants.buffer(tenant, region));
        slot.asked = plan.remaining();
        slot.posted = true;
        self.backend.post(index, fd, plan);
    }

    /// Receives the bytes that have gathered, if that was long enough.
    fn end_coalescing(&mut self) {
        let ends = |since| self.backend.has_coalesced(since);
        if !self.coalescing_since.is_some_and(ends) {
            return;
        }
        self.coalescing_since = None;
        while let Some(index) = self.coalescing.pop() {
            if let Some(slot) = self.slots.get_mut(index)
                && std::mem::take(&mut slot.is_coalescing)
            {
                slot.is_drained = false;
                self.post(index);
            }
        }
    }

    /// Takes a connection off this core. None if a receive is posted on it.
    fn detach(&mut self, index: usize) -> Option<Slot> {
        let slot = self.slots.take(index)?;
        self.backend.forget(index, slot.connection.fd());
        match slot.tenant {
            Some(tenant) => self.tenants.detach(tenant, index, &mut self.backend),
            None => self.guestless.retain(|other| *other != index),
        }
        Some(slot)
    }

    /// The core ends, and with it every session on it. What is posted may still be written to, so [`Slots`] leaks those
    /// connections and their memory. A panic of one connection does not keep the others from their end.
    fn abandon(&mut self, error: &io::Error) {
        let failure = || Loss::Error(io::Error::new(error.kind(), error.to_string()));
        let lose = |connection: &mut dyn Connection| drop(guarded(|| connection.lost(failure())));
        self.inbox()
            .close(|| io::Error::new(error.kind(), error.to_string()));
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots.get_mut(index)
                && !slot.closing
            {
                lose(&mut *slot.connection);
            }
            let _ = guarded(|| drop(self.slots.take(index)));
        }
        while let Some(tenant) = self.tenants.pop() {
            let _ = guarded(|| drop(tenant));
        }
    }

    /// A connection or a tenant has panicked. The guests of this core are in an unknown state, and no primary may be left
    /// waiting: their sessions end. What is posted completes, since its socket is shut down, and is dropped then.
    ///
    /// # Errors
    /// If there is another panic meanwhile: some session may not have ended.
    fn close_all(&mut self) -> io::Result<()> {
        let warn = || (self.warn)("a receiving thread panicked: the sessions on its core are ended".into());
        let mut result = guarded(warn);
        for index in 0..self.slots.len() {
            let closed = guarded(|| {
                if let Some(slot) = self.slots.get_mut(index)
                    && !slot.closing
                {
                    let error = io::Error::other("its receiving thread panicked");
                    slot.connection.lost(Loss::Error(error));
                    self.go_on(index, ControlFlow::Break(()));
                }
            });
            result = result.and(closed);
        }
        result.and(guarded(|| self.tenants.close_all(&mut self.backend)))
    }
}

#[cfg(all(test, not(loom), not(miri)))]
pub(super) mod tests;
