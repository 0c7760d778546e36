//! The loop of a core, with a backend that does what the test says.

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

#[test]
fn no_primary_waits_for_a_thread_that_panicked() {
    let handle = CoreHandle::new().unwrap();
    let mut peers = Vec::new();
    for _ in 0..2 {
        let (peer, socket) = UnixStream::pair().unwrap();
        peer.set_read_timeout(Some(HANG)).unwrap();
        let connection: Box<dyn Connection> = Box::new(Fragile::new(socket));
        assert!(handle.push(Arrival::Connection(connection)).is_ok());
        peers.push(peer);
    }
    let thread = {
        let handle = handle.clone();
        thread::spawn(move || {
            let epoll = EpollBackend::new(handle.wake.clone()).unwrap();
            Core::new(epoll, Arc::new([handle]), 0, Arc::new(|_| {})).run()
        })
    };
    peers[0].write_all(&[7]).unwrap();
    for mut peer in peers {
        assert_eq!(
            peer.read_to_end(&mut Vec::new()).unwrap(),
            0,
            "the end of the connection"
        );
    }
    handle.stop();
    thread.join().unwrap().unwrap();
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
    fn reserve_buffers(&mut self, _count: u16) -> Option<u16> {
        Some(7)
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

/// Turns after each of these completions, and how many receives were posted by then.
fn posts_after(bulk: bool, completions: &[usize]) -> (Core<Scripted>, Scripted, Vec<usize>) {
    let (mut core, backend) = scripted_core();
    let (plan, bytes) = (ReceivePlan::new(), Box::new([0; 100]));
    core.attach(Box::new(Greedy { plan, bytes, bulk }));
    let turn = |bytes: &usize| {
        backend.completes.set(Some(*bytes));
        core.turn().unwrap();
        backend.posts.get()
    };
    let posts = completions.iter().map(turn).collect();
    (core, backend, posts)
}

#[test]
fn bytes_gather_where_a_bulk_receive_has_emptied_the_socket() {
    let (_, _, posts) = posts_after(false, &[100, 7]);
    assert_eq!(posts, [2, 3], "others are received as they come");
    let (mut core, backend, posts) = posts_after(true, &[100, 7]);
    assert_eq!(posts, [2, 2]);
    core.turn().unwrap();
    assert_eq!((backend.posts.get(), core.is_busy()), (2, true));
    backend.has_coalesced.set(true);
    core.turn().unwrap();
    assert_eq!((backend.posts.get(), core.is_busy()), (3, false));
}

/// What happens to a connection.
#[derive(Clone, Default)]
struct Fate {
    losses: Arc<AtomicUsize>,
    leaks: Arc<AtomicUsize>,
    drops: Arc<AtomicUsize>,
}

/// Panics where the test says so. Its receives go to memory of its own.
struct Doomed {
    plan: Box<ReceivePlan>,
    bytes: Box<[u8; 100]>,
    fate: Fate,
    panics_when_received: bool,
    panics_when_lost: bool,
    panics_when_dropped: bool,
}

impl Doomed {
    fn new(fate: &Fate) -> Self {
        Self {
            plan: ReceivePlan::new(),
            bytes: Box::new([0; 100]),
            fate: fate.clone(),
            panics_when_received: false,
            panics_when_lost: false,
            panics_when_dropped: false,
        }
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.fate.drops.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics_when_dropped, "meant by the test");
    }
}

impl Connection for Doomed {
    fn fd(&self) -> RawFd {
        -1
    }
    fn tenant(&self) -> u64 {
        1
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        self.plan.clear();
        self.plan.push(self.bytes.as_mut_ptr(), self.bytes.len());
        Some(&mut self.plan)
    }
    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        assert!(!self.panics_when_received, "meant by the test");
        ControlFlow::Continue(())
    }
    fn lost(&mut self, _loss: Loss) {
        self.fate.losses.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics_when_lost, "meant by the test");
    }
    fn resume(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn leaked(&mut self) {
        self.fate.leaks.fetch_add(1, Ordering::Relaxed);
        assert!(!self.panics_when_lost, "meant by the test");
    }
    fn attached(&mut self, _core: usize) {}
}

