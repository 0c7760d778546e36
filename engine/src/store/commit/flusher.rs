//! The flush copies dirty slots to the RAM image: inside a commit by the committing thread and parked helpers, or after it in
//! small steps by threads that have nothing else to do.
//!
//! A [`Flush`] belongs to a store, and its threads share it; a [`Flusher`] is the helpers, which several stores share. Threads take
//! parts of the plan in address order, so that they stay near each other and each writes runs.

use crate::canary::{self, Canary};
use crate::host::pin;
use crate::sandbox::ThreadKind;
use crate::store::StoreError;
use crate::store::cache::Cache;
use crate::store::cache::plan::FlushPlan;
use crate::store::commit::fork_join::{Fork, ForkJoin};
use crate::store::commit::work_queue::WorkQueue;
use crate::store::memory::copy::CopyMethod;
use crate::store::memory::image::RamImage;
use crate::threads::Threads;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// From how many dirty pages on helpers are woken inside of a commit: below that, waking one takes longer than it saves.
const HELP_FROM_PAGES: u64 = 1000;

/// Words of the plan that a thread takes at a time: 16 to 1024 pages, between 5 µs and 0.5 ms of work.
const TAKE_WORDS: usize = 16;

/// How much of a flush after the commit is done when: tests, whose guests are small, use less.
#[derive(Clone, Copy)]
pub(crate) struct FlushSizes {
    /// From how many pages on other cores may help, while a primary whose guest runs waits for the end. They move the slots out
    /// of the receiving core's cache, which costs the next checkpoint more than a few milliseconds of that wait are worth; of
    /// 64 MiB little is in that cache.
    pub(crate) help_from_pages: u64,
    /// Words of the plan that a core copies before it looks at its sockets again: 4 words are up to 256 pages.
    pub(crate) step_words: usize,
}

impl Default for FlushSizes {
    fn default() -> Self {
        Self {
            help_from_pages: 16 << 10,
            step_words: 4,
        }
    }
}

/// What a flush did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushReport {
    /// Pages copied to the RAM image.
    pub pages: u64,
    /// Copies made: consecutive pages of a block are one copy, within the part that a thread takes.
    pub runs: u64,
    /// Helpers that took part.
    pub helpers: usize,
    /// Time that the copying took, summed over the threads that did it.
    pub busy: Duration,
}

/// The outcome of one step of a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushStep {
    /// There was nothing to do: no flush is in progress, or other threads are copying what is left.
    Nothing,
    /// Some pages were copied; there may be more.
    Some,
    /// The last pages were copied.
    Last,
}

/// The flush of a store, in progress or idle.
pub(crate) struct Flush {
    image: Arc<RamImage>,
    cache: Cache,
    round: RwLock<Round>,
    /// Which words of the plan are taken and done.
    queue: WorkQueue,
    /// Whether cores that do not receive from this primary may take part.
    help_allowed: AtomicBool,
    /// A thread panicked in its part: the image may be torn.
    failed: AtomicBool,
    runs: AtomicU64,
    busy_ns: AtomicU64,
    /// Called when all pages are in the image, before any thread sees that the flush has ended.
    complete: Box<dyn Fn() + Send + Sync>,
    /// Called after the last part of a flush that was not done inside a commit.
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
    sizes: FlushSizes,
}

/// What one flush is to do: written by the committing thread, then read by all.
struct Round {
    plan: FlushPlan,
    method: CopyMethod,
}

const NEVER_POISONED: &str = "a thread that panics in a flush ends the commit with a panic";

impl Flush {
    /// The flush of a cache to an image. Calls `complete` whenever all pages of a commit are in the image, before any
    /// thread sees that the flush has ended.
    ///
    /// # Errors
    /// If there is no memory for its plan.
    pub(crate) fn new(
        image: Arc<RamImage>,
        cache: Cache,
        complete: Box<dyn Fn() + Send + Sync>,
        sizes: FlushSizes,
    ) -> Result<Arc<Self>, StoreError> {
        let plan = FlushPlan::with_room(image.table().total_pages())?;
        let method = CopyMethod::NonTemporal;
        Ok(Arc::new(Self {
            image,
            cache,
            round: RwLock::new(Round { plan, method }),
            queue: WorkQueue::new(),
            help_allowed: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            runs: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            complete,
            notify: OnceLock::new(),
            sizes,
        }))
    }

