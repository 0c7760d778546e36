//! The event loop of one core: drives its endpoints over a backend that posts receives and reports completions.
//!
//! Contract with the backend: each slot has at most one receive posted; its endpoint, and with it the plan, lives
//! until that receive has completed, whatever happens to the session meanwhile. If a core ends before that, because its
//! backend has failed or a panic unwinds, the endpoint is leaked ([`Slots`]). Nothing is allocated here once all endpoints
//! are attached.

use super::slots::{Slot, Slots};
use super::wake::CoreWake;
use super::{Buffers, Endpoint, Loss, ReceivePlan};
use crate::store::Slab;
use crossbeam_queue::ArrayQueue;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The end of a posted receive. Ok(0) is the end of the stream.
pub(super) struct Completion {
    pub slot: usize,
    pub result: io::Result<usize>,
}

/// Whether to wait for something to happen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Until a completion or a wake-up.
    Block,
    /// The same, but not much longer than a socket rests.
    Rest,
    /// Take what is there.
    Poll,
}

/// How long bytes gather in a socket that a bulk receive has emptied. The kernel wakes a waiting core for the first packet,
/// and a core that is as fast as its sender is then woken for each: that costs more, the sender too, than the bytes'
/// copying. At 4 GB/s this is 200 KiB; it is also what it can add to a checkpoint of some MiB.
pub(super) const REST: Duration = Duration::from_micros(50);

/// What a core needs from the kernel.
pub(super) trait Backend {
    /// Posts a receive. The plan stays where it is until its completion is reported.
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan);

    /// Appends completions to `done`. True if the core was woken.
    fn wait(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool>;

    /// Bytes that wait in the socket.
    fn queued(&self, fd: RawFd) -> u64;

    /// Whether enough time has passed for sockets that rest.
    fn has_rested(&self, since: Instant) -> bool {
        since.elapsed() >= REST
    }

    /// A connection will be used no more; nothing is posted on it.
    fn forget(&mut self, slot: usize, fd: RawFd);

    /// Takes `count` consecutive buffer indices, or None if this backend has no registered buffers or no room.
    fn reserve_buffers(&mut self, count: u16) -> Option<u16>;

    /// Registers a slab under an index. The slab outlives every receive into it, and its registration.
    fn register(&mut self, index: u16, slab: &Slab) -> io::Result<()>;

    /// Forgets the slab under an index. Nothing is posted that uses it.
    fn unregister(&mut self, index: u16);

    /// Gives `count` indices back, under which no slab is registered.
    fn release_buffers(&mut self, first: u16, count: u16);
}

/// Endpoints that can wait for their core at the same time: all connections of a large host.
const INBOX_MAX: usize = 4096;

/// What others hold of a core.
pub(super) struct Inbox {
    /// Endpoints that it shall drive. With a fixed capacity, so that a hand-over allocates nothing.
    pub endpoints: ArrayQueue<Box<dyn Endpoint>>,
    pub stop: AtomicBool,
    /// Its core has failed and drives nothing any more.
    failed: AtomicBool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            endpoints: ArrayQueue::new(INBOX_MAX),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }
    }
}

/// What of one guest's slabs is known to the ring.
struct Registration {
    guest: u64,
    /// Indices that are reserved for it, from `registered.first` on.
    reserved: u16,
    registered: Buffers,
    failed: bool,
}

/// A core as others see it: where endpoints are put that it shall drive, and how it is woken to find them.
#[derive(Clone)]
pub(super) struct Peer {
    pub inbox: Arc<Inbox>,
    pub wake: Arc<CoreWake>,
}

impl Peer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            inbox: Arc::default(),
            wake: Arc::new(CoreWake::new()?),
        })
    }
}

/// Takes what an operator should know.
pub(super) type Warn = Arc<dyn Fn(String) + Send + Sync>;

pub(super) struct Core<B> {
    backend: B,
    /// All cores of the plane, and which of them this is.
    peers: Arc<[Peer]>,
    position: usize,
    slots: Slots,
    registrations: Vec<Registration>,
    /// Completions that are to be handed on: here, so that none is lost in a panic.
    done: Vec<Completion>,
    /// The slot that was last asked for work that can wait.
    idle_turn: usize,
    /// Whether there is something to do without waiting for it.
    busy: bool,
    /// Since when bytes gather for slots that rest, if any does.
    rest: Option<Instant>,
    warn: Warn,
}

impl<B: Backend> Core<B> {
    pub(super) fn new(backend: B, peers: Arc<[Peer]>, position: usize, warn: Warn) -> Self {
        Self {
            backend,
            peers,
            position,
            slots: Slots::default(),
            registrations: Vec::new(),
            done: Vec::with_capacity(256),
            idle_turn: 0,
            busy: false,
            rest: None,
            warn,
        }
    }

