//! How one thread shares work with parked helpers and gets all of it back.
//!
//! The owner **offers** a piece of work, does its own part, and **collects**: from then on nobody joins, and it waits
//! until everyone who joined has left. So once [`Offer::collect`] returns, no helper works and none holds a
//! clone of the work; what helpers wrote is visible to the owner. How the parts are claimed is the work's own matter.
//!
//! One offer stands at a time. An owner that finds another's gets `None` and does its work alone, which it could
//! do anyhow: nobody ever waits for helpers.
#![forbid(unsafe_code)]

use super::sync::{Condvar, Mutex};

/// What the lock guards.
struct Desk<W> {
    /// The work on offer: taken away by the owner when it collects.
    work: Option<W>,
    /// Number of the offer, so that a helper joins each one once.
    round: u64,
    /// From offer to the end of collect.
    taken: bool,
    /// Helpers that have joined and not left.
    working: usize,
    /// Helpers that have joined.
    joined: usize,
    /// A helper panicked in its part.
    failed: bool,
    /// Helpers are to end.
    closed: bool,
}

/// See the module.
pub(super) struct HandOver<W> {
    desk: Mutex<Desk<W>>,
    offered: Condvar,
    left: Condvar,
}

const NEVER_POISONED: &str = "nothing panics while it holds the desk's lock";

impl<W: Clone> HandOver<W> {
    pub(super) fn new() -> Self {
        Self {
            desk: Mutex::new(Desk {
                work: None,
                round: 0,
                taken: false,
                working: 0,
                joined: 0,
                failed: false,
                closed: false,
            }),
            offered: Condvar::new(),
            left: Condvar::new(),
        }
    }

    /// Offers `work` to the helpers, unless they are with another owner.
    pub(super) fn offer(&self, work: &W) -> Option<Offer<'_, W>> {
        let mut desk = self.desk.lock().expect(NEVER_POISONED);
        if desk.taken {
            return None;
        }
        desk.taken = true;
        desk.round += 1;
        desk.joined = 0;
        desk.work = Some(work.clone());
        drop(desk);
        self.offered.notify_all();
        Some(Offer { hand_over: self })
    }

    /// The life of a helper: joins every offer it gets to see and does `part` of it, until [`HandOver::close`].
    pub(super) fn help(&self, part: impl Fn(&W)) {
        let mut round = 0;
        while let Some(seat) = self.join(&mut round) {
            if let Some(work) = &seat.work {
                part(work);
            }
        }
    }

    /// Waits for an offer other than `round`; `None` when closed.
    fn join(&self, round: &mut u64) -> Option<Seat<'_, W>> {
        let mut desk = self.desk.lock().expect(NEVER_POISONED);
        loop {
            if desk.closed {
                return None;
            }
            if desk.round != *round
                && let Some(work) = desk.work.clone()
            {
                *round = desk.round;
                desk.working += 1;
                desk.joined += 1;
                let hand_over = self;
                let work = Some(work);
                return Some(Seat { hand_over, work });
            }
            desk = self.offered.wait(desk).expect(NEVER_POISONED);
        }
    }

    /// Sends the helpers home. They finish what they have joined.
    pub(super) fn close(&self) {
        self.desk.lock().expect(NEVER_POISONED).closed = true;
        self.offered.notify_all();
    }
}

/// A helper's place at the desk: given up however its part ends.
struct Seat<'a, W: Clone> {
    hand_over: &'a HandOver<W>,
    work: Option<W>,
}

impl<W: Clone> Drop for Seat<'_, W> {
    fn drop(&mut self) {
        // First the clone, then the word that it is gone.
        self.work = None;
        let mut desk = self.hand_over.desk.lock().expect(NEVER_POISONED);
        desk.working -= 1;
        desk.failed |= std::thread::panicking();
        if desk.working == 0 {
            drop(desk);
            self.hand_over.left.notify_all();
        }
    }
}

/// An offer that stands until it is collected.
#[must_use = "an offer that is not collected leaves helpers at work"]
pub(super) struct Offer<'a, W> {
    hand_over: &'a HandOver<W>,
}

