//! A data plane without a kernel's network: the real loop of a core over connections whose bytes a simulation moves, any
//! number at a time.
//!
//! Each connection has a real descriptor, whose other end the simulation holds. Answers and shutdowns go through it, received
//! bytes do not: they are *sent* when the model primary writes them, *arrived* when the simulated network has delivered
//! them here, and *taken* when they were put where the connection's plan says.
#![expect(unsafe_code, reason = "simulated receives write to the places of a plan")]

use super::backend::{Backend, Completion, Wait};
use super::core::Core;
use super::inbox::{Arrival, CoreHandle};
use super::wake::{CoreWake, Waker};
use super::{Connection, ReceivePlan, Region, Tenant};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// All connections, shared by the cores and the simulation.
pub(crate) type Net = Rc<RefCell<Network>>;

/// Whether regions can be registered as buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// As with epoll.
    No,
    /// As with io_uring.
    Yes,
    /// As with io_uring under a limit of locked memory.
    Refused,
}

/// How a stream ends once all of it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// Not yet.
    Open,
    /// As the peer closed it.
    Eof,
    /// By this error; what was not taken before it is lost.
    Error(Errno),
}

/// One connection towards the receiver.
pub(crate) struct Pipe {
    /// By which the core names it.
    fd: RawFd,
    /// The same socket, which stays open when its connection has closed it.
    probe: OwnedFd,
    /// All bytes that the primary has sent.
    pub(crate) sent: Vec<u8>,
    /// Where a piece of them ends, however much more is under way: the peer has written up to there, and writes the rest when that is
    /// received.
    pub(crate) seam: Option<usize>,
    /// How many of them have arrived.
    pub(crate) arrived: usize,
    /// How many of those were put into a plan's places.
    pub(crate) taken: usize,
    pub(crate) end: StreamEnd,
    /// Whether the receiver was seen to have shut its side down: what has arrived can be read, then the stream ends.
    shut: bool,
    posted: Option<Posted>,
    /// The core that received on it last.
    core: Option<usize>,
}

/// A receive that the kernel has.
struct Posted {
    core: usize,
    slot: usize,
    plan: NonNull<ReceivePlan>,
    filled: usize,
}

impl Pipe {
    /// A connection that uses this socket.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(crate) fn new(socket: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: socket.as_raw_fd(),
            probe: socket.try_clone()?,
            sent: Vec::new(),
            seam: None,
            arrived: 0,
            taken: 0,
            end: StreamEnd::Open,
            shut: false,
            posted: None,
            core: None,
        })
    }

    fn is_shut(&mut self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        self.shut = self.shut || matches!(recv(self.probe.as_raw_fd(), &mut [0], flags), Ok(0));
        self.shut
    }

    /// Whether a receive has got bytes and was not reported yet.
    pub(crate) fn is_filling(&self) -> bool {
        self.posted.as_ref().is_some_and(|posted| posted.filled > 0)
    }

    /// Whether bytes are under way.
    pub(crate) fn is_under_way(&self) -> bool {
        !self.shut && self.arrived < self.sent.len()
    }

    /// Whether a receive would find the end, of either side, behind what has arrived.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.is_shut() || (self.end != StreamEnd::Open && !self.is_under_way())
    }

    /// Lets at most `bytes` bytes arrive, and returns how many did. None arrive after a shutdown.
    pub(crate) fn arrive(&mut self, bytes: usize) -> usize {
        let seam = self.seam.filter(|seam| *seam > self.taken || self.is_filling());
        let end = seam.map_or(self.sent.len(), |seam| {
            seam.min(self.sent.len()).max(self.arrived)
        });
        let bytes = bytes.min(end - self.arrived);
        if bytes == 0 || self.is_shut() {
            return 0;
        }
        self.arrived += bytes;
        bytes
    }

    /// The peer sends no more than the first `bytes` bytes, of which those that have arrived cannot be undone.
    pub(crate) fn cut(&mut self, bytes: usize, end: StreamEnd) {
        self.sent.truncate(bytes.max(self.arrived));
        self.end = end;
        if let StreamEnd::Error(_) = end {
            self.sent.truncate(self.taken);
            self.arrived = self.taken;
        }
    }

    /// Whether a receive is posted on which something could be done now.
    pub(crate) fn is_ready(&mut self) -> bool {
        let Some(posted) = &self.posted else { return false };
        let here = self.taken < self.arrived || posted.filled > 0;
        here || self.has_ended()
    }

    /// Puts at most `bytes` bytes into the posted plan. Returns the completion if the kernel would report it, which
    /// `eager` lets it do also while bytes are missing that the plan asked to wait for.
    fn receive(&mut self, bytes: usize, eager: bool) -> Option<(usize, Completion)> {
        let ended_before = self.has_ended();
        let posted = self.posted.as_mut()?;
        // SAFETY: posted and not completed, so the connection keeps the plan where it is and does not touch it (contract of
        // `core`); everything here is on one thread.
        let plan = unsafe { posted.plan.as_mut() };
        let missing = plan.remaining() - posted.filled;
        let count = bytes.min(missing).min(self.arrived - self.taken);
        plan.put(posted.filled, &self.sent[self.taken..self.taken + count]);
        posted.filled += count;
        self.taken += count;
        let (filled, missing, waits) = (posted.filled, missing - count, plan.wait_all);
        let ended = self.taken == self.arrived && ended_before;
        let enough = missing == 0 || !waits || eager;
        if !ended && (filled == 0 || !enough) {
            return None;
        }
        let result = match self.end {
            StreamEnd::Error(errno) if filled == 0 => Err(errno.into()),
            _ => Ok(filled),
        };
        let posted = self.posted.take()?;
        let slot = posted.slot;
        Some((posted.core, Completion { slot, result }))
    }
}

