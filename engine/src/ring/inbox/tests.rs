//! The end of a core, while others hand connections and tenants over to it.

use super::*;
use crate::ring::ReceivePlan;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicUsize;
use std::thread;

/// What happened to connections and tenants.
#[derive(Default)]
struct Ends {
    losses: AtomicUsize,
    drops: AtomicUsize,
}

struct Counted(Arc<Ends>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.drops.fetch_add(1, Ordering::Relaxed);
    }
}

impl Connection for Counted {
    fn fd(&self) -> RawFd {
        -1
    }
    fn tenant(&self) -> u64 {
        1
    }
    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        None
    }
    fn received(&mut self, _bytes: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn lost(&mut self, _loss: Loss) {
        self.0.losses.fetch_add(1, Ordering::Relaxed);
    }
    fn resume(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
    fn attached(&mut self, _core: usize) {}
}

fn connection(ends: &Arc<Ends>) -> Arrival {
    Arrival::Connection(Box::new(Counted(ends.clone())))
}

fn losses_and_drops(ends: &Ends) -> (usize, usize) {
    (
        ends.losses.load(Ordering::Relaxed),
        ends.drops.load(Ordering::Relaxed),
    )
}

#[test]
fn an_inbox_that_closes_ends_what_is_in_it_and_returns_what_comes_later() {
    let (handle, ends) = (CoreHandle::with_capacity(2).unwrap(), Arc::new(Ends::default()));
    assert!(handle.push(connection(&ends)).is_ok());
    assert!(handle.push(connection(&ends)).is_ok());
    assert!(matches!(handle.push(connection(&ends)), Err(Refused::Full(_))));
    assert_eq!(losses_and_drops(&ends), (0, 1), "the third one is its owner's");
    handle.inbox.close(core_ended);
    assert_eq!(losses_and_drops(&ends), (2, 3));
    assert!(matches!(handle.push(connection(&ends)), Err(Refused::Closed(_))));
    assert_eq!(losses_and_drops(&ends), (2, 4));
}

#[test]
fn what_is_pushed_into_an_inbox_that_closes_meanwhile_is_closed() {
    let (inbox, ends) = (Inbox::with_capacity(2), Arc::new(Ends::default()));
    inbox.close(core_ended);
    let pushed = inbox.push_unchecked(connection(&ends));
    assert!(matches!(pushed, Err(Refused::ClosedMeanwhile)));
    assert_eq!((losses_and_drops(&ends), inbox.is_empty()), ((1, 1), true));
}

/// Whichever of the two comes first: none stays in the inbox of a core that has ended.
#[test]
fn what_is_pushed_while_an_inbox_closes_is_closed_or_returned() {
    const INBOXES: usize = 20_000;
    let inboxes: Vec<Inbox> = (0..INBOXES).map(|_| Inbox::with_capacity(1)).collect();
    let ends = Arc::new(Ends::default());
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
                let arrival = connection(&ends);
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
    assert_eq!(losses_and_drops(&ends), (INBOXES, INBOXES));
}
