//! The services of simulated sessions.

use super::super::disks;
use super::super::rng::Rng;
use crate::blocks::BlockTable;
use crate::disk::{Disk, DiskError};
use crate::metrics::SampleQueue;
use crate::receiver::decode::Workers;
use crate::receiver::disks::SessionDisks;
use crate::receiver::guest_memory::{Budgets, GuestMemory, MemoryError};
use crate::receiver::live_session::LiveSession;
use crate::receiver::recovery::label;
use crate::receiver::remark::Remark;
use crate::receiver::services::{Services, Shared, Work};
use crate::store::{
    CacheKind, CommitMode, CopyMethod, FlushSizes, Flusher, Granularity, HugePages, Store, StoreOptions,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The cache of a store, the pool's limit, and when it commits.
type StoreKind = (CacheKind, Option<u64>, CommitMode);

/// Every way to make a store. Most have a flush behind the commit, during which the primary goes on.
pub(super) const STORES: [StoreKind; 8] = [
    (CacheKind::Mirror, None, CommitMode::Sync),
    (CacheKind::Mirror, None, CommitMode::Deferred),
    (CacheKind::Mirror, None, CommitMode::Deferred),
    (CacheKind::Pool, None, CommitMode::Sync),
    (CacheKind::Pool, None, CommitMode::Deferred),
    (CacheKind::Pool, None, CommitMode::Deferred),
    // So little that every checkpoint needs more.
    (CacheKind::Pool, Some(1), CommitMode::Sync),
    (CacheKind::Pool, Some(1), CommitMode::Deferred),
];

/// Those whose checkpoints outlive the receiver, with a RAM directory.
pub(super) const LASTING_STORES: [StoreKind; 2] = [STORES[3], STORES[4]];

/// Background work that is waiting.
pub(super) type Jobs = Arc<Mutex<Vec<Work>>>;

/// Services without a thread and without a clock.
pub(super) struct SimServices {
    shared: Shared,
    store: StoreOptions,
    granularity: Granularity,
    budgets: Budgets,
    jobs: Jobs,
    disks: Mutex<BTreeMap<u32, WaitingDisks>>,
    threads: Mutex<Threads>,
}

/// Threads for background work, which the host may refuse.
#[derive(Default)]
struct Threads {
    /// One in so many is refused.
    refusal: Option<(Rng, usize)>,
    refused: u64,
}

/// Disks that their session has not bound yet, and how many segments of their logs may be in memory.
type WaitingDisks = (Vec<Arc<Disk>>, usize);

impl SimServices {
    fn disks(&self) -> MutexGuard<'_, BTreeMap<u32, WaitingDisks>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One in so many threads is refused from now on, if any.
    pub(super) fn refuse_threads(&self, refusal: Option<(Rng, usize)>) {
        self.threads().refusal = refusal;
    }

    pub(super) fn refused_threads(&self) -> u64 {
        self.threads().refused
    }

    /// A primary has connected its disks.
    pub(super) fn add_disks(&self, session: u32, disks: Vec<Arc<Disk>>, segments_in_ram: usize) {
        self.disks().insert(session, (disks, segments_in_ram));
    }
}

/// Makes them, for guests with memory of that kind, and with a shard for each core and worker.
#[expect(clippy::too_many_arguments, reason = "each is drawn for one run")]
pub(super) fn services(
    rng: &mut Rng,
    (cache, pool_max, commit): StoreKind,
    ram_dir: Option<PathBuf>,
    workers: Workers,
    shards: usize,
    jobs: &Jobs,
    budgets: &Budgets,
    inline_state_bytes: usize,
) -> Arc<SimServices> {
    let options = StoreOptions {
        hugepages: HugePages::Off,
        ram_dir,
        cache,
        pool_max,
        commit,
        shards,
        // With two nodes, whether or not this host has a second node.
        nodes: match shards.is_multiple_of(2) {
            true => (0..shards).map(|shard| shard % 2).collect(),
            false => Vec::new(),
        },
        budget: budgets.memory.clone(),
        running_guest: None,
    };
    let method = rng.pick(&[CopyMethod::NonTemporal, CopyMethod::Memcpy]);
    let granularity = Granularity {
        mirror_slab_pages: rng.pick(&[16, 64, 256]),
        pool_slab_extents: Some(rng.pick(&[1, 2, 5])),
        area_bytes: 4096,
        flight_checkpoints: 32,
        flush: FlushSizes {
            help_from_pages: 4,
            step_words: 1,
        },
    };
    Arc::new(SimServices {
        shared: Shared {
            started: Instant::now(),
            samples: SampleQueue::with_capacity(4),
            flusher: Arc::new(Flusher::new(method, 0, &[]).expect("no helpers, no error")),
            workers: Arc::new(workers),
            guests: Arc::default(),
            links: Arc::default(),
            inline_state_bytes,
        },
        store: options,
        granularity,
        budgets: budgets.clone(),
        jobs: jobs.clone(),
        disks: Mutex::default(),
        threads: Mutex::default(),
    })
}

impl Services for SimServices {
    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn make_memory(&self, session: u32, table: Arc<BlockTable>) -> Result<GuestMemory, MemoryError> {
        let leases = self.budgets.take(0)?;
        let (store, _) = Store::with_granularity(table, &label(session), &self.store, self.granularity)?;
        Ok(GuestMemory {
            store: Arc::new(store),
            leases,
            fallbacks: Vec::new(),
        })
    }

    fn bind_disks(&self, session: &Arc<LiveSession>, _: Option<[u8; 16]>) -> Result<SessionDisks, DiskError> {
        let waiting = self.disks().remove(&session.id);
        let (disks, segments_in_ram) = waiting.unwrap_or_default();
        disks::bind(session, disks, segments_in_ram)
    }

    fn run_in_background(&self, work: Work) -> std::io::Result<()> {
        let mut threads = self.threads();
        if let Some((rng, one_in)) = &mut threads.refusal
            && rng.one_in(*one_in)
        {
            threads.refused += 1;
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(work);
        Ok(())
    }

    fn notify_control(&self) {}

    fn warn(&self, _remark: Remark) {}

    fn warn_of(&self, _session: &LiveSession, _text: String) {}
}