/// The first connection panics when its receive has completed, and a part of the clean-up after that panics again. The
/// second connection's receive is posted all the time.
fn memory_survives(spoil: impl FnOnce(&mut Doomed), warn: Warn) {
    let (first, second) = (Fate::default(), Fate::default());
    let backend = Scripted::default();
    let cores = Arc::new([CoreHandle::new().unwrap()]);
    let mut core = Core::new(backend.clone(), cores, 0, warn);
    let mut doomed = Doomed::new(&first);
    doomed.panics_when_received = true;
    spoil(&mut doomed);
    core.attach(Box::new(doomed));
    core.attach(Box::new(Doomed::new(&second)));
    backend.completes.set(Some(100));
    let end = catch_unwind(AssertUnwindSafe(|| core.run()));
    assert_eq!(
        second.drops.load(Ordering::Relaxed),
        0,
        "the kernel still has the receive into its memory"
    );
    assert!(end.expect("a core ends without unwinding").is_err());
    assert_eq!(second.losses.load(Ordering::Relaxed), 1);
    assert_eq!(
        second.leaks.load(Ordering::Relaxed),
        1,
        "its session need not wait for it"
    );
    assert_eq!(first.drops.load(Ordering::Relaxed), 1);
    assert_eq!(first.leaks.load(Ordering::Relaxed), 0);
}

#[test]
fn posted_memory_survives_a_panic_in_a_destructor() {
    memory_survives(|doomed| doomed.panics_when_dropped = true, Arc::new(|_| {}));
}

#[test]
fn posted_memory_survives_a_panic_in_lost_and_in_a_destructor() {
    let spoil = |doomed: &mut Doomed| {
        doomed.panics_when_lost = true;
        doomed.panics_when_dropped = true;
    };
    memory_survives(spoil, Arc::new(|_| {}));
}

#[test]
fn posted_memory_survives_a_panic_in_the_warning() {
    memory_survives(|_| {}, Arc::new(|_| panic!("meant by the test")));
}

#[test]
fn a_panic_of_one_that_is_leaked_does_not_drop_the_next() {
    let fates = [Fate::default(), Fate::default()];
    let cores = Arc::new([CoreHandle::new().unwrap()]);
    let mut core = Core::new(Scripted::default(), cores, 0, Arc::new(|_| {}));
    for fate in &fates {
        let mut doomed = Doomed::new(fate);
        doomed.panics_when_lost = true;
        core.attach(Box::new(doomed));
    }
    drop(core);
    for fate in &fates {
        assert_eq!(fate.drops.load(Ordering::Relaxed), 0);
        assert_eq!(fate.leaks.load(Ordering::Relaxed), 1);
    }
}

/// Also when a destructor panics while the core is dropped.
#[test]
fn posted_memory_survives_the_drop_of_a_core() {
    let (first, second) = (Fate::default(), Fate::default());
    let cores = Arc::new([CoreHandle::new().unwrap()]);
    let mut core = Core::new(Scripted::default(), cores, 0, Arc::new(|_| {}));
    let mut doomed = Doomed::new(&first);
    doomed.panics_when_dropped = true;
    core.attach(Box::new(doomed));
    core.attach(Box::new(Doomed::new(&second)));
    // Not posted any more, so it is dropped with the core.
    core.slots.get_mut(0).unwrap().posted = false;
    assert!(catch_unwind(AssertUnwindSafe(|| drop(core))).is_err());
    let drops = |fate: &Fate| fate.drops.load(Ordering::Relaxed);
    assert_eq!((drops(&first), drops(&second)), (1, 0));
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
}

impl Tenant for Guest {
    fn id(&self) -> u64 {
        self.id
    }
    fn region_limit(&self) -> usize {
        self.regions.len()
    }
    fn region(&self, position: u16) -> Option<&dyn Region> {
        let region = self.regions.get(usize::from(position))?;
        Some(region)
    }
    fn background(&mut self) -> bool {
        let step = |work: usize| work.checked_sub(1);
        let done = self.work.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step);
        done.is_ok()
    }
    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }
}