impl<W> Offer<'_, W> {
    /// Ends the offer and waits for those who joined; says how many did.
    ///
    /// # Panics
    /// If one of them panicked, since its part is then not done.
    pub(super) fn collect(self) -> usize {
        let mut desk = self.hand_over.desk.lock().expect(NEVER_POISONED);
        let work = desk.work.take();
        while desk.working > 0 {
            desk = self.hand_over.left.wait(desk).expect(NEVER_POISONED);
        }
        desk.taken = false;
        let (joined, failed) = (desk.joined, std::mem::take(&mut desk.failed));
        drop(desk);
        drop(work);
        assert!(!failed, "a helper panicked in its part of the work");
        joined
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn a_second_owner_works_alone() {
        let hand_over = HandOver::new();
        let first = hand_over.offer(&1);
        assert!(hand_over.offer(&2).is_none());
        assert_eq!(first.unwrap().collect(), 0);
        assert_eq!(hand_over.offer(&3).unwrap().collect(), 0);
    }

    #[test]
    fn a_helper_that_panics_is_the_owners_panic() {
        let hand_over = Arc::new(HandOver::new());
        let begun = Arc::new(AtomicBool::new(false));
        let helper = {
            let (hand_over, begun) = (hand_over.clone(), begun.clone());
            thread::spawn(move || {
                hand_over.help(|_: &()| {
                    begun.store(true, Ordering::Release);
                    panic!("meant by the test");
                });
            })
        };
        let offer = hand_over.offer(&()).unwrap();
        while !begun.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let collected = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| offer.collect()));
        assert!(collected.is_err());
        assert!(helper.join().is_err());
    }

    #[test]
    fn every_part_is_done_once_over_many_rounds() {
        let hand_over = Arc::new(HandOver::<Arc<(AtomicUsize, AtomicUsize)>>::new());
        let part = |work: &Arc<(AtomicUsize, AtomicUsize)>| {
            while work.0.fetch_add(1, Ordering::Relaxed) < 100 {
                work.1.fetch_add(1, Ordering::Relaxed);
            }
        };
        let helpers: Vec<_> = (0..3)
            .map(|_| {
                let hand_over = hand_over.clone();
                thread::spawn(move || hand_over.help(part))
            })
            .collect();
        let rounds = if cfg!(miri) { 5 } else { 500 };
        for _ in 0..rounds {
            let work = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
            let offer = hand_over.offer(&work).unwrap();
            part(&work);
            assert!(offer.collect() <= 3);
            assert_eq!(work.1.load(Ordering::Relaxed), 100);
            assert_eq!(Arc::strong_count(&work), 1, "a helper kept its clone");
        }
        hand_over.close();
        for helper in helpers {
            helper.join().unwrap();
        }
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p colo-ring --lib loom --release`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    /// Two parts, claimed by counter; each is written without synchronisation by whoever claimed it.
    struct Work {
        next: AtomicUsize,
        parts: [UnsafeCell<u32>; 2],
    }

    impl Work {
        fn new() -> Self {
            Self {
                next: AtomicUsize::new(0),
                parts: [UnsafeCell::new(0), UnsafeCell::new(0)],
            }
        }

        fn part(&self) {
            while let Some(cell) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                // SAFETY: the counter gives each part to one thread; loom fails the test if that is not so.
                cell.with_mut(|value| unsafe { *value += 1 });
            }
        }

        fn done(&self) -> Vec<u32> {
            // SAFETY: read after collect, when no helper works; loom fails the test if one could.
            self.parts
                .iter()
                .map(|cell| cell.with(|value| unsafe { *value }))
                .collect()
        }
    }

    #[test]
    fn loom_collect_returns_when_all_parts_are_done() {
        loom::model(|| {
            let hand_over = Arc::new(HandOver::<Arc<Work>>::new());
            let helper = {
                let hand_over = hand_over.clone();
                thread::spawn(move || hand_over.help(|work| work.part()))
            };
            for _ in 0..2 {
                let work = Arc::new(Work::new());
                let offer = hand_over.offer(&work).unwrap();
                work.part();
                assert!(offer.collect() <= 1);
                assert_eq!(work.done(), [1, 1]);
            }
            hand_over.close();
            helper.join().unwrap();
        });
    }

    #[test]
    fn loom_two_owners_share_one_helper() {
        loom::model(|| {
            let hand_over = Arc::new(HandOver::<Arc<Work>>::new());
            let owner = |hand_over: &HandOver<Arc<Work>>| {
                let work = Arc::new(Work::new());
                let offer = hand_over.offer(&work);
                work.part();
                offer.map(Offer::collect);
                assert_eq!(work.done(), [1, 1]);
            };
            let helper = {
                let hand_over = hand_over.clone();
                thread::spawn(move || hand_over.help(|work| work.part()))
            };
            let second = {
                let hand_over = hand_over.clone();
                thread::spawn(move || owner(&hand_over))
            };
            owner(&hand_over);
            second.join().unwrap();
            hand_over.close();
            helper.join().unwrap();
        });
    }
}