    /// Lends its plan, which has room for all pages: nothing is flushed, and nothing will be.
    pub(crate) fn with_idle_plan(&self, with: impl FnOnce(&mut FlushPlan)) {
        let mut round = self.round.write().unwrap_or_else(PoisonError::into_inner);
        with(&mut round.plan);
    }

    /// Begins a flush of what `plan_it` puts into the plan, and returns how many pages that is. The caller holds the lock of the
    /// commit record, and has finished the flush before, so there is one at a time.
    pub(crate) fn begin(&self, method: CopyMethod, plan_it: impl FnOnce(&mut FlushPlan)) -> u64 {
        debug_assert!(!self.is_open(), "one flush after the other");
        let mut round = self.round.write().expect(NEVER_POISONED);
        plan_it(&mut round.plan);
        round.method = method;
        self.help_allowed.store(false, Ordering::Relaxed);
        self.runs.store(0, Ordering::Relaxed);
        self.busy_ns.store(0, Ordering::Relaxed);
        if round.plan.len() == 0 {
            (self.complete)();
        }
        self.queue.open(round.plan.len());
        round.plan.pages()
    }

    /// Whether there is something to copy, or being copied.
    pub(crate) fn is_open(&self) -> bool {
        self.queue.is_open()
    }

    /// A caller is waiting for its end: lets other cores help if so much is left that they should. Returns whether it does.
    pub(crate) fn allow_help(&self) -> bool {
        if !self.is_open() {
            return false;
        }
        let round = self.round.read().expect(NEVER_POISONED);
        let entries = round.plan.len() as u64;
        let left = entries - self.queue.taken(round.plan.len()) as u64;
        // In proportion, as the plan's words hold different numbers of pages.
        let help_allowed = (round.plan.pages() * left).div_ceil(entries) >= self.sizes.help_from_pages;
        self.help_allowed.store(help_allowed, Ordering::Relaxed);
        help_allowed
    }

    /// Begins a flush and does all of it, with the helpers where they are free.
    pub(crate) fn run(
        self: &Arc<Self>,
        flusher: &Flusher,
        plan_it: impl FnOnce(&mut FlushPlan),
    ) -> FlushReport {
        let pages = self.begin(flusher.method, plan_it);
        let helpers = match pages {
            ..HELP_FROM_PAGES => 0,
            HELP_FROM_PAGES.. => flusher.share(self),
        };
        self.finish_quietly();
        FlushReport {
            pages,
            helpers,
            ..self.report()
        }
    }

    /// What was done since it began.
    pub(crate) fn report(&self) -> FlushReport {
        FlushReport {
            pages: 0,
            runs: self.runs.load(Ordering::Relaxed),
            helpers: 0,
            busy: Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed)),
        }
    }

    /// Whether a part of it panicked.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Has `notify` called after the last part of every flush that is not done inside a commit.
    ///
    /// # Panics
    /// If it is called twice.
    pub(crate) fn on_end(&self, notify: Box<dyn Fn() + Send + Sync>) {
        assert!(self.notify.set(notify).is_ok(), "a notification is set already");
    }

    fn notify_end(&self) {
        if let Some(notify) = self.notify.get() {
            notify();
        }
    }

    /// Copies what is left, and waits for the parts that other threads are copying.
    ///
    /// # Panics
    /// If a part of it panicked, here or in another thread: it will never be complete.
    pub(crate) fn finish(&self) {
        if self.finish_quietly() && !canary::is_set(Canary::SilentFlushEnd) {
            self.notify_end();
        }
    }

    /// As [`Self::finish`], without the notification. Returns whether the last part was copied here.
    fn finish_quietly(&self) -> bool {
        while self.is_open() {
            assert!(!self.has_failed(), "a part of the flush panicked");
            match self.step(TAKE_WORDS) {
                FlushStep::Last => return true,
                FlushStep::Some => {}
                // Another thread is copying the last part, which takes at most half a millisecond.
                FlushStep::Nothing => std::thread::yield_now(),
            }
        }
        false
    }

    /// Copies a small part, if there is one.
    pub(crate) fn small_step(&self) -> FlushStep {
        let step = self.step(self.sizes.step_words);
        if step == FlushStep::Last {
            self.notify_end();
        }
        step
    }

    /// As [`Self::small_step`], where help is allowed.
    pub(crate) fn help_step(&self) -> FlushStep {
        match self.help_allowed.load(Ordering::Relaxed) {
            true => self.small_step(),
            false => FlushStep::Nothing,
        }
    }

    fn step(&self, words: usize) -> FlushStep {
        if !self.is_open() {
            return FlushStep::Nothing;
        }
        let round = self.round.read().expect(NEVER_POISONED);
        let entries = round.plan.len();
        let Some(taken) = self.queue.take(words, entries) else {
            return FlushStep::Nothing;
        };
        let started = Instant::now();
        let part = Part(&self.failed);
        let first = taken.start + usize::from(canary::is_set(Canary::SkippedPage));
        let runs = self
            .cache
            .flush(&round.plan, first..taken.end, &self.image, round.method);
        drop(part);
        let busy = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.runs.fetch_add(runs, Ordering::Relaxed);
        self.busy_ns.fetch_add(busy, Ordering::Relaxed);
        if self.queue.finish(&taken, entries, &self.complete) {
            FlushStep::Last
        } else {
            FlushStep::Some
        }
    }

    /// The part of one thread: takes words of the plan until none is left.
    fn work(&self) {
        while self.step(TAKE_WORDS) == FlushStep::Some {}
    }
}

