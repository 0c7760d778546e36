//! How one thread shares work with parked helpers and waits until all of it is done.
//!
//! The owner **forks**: it offers a piece of work, does its own part, and **joins**. From then on no helper starts on it, and the
//! owner waits for those that have. So after [`Fork::join`] no helper works and none has a clone of the work; what helpers wrote
//! is visible to the owner. How the work is divided is up to the work.
//!
//! There is one fork at a time. An owner that finds another's gets `None` and does its work alone: no owner ever waits for
//! helpers to become free.

use crate::sync::{Condvar, Mutex};

/// What the lock guards.
struct Shared<W> {
    /// The work that is offered, until its owner joins.
    work: Option<W>,
    /// Number of the fork, so that a helper works on each one once.
    round: u64,
    /// From fork to the end of the join.
    taken: bool,
    /// Helpers that work on it.
    working: usize,
    /// Helpers that have worked on it or do.
    joined: usize,
    /// A helper panicked in its part.
    failed: bool,
    /// Helpers are to end.
    closed: bool,
}

/// See the module.
pub(crate) struct ForkJoin<W> {
    shared: Mutex<Shared<W>>,
    forked: Condvar,
    all_left: Condvar,
}

const NEVER_POISONED: &str = "nothing panics while it holds this lock";

impl<W: Clone> ForkJoin<W> {
    pub(crate) fn new() -> Self {
        Self {
            shared: Mutex::new(Shared {
                work: None,
                round: 0,
                taken: false,
                working: 0,
                joined: 0,
                failed: false,
                closed: false,
            }),
            forked: Condvar::new(),
            all_left: Condvar::new(),
        }
    }

    /// Offers `work` to the helpers, unless they are with another owner.
    pub(crate) fn fork(&self, work: &W) -> Option<Fork<'_, W>> {
        let mut shared = self.shared.lock().expect(NEVER_POISONED);
        if shared.taken {
            return None;
        }
        shared.taken = true;
        shared.round += 1;
        shared.joined = 0;
        shared.work = Some(work.clone());
        drop(shared);
        self.forked.notify_all();
        Some(Fork { fork_join: self })
    }

    /// The life of a helper: joins every fork it gets to see and does `part` of it, until [`ForkJoin::close`].
    pub(crate) fn help(&self, part: impl Fn(&W)) {
        let mut round = 0;
        while let Some(joined_fork) = self.wait_for_fork(&mut round) {
            if let Some(work) = &joined_fork.work {
                part(work);
            }
        }
    }

    /// Waits for a fork other than `round`; `None` when closed.
    fn wait_for_fork(&self, round: &mut u64) -> Option<Joined<'_, W>> {
        let mut shared = self.shared.lock().expect(NEVER_POISONED);
        loop {
            if shared.closed {
                return None;
            }
            if shared.round != *round
                && let Some(work) = shared.work.clone()
            {
                *round = shared.round;
                shared.working += 1;
                shared.joined += 1;
                let fork_join = self;
                let work = Some(work);
                return Some(Joined { fork_join, work });
            }
            shared = self.forked.wait(shared).expect(NEVER_POISONED);
        }
    }

    /// Ends the helpers, after the work that they are doing.
    pub(crate) fn close(&self) {
        self.shared.lock().expect(NEVER_POISONED).closed = true;
        self.forked.notify_all();
    }
}

/// A helper's part in a fork, which ends with this however the helper's work ends.
struct Joined<'a, W: Clone> {
    fork_join: &'a ForkJoin<W>,
    work: Option<W>,
}

impl<W: Clone> Drop for Joined<'_, W> {
    fn drop(&mut self) {
        // The clone goes before the count says so.
        self.work = None;
        let mut shared = self.fork_join.shared.lock().expect(NEVER_POISONED);
        shared.working -= 1;
        shared.failed |= std::thread::panicking();
        if shared.working == 0 {
            drop(shared);
            self.fork_join.all_left.notify_all();
        }
    }
}

/// A fork, until it is joined.
#[must_use = "a fork that is not joined leaves helpers at work"]
pub(crate) struct Fork<'a, W> {
    fork_join: &'a ForkJoin<W>,
}

