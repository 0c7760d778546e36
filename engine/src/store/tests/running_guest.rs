//! A store whose image a guest runs on between checkpoints: the pages that it changes are restored, too.

use super::*;
use crate::blocks::BlockTable;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

#[test]
fn the_pages_that_the_guest_dirtied_are_restored() {
    const PAGES: u64 = 300;
    let bitmap = Arc::new(DirtyBitmap::new(PAGES, 1).unwrap());
    let options = StoreOptions {
        running_guest: Some(bitmap.clone()),
        ..options()
    };
    let (store, _) =
        Store::with_granularity(table(&[("pc.ram", PAGES)]), "test", &options, TEST_GRANULARITY).unwrap();
    let mut primary: Vec<u64> = (0..PAGES).map(|at| at + 1).collect();
    for at in 0..PAGES {
        store.write(0, page(at), &content(at + 1)).unwrap();
    }
    store.begin_colo();
    let mut landing = Landing::default();
    let mut generator = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut random = |below: u64| generator.random_range(0..below);
    for checkpoint in 0..50 {
        store.commit(CheckpointId(checkpoint), &mut Vec::new(), &alone());
        for (at, stamp) in (0..).zip(&primary) {
            assert_eq!(
                image_stamp(&store, at),
                *stamp,
                "page {at} after checkpoint {checkpoint}"
            );
        }
        // The guest runs here and goes its own way; the primary's does as well, with some of the same pages.
        for _ in 0..random(40) {
            let at = random(PAGES);
            copy::fill(
                store.image().span(PageRun::one(page(at))),
                &content(1_000_000 + random(1000)),
            );
            bitmap.mark(0, page(at));
        }
        for _ in 0..random(40) {
            let (at, stamp) = (random(PAGES), 1000 + random(1_000_000));
            land(&store, 1, &[(at, stamp)], &mut landing);
            primary[usize::try_from(at).unwrap()] = stamp;
        }
    }
}

#[test]
fn other_caches_and_modes_are_refused_for_it() {
    let table: Arc<BlockTable> = table(&[("pc.ram", 8)]);
    for (cache, commit) in &KINDS[1..] {
        let options = StoreOptions {
            cache: *cache,
            commit: *commit,
            running_guest: Some(Arc::new(DirtyBitmap::new(8, 1).unwrap())),
            ..options()
        };
        let refused = Store::create(table.clone(), "test", &options).err().unwrap();
        assert!(matches!(refused, StoreError::RunningGuest), "{refused}");
    }
}