#[test]
fn regions_stay_registered_until_the_last_connection_leaves() {
    let (mut core, backend) = scripted_core();
    let (ended, registrations) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let region = || Counted {
        registrations: registrations.clone(),
    };
    core.tenants.admit(Box::new(Guest {
        id: 1,
        regions: vec![region(), region()],
        has_ended: Arc::clone(&ended),
        ..Guest::default()
    }));
    let (plan, bytes) = (ReceivePlan::new(), Box::new([0; 100]));
    let bulk = false;
    core.attach(Box::new(Greedy { plan, bytes, bulk }));
    core.turn().unwrap();
    assert_eq!(*backend.registered.borrow(), [7], "one region a turn");
    core.turn().unwrap();
    assert_eq!(*backend.registered.borrow(), [7, 8]);
    ended.store(true, Ordering::Relaxed);
    core.resume_all();
    // The count of the flag shows whether the tenant still exists.
    let state = || (registrations.load(Ordering::Relaxed), Arc::strong_count(&ended));
    assert_eq!(state(), (2, 2));
    // The end of the stream.
    backend.completes.set(Some(0));
    core.turn().unwrap();
    assert_eq!((state(), core.is_empty()), ((0, 1), true));
    assert!(backend.registered.borrow().is_empty());
}

#[test]
fn background_work_is_fair_to_all_tenants() {
    let (mut core, _) = scripted_core();
    let works: Vec<Arc<AtomicUsize>> = [9, 0, 9]
        .into_iter()
        .map(|steps| Arc::new(steps.into()))
        .collect();
    for (id, work) in (1..).zip(&works) {
        let work = work.clone();
        core.tenants.admit(Box::new(Guest {
            id,
            work,
            ..Guest::default()
        }));
    }
    for _ in 0..6 {
        core.turn().unwrap();
    }
    let left: Vec<usize> = works.iter().map(|work| work.load(Ordering::Relaxed)).collect();
    assert_eq!(left, [6, 0, 6]);
}

/// A release wakes only the home core, so the connection must come there, however late there is room for it.
#[test]
fn a_parked_connection_reaches_its_home_core_though_there_was_no_room() {
    let handles = [0, 1].map(|_| CoreHandle::with_capacity(1).unwrap());
    let cores: Arc<[CoreHandle]> = Arc::new(handles);
    let core = |position| Core::new(Scripted::default(), cores.clone(), position, Arc::new(|_| {}));
    let (mut home, mut other) = (core(0), core(1));
    let guest = |id| {
        Box::new(Guest {
            id,
            ..Guest::default()
        })
    };
    assert!(cores[0].push(Arrival::Tenant(guest(1))).is_ok());
    let fate = Arc::new(ParkedFate::default());
    other.attach(Box::new(Parked {
        home: 0,
        fate: fate.clone(),
    }));
    assert_eq!(fate.core(), 1);
    // It has reached the sync.
    other.resume_all();
    assert!(!other.is_empty(), "the inbox of the home core is full");
    for _ in 0..3 {
        other.turn().unwrap();
        assert!(other.is_busy(), "it must try again without being woken");
    }
    home.take_arrivals();
    other.turn().unwrap();
    assert!(other.is_empty() && !other.is_busy());
    home.take_arrivals();
    assert_eq!(fate.core(), 0);
}

/// A core that ends with its receiver takes no connection with it that another core is handing over.
#[test]
fn a_connection_stays_where_it_is_if_the_other_core_has_ended() {
    let cores: Arc<[CoreHandle]> = Arc::new([0, 1].map(|_| CoreHandle::new().unwrap()));
    let core = |position| Core::new(Scripted::default(), cores.clone(), position, Arc::new(|_| {}));
    let mut other = core(1);
    let fate = Arc::new(ParkedFate::default());
    other.attach(Box::new(Parked {
        home: 0,
        fate: fate.clone(),
    }));
    assert_eq!(fate.core(), 1);
    cores[0].stop();
    core(0).run().unwrap();
    other.resume_all();
    assert!(!other.is_empty() && !other.is_busy());
    assert_eq!(fate.core(), 1);
}