/// A part of a flush that is being done: records a panic.
struct Part<'a>(&'a AtomicBool);

impl Drop for Part<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// Why a [`Flusher`] could not be made.
#[derive(Debug, Error)]
pub enum FlusherError {
    /// The system refused a thread.
    #[error("cannot start flush helper {helper}: {source}")]
    Spawn {
        /// Which, from 0.
        helper: usize,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The core does not exist, or this process may not use it.
    #[error(
        "flush helper {helper} cannot be pinned to core {core}: {source}; see `taskset -p $$` for the cores that may be used"
    )]
    Pin {
        /// Which, from 0.
        helper: usize,
        /// The core asked for.
        core: usize,
        /// The error of the system.
        source: std::io::Error,
    },
}

/// Parked threads that help commits of many pages, and how these copy. Shared by the stores of a receiver; a
/// commit that finds the helpers busy with another's does its work alone.
pub struct Flusher {
    fork_join: Arc<ForkJoin<Arc<Flush>>>,
    helpers: Vec<JoinHandle<()>>,
    method: CopyMethod,
}

impl Flusher {
    /// Starts `helpers` threads (none is fine), pinned to `cores` in turn where there are any.
    ///
    /// # Errors
    /// If a thread cannot be started or pinned. Those started before it end.
    pub fn new(method: CopyMethod, helpers: usize, cores: &[usize]) -> Result<Self, FlusherError> {
        Self::confined(method, helpers, cores, &Threads::free())
    }

    /// The same with helpers that `threads` confines.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub(crate) fn confined(
        method: CopyMethod,
        helpers: usize,
        cores: &[usize],
        threads: &Threads,
    ) -> Result<Self, FlusherError> {
        let fork_join = Arc::new(ForkJoin::new());
        let mut flusher = Self {
            fork_join,
            helpers: Vec::with_capacity(helpers),
            method,
        };
        for helper in 0..helpers {
            let core = (!cores.is_empty()).then(|| cores[helper % cores.len()]);
            flusher.start(helper, core, threads.clone())?;
        }
        Ok(flusher)
    }

    fn start(&mut self, helper: usize, core: Option<usize>, threads: Threads) -> Result<(), FlusherError> {
        let fork_join = self.fork_join.clone();
        let (started, pinned) = mpsc::sync_channel(1);
        let life = move || {
            let ready = core.map_or(Ok(()), |core| pin(&[core]));
            let on = ready.is_ok();
            threads.enter(ThreadKind::Worker);
            // Fails only if the thread that waits below is gone, and the process with it.
            let _ = started.send(ready);
            if on {
                fork_join.help(|flush| flush.work());
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

    /// How pages are copied.
    pub(crate) fn method(&self) -> CopyMethod {
        self.method
    }

    /// Does all of `flush`, with the helpers if they are free; returns how many took part.
    fn share(&self, flush: &Arc<Flush>) -> usize {
        let fork = match self.helpers.is_empty() {
            true => None,
            false => self.fork_join.fork(flush),
        };
        flush.work();
        fork.map_or(0, Fork::join)
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.fork_join.close();
        for helper in self.helpers.drain(..) {
            // One that panicked has made its flush's owner panic already.
            drop(helper.join());
        }
    }
}
