//! The event loop of one core: drives its endpoints over a backend that posts receives and reports completions.
//!
//! Contract with the backend: each slot has at most one receive posted; its endpoint, and with it the plan, lives
//! until that receive has completed, whatever happens to the session meanwhile. Nothing is allocated here once all
//! endpoints are attached.

use super::wake::CoreWake;
use super::{Endpoint, Loss, ReceivePlan};
use crate::store::Slab;
use crossbeam_queue::SegQueue;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// Take what is there.
    Poll,
}

/// What a core needs from the kernel.
pub(super) trait Backend {
    /// Posts a receive. The plan stays where it is until its completion is reported.
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan);

    /// Appends completions to `done`. True if the core was woken.
    fn wait(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool>;

    /// A connection will be used no more; nothing is posted on it.
    fn forget(&mut self, slot: usize, fd: RawFd);

    /// Takes `count` consecutive buffer indices, or None if this backend has no registered buffers or no room.
    fn reserve_buffers(&mut self, count: u16) -> Option<u16>;

    /// Registers a slab under an index. The slab outlives every receive into it, and its registration.
    fn register(&mut self, index: u16, slab: &Slab) -> io::Result<()>;

    /// Gives `count` indices back.
    fn release_buffers(&mut self, first: u16, count: u16);
}

/// What others hold of a core.
#[derive(Default)]
pub(super) struct Inbox {
    pub endpoints: SegQueue<Box<dyn Endpoint>>,
    pub stop: AtomicBool,
}

struct Slot {
    endpoint: Box<dyn Endpoint>,
    posted: bool,
    closing: bool,
}

/// Progress of making one guest's slabs known to the ring.
struct Registration {
    guest: u64,
    first: u16,
    count: u16,
    registered: u16,
    failed: bool,
}

impl Registration {
    fn pending(&self) -> bool {
        !self.failed && self.registered < self.count
    }
}

/// Takes what an operator should know.
pub(super) type Warn = Arc<dyn Fn(String) + Send + Sync>;

pub(super) struct Core<B> {
    backend: B,
    wake: Arc<CoreWake>,
    inbox: Arc<Inbox>,
    slots: Vec<Option<Slot>>,
    registrations: Vec<Registration>,
    /// Completions that are to be handed on: here, so that none is lost in a panic.
    done: Vec<Completion>,
    warn: Warn,
}

impl<B: Backend> Core<B> {
    pub(super) fn new(backend: B, wake: Arc<CoreWake>, inbox: Arc<Inbox>, warn: Warn) -> Self {
        Self {
            backend,
            wake,
            inbox,
            slots: Vec::new(),
            registrations: Vec::new(),
            done: Vec::with_capacity(256),
            warn,
        }
    }