/// The connections, and the completions that the cores have not taken yet.
pub(crate) struct Network {
    pub(crate) pipes: Vec<Pipe>,
    registered: Registered,
    /// How often a connection was received on by another core than before.
    pub(crate) moves: u64,
    ready: Vec<Vec<Completion>>,
    /// Per core: address and bytes of each buffer.
    buffers: Vec<Vec<Option<(usize, usize)>>>,
}

impl Network {
    pub(crate) fn new(cores: usize, registered: Registered) -> Net {
        Rc::new(RefCell::new(Self {
            pipes: Vec::new(),
            registered,
            moves: 0,
            ready: (0..cores).map(|_| Vec::new()).collect(),
            buffers: vec![Vec::new(); cores],
        }))
    }

    /// See [`Pipe::receive`]. Whether something changed.
    pub(crate) fn receive(&mut self, pipe: usize, bytes: usize, eager: bool) -> bool {
        let before = self.pipes[pipe].taken;
        match self.pipes[pipe].receive(bytes, eager) {
            Some((core, completion)) => {
                self.ready[core].push(completion);
                true
            }
            None => before != self.pipes[pipe].taken,
        }
    }

    /// Whether a core has completions to take.
    pub(crate) fn is_ready(&self, core: usize) -> bool {
        !self.ready[core].is_empty()
    }

    /// Receives posted, completions not taken, and buffers registered: all 0 at the end of a simulation.
    pub(crate) fn outstanding(&self) -> (usize, usize, usize) {
        let posted = self.pipes.iter().filter(|pipe| pipe.posted.is_some()).count();
        let ready = self.ready.iter().map(Vec::len).sum();
        let buffers = self.buffers.iter().flatten().flatten().count();
        (posted, ready, buffers)
    }
}

/// The simulation's backend of one core.
struct SimBackend {
    core: usize,
    net: Net,
    wake: Arc<CoreWake>,
}

