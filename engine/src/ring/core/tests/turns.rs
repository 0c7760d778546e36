//! What a turn of a core does, and what it leaves to the next.

use super::*;

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

/// A connection of some guest, on whose resumptions nothing follows, or so many more at its core's next turns.
struct Resumable {
    tenant: u64,
    plan: Option<Box<ReceivePlan>>,
    bytes: Box<[u8; 100]>,
    more: usize,
    resumptions: Arc<AtomicUsize>,
}

impl Resumable {
    /// One that is parked.
    fn parked(tenant: u64, resumptions: &Arc<AtomicUsize>) -> Box<Self> {
        Box::new(Self {
            tenant,
            plan: None,
            bytes: Box::new([0; 100]),
            more: 0,
            resumptions: resumptions.clone(),
        })
    }

    /// One that receives, and then has so much more to do.
    fn receiving(tenant: u64, more: usize, resumptions: &Arc<AtomicUsize>) -> Box<Self> {
        Box::new(Self {
            plan: Some(ReceivePlan::new()),
            more,
            ..*Self::parked(tenant, resumptions)
        })
    }
}

impl Connection for Resumable {
    fn fd(&self) -> RawFd {
        -1
    }
    fn tenant(&self) -> u64 {
        self.tenant
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        let plan = self.plan.as_mut()?;
        plan.clear();
        plan.push(self.bytes.as_mut_ptr(), self.bytes.len());
        Some(plan)
    }
    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn lost(&mut self, _loss: Loss) {}
    fn resume(&mut self) -> ControlFlow<()> {
        self.resumptions.fetch_add(1, Ordering::Relaxed);
        self.more = self.more.saturating_sub(1);
        ControlFlow::Continue(())
    }
    fn has_more(&self) -> bool {
        self.more > 0
    }
    fn attached(&mut self, _core: usize) {}
}

/// What a guest costs that nothing happens to: nothing, whatever happens to another.
#[test]
fn a_turn_looks_at_no_idle_guest() {
    let (mut core, backend) = scripted_core();
    let (looks, resumptions) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    core.attach(Resumable::receiving(0, 0, &Arc::default()));
    core.tenants.admit(Box::new(Guest::default()));
    for id in 1..=250 {
        core.tenants.admit(Box::new(Guest {
            id,
            regions: vec![Counted::default()],
            looks: looks.clone(),
            ..Guest::default()
        }));
        for _ in 0..5 {
            core.attach(Resumable::parked(id, &resumptions));
        }
    }
    // A turn registers one region.
    for _ in 0..300 {
        core.turn().unwrap();
    }
    assert!(looks.swap(0, Ordering::Relaxed) > 0);
    for _ in 0..100 {
        backend.completes.set(Some(100));
        core.wake().wake_for(0);
        core.turn().unwrap();
    }
    let seen = (looks.load(Ordering::Relaxed), resumptions.load(Ordering::Relaxed));
    assert_eq!(
        seen,
        (0, 0),
        "looks at idle guests, and resumptions of their connections"
    );
    // One of them is woken: it alone is looked at.
    core.wake().wake_for(77);
    core.turn().unwrap();
    assert_eq!(resumptions.load(Ordering::Relaxed), 5);
    assert!((1..20).contains(&looks.load(Ordering::Relaxed)));
    // So many are woken that there is no room for that.
    for id in 0..5000 {
        core.wake().wake_for(id % 251);
    }
    while core.wake().has_some() {
        core.turn().unwrap();
    }
    assert!(
        resumptions.load(Ordering::Relaxed) >= 5 + 250 * 5,
        "none is forgotten"
    );
}

