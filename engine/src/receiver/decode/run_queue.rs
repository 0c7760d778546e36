//! The queue of work that worker threads share, and which of them are idle.
//!
//! A thread that adds work wakes one idle worker, if there is any. A worker first says that it is idle and then looks at the queue
//! once more; of that and of an addition, the later one sees the other, so no work is left while a worker sleeps.

use crate::sync::{ArrayQueue, AtomicBool, AtomicU64, Ordering, fence};

/// Most workers: one bit for each.
pub(super) const WORKERS_MAX: usize = 64;

/// What a worker does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<T> {
    Work(T),
    /// It sleeps until it is woken. A wake-up may be a left-over one.
    Sleep,
    /// There is no work, and there will be none.
    Stop,
}

/// See the module.
pub(super) struct RunQueue<T> {
    work: ArrayQueue<T>,
    idle: AtomicU64,
    stopped: AtomicBool,
}

impl<T> RunQueue<T> {
    /// With room for `capacity` pieces of work.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            work: ArrayQueue::new(capacity),
            idle: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    /// Adds work. Returns the worker that is to be woken for it, or the work if there is no room.
    pub(super) fn push(&self, work: T) -> Result<Option<usize>, T> {
        self.work.push(work)?;
        // With its twin in `next`.
        fence(Ordering::SeqCst);
        let mut idle = self.idle.load(Ordering::Relaxed);
        while idle != 0 {
            let rest = idle & (idle - 1);
            let exchange = self
                .idle
                .compare_exchange_weak(idle, rest, Ordering::Relaxed, Ordering::Relaxed);
            match exchange {
                Ok(_) => return Ok(usize::try_from(idle.trailing_zeros()).ok()),
                Err(now) => idle = now,
            }
        }
        Ok(None)
    }

    /// Adds work that the calling worker has taken before. It will call [`Self::next`] itself, so no other is woken.
    pub(super) fn put_back(&self, work: T) -> Result<(), T> {
        self.work.push(work)
    }

    /// What a worker does next.
    pub(super) fn next(&self, worker: usize) -> Next<T> {
        let own = 1 << worker;
        // Before it looks at the queue: a thread that sees the stop also sees the work before it.
        let has_stopped = self.stopped.load(Ordering::Acquire);
        let work = self.work.pop().or_else(|| {
            self.idle.fetch_or(own, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.work.pop()
        });
        match work {
            Some(work) => {
                // Else it might be woken instead of one that sleeps.
                if self.idle.load(Ordering::Relaxed) & own != 0 {
                    self.idle.fetch_and(!own, Ordering::Relaxed);
                }
                Next::Work(work)
            }
            None if has_stopped => Next::Stop,
            None => Next::Sleep,
        }
    }

    /// Whether there is work.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(super) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// No more work will come. All workers are to be woken.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn work_wakes_one_idle_worker() {
        let queue = RunQueue::new(2);
        assert_eq!(queue.push('a'), Ok(None));
        assert_eq!(queue.next(0), Next::Work('a'));
        assert_eq!((queue.next(1), queue.next(0)), (Next::Sleep, Next::Sleep));
        assert_eq!(queue.push('b'), Ok(Some(0)));
        assert_eq!(queue.push('c'), Ok(Some(1)));
        assert_eq!(queue.push('d'), Err('d'));
        assert_eq!(queue.next(1), Next::Work('b'));
        assert_eq!(queue.put_back('b'), Ok(()));
        assert_eq!(queue.next(1), Next::Work('c'));
        queue.stop();
        assert_eq!(queue.next(1), Next::Work('b'));
        assert_eq!(queue.next(1), Next::Stop);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::sync::{Arc, Notify};

    /// All work is done, and all workers end: no wake-up is lost.
    #[test]
    fn loom_no_work_is_left_while_workers_sleep() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let queue = Arc::new(RunQueue::new(2));
            let done = Arc::new(AtomicUsize::new(0));
            let wake = [Arc::new(Notify::new()), Arc::new(Notify::new())];
            let workers: Vec<_> = (0..2)
                .map(|worker| {
                    let (queue, done, wake) = (queue.clone(), done.clone(), wake[worker].clone());
                    loom::thread::spawn(move || {
                        loop {
                            match queue.next(worker) {
                                Next::Work(()) => drop(done.fetch_add(1, Relaxed)),
                                Next::Sleep => wake.wait(),
                                Next::Stop => return,
                            }
                        }
                    })
                })
                .collect();
            for _ in 0..2 {
                if let Some(worker) = queue.push(()).unwrap() {
                    wake[worker].notify();
                }
            }
            queue.stop();
            wake.iter().for_each(|worker| worker.notify());
            for worker in workers {
                worker.join().unwrap();
            }
            assert_eq!(done.load(Relaxed), 2);
        });
    }
}