impl Backend for SimBackend {
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan) {
        let net = &mut *self.net.borrow_mut();
        if let Some(index) = plan.registered {
            let buffer = net.buffers[self.core].get(usize::from(index)).copied().flatten();
            let (base, bytes) = buffer.expect("a plan names a buffer that is registered");
            for piece in plan.pieces() {
                let offset = piece.iov_base.addr().checked_sub(base);
                let inside = offset.is_some_and(|offset| offset + piece.iov_len <= bytes);
                assert!(inside, "a registered receive leaves its buffer");
            }
        }
        assert!(
            plan.remaining() > 0,
            "a receive of no bytes looks like the end of the stream"
        );
        let pipe = net.pipes.iter_mut().find(|pipe| pipe.fd == fd);
        let pipe = pipe.expect("the descriptor is that of a simulated connection");
        assert!(
            pipe.posted.is_none(),
            "one receive at a time is posted on a connection"
        );
        let before = pipe.core.replace(self.core);
        net.moves += u64::from(before.is_some_and(|core| core != self.core));
        pipe.posted = Some(Posted {
            core: self.core,
            slot,
            plan: NonNull::from(plan),
            filled: 0,
        });
    }

    fn wait(&mut self, _wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool> {
        done.append(&mut self.net.borrow_mut().ready[self.core]);
        Ok(self.wake.clear())
    }

    fn has_coalesced(&self, _since: Instant) -> bool {
        true
    }

    fn queued(&self, fd: RawFd) -> u64 {
        let net = self.net.borrow();
        let pipe = net.pipes.iter().find(|pipe| pipe.fd == fd);
        pipe.map_or(0, |pipe| (pipe.arrived - pipe.taken) as u64)
    }

    fn forget(&mut self, slot: usize, _fd: RawFd) {
        let net = self.net.borrow();
        let mut posted = net.pipes.iter().filter_map(|pipe| pipe.posted.as_ref());
        let own = posted.any(|posted| posted.core == self.core && posted.slot == slot);
        assert!(!own, "a connection leaves only when its receive has completed");
    }

    fn buffers(&self) -> usize {
        match self.net.borrow().registered {
            Registered::No => 0,
            _ => usize::from(u16::MAX),
        }
    }

    fn reserve_buffers(&mut self, count: u16) -> Option<u16> {
        let net = &mut *self.net.borrow_mut();
        let buffers = &mut net.buffers[self.core];
        let first = u16::try_from(buffers.len()).ok()?;
        buffers.resize(buffers.len() + usize::from(count), None);
        Some(first)
    }

    fn register(&mut self, index: u16, region: &dyn Region) -> io::Result<()> {
        let net = &mut *self.net.borrow_mut();
        if net.registered == Registered::Refused {
            return Err(Errno::ENOMEM.into());
        }
        net.buffers[self.core][usize::from(index)] = Some((region.base().addr(), region.bytes()));
        Ok(())
    }

    fn unregister(&mut self, index: u16) {
        let net = &mut *self.net.borrow_mut();
        let (base, bytes) = net.buffers[self.core][usize::from(index)]
            .take()
            .expect("what is unregistered was registered");
        let here = |posted: &&Posted| posted.core == self.core;
        for posted in net
            .pipes
            .iter()
            .filter_map(|pipe| pipe.posted.as_ref())
            .filter(here)
        {
            // SAFETY: posted and not completed, so the plan is where it was (contract of `core`).
            let plan = unsafe { posted.plan.as_ref() };
            let inside = |piece: &libc::iovec| (base..base + bytes).contains(&piece.iov_base.addr());
            assert!(
                !plan.pieces().iter().any(inside),
                "a region is unregistered while a receive into it is posted"
            );
        }
    }

    fn release_buffers(&mut self, first: u16, count: u16) {
        let range = usize::from(first)..usize::from(first) + usize::from(count);
        self.net.borrow_mut().buffers[self.core][range].fill(None);
    }
}

/// A core whose loop turns only when the simulation calls it.
pub(crate) struct SimCore {
    core: Core<SimBackend>,
    handle: CoreHandle,
}

impl SimCore {
    /// All cores of that network. `warn` takes messages for the operator.
    pub(crate) fn all(
        net: &Net,
        cores: usize,
        warn: &Arc<dyn Fn(String) + Send + Sync>,
    ) -> io::Result<Vec<Self>> {
        let handles: Arc<[CoreHandle]> = (0..cores).map(|_| CoreHandle::new()).collect::<Result<_, _>>()?;
        let core = |position: usize| {
            let handle = handles[position].clone();
            let backend = SimBackend {
                core: position,
                net: net.clone(),
                wake: handle.wake.clone(),
            };
            Self {
                core: Core::new(backend, handles.clone(), position, warn.clone()),
                handle,
            }
        };
        Ok((0..cores).map(core).collect())
    }

    /// What wakes it for a guest.
    pub(crate) fn waker(&self, guest: u64) -> Waker {
        Waker::Core(self.handle.wake.clone(), guest)
    }

    /// A guest is present on it from now on.
    pub(crate) fn admit(&self, tenant: Box<dyn Tenant>) {
        self.push(Arrival::Tenant(tenant));
    }

    /// Hands a connection to it.
    pub(crate) fn attach(&self, connection: Box<dyn Connection>) {
        self.push(Arrival::Connection(connection));
    }

    fn push(&self, arrival: Arrival) {
        let pushed = self.handle.push(arrival);
        assert!(pushed.is_ok(), "a simulation has few connections");
    }

    /// One turn of its loop, which does not wait.
    pub(crate) fn turn(&mut self) -> io::Result<()> {
        self.handle.wake.adopt();
        let done = self.core.turn();
        // What wakes it between its turns comes from elsewhere.
        CoreWake::disown();
        done
    }

    /// Whether it was woken.
    pub(crate) fn is_woken(&self) -> bool {
        self.handle.wake.is_readable()
    }

    /// Whether it has something left to do.
    pub(crate) fn is_busy(&self) -> bool {
        self.core.is_busy()
    }

    /// Whether it has neither connections nor tenants, and none is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.core.is_empty() && self.handle.inbox.is_empty()
    }
}
