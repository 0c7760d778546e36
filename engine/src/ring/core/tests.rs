//! The loop of a core, with a backend that does what the test says.

mod handover;
mod panics;
mod tenants;
mod turns;

use super::*;
use crate::ring::epoll::EpollBackend;
use crate::ring::parked::{Parked, ParkedFate};
use crate::ring::{ReceivePlan, Region, Tenant};
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// After so long, a test hangs.
const HANG: Duration = Duration::from_secs(300);

/// Panics at the first byte that it receives; shuts its socket down when it is lost, as a session does.
pub(in crate::ring) struct Fragile {
    socket: UnixStream,
    plan: Box<ReceivePlan>,
    byte: Box<[u8; 1]>,
}

impl Fragile {
    pub(in crate::ring) fn new(socket: UnixStream) -> Self {
        let (plan, byte) = (ReceivePlan::new(), Box::new([0]));
        Self { socket, plan, byte }
    }
}

impl Connection for Fragile {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    fn tenant(&self) -> u64 {
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
    fn attached(&mut self, _core: usize) {}
}

/// A backend for which the test stands for the kernel.
#[derive(Clone, Default)]
struct Scripted {
    posts: Rc<Cell<usize>>,
    completes: Rc<Cell<Option<usize>>>,
    has_coalesced: Rc<Cell<bool>>,
    /// Indices of registered buffers.
    registered: Rc<RefCell<Vec<u16>>>,
}

impl Backend for Scripted {
    fn post(&mut self, _slot: usize, _fd: RawFd, _plan: &mut ReceivePlan) {
        self.posts.set(self.posts.get() + 1);
    }
    fn wait(&mut self, _wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool> {
        done.extend(self.completes.take().map(|bytes| Completion {
            slot: 0,
            result: Ok(bytes),
        }));
        Ok(false)
    }
    fn has_coalesced(&self, _since: Instant) -> bool {
        self.has_coalesced.get()
    }
    fn queued(&self, _fd: RawFd) -> u64 {
        0
    }
    fn forget(&mut self, _slot: usize, _fd: RawFd) {}
    fn buffers(&self) -> usize {
        100
    }
    fn reserve_buffers(&mut self, count: u16) -> Option<u16> {
        (count <= 93).then_some(7)
    }
    fn register(&mut self, index: u16, _region: &dyn Region) -> io::Result<()> {
        self.registered.borrow_mut().push(index);
        Ok(())
    }
    fn unregister(&mut self, index: u16) {
        self.registered.borrow_mut().retain(|other| *other != index);
    }
    fn release_buffers(&mut self, _first: u16, _count: u16) {}
}

/// Asks for a hundred bytes at a time.
struct Greedy {
    plan: Box<ReceivePlan>,
    bytes: Box<[u8; 100]>,
    bulk: bool,
}

impl Connection for Greedy {
    fn fd(&self) -> RawFd {
        -1
    }
    fn tenant(&self) -> u64 {
        1
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        self.plan.clear();
        self.plan.push(self.bytes.as_mut_ptr(), self.bytes.len());
        self.plan.bulk = self.bulk;
        Some(&mut self.plan)
    }
    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn lost(&mut self, _loss: Loss) {}
    fn resume(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn attached(&mut self, _core: usize) {}
}

fn scripted_core() -> (Core<Scripted>, Scripted) {
    let backend = Scripted::default();
    let cores = Arc::new([CoreHandle::new().unwrap()]);
    (Core::new(backend.clone(), cores, 0, Arc::new(|_| {})), backend)
}

/// A region that only counts.
#[derive(Default)]
struct Counted {
    registrations: Arc<AtomicUsize>,
}

impl Region for Counted {
    fn base(&self) -> *mut u8 {
        std::ptr::null_mut()
    }
    fn bytes(&self) -> usize {
        0
    }
    fn is_wanted(&self) -> bool {
        true
    }
    fn registered(&self) {
        self.registrations.fetch_add(1, Ordering::Relaxed);
    }
    fn unregistered(&self) {
        self.registrations.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A guest with as many regions and steps of background work as the test says.
#[derive(Default)]
struct Guest {
    id: u64,
    regions: Vec<Counted>,
    work: Arc<AtomicUsize>,
    has_ended: Arc<AtomicBool>,
    /// How often the core has looked at it.
    looks: Arc<AtomicUsize>,
}

impl Tenant for Guest {
    fn id(&self) -> u64 {
        self.id
    }
    fn region_limit(&self) -> usize {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.regions.len()
    }
    fn region(&self, position: u16) -> Option<&dyn Region> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let region = self.regions.get(usize::from(position))?;
        Some(region)
    }
    fn background(&mut self) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed);
        let step = |work: usize| work.checked_sub(1);
        let done = self.work.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step);
        done.is_ok()
    }
    fn has_ended(&self) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.has_ended.load(Ordering::Relaxed)
    }
}
