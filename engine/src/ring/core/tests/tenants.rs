//! What a core does for its guests: buffers are registered, background work is done.

use super::*;
use std::sync::Mutex;

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

#[test]
fn a_guest_for_which_a_ring_has_no_room_is_reported_once() {
    let said: Arc<Mutex<Vec<String>>> = Arc::default();
    let says = said.clone();
    let cores = Arc::new([CoreHandle::new().unwrap()]);
    let warn = move |text| says.lock().unwrap().push(text);
    let mut core = Core::new(Scripted::default(), cores, 0, Arc::new(warn));
    core.tenants.admit(Box::new(Guest {
        id: 1,
        regions: (0..94).map(|_| Counted::default()).collect(),
        ..Guest::default()
    }));
    for _ in 0..3 {
        core.turn().unwrap();
    }
    let said = said.lock().unwrap();
    assert!(
        matches!(&said[..], [text] if text.contains("94 slabs") && text.contains("100 registered buffers")),
        "{said:?}"
    );
}
