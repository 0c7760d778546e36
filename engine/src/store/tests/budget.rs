//! What stores take of the budget: before it is mapped, and until it is freed.

use super::*;
use crate::budget::Budget;

/// A guest of three slabs.
const PAGES: u64 = 1500;

fn with_budget(limit: u64, (cache, commit): (CacheKind, CommitMode)) -> (Arc<Budget>, StoreOptions) {
    let budget = Arc::new(Budget::new(limit, "--ram-limit"));
    let options = StoreOptions {
        cache,
        commit,
        budget: budget.clone(),
        ..options()
    };
    (budget, options)
}

fn create(options: &StoreOptions) -> Result<Store, StoreError> {
    let table = table(&[("pc.ram", PAGES)]);
    Store::with_granularity(table, "test", options, TEST_GRANULARITY).map(|(store, _)| store)
}

/// Bytes of all that is mapped for a store now.
fn mapped_bytes(store: &Store) -> u64 {
    let slabs = (0..store.slab_limit()).filter_map(|position| store.slab(position));
    let slabs: usize = slabs.map(Slab::bytes).sum();
    slabs as u64 + store.table().total_bytes()
}

/// Lets so many extents stay in use, each by one page: the others of it are sent again and again.
fn waste(store: &Store, extents: u64) -> Result<(), StoreError> {
    let mut landing = Landing::default();
    let again: Vec<_> = (1..=PACKET_PAGES as u64).map(|at| page(PAGES - at)).collect();
    let firsts = (0..extents).flat_map(|kept| [page(kept), again[0]]);
    let wasted = firsts.map(|first| {
        let mut pages = again.clone();
        pages[0] = first;
        store.place(0, &pages, &mut landing)?;
        fill_by_kernel(landing.runs(), &[7; PACKET_PAGES * PAGE_SIZE]);
        store.landed(0, &mut landing);
        Ok(())
    });
    let wasted = wasted.collect();
    store.release_landing(&mut landing);
    wasted
}

#[test]
fn all_memory_is_taken_and_given_back() {
    for kind in KINDS {
        for directory in [None, Some(in_memory())] {
            let (budget, options) = with_budget(1 << 30, kind);
            let options = StoreOptions {
                ram_dir: directory.as_ref().map(|directory| directory.path().to_owned()),
                ..options
            };
            let store = create(&options).unwrap();
            let at_first = budget.used();
            assert!(at_first > mapped_bytes(&store), "{kind:?}");
            assert!(at_first < 3 * mapped_bytes(&store), "{kind:?}: {at_first}");
            store.begin_colo();
            if kind.0 == CacheKind::Pool {
                waste(&store, 40).unwrap();
                assert!(budget.used() > at_first + (4 << 20));
                assert!(budget.used() > mapped_bytes(&store));
            }
            store.commit(CheckpointId(0), &mut vec![7; 100], &alone());
            dump(store.committed()).unwrap();
            // A kept checkpoint has no cache.
            let committed = store.committed().clone();
            store.drop_uncommitted();
            drop(store);
            let kept = budget.used();
            assert!(
                kept >= committed.table().total_bytes() && kept < at_first,
                "{kept}"
            );
            drop(committed);
            assert_eq!(budget.used(), 0, "{kind:?}");
        }
    }
}

#[test]
fn what_exceeds_it_is_not_mapped() {
    for kind in KINDS {
        let (budget, options) = with_budget(PAGES * PAGE_BYTES, kind);
        let refused = create(&options).err().unwrap();
        assert!(matches!(refused, StoreError::Budget(_)), "{refused}");
        assert!(refused.to_string().contains("--ram-limit"), "{refused}");
        assert_eq!(budget.used(), 0);
    }
    // Whatever a peer announces.
    let (_, options) = with_budget(1 << 40, KINDS[3]);
    for pages in [1 << 30, 1 << 40, (1 << 52) - 1] {
        for cache in [CacheKind::Pool, CacheKind::Mirror] {
            let options = StoreOptions {
                cache,
                ..options.clone()
            };
            let refused = Store::create(table(&[("pc.ram", pages)]), "test", &options)
                .err()
                .unwrap();
            assert!(matches!(refused, StoreError::Budget(_)), "{refused}");
        }
    }
}

/// Whatever others take, a checkpoint finds room for half of the guest, and of a small one for all; what is beyond that is refused.
#[test]
fn a_pool_has_its_reserve_and_more_only_if_it_is_left() {
    let (budget, options) = with_budget(1 << 30, KINDS[3]);
    let store = create(&options).unwrap();
    store.begin_colo();
    let others = budget.take(budget.limit() - budget.used()).unwrap();
    let mut landing = Landing::default();
    let all: Vec<_> = (0..PAGES).map(|at| (at, at + 1)).collect();
    for packet in all.chunks(PACKET_PAGES) {
        land(&store, 0, packet, &mut landing);
    }
    assert_eq!(budget.used(), budget.limit());
    let refused = waste(&store, 100).unwrap_err();
    assert!(matches!(refused, StoreError::Budget(_)), "{refused}");
    // As soon as there is more, it goes on.
    drop(others);
    waste(&store, 20).unwrap();
    drop(store);
    assert_eq!(budget.used(), 0);
}

/// Memory that checkpoints do not need any more is there for others.
#[test]
fn a_slab_that_is_given_back_is_taken_again() {
    let (budget, options) = with_budget(1 << 30, KINDS[3]);
    let store = create(&options).unwrap();
    store.begin_colo();
    waste(&store, 40).unwrap();
    let most = budget.used();
    let mut id = 0;
    let mut commit = |store: &Store| {
        store.commit(CheckpointId(id), &mut Vec::new(), &alone());
        store.finish_flush();
        id += 1;
    };
    commit(&store);
    for _ in 0..1000 {
        commit(&store);
        if store.pool_task() == PoolTask::Shrink {
            store.shrink();
        }
    }
    let least = budget.used();
    assert!(least < most, "{least} of {most}");
    waste(&store, 40).unwrap();
    assert!(budget.used() > least);
    assert!(budget.used() > mapped_bytes(&store));
    drop(store);
    assert_eq!(budget.used(), 0);
}