impl<W> Fork<'_, W> {
    /// Ends the fork, waits for the helpers that work on it, and returns how many did.
    ///
    /// # Panics
    /// If one of them panicked, since its part is then not done.
    pub(crate) fn join(self) -> usize {
        let mut shared = self.fork_join.shared.lock().expect(NEVER_POISONED);
        let work = shared.work.take();
        while shared.working > 0 {
            shared = self.fork_join.all_left.wait(shared).expect(NEVER_POISONED);
        }
        shared.taken = false;
        let (joined, failed) = (shared.joined, std::mem::take(&mut shared.failed));
        drop(shared);
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
        let fork_join = ForkJoin::new();
        let first = fork_join.fork(&1);
        assert!(fork_join.fork(&2).is_none());
        assert_eq!(first.unwrap().join(), 0);
        assert_eq!(fork_join.fork(&3).unwrap().join(), 0);
    }

    #[test]
    fn a_helper_that_panics_is_the_owners_panic() {
        let fork_join = Arc::new(ForkJoin::new());
        let begun = Arc::new(AtomicBool::new(false));
        let helper = {
            let (fork_join, begun) = (fork_join.clone(), begun.clone());
            thread::spawn(move || {
                fork_join.help(|_: &()| {
                    begun.store(true, Ordering::Release);
                    panic!("meant by the test");
                });
            })
        };
        let fork = fork_join.fork(&()).unwrap();
        while !begun.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let collected = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fork.join()));
        assert!(collected.is_err());
        assert!(helper.join().is_err());
    }

    #[test]
    fn every_part_is_done_once_over_many_rounds() {
        let fork_join = Arc::new(ForkJoin::<Arc<(AtomicUsize, AtomicUsize)>>::new());
        let part = |work: &Arc<(AtomicUsize, AtomicUsize)>| {
            while work.0.fetch_add(1, Ordering::Relaxed) < 100 {
                work.1.fetch_add(1, Ordering::Relaxed);
            }
        };
        let helpers: Vec<_> = (0..3)
            .map(|_| {
                let fork_join = fork_join.clone();
                thread::spawn(move || fork_join.help(part))
            })
            .collect();
        let rounds = if cfg!(miri) { 5 } else { 500 };
        for _ in 0..rounds {
            let work = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
            let fork = fork_join.fork(&work).unwrap();
            part(&work);
            assert!(fork.join() <= 3);
            assert_eq!(work.1.load(Ordering::Relaxed), 100);
            assert_eq!(Arc::strong_count(&work), 1, "a helper kept its clone");
        }
        fork_join.close();
        for helper in helpers {
            helper.join().unwrap();
        }
    }
}

/// Run with `scripts/test loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    /// Two parts, taken by counter. Loom lets a relaxed read miss any write that nothing orders before it, so that a
    /// part done without synchronisation shows as one not done.
    struct Work {
        next: AtomicUsize,
        parts: [AtomicUsize; 2],
    }

    impl Work {
        fn new() -> Self {
            Self {
                next: AtomicUsize::new(0),
                parts: [AtomicUsize::new(0), AtomicUsize::new(0)],
            }
        }

        fn part(&self) {
            while let Some(part) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                part.store(part.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
        }

        fn done(&self) -> Vec<usize> {
            self.parts
                .iter()
                .map(|part| part.load(Ordering::Relaxed))
                .collect()
        }
    }

    /// All interleavings with at most that many preemptions: without a bound, the condition variables make them too
    /// many to finish.
    fn explore(case: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(case);
    }

    #[test]
    fn loom_join_returns_when_all_parts_are_done() {
        explore(|| {
            let fork_join = Arc::new(ForkJoin::<Arc<Work>>::new());
            let helper = {
                let fork_join = fork_join.clone();
                thread::spawn(move || fork_join.help(|work| work.part()))
            };
            for _ in 0..2 {
                let work = Arc::new(Work::new());
                let fork = fork_join.fork(&work).unwrap();
                work.part();
                assert!(fork.join() <= 1);
                assert_eq!(work.done(), [1, 1]);
            }
            fork_join.close();
            helper.join().unwrap();
        });
    }

    #[test]
    fn loom_two_owners_share_one_helper() {
        explore(|| {
            let fork_join = Arc::new(ForkJoin::<Arc<Work>>::new());
            let owner = |fork_join: &ForkJoin<Arc<Work>>| {
                let work = Arc::new(Work::new());
                let fork = fork_join.fork(&work);
                work.part();
                fork.map(Fork::join);
                assert_eq!(work.done(), [1, 1]);
            };
            let helper = {
                let fork_join = fork_join.clone();
                thread::spawn(move || fork_join.help(|work| work.part()))
            };
            let second = {
                let fork_join = fork_join.clone();
                thread::spawn(move || owner(&fork_join))
            };
            owner(&fork_join);
            second.join().unwrap();
            fork_join.close();
            helper.join().unwrap();
        });
    }
}
