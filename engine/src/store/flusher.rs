//! The flush: dirty slots → RAM image, by the committing thread and parked helpers.
//!
//! A [`Flush`] belongs to a store and is what its threads share; a [`Flusher`] is the helpers, which several stores
//! share. Claims go through the plan in address order, so that the threads stay near each other and each writes runs.
#![forbid(unsafe_code)]

use super::cache::Cache;
use super::copy::{self, CopyMethod};
use super::handover::{HandOver, Offer};
use super::image::RamImage;
use super::plan::{PageRun, Plan};
use crate::canary::{self, Canary};
use crate::host::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, mpsc};
use std::thread::JoinHandle;
use thiserror::Error;

/// From how many dirty pages on helpers are woken: below that, waking one takes longer than it saves.
const HELP_FROM_PAGES: u64 = 1000;

/// Words of the plan that a thread claims at a time: 16 to 1024 pages, between 5 µs and 0.5 ms of work.
const CLAIM_WORDS: usize = 16;

/// What a flush did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushReport {
    /// Pages copied to the RAM image.
    pub pages: u64,
    /// Copies they were made in: consecutive pages of a block are one, within a thread's claim.
    pub runs: u64,
    /// Helpers that took part.
    pub helpers: usize,
}

/// A store's flush in progress, or at rest with an empty plan.
pub(super) struct Flush {
    image: Arc<RamImage>,
    cache: Arc<dyn Cache>,
    round: RwLock<Round>,
    /// First word of the plan that is not claimed.
    next: AtomicUsize,
    runs: AtomicU64,
}

/// What one flush is to do: written by the committing thread, then read by all.
struct Round {
    plan: Plan,
    method: CopyMethod,
}

const NEVER_POISONED: &str = "a thread that panics in a flush ends the commit with a panic";

impl Flush {
    pub(super) fn new(image: Arc<RamImage>, cache: Arc<dyn Cache>) -> Arc<Self> {
        let (plan, method) = (Plan::default(), CopyMethod::NonTemporal);
        Arc::new(Self {
            image,
            cache,
            round: RwLock::new(Round { plan, method }),
            next: AtomicUsize::new(0),
            runs: AtomicU64::new(0),
        })
    }

    /// Copies what `plan_it` puts into the plan; the caller holds the store's commit lock, so there is one at a time.
    pub(super) fn run(self: &Arc<Self>, flusher: &Flusher, plan_it: impl FnOnce(&mut Plan)) -> FlushReport {
        let pages = {
            let mut round = self.round.write().expect(NEVER_POISONED);
            plan_it(&mut round.plan);
            round.method = flusher.method;
            round.plan.pages()
        };
        self.next.store(0, Ordering::Relaxed);
        self.runs.store(0, Ordering::Relaxed);
        let helpers = match pages {
            ..HELP_FROM_PAGES => {
                self.work();
                0
            }
            HELP_FROM_PAGES.. => flusher.share(self),
        };
        let runs = self.runs.load(Ordering::Relaxed);
        FlushReport { pages, runs, helpers }
    }

    /// One thread's part: claims words of the plan until none is left.
    fn work(&self) {
        let round = self.round.read().expect(NEVER_POISONED);
        let mut runs = 0;
        loop {
            let begin = self.next.fetch_add(CLAIM_WORDS, Ordering::Relaxed);
            let end = round.plan.len().min(begin + CLAIM_WORDS);
            if begin >= end {
                break;
            }
            for run in round.plan.runs(begin..end) {
                runs += self.copy_run(run, round.method);
            }
        }
        copy::fence();
        self.runs.fetch_add(runs, Ordering::Relaxed);
    }

    /// Copies a run in as many pieces as it has in memory: it may cross blocks of the image and slabs of the cache.
    fn copy_run(&self, mut run: PageRun, method: CopyMethod) -> u64 {
        let mut pieces = 0;
        if canary::is_set(Canary::SkippedPage) {
            run = run.skip(1);
        }
        while run.pages > 0 {
            let source = self.cache.newest(run);
            let target = self.image.span(run);
            let pages = source.pages().min(target.pages());
            copy::copy(target.first(pages), source.first(pages), method);
            run = run.skip(pages);
            pieces += 1;
        }
        pieces
    }
}

/// Why a [`Flusher`] could not be made.
#[derive(Debug, Error)]
pub enum FlusherError {
    /// The system gave no thread.
    #[error("no thread for flush helper {helper}: {source}")]
    Spawn {
        /// Which, from 0.
        helper: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// The core is not there, or not ours.
    #[error(
        "flush helper {helper} cannot be pinned to core {core}: {source}; see `taskset -p $$` for the cores one may use"
    )]
    Pin {
        /// Which, from 0.
        helper: usize,
        /// The core asked for.
        core: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Parked threads that help commits of many pages, and how these copy. Shared by the stores of a receiver; a
/// commit that finds the helpers busy with another's does its work alone.
pub struct Flusher {
    hand_over: Arc<HandOver<Arc<Flush>>>,
    helpers: Vec<JoinHandle<()>>,
    method: CopyMethod,
}

impl Flusher {
    /// Starts `helpers` threads (none is fine), pinned to `cores` in turn where there are any.
    ///
    /// # Errors
    /// If a thread cannot be had, or not be pinned. Those started before then end.
    pub fn new(method: CopyMethod, helpers: usize, cores: &[usize]) -> Result<Self, FlusherError> {
        let hand_over = Arc::new(HandOver::new());
        let mut flusher = Self {
            hand_over,
            helpers: Vec::with_capacity(helpers),
            method,
        };
        for helper in 0..helpers {
            let core = (!cores.is_empty()).then(|| cores[helper % cores.len()]);
            flusher.start(helper, core)?;
        }
        Ok(flusher)
    }

    fn start(&mut self, helper: usize, core: Option<usize>) -> Result<(), FlusherError> {
        let hand_over = self.hand_over.clone();
        let (started, pinned) = mpsc::sync_channel(1);
        let life = move || {
            let ready = core.map_or(Ok(()), |core| pin(&[core]));
            let on = ready.is_ok();
            // Nobody listens only if the thread that waits below is gone, and the process with it.
            let _ = started.send(ready);
            if on {
                hand_over.help(|flush| flush.work());
            }
        };
        let thread = std::thread::Builder::new().name(format!("flush-{helper}"));
        let thread = thread
            .spawn(life)
            .map_err(|source| FlusherError::Spawn { helper, source })?;
        self.helpers.push(thread);
        match (pinned.recv(), core) {
            (Ok(Err(source)), Some(core)) => Err(FlusherError::Pin { helper, core, source }),
            _ => Ok(()),
        }
    }

    /// Does all of `flush`, with the helpers where they are free; says how many came.
    fn share(&self, flush: &Arc<Flush>) -> usize {
        let offer = match self.helpers.is_empty() {
            true => None,
            false => self.hand_over.offer(flush),
        };
        flush.work();
        offer.map_or(0, Offer::collect)
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.hand_over.close();
        for helper in self.helpers.drain(..) {
            // One that panicked has made its flush's owner panic already.
            drop(helper.join());
        }
    }
}
