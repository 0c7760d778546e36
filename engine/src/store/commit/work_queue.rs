//! How the threads of a flush share a list of work: each takes the next few entries, and the call that finishes the last ones
//! returns so.

use crate::sync::{AtomicBool, AtomicUsize, Ordering};
use std::ops::Range;

/// See the module. The number of entries is the list's own, given with every call.
pub(crate) struct WorkQueue {
    /// First entry that is not taken.
    next: AtomicUsize,
    /// Entries that are done.
    done: AtomicUsize,
    /// Whether there are entries that are not.
    open: AtomicBool,
}

impl WorkQueue {
    /// Of an empty list.
    pub(crate) fn new() -> Self {
        Self {
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            open: AtomicBool::new(false),
        }
    }

    /// Opens a new list of `entries` entries. The one before is done, and no thread takes from this one yet.
    pub(crate) fn open(&self, entries: usize) {
        self.next.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        // Release: a thread that finds it open also finds the list.
        self.open.store(entries > 0, Ordering::Release);
    }

    /// Whether something is left to do, or being done. If not, the caller sees all that was done.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Takes the next entries of the list, at most `count`; no other thread gets them.
    pub(crate) fn take(&self, count: usize, entries: usize) -> Option<Range<usize>> {
        let begin = self.next.fetch_add(count, Ordering::Relaxed);
        let end = entries.min(begin.saturating_add(count));
        (begin < end).then_some(begin..end)
    }

    /// How many of them are taken.
    pub(crate) fn taken(&self, entries: usize) -> usize {
        self.next.load(Ordering::Relaxed).min(entries)
    }

    /// Entries that were taken are done; returns whether they were the last. Then `all_done` is called before the list closes.
    pub(crate) fn finish(&self, taken: &Range<usize>, entries: usize, all_done: impl FnOnce()) -> bool {
        // Acquire and release: the thread that closes the list has seen what all others did.
        let done = self.done.fetch_add(taken.len(), Ordering::AcqRel) + taken.len();
        if done == entries {
            all_done();
            self.open.store(false, Ordering::Release);
        }
        done == entries
    }
}

/// Run with `scripts/test loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Two threads do a list of three: every entry once, and a thread that finds it closed sees every entry done.
    #[test]
    fn loom_every_entry_is_done_once_and_seen() {
        const ENTRIES: usize = 3;
        fn work(queue: &WorkQueue, done: &[AtomicUsize]) -> usize {
            let mut last = 0;
            while let Some(taken) = queue.take(2, ENTRIES) {
                for entry in taken.clone() {
                    let before = done[entry].load(Ordering::Relaxed);
                    done[entry].store(before + 1, Ordering::Relaxed);
                }
                last += usize::from(queue.finish(&taken, ENTRIES, || ()));
            }
            last
        }
        loom::model(|| {
            let queue = Arc::new(WorkQueue::new());
            let done: Arc<Vec<AtomicUsize>> = Arc::new((0..ENTRIES).map(|_| AtomicUsize::new(0)).collect());
            queue.open(ENTRIES);
            let other = {
                let (queue, done) = (queue.clone(), done.clone());
                thread::spawn(move || work(&queue, &done))
            };
            let mine = work(&queue, &done);
            if !queue.is_open() {
                assert!(done.iter().all(|entry| entry.load(Ordering::Relaxed) == 1));
            }
            assert_eq!(mine + other.join().unwrap(), 1, "one of them was the last");
            assert!(!queue.is_open());
        });
    }
}
