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
    let scratch = tempfile::tempdir().unwrap();
    let mut seen = BTreeSet::new();
    // Into one directory: each replaces the one before.
    for _ in 0..10 {
        let report = store.committed().dump(scratch.path()).unwrap();
        let checkpoint = report.checkpoint.0;
        let device_state = fs::read(&report.device_state).unwrap();
        assert_eq!(device_state, checkpoint.to_le_bytes());
        for (at, stamp) in (0..).zip(dumped_stamps(&report)) {
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
    assert_eq!(
        fs::read_dir(scratch.path()).unwrap().count(),
        3,
        "pc.ram, rom, device-state.bin"
    );
}

#[test]
fn a_dump_that_fails_leaves_nothing_behind() {
    let store = store(&BLOCKS);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let scratch = tempfile::tempdir().unwrap();
    // A directory in the way of the third block's file, which shows when the others are open already.
    let obstacle = scratch.path().join("vga~part");
    fs::create_dir(&obstacle).unwrap();
    let refused = store.committed().dump(scratch.path()).unwrap_err();
    assert!(refused.to_string().contains("vga~part"), "{refused}");
    let left: Vec<_> = fs::read_dir(scratch.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(left, std::slice::from_ref(&obstacle));
    fs::remove_dir(obstacle).unwrap();
    assert_eq!(
        store.committed().dump(scratch.path()).unwrap().checkpoint,
        CheckpointId(0)
    );
}

/// Whatever the primary calls its blocks, the files that are put beside a dump overwrite none of them.
#[test]
fn blocks_keep_out_of_the_way_of_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let store = store(&[
        (RESERVED_FILES[0], 1),
        (RESERVED_FILES[1], 1),
        (RESERVED_FILES[2], 1),
        (RESERVED_FILES[3], 1),
    ]);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let scratch = tempfile::tempdir().unwrap();
    for block in store.committed().dump(scratch.path()).unwrap().blocks {
        let name = block.file.file_name().unwrap().to_str().unwrap();
        assert!(!RESERVED_FILES.contains(&name), "{name}");
        let mode = fs::metadata(&block.file).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "others may not look at a guest's memory");
    }
}
