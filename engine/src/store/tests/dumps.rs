//! Dumps beside commits, and dumps that fail.

use super::*;
use std::collections::BTreeSet;

/// Dumps beside a thread that commits without a pause: each dump is one of its checkpoints, whole.
#[test]
fn a_dump_is_of_one_checkpoint_while_others_are_committed() {
    KINDS.into_iter().for_each(dumps_beside_commits);
}

fn dumps_beside_commits(kind: (CacheKind, CommitMode)) {
    const MANY: u64 = 4000;
    /// Content of a page at a checkpoint: each checkpoint writes two thirds of the pages.
    fn expected(at: u64, checkpoint: u64) -> u64 {
        let back = u64::from((at + checkpoint).is_multiple_of(3));
        checkpoint.checked_sub(back).map_or(0, |wrote| wrote + 1)
    }
    let store = Arc::new(store_of(kind, &[("pc.ram", MANY - 1), ("rom", 1)]));
    store.begin_colo();
    let stop = Arc::new(AtomicBool::new(false));
    let committed_once = Arc::new(std::sync::Barrier::new(2));
    let committer = {
        let (store, stop, committed_once) = (store.clone(), stop.clone(), committed_once.clone());
        thread::spawn(move || {
            let flusher = Flusher::new(CopyMethod::NonTemporal, 1, &[]).unwrap();
            let mut device_state = Vec::new();
            for checkpoint in 0.. {
                store.finish_flush();
                for at in (0..MANY).filter(|at| (at + checkpoint) % 3 != 0) {
                    store.write(0, page(at), &content(checkpoint + 1)).unwrap();
                }
                device_state.extend(checkpoint.to_le_bytes());
                store.commit(CheckpointId(checkpoint), &mut device_state, &flusher);
                if checkpoint == 0 {
                    committed_once.wait();
                }
                if stop.load(Ordering::Relaxed) {
                    return checkpoint;
                }
            }
            unreachable!("the range has no end")
        })
    };
    committed_once.wait();
    let mut seen = BTreeSet::new();
    for _ in 0..10 {
        let dumped = dump(store.committed()).unwrap();
        let checkpoint = dumped.checkpoint.0;
        assert_eq!(dumped.device_state, checkpoint.to_le_bytes());
        for (at, stamp) in (0..).zip(dumped.stamps) {
            assert_eq!(
                stamp,
                expected(at, checkpoint),
                "page {at} at checkpoint {checkpoint}"
            );
        }
        seen.insert(checkpoint);
    }
    stop.store(true, Ordering::Relaxed);
    let last = committer.join().unwrap();
    assert!(
        seen.len() > 1 && last > 0,
        "nothing was committed beside the dumps: {seen:?}, {last}"
    );
}

#[test]
fn a_dump_that_fails_leaves_the_next_one_whole() {
    let store = store(&BLOCKS);
    let refused = dump(store.committed()).unwrap_err();
    assert!(matches!(refused, StoreError::NothingCommitted), "{refused}");
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let file = tempfile::tempfile().unwrap();
    let refused = store.committed().dump(&DumpTargets {
        blocks: vec![&file; 3],
        device_state: &file,
    });
    assert_eq!(
        refused.unwrap_err().to_string(),
        "a dump of 4 ram blocks cannot go to 3 files"
    );
    // One of them cannot be written.
    let closed = fs::File::open("/dev/null").unwrap();
    let refused = store.committed().dump(&DumpTargets {
        blocks: vec![&file, &file, &closed, &file],
        device_state: &file,
    });
    let refused = refused.unwrap_err().to_string();
    assert!(refused.starts_with("the dump of vga: "), "{refused}");
    assert_eq!(dump(store.committed()).unwrap().checkpoint, CheckpointId(0));
}
