//! The threads that decode compressed payloads: as many as there are receiving cores, on these cores.
//!
//! They are started with the receiver, and sleep until a channel has a compressed packet. Each has a shard of the dirty
//! bitmap, behind those of the cores, and a [`PageBuffer`], made for its first packet.

use super::queue::DecodeQueue;
use super::run_queue::{Next, RunQueue, WORKERS_MAX};
use crate::host::pin;
use crate::sandbox::ThreadKind;
use crate::threads::Threads;
use crate::units::PAGE_SIZE;
use crate::wire::codec::PageBuffer;
use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, Thread};

/// Channels whose packets wait for a worker, over all guests: those of a large host. Where there are more, channels decode
/// by themselves.
const QUEUES_MAX: usize = 4096;

/// Most pages of a packet that is decoded on the channel's own core if nothing is pending: a wake-up takes as long as some
/// pages.
const INLINE_PAGES: usize = 8;

/// What channels know of the workers: how to hand a queue over.
pub(in crate::receiver) struct Workers {
    run_queue: RunQueue<Arc<DecodeQueue>>,
    /// None for those that did not start.
    threads: Box<[OnceLock<Thread>]>,
    /// The shard of the first worker.
    first_shard: usize,
    inline_pages: usize,
}

impl Workers {
    /// With `count` workers, of which none runs yet.
    pub(in crate::receiver) fn new(count: usize, first_shard: usize) -> Self {
        Self {
            run_queue: RunQueue::new(QUEUES_MAX),
            threads: (0..count.min(WORKERS_MAX)).map(|_| OnceLock::new()).collect(),
            first_shard,
            inline_pages: INLINE_PAGES,
        }
    }

    /// Workers of a simulation, which takes every step of theirs: with room for `capacity` queues, and packets of up to
    /// `inline_pages` pages left to the channel.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(in crate::receiver) fn simulated(
        count: usize,
        first_shard: usize,
        capacity: usize,
        inline_pages: usize,
    ) -> Self {
        Self {
            run_queue: RunQueue::new(capacity),
            inline_pages,
            ..Self::new(count, first_shard)
        }
    }

    /// Whether a queue waits for a worker.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(in crate::receiver) fn have_work(&self) -> bool {
        self.run_queue.has_work()
    }

    /// Whether there are any.
    pub(in crate::receiver) fn exist(&self) -> bool {
        !self.threads.is_empty()
    }

    /// How many shards of the dirty bitmap they use.
    pub(in crate::receiver) fn shards(&self) -> usize {
        self.threads.len()
    }

    /// Whether a packet with so many pages in so many bytes is decoded by its channel's thread, if it is the only one.
    pub(super) fn leave_to_channel(&self, pages: usize, bytes: usize) -> bool {
        // A payload that is longer than its pages costs what other guests wait for.
        let is_small = pages <= self.inline_pages && bytes / (2 * PAGE_SIZE) <= pages;
        is_small || !self.exist()
    }

    /// Hands a queue over, whose first packet was added. If there is no room for it, it stays with the caller.
    pub(super) fn hand_over(&self, queue: Arc<DecodeQueue>) -> Result<(), Arc<DecodeQueue>> {
        if !self.exist() {
            return Err(queue);
        }
        if let Some(worker) = self.run_queue.push(queue)? {
            self.wake(worker);
        }
        Ok(())
    }

    fn wake(&self, worker: usize) {
        if let Some(thread) = self.threads.get(worker).and_then(OnceLock::get) {
            thread.unpark();
        }
    }
}

/// What one worker has.
pub(in crate::receiver) struct Worker {
    number: usize,
    shard: usize,
    pages: PageBuffer,
}

impl Worker {
    pub(in crate::receiver) fn new(workers: &Workers, number: usize) -> Self {
        Self {
            number,
            shard: workers.first_shard + number,
            pages: PageBuffer::default(),
        }
    }

    /// Applies the oldest packet of a queue, and puts the queue back if there are more.
    pub(in crate::receiver) fn work_on(&mut self, queue: Arc<DecodeQueue>, workers: &Workers) {
        if !queue.apply_oldest(self.shard, &mut self.pages) {
            return;
        }
        if let Err(queue) = workers.run_queue.put_back(queue) {
            // No room, so it has no other's turn to wait for.
            while queue.apply_oldest(self.shard, &mut self.pages) {}
        }
    }

    /// The queue that is next to be worked on.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(in crate::receiver) fn take(&self, workers: &Workers) -> Option<Arc<DecodeQueue>> {
        match workers.run_queue.next(self.number) {
            Next::Work(queue) => Some(queue),
            Next::Sleep | Next::Stop => None,
        }
    }

    /// Works until there is nothing to do and there will be nothing.
    fn run(&mut self, workers: &Workers) {
        loop {
            match workers.run_queue.next(self.number) {
                Next::Work(queue) => self.work_on(queue, workers),
                Next::Sleep => thread::park(),
                Next::Stop => return,
            }
        }
    }
}

/// The running workers. They end when this is dropped, after what is left to do.
pub(in crate::receiver) struct WorkerThreads {
    workers: Arc<Workers>,
    threads: Vec<JoinHandle<()>>,
}

impl WorkerThreads {
    /// Starts a worker for each of these cores. `first_shard` is that of the first worker.
    ///
    /// # Errors
    /// If a thread cannot be started; none is left running then.
    pub(in crate::receiver) fn start(
        cores: &[usize],
        first_shard: usize,
        threads: &Threads,
    ) -> io::Result<Self> {
        let workers = Arc::new(Workers::new(cores.len(), first_shard));
        let mut running = Self {
            workers: workers.clone(),
            threads: Vec::new(),
        };
        for number in 0..workers.threads.len() {
            let (workers, cores, confinement) = (workers.clone(), cores.to_vec(), threads.clone());
            let thread = thread::Builder::new().name(format!("colo-decode-{number}"));
            let thread = thread.spawn(move || {
                // It sleeps only after this, so a thread that is to wake it finds it.
                let _ = workers.threads[number].set(thread::current());
                // The receiving threads were pinned to them; if a core has gone since, the scheduler decides.
                let _ = pin(&cores);
                confinement.enter(ThreadKind::Worker);
                Worker::new(&workers, number).run(&workers);
            })?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// No worker.
    pub(in crate::receiver) fn none() -> Self {
        Self {
            workers: Arc::new(Workers::new(0, 0)),
            threads: Vec::new(),
        }
    }

    /// What the sessions need of them.
    pub(in crate::receiver) fn workers(&self) -> &Arc<Workers> {
        &self.workers
    }
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.workers.run_queue.stop();
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // The panic hook has reported a thread that panicked.
            let _ = thread.join();
        }
    }
}