    /// Drives endpoints until it is told to stop and the last one has ended.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.wake().adopt();
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.drive())) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    self.abandon(&error);
                    return Err(error);
                }
                Err(_) => {
                    if let Err(error) = self.close_all() {
                        self.abandon(&error);
                        return Err(error);
                    }
                }
            }
        }
    }

    fn wake(&self) -> &CoreWake {
        &self.peers[self.position].wake
    }

    fn inbox(&self) -> &Inbox {
        &self.peers[self.position].inbox
    }

    fn drive(&mut self) -> io::Result<()> {
        loop {
            self.turn()?;
            let stop = self.inbox().stop.load(Ordering::Acquire) && self.inbox().endpoints.is_empty();
            if stop && self.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes what has completed since the last turn, or waits for it, and acts on it; or, if nothing has, does a little of
    /// the work that can wait.
    pub(super) fn turn(&mut self) -> io::Result<()> {
        let wait = match (self.busy, self.rest) {
            (true, _) => Wait::Poll,
            (false, Some(_)) => Wait::Rest,
            (false, None) => Wait::Block,
        };
        let mut woken = self.backend.wait(wait, &mut self.done)?;
        let idle = !woken && self.done.is_empty();
        while let Some(completion) = self.done.pop() {
            self.completed(completion);
        }
        if woken {
            self.attach_new();
        }
        while woken || self.wake().take_own() {
            woken = false;
            self.resume_all();
        }
        self.end_rest();
        self.busy = self.register_some();
        if idle || !self.busy {
            self.busy |= self.background_some();
        }
        Ok(())
    }

    /// Whether it has something to do without being woken for it.
    #[cfg(test)]
    pub(super) fn is_busy(&self) -> bool {
        self.busy || self.rest.is_some()
    }

    /// Whether it drives no endpoint.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Lets the next endpoint that has some do a little of the work that can wait. False if none has.
    fn background_some(&mut self) -> bool {
        let count = self.slots.len();
        for turn in self.idle_turn..self.idle_turn + count {
            let Some(slot) = self.slots.get_mut(turn % count) else {
                continue;
            };
            if !slot.closing && slot.endpoint.background() {
                self.idle_turn = (turn + 1) % count;
                return true;
            }
        }
        false
    }

    /// The core ends: every session on it ends. What is posted may still be written to, so [`Slots`] leaks those endpoints
    /// and their memory. A panic of one endpoint does not keep the others from their end.
    fn abandon(&mut self, error: &io::Error) {
        let failure = || Loss::Error(io::Error::new(error.kind(), error.to_string()));
        self.inbox().failed.store(true, Ordering::Release);
        while let Some(mut endpoint) = self.inbox().endpoints.pop() {
            let _ = guarded(|| endpoint.lost(failure()));
            let _ = guarded(|| drop(endpoint));
        }
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots.get_mut(index)
                && !slot.closing
            {
                let _ = guarded(|| slot.endpoint.lost(failure()));
            }
            let _ = guarded(|| drop(self.slots.take(index)));
        }
    }

    /// An endpoint has panicked. Nobody knows in which state the guests of this core are, and no primary may be left
    /// waiting: their sessions end. What is posted completes, since its socket is shut down, and is dropped then.
    ///
    /// # Errors
    /// If there is another panic meanwhile: some session may not have ended.
    fn close_all(&mut self) -> io::Result<()> {
        let warned =
            guarded(|| (self.warn)("a receiving thread panicked: the sessions on its core are ended".into()));
        let mut result = warned;
        for index in 0..self.slots.len() {
            let closed = guarded(|| {
                if let Some(slot) = self.slots.get_mut(index) {
                    let error = io::Error::other("its receiving thread panicked");
                    slot.endpoint.lost(Loss::Error(error));
                    self.go_on(index, ControlFlow::Break(()));
                }
            });
            result = result.and(closed);
        }
        result
    }

    fn attach_new(&mut self) {
        while let Some(endpoint) = self.inbox().endpoints.pop() {
            self.attach(endpoint);
        }
    }

    fn attach(&mut self, mut endpoint: Box<dyn Endpoint>) {
        let guest = endpoint.guest();
        let registration = self.registrations.iter().find(|r| r.guest == guest);
        let buffers = registration.map_or_else(Buffers::default, |r| r.registered);
        endpoint.attached(self.position, buffers);
        let index = self.slots.insert(endpoint);
        self.post(index);
    }

    fn completed(&mut self, completion: Completion) {
        let index = completion.slot;
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.posted = false;
        if slot.closing {
            return self.remove(index);
        }
        let flow = match completion.result {
            Ok(0) => {
                slot.endpoint.lost(Loss::Eof);
                ControlFlow::Break(())
            }
            Ok(bytes) => {
                slot.is_drained = bytes < slot.asked;
                slot.endpoint.received(bytes)
            }
            Err(error) => {
                slot.endpoint.lost(Loss::Error(error));
                ControlFlow::Break(())
            }
        };
        self.go_on(index, flow);
    }

    fn resume_all(&mut self) {
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get_mut(index) else {
                continue;
            };
            if !slot.closing {
                let flow = slot.endpoint.resume();
                self.go_on(index, flow);
            }
        }
    }

    fn go_on(&mut self, index: usize, flow: ControlFlow<()>) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if flow.is_break() {
            slot.closing = true;
            if !slot.posted {
                self.remove(index);
            }
            return;
        }
        let queued = || self.backend.queued(slot.endpoint.fd());
        let elsewhere = slot
            .endpoint
            .moves_to(&queued)
            .filter(|core| *core != self.position);
        match elsewhere {
            Some(core) if !slot.posted && !self.peers[core].inbox.failed.load(Ordering::Acquire) => {
                self.hand_over(index, core);
            }
            _ => self.post(index),
        }
    }

    /// Another core drives the endpoint from now on; if that has no room for it, this one goes on.
    fn hand_over(&mut self, index: usize, core: usize) {
        let Some(slot) = self.detach(index) else {
            return;
        };
        let peer = &self.peers[core];
        match peer.inbox.endpoints.push(slot.endpoint) {
            Ok(()) => peer.wake.wake(),
            Err(endpoint) => self.attach(endpoint),
        }
    }

    fn post(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if slot.posted || slot.is_resting {
            return;
        }
        let fd = slot.endpoint.fd();
        let Some(plan) = slot.endpoint.plan() else {
            return;
        };
        if plan.bulk && slot.is_drained {
            slot.is_resting = true;
            self.rest.get_or_insert_with(Instant::now);
            return;
        }
        slot.asked = plan.remaining();
        slot.posted = true;
        self.backend.post(index, fd, plan);
    }

    /// Bytes have gathered long enough: receives them.
    fn end_rest(&mut self) {
        if self.rest.is_none_or(|since| !self.backend.has_rested(since)) {
            return;
        }
        self.rest = None;
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots.get_mut(index)
                && std::mem::take(&mut slot.is_resting)
            {
                slot.is_drained = false;
                self.post(index);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        // Dropped last: it may be the last owner of the slabs that were just given back.
        drop(self.detach(index));
    }

    /// Takes an endpoint off this core; the last one of a guest takes the guest's buffers with it.
    fn detach(&mut self, index: usize) -> Option<Slot> {
        let slot = self.slots.take(index)?;
        self.backend.forget(index, slot.endpoint.fd());
        let guest = slot.endpoint.guest();
        let others = |other: &Slot| other.endpoint.guest() == guest;
        if !self.slots.iter().any(others)
            && let Some(position) = self.registrations.iter().position(|r| r.guest == guest)
        {
            let registration = self.registrations.swap_remove(position);
            let Buffers { first, count } = registration.registered;
            for position in 0..count {
                self.backend.unregister(first + position);
                if let Some(slab) = slot.endpoint.slab(usize::from(position)) {
                    slab.unregistered();
                }
            }
            self.backend.release_buffers(first, registration.reserved);
        }
        Some(slot)
    }

    /// One slab a turn: a large guest's registration must not hold up the other guests of this core. True if it
    /// registered one, so that there may be more.
    fn register_some(&mut self) -> bool {
        self.find_new_guests();
        for position in 0..self.registrations.len() {
            let registration = &mut self.registrations[position];
            let guest = registration.guest;
            let of_guest = |slot: &&mut Slot| slot.endpoint.guest() == guest;
            let Some(slot) = self.slots.iter_mut().find(of_guest) else {
                continue;
            };
            let Buffers { first, count } = registration.registered;
            let slab = |position: u16| slot.endpoint.slab(usize::from(position));
            if let Some(last) = count.checked_sub(1)
                && let Some(retired) = slab(last).filter(|slab| !slab.is_wanted())
            {
                self.backend.unregister(first + last);
                retired.unregistered();
                registration.registered.count = last;
            } else if !registration.failed
                && count < registration.reserved
                && let Some(next) = slab(count).filter(|slab| slab.is_wanted())
            {
                if let Err(error) = self.backend.register(first + count, next) {
                    registration.failed = true;
                    (self.warn)(format!(
                        "guest {guest}: registering cache slab {count} with io_uring failed ({error}); pages are received \
                         there without registered buffers. With \"cannot allocate memory\": raise `ulimit -l`"
                    ));
                    return true;
                }
                next.registered();
                registration.registered.count += 1;
            } else {
                continue;
            }
            let buffers = registration.registered;
            let members = self.slots.iter_mut().filter(of_guest);
            members.for_each(|slot| slot.endpoint.use_buffers(buffers));
            return true;
        }
        false
    }

    fn find_new_guests(&mut self) {
        for slot in self.slots.iter() {
            let (guest, limit) = (slot.endpoint.guest(), slot.endpoint.slab_limit());
            if limit == 0 || self.registrations.iter().any(|r| r.guest == guest) {
                continue;
            }
            let reserved = u16::try_from(limit)
                .ok()
                .and_then(|count| Some((self.backend.reserve_buffers(count)?, count)));
            let (first, reserved) = reserved.unwrap_or((0, 0));
            self.registrations.push(Registration {
                guest,
                reserved,
                registered: Buffers { first, count: 0 },
                failed: false,
            });
        }
    }
}

/// Calls something that may panic, where more must be done after it.
fn guarded(call: impl FnOnce()) -> io::Result<()> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|_| io::Error::other("a receiving thread panicked repeatedly"))
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests;