    /// Drives endpoints until it is told to stop and the last one has ended.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.wake.adopt();
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.drive())) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    self.abandon(&error);
                    return Err(error);
                }
                Err(_) => self.close_all(),
            }
        }
    }

    fn drive(&mut self) -> io::Result<()> {
        loop {
            self.turn()?;
            if self.inbox.stop.load(Ordering::Acquire) && self.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes what has completed since the last turn, or waits for it, and acts on it.
    pub(super) fn turn(&mut self) -> io::Result<()> {
        let registering = self.registrations.iter().any(Registration::pending);
        let wait = if registering { Wait::Poll } else { Wait::Block };
        let mut woken = self.backend.wait(wait, &mut self.done)?;
        while let Some(completion) = self.done.pop() {
            self.completed(completion);
        }
        if woken {
            self.attach_new();
        }
        while woken || self.wake.take_own() {
            woken = false;
            self.resume_all();
        }
        self.register_some();
        Ok(())
    }

    /// Whether it drives no endpoint.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// The backend has failed: every session of this core ends. What is posted may still be written to, so those
    /// endpoints and their memory are never freed.
    fn abandon(&mut self, error: &io::Error) {
        for mut slot in self.slots.drain(..).flatten() {
            slot.endpoint
                .lost(Loss::Error(io::Error::new(error.kind(), error.to_string())));
            if slot.posted {
                std::mem::forget(slot);
            }
        }
    }

    /// An endpoint has panicked. Nobody knows in which state the guests of this core are, and no primary may be left
    /// waiting: their sessions end. What is posted completes, since its socket is shut down, and is dropped then.
    fn close_all(&mut self) {
        (self.warn)("a receiving thread panicked: the sessions on its core are ended".into());
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots[index].as_mut() {
                let error = io::Error::other("its receiving thread panicked");
                slot.endpoint.lost(Loss::Error(error));
                self.go_on(index, ControlFlow::Break(()));
            }
        }
    }

    fn attach_new(&mut self) {
        while let Some(endpoint) = self.inbox.endpoints.pop() {
            let free = self.slots.iter().position(Option::is_none);
            let index = free.unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
            self.slots[index] = Some(Slot {
                endpoint,
                posted: false,
                closing: false,
            });
            self.post(index);
        }
    }

    fn completed(&mut self, completion: Completion) {
        let index = completion.slot;
        let Some(slot) = self.slots[index].as_mut() else {
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
            Ok(bytes) => slot.endpoint.received(bytes),
            Err(error) => {
                slot.endpoint.lost(Loss::Error(error));
                ControlFlow::Break(())
            }
        };
        self.go_on(index, flow);
    }

    fn resume_all(&mut self) {
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots[index].as_mut() else {
                continue;
            };
            if !slot.closing {
                let flow = slot.endpoint.resume();
                self.go_on(index, flow);
            }
        }
    }

    fn go_on(&mut self, index: usize, flow: ControlFlow<()>) {
        if flow.is_continue() {
            return self.post(index);
        }
        let Some(slot) = self.slots[index].as_mut() else {
            return;
        };
        slot.closing = true;
        if !slot.posted {
            self.remove(index);
        }
    }

    fn post(&mut self, index: usize) {
        let Some(slot) = self.slots[index].as_mut() else {
            return;
        };
        if slot.posted {
            return;
        }
        let fd = slot.endpoint.fd();
        if let Some(plan) = slot.endpoint.plan() {
            slot.posted = true;
            self.backend.post(index, fd, plan);
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(slot) = self.slots[index].take() else {
            return;
        };
        self.backend.forget(index, slot.endpoint.fd());
        let guest = slot.endpoint.guest();
        if !self
            .slots
            .iter()
            .flatten()
            .any(|other| other.endpoint.guest() == guest)
            && let Some(position) = self.registrations.iter().position(|r| r.guest == guest)
        {
            let registration = self.registrations.swap_remove(position);
            self.backend
                .release_buffers(registration.first, registration.count);
        }
        // Dropped last: it may be the last owner of the slabs that were just given back.
        drop(slot);
    }

    /// One slab a turn: a large guest's registration must not hold up the other guests of this core.
    fn register_some(&mut self) {
        self.find_new_slabs();
        let Some(registration) = self.registrations.iter_mut().find(|r| r.pending()) else {
            return;
        };
        let guest = registration.guest;
        let mut members = self
            .slots
            .iter_mut()
            .flatten()
            .filter(|slot| slot.endpoint.guest() == guest);
        let Some(slot) = members.next() else { return };
        let index = registration.first + registration.registered;
        match self.backend.register(
            index,
            &slot.endpoint.slabs()[usize::from(registration.registered)],
        ) {
            Err(error) => {
                registration.failed = true;
                let count = registration.count;
                (self.warn)(format!(
                    "guest {guest}: registering {count} cache slabs with io_uring failed ({error}); its pages are \
                     received without registered buffers. With \"cannot allocate memory\": raise `ulimit -l`"
                ));
            }
            Ok(()) => {
                registration.registered += 1;
                if registration.registered == registration.count {
                    let first = registration.first;
                    slot.endpoint.use_buffers(first);
                    members.for_each(|slot| slot.endpoint.use_buffers(first));
                }
            }
        }
    }

    fn find_new_slabs(&mut self) {
        for slot in self.slots.iter().flatten() {
            let (guest, slabs) = (slot.endpoint.guest(), slot.endpoint.slabs());
            if slabs.is_empty() || self.registrations.iter().any(|r| r.guest == guest) {
                continue;
            }
            let reserved = u16::try_from(slabs.len())
                .ok()
                .and_then(|n| Some((self.backend.reserve_buffers(n)?, n)));
            let (first, count) = reserved.unwrap_or((0, 0));
            self.registrations.push(Registration {
                guest,
                first,
                count,
                registered: 0,
                failed: false,
            });
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::super::epoll::EpollBackend;
    use super::super::wake::Waker;
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    /// Panics at the first byte it gets; shuts its socket down when it is lost, as a session does.
    struct Fragile {
        socket: UnixStream,
        plan: Box<ReceivePlan>,
        byte: Box<[u8; 1]>,
    }

    impl Endpoint for Fragile {
        fn fd(&self) -> RawFd {
            self.socket.as_raw_fd()
        }
        fn guest(&self) -> u64 {
            1
        }
        fn plan(&mut self) -> Option<&mut ReceivePlan> {
            self.plan.clear();
            self.plan.push(self.byte.as_mut_ptr(), 1);
            Some(&mut self.plan)
        }
        fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
            panic!("meant by the test");
        }
        fn lost(&mut self, _loss: Loss) {
            self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        }
        fn resume(&mut self) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }
        fn slabs(&self) -> &[Slab] {
            &[]
        }
        fn use_buffers(&mut self, _first: u16) {}
    }

    #[test]
    fn no_primary_waits_for_a_thread_that_panicked() {
        let (wake, inbox) = (Arc::new(CoreWake::new().unwrap()), Arc::new(Inbox::default()));
        let mut peers = Vec::new();
        for _ in 0..2 {
            let (peer, socket) = UnixStream::pair().unwrap();
            peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let (plan, byte) = (ReceivePlan::new(), Box::new([0]));
            inbox.endpoints.push(Box::new(Fragile { socket, plan, byte }));
            peers.push(peer);
        }
        let thread = {
            let (wake, inbox) = (wake.clone(), inbox.clone());
            thread::spawn(move || {
                let epoll = EpollBackend::new(wake.clone()).unwrap();
                Core::new(epoll, wake, inbox, Arc::new(|_| {})).run()
            })
        };
        Waker::Core(wake.clone()).wake();
        peers[0].write_all(&[7]).unwrap();
        for mut peer in peers {
            assert_eq!(
                peer.read_to_end(&mut Vec::new()).unwrap(),
                0,
                "the end of the connection"
            );
        }
        inbox.stop.store(true, Ordering::Release);
        Waker::Core(wake).wake();
        thread.join().unwrap().unwrap();
    }
}
