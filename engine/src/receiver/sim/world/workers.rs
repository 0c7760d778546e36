//! The workers that decode, each of which does a part of its work when the simulation says so.

use super::super::rng::Rng;
use super::World;
use crate::receiver::decode::{DecodeQueue, Worker, Workers};
use crate::receiver::services::Services;
use std::sync::Arc;

/// Workers beside so many cores: none, where each stands for a connection's thread.
pub(super) fn some(rng: &mut Rng, is_threads: bool, cores: usize) -> Workers {
    let count = if is_threads { 0 } else { rng.pick(&[0, 1, 2, 2, 3]) };
    Workers::simulated(count, cores, rng.pick(&[1, 2, 100]), rng.pick(&[0, 0, 3]))
}

/// A worker between two steps.
pub(super) struct SimWorker {
    worker: Worker,
    /// What it has taken, and not begun to apply.
    taken: Option<Arc<DecodeQueue>>,
}

impl SimWorker {
    pub(super) fn all(workers: &Workers) -> Vec<Self> {
        let worker = |number| Self {
            worker: Worker::new(workers, number),
            taken: None,
        };
        (0..workers.shards()).map(worker).collect()
    }

    pub(super) fn is_working(&self) -> bool {
        self.taken.is_some()
    }
}

impl World {
    /// A worker takes a queue, or applies a packet of the one that it has taken.
    pub(super) fn work(&mut self, number: usize) -> bool {
        let SimWorker { worker, taken } = &mut self.workers[number];
        let workers = &self.services.shared().workers;
        match taken.take() {
            Some(queue) => {
                worker.work_on(queue, workers);
                self.tally.decoded += 1;
            }
            None => {
                *taken = worker.take(workers);
                if taken.is_none() {
                    return false;
                }
            }
        }
        self.note(|| format!("worker {number} works"));
        true
    }
}
