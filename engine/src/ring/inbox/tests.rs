//! The end of a core, while others hand connections and tenants over to it.

use super::*;
use crate::ring::parked::{Parked, ParkedFate};
use std::sync::atomic::AtomicUsize;
use std::thread;

fn connection(fate: &Arc<ParkedFate>) -> Arrival {
    Arrival::Connection(Box::new(Parked {
        home: 0,
        fate: fate.clone(),
    }))
}

#[test]
fn an_inbox_that_closes_ends_what_is_in_it_and_returns_what_comes_later() {
    let (handle, fate) = (
        CoreHandle::with_capacity(2).unwrap(),
        Arc::new(ParkedFate::default()),
    );
    assert!(handle.push(connection(&fate)).is_ok());
    assert!(handle.push(connection(&fate)).is_ok());
    assert!(matches!(handle.push(connection(&fate)), Err(Refused::Full(_))));
    assert_eq!(fate.losses_and_drops(), (0, 1), "the third one is its owner's");
    handle.inbox.close(core_ended);
    assert_eq!(fate.losses_and_drops(), (2, 3));
    assert!(matches!(handle.push(connection(&fate)), Err(Refused::Closed(_))));
    assert_eq!(fate.losses_and_drops(), (2, 4));
}

#[test]
fn what_is_pushed_into_an_inbox_that_closes_meanwhile_is_closed() {
    let (inbox, fate) = (Inbox::with_capacity(2), Arc::new(ParkedFate::default()));
    inbox.close(core_ended);
    let pushed = inbox.push_unchecked(connection(&fate));
    assert!(matches!(pushed, Err(Refused::ClosedMeanwhile)));
    assert_eq!((fate.losses_and_drops(), inbox.is_empty()), ((1, 1), true));
}

/// Whichever of the two comes first: none stays in the inbox of a core that has ended.
#[test]
fn what_is_pushed_while_an_inbox_closes_is_closed_or_returned() {
    const INBOXES: usize = 20_000;
    let inboxes: Vec<Inbox> = (0..INBOXES).map(|_| Inbox::with_capacity(1)).collect();
    let fate = Arc::new(ParkedFate::default());
    // How far each thread is: neither gets ahead of the other.
    let (pushing, closing) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let meet = |own: &AtomicUsize, other: &AtomicUsize, at: usize| {
        own.store(at + 1, Ordering::Relaxed);
        while other.load(Ordering::Relaxed) <= at {
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for (at, inbox) in inboxes.iter().enumerate() {
                let arrival = connection(&fate);
                meet(&pushing, &closing, at);
                if let Err(Refused::Closed(arrival)) = inbox.push(arrival) {
                    arrival.close(core_ended());
                }
            }
        });
        scope.spawn(|| {
            for (at, inbox) in inboxes.iter().enumerate() {
                meet(&closing, &pushing, at);
                inbox.close(core_ended);
            }
        });
    });
    assert_eq!(fate.losses_and_drops(), (INBOXES, INBOXES));
}
