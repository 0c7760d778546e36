//! Random sequences of everything that can be done with a store, against a model: a list of page contents.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

#[derive(Clone, Debug)]
enum Step {
    /// Shard, first page, pages; the packet takes them upwards, or scattered.
    Land(usize, Vec<u64>),
    Write(usize, u64),
    Zero(usize, u64),
    Commit,
    /// Some steps of a deferred flush, if one is under way.
    Flush(usize),
    Dump,
}

fn step() -> impl Strategy<Value = Step> {
    let shard = 0..SHARDS;
    let run = (0..PAGES, 1..100u64).prop_map(|(first, count)| (first..PAGES.min(first + count)).collect());
    let scattered = prop::collection::vec(0..PAGES, 0..20);
    let packet = prop_oneof![run, scattered];
    prop_oneof![
        8 => (shard.clone(), packet).prop_map(|(shard, pages)| Step::Land(shard, pages)),
        4 => (shard.clone(), 0..PAGES).prop_map(|(shard, page)| Step::Write(shard, page)),
        4 => (shard, 0..PAGES).prop_map(|(shard, page)| Step::Zero(shard, page)),
        3 => Just(Step::Commit),
        3 => (1..20usize).prop_map(Step::Flush),
        1 => Just(Step::Dump),
    ]
}

/// What a store should hold: numbers of page contents.
#[derive(Default)]
struct Model {
    colo: bool,
    newest: Vec<u64>,
    committed: Vec<u64>,
    dirty: BTreeSet<u64>,
    received: BTreeSet<u64>,
    commits: u64,
    next_stamp: u64,
}

impl Model {
    fn stamp(&mut self) -> u64 {
        self.next_stamp += 1;
        self.next_stamp
    }

    fn receive(&mut self, page: u64, stamp: u64) {
        let at = usize::try_from(page).unwrap();
        self.newest[at] = stamp;
        self.received.insert(page);
        if self.colo {
            self.dirty.insert(page);
        } else {
            self.committed[at] = stamp;
        }
    }

    fn check(&self, store: &Store) {
        let flushed = !store.is_flushing();
        for at in 0..PAGES {
            let index = usize::try_from(at).unwrap();
            if flushed {
                assert_eq!(image_stamp(store, at), self.committed[index], "image, page {at}");
            }
            assert_eq!(newest_stamp(store, at), self.newest[index], "newest, page {at}");
            assert_eq!(store.was_received(page(at)), self.received.contains(&at));
        }
        assert_eq!(store.dirty_pages(), u64::try_from(self.dirty.len()).unwrap());
        assert_eq!(
            store.unseen_pages(),
            PAGES - u64::try_from(self.received.len()).unwrap()
        );
        assert_eq!(
            store.committed().checkpoint(),
            self.commits.checked_sub(1).map(CheckpointId)
        );
    }
}

/// Applies a step to both, and compares what the step itself answers.
fn apply(step: Step, store: &Store, model: &mut Model, landing: &mut Landing, flusher: &Flusher) {
    if matches!(step, Step::Land(..) | Step::Write(..) | Step::Zero(..)) {
        // What the session sees to: no page arrives before the last checkpoint's are in the image.
        store.finish_flush();
    }
    match step {
        Step::Flush(steps) => (0..steps).for_each(|_| {
            store.flush_step();
        }),
        Step::Land(shard, pages) => {
            let packet: Vec<_> = pages.iter().map(|page| (*page, model.stamp())).collect();
            land(store, shard, &packet, landing);
            packet
                .iter()
                .for_each(|(page, stamp)| model.receive(*page, *stamp));
        }
        Step::Write(shard, at) => {
            let stamp = model.stamp();
            store.write(shard, page(at), &content(stamp)).unwrap();
            model.receive(at, stamp);
        }
        Step::Zero(shard, at) => {
            store.zero(shard, page(at));
            model.receive(at, 0);
        }
        Step::Commit if !model.colo => {}
        Step::Commit => {
            let mut device_state = model.commits.to_le_bytes().to_vec();
            let report = store.commit(CheckpointId(model.commits), &mut device_state, flusher);
            assert!(device_state.is_empty());
            assert_eq!(report.pages, u64::try_from(model.dirty.len()).unwrap());
            assert!(report.runs <= report.pages);
            model.dirty.clear();
            model.committed.clone_from(&model.newest);
            model.commits += 1;
        }
        Step::Dump => match dump(store.committed()) {
            Err(StoreError::NothingCommitted) => assert_eq!(model.commits, 0),
            dumped => check_dump(&dumped.unwrap(), model),
        },
    }
}

fn check_dump(dumped: &DumpContent, model: &Model) {
    assert_eq!(dumped.checkpoint, CheckpointId(model.commits - 1));
    assert_eq!(dumped.stamps, model.committed);
    assert_eq!(dumped.device_state, (model.commits - 1).to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn the_image_is_the_last_committed_checkpoint(
        kind in prop::sample::select(&KINDS[..]),
        precopy in prop::collection::vec(step(), 0..15),
        colo in prop::collection::vec(step(), 0..40),
    ) {
        let store = store_of(kind, &BLOCKS);
        let zeros = vec![0; usize::try_from(PAGES).unwrap()];
        let mut model = Model { newest: zeros.clone(), committed: zeros, ..Model::default() };
        let (mut landing, flusher) = (Landing::default(), alone());
        for step in precopy {
            apply(step, &store, &mut model, &mut landing, &flusher);
        }
        model.check(&store);
        store.begin_colo();
        model.colo = true;
        for step in colo {
            let committing = matches!(step, Step::Commit);
            apply(step, &store, &mut model, &mut landing, &flusher);
            if committing {
                model.check(&store);
            }
        }
        model.check(&store);
        // The primary is lost: what was not committed never happened, and what was committed is whole.
        store.release_landing(&mut landing);
        store.drop_uncommitted();
        if let Some(pool) = store.pool_use() {
            assert_eq!(pool.free_extents, pool.extents, "slots were leaked");
        }
        for at in 0..PAGES {
            prop_assert_eq!(image_stamp(&store, at), model.committed[usize::try_from(at).unwrap()]);
        }
        if model.commits > 0 {
            check_dump(&dump(store.committed()).unwrap(), &model);
        }
    }
}