/// What a guest has left to do is done in parts, one a turn, and others are served between them.
#[test]
fn a_connection_with_much_to_do_has_one_part_of_each_turn() {
    let (mut core, backend) = scripted_core();
    let (busy, other) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    core.attach(Resumable::receiving(1, 5, &busy));
    core.attach(Resumable::receiving(2, 3, &other));
    backend.completes.set(Some(100));
    core.turn().unwrap();
    let parts = || (busy.load(Ordering::Relaxed), other.load(Ordering::Relaxed));
    assert_eq!((parts(), core.is_busy()), ((0, 0), true));
    let posts = backend.posts.get();
    for turn in 1..=5 {
        assert!(core.is_busy(), "turn {turn}");
        core.turn().unwrap();
        assert_eq!(parts(), (turn, 0));
    }
    assert!(!core.is_busy());
    assert_eq!(
        backend.posts.get(),
        posts + 1,
        "it receives on when it has done all"
    );
}

/// However many connections a guest has, and however much to do on them.
#[test]
fn a_guest_that_has_had_less_of_the_core_goes_first() {
    const CONNECTIONS: usize = 50;
    let (mut core, _) = scripted_core();
    let (busy, other) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    for id in 1..=2 {
        core.tenants.admit(Box::new(Guest {
            id,
            ..Guest::default()
        }));
    }
    for _ in 0..CONNECTIONS {
        let index = core.attach(Resumable::receiving(1, usize::MAX, &busy));
        core.leave_unfinished(index);
    }
    let turns = |core: &mut Core<Scripted>, count: usize| {
        (0..count).for_each(|_| core.turn().unwrap());
        (busy.swap(0, Ordering::Relaxed), other.swap(0, Ordering::Relaxed))
    };
    let (alone, _) = turns(&mut core, 100);
    assert!(
        (100..=200).contains(&alone),
        "{alone}: what a turn may do is bounded"
    );
    // All of what it has to do comes before the rest of the other's.
    let index = core.attach(Resumable::receiving(2, 10, &other));
    core.leave_unfinished(index);
    assert_eq!(turns(&mut core, 10), (0, 10));
    assert!(turns(&mut core, 1).0 > 0);
    // If there is no end of it, both have the same in the long run.
    let index = core.attach(Resumable::receiving(2, usize::MAX, &other));
    core.leave_unfinished(index);
    turns(&mut core, 2000);
    let (first, second) = turns(&mut core, 2000);
    assert!(
        first > 0 && first.abs_diff(second) * 20 < first,
        "{first} and {second}"
    );
    // And all of its connections are served.
    let parts = core.slots.len();
    assert!(first > 2 * parts, "{first}");
}

/// Whoever else has something to do.
#[test]
fn the_end_of_a_connection_waits_for_nobody() {
    let (mut core, backend) = scripted_core();
    for id in 1..=2 {
        core.tenants.admit(Box::new(Guest {
            id,
            ..Guest::default()
        }));
    }
    // In slot 0, where the backend completes: its guest has had much more than the other one.
    core.attach(Resumable::receiving(1, 0, &Arc::default()));
    core.tenants.shares.charge(Some(0), 1 << 30);
    let busy = Arc::<AtomicUsize>::default();
    let index = core.attach(Resumable::receiving(2, usize::MAX, &busy));
    core.leave_unfinished(index);
    core.turn().unwrap();
    backend.completes.set(Some(100));
    core.turn().unwrap();
    assert_eq!(core.ready.len(), 1, "its bytes wait");
    core.ready.clear();
    backend.completes.set(Some(0));
    core.turn().unwrap();
    assert!(core.slots.get_mut(0).is_none(), "its end does not");
}

/// A number that is used again does not take over what was left.
#[test]
fn what_a_connection_has_left_goes_with_it() {
    let (mut core, _) = scripted_core();
    let (first, second) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let mut connection = Resumable::receiving(1, usize::MAX, &first);
    connection.plan = None;
    let index = core.attach(connection);
    core.leave_unfinished(index);
    core.turn().unwrap();
    assert!(core.is_busy());
    drop(core.detach(index));
    let mut connection = Resumable::receiving(1, 0, &second);
    connection.plan = None;
    assert_eq!(core.attach(connection), index);
    core.turn().unwrap();
    assert_eq!(second.load(Ordering::Relaxed), 0);
    assert!(!core.is_busy());
}
