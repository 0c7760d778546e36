//! What the guests' parts are given to work with, without a thread.

use super::super::rng::Rng;
use crate::metrics::SampleQueue;
use crate::receiver::budget::Budget;
use crate::receiver::guest::{MakeStore, Memory, Services};
use crate::receiver::recovery::label;
use crate::store::{
    CacheKind, CommitMode, CopyMethod, FlushSizes, Flusher, Granularity, HugePages, Store, StoreOptions,
};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Every way to make a store.
pub(super) const STORES: [(CacheKind, CommitMode); 6] = [
    (CacheKind::Mirror, CommitMode::Sync),
    (CacheKind::Mirror, CommitMode::Deferred),
    (CacheKind::Pool { max: None }, CommitMode::Sync),
    (CacheKind::Pool { max: None }, CommitMode::Deferred),
    // So little that every checkpoint needs more.
    (CacheKind::Pool { max: Some(1) }, CommitMode::Sync),
    (CacheKind::Pool { max: Some(1) }, CommitMode::Deferred),
];

/// Those whose checkpoints outlive the receiver, with a RAM directory.
pub(super) const LASTING_STORES: [(CacheKind, CommitMode); 2] = [STORES[2], STORES[3]];

/// Something that is to be done apart.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Makes them, for guests with memory of that kind.
pub(super) fn services(
    rng: &mut Rng,
    (cache, commit): (CacheKind, CommitMode),
    ram_dir: Option<PathBuf>,
    shards: usize,
    jobs: &Arc<Mutex<Vec<Job>>>,
    budgets: &[Arc<Budget>; 2],
) -> Arc<Services> {
    let options = StoreOptions {
        hugepages: HugePages::Off,
        ram_dir,
        cache,
        commit,
        shards,
        // With two homes, whether or not this host has a second node.
        nodes: match shards.is_multiple_of(2) {
            true => (0..shards).map(|shard| shard % 2).collect(),
            false => Vec::new(),
        },
        running_guest: None,
    };
    let method = rng.pick(&[CopyMethod::NonTemporal, CopyMethod::Memcpy]);
    let grain = Granularity {
        mirror_slab_pages: rng.pick(&[16, 64, 256]),
        pool_slab_extents: Some(rng.pick(&[1, 2, 5])),
        area_bytes: 4096,
        flush: FlushSizes {
            help_from_pages: 4,
            step_words: 1,
        },
    };
    let jobs = jobs.clone();
    Arc::new(Services {
        started: Instant::now(),
        samples: Arc::new(SampleQueue::with_capacity(4)),
        flusher: Arc::new(Flusher::new(method, 0, &[]).expect("no helpers, no error")),
        make_store: store_maker(options, grain, budgets.clone()),
        run_in_background: Arc::new(move |job| {
            jobs.lock().unwrap_or_else(PoisonError::into_inner).push(job);
            Ok(())
        }),
        notify: Arc::new(|| {}),
        warn: Arc::new(|_| {}),
    })
}

fn store_maker(options: StoreOptions, grain: Granularity, budgets: [Arc<Budget>; 2]) -> Arc<MakeStore> {
    Arc::new(move |guest, table| {
        let [ram, device_state] = &budgets;
        let ram = ram.take(table.total_bytes())?;
        let device_state = device_state.take(0)?;
        let made = Store::with_granularity(table, &label(guest.id), &options, grain);
        let (store, _) = made.map_err(|error| error.to_string())?;
        Ok(Memory {
            committed: store.committed().clone(),
            store: Some(Arc::new(store)),
            _ram: ram,
            device_state,
            fallbacks: Vec::new(),
        })
    })
}
