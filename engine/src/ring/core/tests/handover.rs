//! Connections that go on at another core.

use super::*;

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
    other.resume(0);
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
