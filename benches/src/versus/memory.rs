//! How fast this machine's memory can copy: what a flush can reach at most.

use std::sync::Barrier;
use std::time::Instant;

/// Far larger than any cache, and mapped and touched before it is measured.
const BYTES: usize = 256 << 20;
const ROUNDS: usize = 9;

/// What was measured.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct CopySpeed {
    /// By one thread.
    pub one_thread_bytes_per_s: f64,
    /// By two at the same time, together.
    pub two_threads_bytes_per_s: f64,
}

impl CopySpeed {
    /// Copies 256 MiB from memory to memory some times; takes about two seconds. The fastest of each: what others do
    /// meanwhile makes it slower, and nothing makes it faster than it can be.
    #[must_use]
    pub fn measure() -> Self {
        let source = vec![1; BYTES];
        let mut target = vec![2; BYTES];
        let (mut one, mut two) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            one = copy(&source, &mut target, 1).max(one);
            two = copy(&source, &mut target, 2).max(two);
        }
        Self {
            one_thread_bytes_per_s: one,
            two_threads_bytes_per_s: two,
        }
    }
}

fn copy(source: &[u8], target: &mut [u8], threads: usize) -> f64 {
    let start = Barrier::new(threads);
    let part = BYTES / threads;
    let seconds = std::thread::scope(|scope| {
        let copies = source.chunks(part).zip(target.chunks_mut(part));
        let running: Vec<_> = copies
            .map(|(source, target)| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    let begin = Instant::now();
                    target.copy_from_slice(source);
                    begin.elapsed().as_secs_f64()
                })
            })
            .collect();
        let ended = running.into_iter().map(|thread| thread.join());
        ended
            .map(|seconds| seconds.expect("it only copies"))
            .fold(0.0, f64::max)
    });
    BYTES as f64 / seconds
}
