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
