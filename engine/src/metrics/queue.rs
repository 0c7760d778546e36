//! The hand-over of samples from the cores to the control thread.
//!
//! Any core pushes, one thread pops. Bounded and allocated at start; a push never waits. A sample that finds no
//! room is counted, and the count stands in every report.

use super::CheckpointSample;
use crossbeam_queue::ArrayQueue;
use std::sync::atomic::{AtomicU64, Ordering};

/// Samples that wait at most: four seconds of a thousand checkpoints each, drained several times a second.
pub const SAMPLES_MAX: usize = 4096;

/// See the module's documentation.
#[derive(Debug)]
pub struct SampleQueue {
    waiting: ArrayQueue<CheckpointSample>,
    dropped: AtomicU64,
}

impl SampleQueue {
    /// A queue with room for [`SAMPLES_MAX`] samples.
    pub fn new() -> Self {
        Self::with_capacity(SAMPLES_MAX)
    }

    /// A queue with room for `capacity` samples.
    ///
    /// # Panics
    /// If `capacity` is zero.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            waiting: ArrayQueue::new(capacity),
            dropped: AtomicU64::new(0),
        }
    }

    /// Hands a sample over. Without room it is dropped and counted.
    pub fn push(&self, sample: CheckpointSample) {
        if self.waiting.push(sample).is_err() {
            // A plain count: nothing is ordered by it.
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The oldest sample that waits.
    pub fn pop(&self) -> Option<CheckpointSample> {
        self.waiting.pop()
    }

    /// Samples dropped since the start for want of room.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Default for SampleQueue {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::test_samples::sample;
    use std::time::Duration;

    #[test]
    fn a_full_queue_counts_what_it_drops() {
        let queue = SampleQueue::with_capacity(2);
        for checkpoint in 1..=5 {
            queue.push(sample(0, checkpoint, Duration::from_millis(1)));
        }
        assert_eq!(queue.dropped(), 3);
        // The oldest are kept: what was dropped is the end of a burst, not its beginning.
        assert_eq!(queue.pop().map(|s| s.checkpoint), Some(1));
        assert_eq!(queue.pop().map(|s| s.checkpoint), Some(2));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn samples_of_several_threads_all_arrive_or_are_counted() {
        const THREADS: u32 = 4;
        const EACH: u64 = 1000;
        let queue = SampleQueue::with_capacity(64);
        let mut arrived = 0u64;
        std::thread::scope(|scope| {
            let pushers: Vec<_> = (0..THREADS)
                .map(|session| {
                    let queue = &queue;
                    scope.spawn(move || {
                        for checkpoint in 0..EACH {
                            queue.push(sample(session, checkpoint, Duration::from_micros(5)));
                        }
                    })
                })
                .collect();
            while !pushers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                arrived += u64::from(queue.pop().is_some());
            }
        });
        while queue.pop().is_some() {
            arrived += 1;
        }
        assert_eq!(arrived + queue.dropped(), u64::from(THREADS) * EACH);
    }
}
