//! Panics of connections, of their destructors and of the warning.

use super::*;

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
