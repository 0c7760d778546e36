//! The count of a channel's packets that are received and not applied yet, and the one thing that its channel waits for.
//!
//! The channel alone raises the count; the thread that applies a packet lowers it. The channel may wait until the count has fallen to
//! a limit. Of "the count falls to it" and "the channel waits for it" the later one sees the other, so no wake-up is lost,
//! and only one is made.

use crate::sync::{AtomicU32, Ordering, fence};

/// The channel waits for nothing.
const NO_LIMIT: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub(super) struct Backlog {
    packets: AtomicU32,
    /// The count that the channel waits for.
    limit: AtomicU32,
}

/// What follows from a packet that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Applied {
    /// Whether there are more; if not, the queue is the channel's again.
    pub(super) more: bool,
    /// Whether the channel waits for that.
    pub(super) wake: bool,
}

impl Backlog {
    pub(super) fn new() -> Self {
        Self {
            packets: AtomicU32::new(0),
            limit: AtomicU32::new(NO_LIMIT),
        }
    }

    /// Whether all packets are applied. A thread that sees that sees their pages.
    pub(super) fn is_empty(&self) -> bool {
        self.packets.load(Ordering::Acquire) == 0
    }

    /// The channel adds a packet. Returns whether it is the only one: then the channel hands the queue over.
    pub(super) fn add(&self) -> bool {
        // Acquire: of the packets before, which may have been applied by another thread.
        self.packets.fetch_add(1, Ordering::AcqRel) == 0
    }

    /// A packet is applied, by the thread that has the queue.
    pub(super) fn applied(&self) -> Applied {
        // Release: a thread that sees the count sees the pages and the free packet.
        let left = self.packets.fetch_sub(1, Ordering::AcqRel) - 1;
        // With its twin in `reaches`.
        fence(Ordering::SeqCst);
        Applied {
            more: left > 0,
            // The channel adds nothing while it waits, so the count passes the limit once.
            wake: self.limit.load(Ordering::Relaxed) == left,
        }
    }

    /// Whether the count has fallen to `limit`. If not, the channel is to be woken when it does, and adds nothing until then.
    pub(super) fn reaches(&self, limit: u32) -> bool {
        let has_reached = || self.packets.load(Ordering::Acquire) <= limit;
        if !has_reached() {
            self.limit.store(limit, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !has_reached() {
                return false;
            }
        }
        self.limit.store(NO_LIMIT, Ordering::Relaxed);
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_reported_once_and_only_when_it_is_waited_for() {
        let backlog = Backlog::new();
        assert!(backlog.is_empty() && backlog.reaches(0));
        assert!(backlog.add());
        assert!(!backlog.add() && !backlog.add());
        let applied = |more, wake| Applied { more, wake };
        assert_eq!(backlog.applied(), applied(true, false));
        assert!(!backlog.reaches(1) && !backlog.reaches(1));
        assert_eq!(backlog.applied(), applied(true, true));
        assert!(backlog.reaches(1) && !backlog.reaches(0));
        assert_eq!(backlog.applied(), applied(false, true));
        assert!(backlog.reaches(0));
        assert!(backlog.add());
        assert_eq!(backlog.applied(), applied(false, false));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::sync::{Arc, Notify};

    /// A channel that waits is woken, and sees the pages of the packets that it waited for.
    #[test]
    fn loom_a_channel_that_waits_is_woken() {
        for limit in [0, 1] {
            loom::model(move || {
                let backlog = Arc::new(Backlog::new());
                let pages = Arc::new(AtomicUsize::new(0));
                let woken = Arc::new(Notify::new());
                assert!(backlog.add() && !backlog.add());
                let worker = {
                    let (backlog, pages, woken) = (backlog.clone(), pages.clone(), woken.clone());
                    loom::thread::spawn(move || {
                        loop {
                            pages.store(pages.load(Relaxed) + 1, Relaxed);
                            let Applied { more, wake } = backlog.applied();
                            if wake {
                                woken.notify();
                            }
                            if !more {
                                return;
                            }
                        }
                    })
                };
                while !backlog.reaches(limit) {
                    woken.wait();
                }
                assert!(pages.load(Relaxed) >= 2 - usize::try_from(limit).unwrap());
                worker.join().unwrap();
            });
        }
    }

    /// The queue has one owner at a time, however adding and applying meet.
    #[test]
    fn loom_a_queue_has_one_owner() {
        loom::model(|| {
            let backlog = Arc::new(Backlog::new());
            let owners = Arc::new(AtomicUsize::new(0));
            let apply = |backlog: &Backlog, owners: &AtomicUsize| {
                assert_eq!(owners.fetch_add(1, Relaxed), 0, "a second owner");
                loop {
                    owners.store(1, Relaxed);
                    owners.store(0, Relaxed);
                    if !backlog.applied().more {
                        return;
                    }
                    owners.store(1, Relaxed);
                }
            };
            let mut workers = Vec::new();
            for _ in 0..2 {
                if backlog.add() {
                    let (backlog, owners) = (backlog.clone(), owners.clone());
                    workers.push(loom::thread::spawn(move || apply(&backlog, &owners)));
                }
            }
            for worker in workers {
                worker.join().unwrap();
            }
            assert!(backlog.is_empty());
        });
    }
}
