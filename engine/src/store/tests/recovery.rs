//! What is left in a RAM directory, as a later receiver finds it.

use super::durable::record::at;
use super::*;
use crate::killpoint;
use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;

const POOL: CacheKind = CacheKind::Pool;
const LABEL: &str = "guest";
const SESSION: &[u8] = b"what stays the same";

fn in_directory(directory: &Path, commit: CommitMode) -> Store {
    let options = StoreOptions {
        cache: POOL,
        commit,
        ram_dir: Some(directory.to_owned()),
        ..options()
    };
    let (store, notes) = Store::with_granularity(table(&BLOCKS), LABEL, &options, TEST_GRANULARITY).unwrap();
    assert_eq!(notes, []);
    store
}

/// Ends the session of a store, and keeps the files of its last checkpoint, as a receiver does that ends.
fn keep_files(store: &Store) -> bool {
    if !store.committed().can_keep_files() {
        return false;
    }
    store.drop_uncommitted();
    store.committed().keep_files()
}

/// What a killed process leaves, since the lock goes with it: files of the same content in another directory.
fn copy_of(directory: &Path) -> TempDir {
    let copy = in_memory();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn find(directory: &Path) -> Result<RecoverableCheckpoint, String> {
    match RecoverableCheckpoint::find(directory, LABEL) {
        Ok(Recoverable::Checkpoint(left)) => Ok(*left),
        Ok(Recoverable::Nothing) => Err("nothing".into()),
        Ok(Recoverable::InUse) => Err("held".into()),
        Ok(Recoverable::Unknown) => Err("unknown".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn state_of(checkpoint: u64) -> (Vec<u64>, Vec<u8>) {
    let stamp = |at| match (at + checkpoint) % 5 {
        0 => 0,
        // Half of the pages change with each checkpoint.
        _ => (at % 2) * checkpoint * 1000 + at + 1,
    };
    let device_state =
        vec![u8::try_from(checkpoint).unwrap(); 3000 * usize::try_from(checkpoint + 1).unwrap()];
    ((0..PAGES).map(stamp).collect(), device_state)
}

fn receive(store: &Store, checkpoint: u64) {
    let (stamps, _) = state_of(checkpoint);
    for (at, stamp) in (0..).zip(stamps) {
        match stamp {
            0 => store.zero(0, page(at)),
            stamp => store.write(0, page(at), &content(stamp)).unwrap(),
        }
    }
}

fn commit(store: &Store, checkpoint: u64) {
    let (_, mut device_state) = state_of(checkpoint);
    store.commit(CheckpointId(checkpoint), &mut device_state, &alone());
}

/// What is recovered, after a check that it is a checkpoint, whole.
fn recovered(directory: &Path) -> Result<u64, String> {
    let left = find(directory)?;
    assert_eq!(left.session(), SESSION);
    let found = left.recover(table(&BLOCKS)).map_err(|error| error.to_string())?;
    let checkpoint = found.checkpoint().unwrap().0;
    let (stamps, device_state) = state_of(checkpoint);
    for (at, stamp) in (0..).zip(stamps) {
        assert_eq!(
            committed_stamp(&found, at),
            stamp,
            "page {at} of checkpoint {checkpoint}"
        );
    }
    assert_eq!(found.checkpoint_view().unwrap().device_state(), device_state);
    Ok(checkpoint)
}

/// The receiver is killed at any instant of three checkpoints. So is every third of those that recover, on its way.
#[test]
fn a_kill_at_any_instant_leaves_a_checkpoint_whole() {
    for mode in [CommitMode::Deferred, CommitMode::Sync] {
        let scratch = in_memory();
        let store = in_directory(scratch.path(), mode);
        let begun = Rc::new(RefCell::new(None));
        let instants = Rc::new(RefCell::new(0u64));
        let (directory, last, count) = (scratch.path().to_owned(), begun.clone(), instants.clone());
        let kill = move || {
            *count.borrow_mut() += 1;
            // All of a commit; of the flush, in which one page is like the other, some.
            if *count.borrow() % 100 > 20 && *count.borrow() % 17 != 0 {
                return;
            }
            let copy = copy_of(&directory);
            let again = copy.path().to_owned();
            let which = *count.borrow();
            if which % 3 == 0 {
                let mut left = which % 500;
                killpoint::set(Some(Box::new(move || {
                    left = left.saturating_sub(1);
                    if left == 1 {
                        copy_is_whole(&again);
                    }
                })));
            }
            let found = recovered(copy.path());
            killpoint::set(None);
            let last: Option<u64> = *last.borrow();
            match found {
                Err(nothing) => assert!(nothing == "nothing" && last == Some(0), "{nothing}, {last:?}"),
                Ok(found) => {
                    let last = last.expect("nothing was committed");
                    assert!(
                        found == last || found + 1 == last,
                        "{found} was found, not {last}"
                    );
                }
            }
        };
        (0..PAGES).for_each(|at| {
            store
                .write(0, page(at), &content(state_of(0).0[usize::try_from(at).unwrap()]))
                .unwrap()
        });
        store.begin_colo();
        store.record_session(|| SESSION.to_vec());
        for checkpoint in 0..3 {
            if checkpoint > 0 {
                receive(&store, checkpoint);
            }
            *begun.borrow_mut() = Some(checkpoint);
            *instants.borrow_mut() = 0;
            killpoint::set(Some(Box::new(kill.clone())));
            commit(&store, checkpoint);
            store.finish_flush();
            killpoint::set(None);
        }
        receive(&store, 3);
        assert_eq!(
            recovered(copy_of(scratch.path()).path()),
            Ok(2),
            "what is not committed is not there"
        );
        assert!(*instants.borrow() > 100, "{}", instants.borrow());
    }
}

fn copy_is_whole(directory: &Path) {
    let copy = copy_of(directory);
    recovered(copy.path()).unwrap();
}

/// A directory with a checkpoint of which pages are still in slots.
fn while_flushing() -> (TempDir, Store) {
    let scratch = in_memory();
    let store = in_directory(scratch.path(), CommitMode::Deferred);
    (0..PAGES).for_each(|at| {
        store
            .write(0, page(at), &content(state_of(0).0[usize::try_from(at).unwrap()]))
            .unwrap()
    });
    store.begin_colo();
    store.record_session(|| SESSION.to_vec());
    commit(&store, 0);
    receive(&store, 1);
    commit(&store, 1);
    assert!(store.is_flushing());
    (scratch, store)
}

#[test]
fn who_has_a_guest_keeps_it() {
    let (scratch, store) = while_flushing();
    assert_eq!(find(scratch.path()).err().unwrap(), "held");
    assert!(keep_files(&store));
    let names = |directory: &Path| {
        let names = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    drop(store);
    let kept = names(scratch.path());
    assert_eq!(kept.len(), BLOCKS.len() + 4, "no slabs, no places: {kept:?}");
    // Found, and not taken: it stays.
    drop(find(scratch.path()).unwrap());
    assert_eq!(names(scratch.path()), kept);
    let store = find(scratch.path()).unwrap().recover(table(&BLOCKS)).unwrap();
    assert_eq!(find(scratch.path()).err().unwrap(), "held");
    assert!(store.keep_files(), "once more");
    drop(store);
    assert_eq!(recovered(scratch.path()), Ok(1));
    assert_eq!(names(scratch.path()), Vec::<String>::new(), "discarded");
}

#[test]
fn what_was_given_away_is_reported() {
    let (scratch, store) = while_flushing();
    store.drop_uncommitted();
    for given in [true, false] {
        store.committed().set_given(given);
        assert_eq!(find(copy_of(scratch.path()).path()).unwrap().is_given(), given);
    }
}

#[test]
fn precopy_leaves_nothing() {
    let scratch = in_memory();
    let store = in_directory(scratch.path(), CommitMode::Deferred);
    let copy = copy_of(scratch.path());
    assert!(!keep_files(&store));
    drop(store);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    assert_eq!(find(copy.path()).err().unwrap(), "nothing");
    assert_eq!(
        fs::read_dir(copy.path()).unwrap().count(),
        0,
        "it would stay for ever"
    );
}

/// Every byte of the record and of the places, with several values; every file cut off, or gone.
#[test]
fn damage_is_reported_and_nothing_is_lost_by_it() {
    let (scratch, _store) = while_flushing();
    let whole = recovered(copy_of(scratch.path()).path());
    assert_eq!(whole, Ok(1));
    let mut refused = 0;
    for (name, bytes) in [("guest.~record", at::SLOTS[1] + 32), ("guest.~places", 64)] {
        for byte in 0..bytes {
            let copy = copy_of(scratch.path());
            let path = copy.path().join(name);
            let mut spoilt = fs::read(&path).unwrap();
            for flip in [0x01, 0x80, 0xff] {
                spoilt[byte] ^= flip;
                fs::write(&path, &spoilt).unwrap();
                spoilt[byte] ^= flip;
                let files = fs::read_dir(copy.path()).unwrap().count();
                let outcome = find(copy.path()).and_then(|left| {
                    let store = left.recover(table(&BLOCKS)).map_err(|error| error.to_string())?;
                    store.keep_files();
                    Ok(())
                });
                match outcome {
                    Err(error) => {
                        refused += 1;
                        assert!(error.contains("guest.~"), "{error}");
                        assert_eq!(fs::read_dir(copy.path()).unwrap().count(), files, "{error}");
                    }
                    // The places of other pages, the older slot, bytes that mean nothing.
                    Ok(()) => break,
                }
            }
        }
    }
    assert!(refused > 200, "{refused}");
    for entry in fs::read_dir(scratch.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        for length in [None, Some(0), Some(8), Some(4096)] {
            let copy = copy_of(scratch.path());
            let path = copy.path().join(&name);
            let before = fs::metadata(&path).unwrap().len();
            match length {
                None => fs::remove_file(&path).unwrap(),
                Some(length) => File::options()
                    .write(true)
                    .open(&path)
                    .unwrap()
                    .set_len(length)
                    .unwrap(),
            }
            let outcome = find(copy.path())
                .and_then(|left| left.recover(table(&BLOCKS)).map_err(|error| error.to_string()));
            match outcome {
                Ok(_) => {
                    let is_idle = name.ends_with("device-0") || name.contains("~slab-");
                    assert!(
                        is_idle || length.is_some_and(|length| length >= before),
                        "{name} {length:?}"
                    );
                }
                Err(error) => assert!(
                    error.contains("guest.") || error == "unknown",
                    "{name} {length:?}: {error}"
                ),
            }
        }
    }
}

#[test]
fn links_and_what_is_no_file_are_not_followed() {
    let (scratch, store) = while_flushing();
    store.drop_uncommitted();
    let copy = copy_of(scratch.path());
    let record = copy.path().join("guest.~record");
    let elsewhere = copy.path().join("elsewhere");
    fs::rename(&record, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &record).unwrap();
    assert!(find(copy.path()).err().unwrap().contains("guest.~record"));
    fs::remove_file(&record).unwrap();
    fs::create_dir(&record).unwrap();
    assert!(find(copy.path()).err().unwrap().contains("guest.~record"));
}

#[test]
fn a_device_state_grows_and_shrinks() {
    let scratch = in_memory();
    let store = in_directory(scratch.path(), CommitMode::Deferred);
    let began = std::time::Instant::now();
    store.begin_colo();
    store.record_session(|| vec![7; 100_000]);
    for (checkpoint, bytes) in (0..).zip([2, 5000, 100_000, 0, 70_000, 3]) {
        let mut device_state = vec![u8::try_from(checkpoint).unwrap(); bytes];
        let expected = device_state.clone();
        store.commit(CheckpointId(checkpoint), &mut device_state, &alone());
        let copy = copy_of(scratch.path());
        let left = find(copy.path()).unwrap();
        assert_eq!(
            (left.checkpoint(), left.session()),
            (CheckpointId(checkpoint), &[7; 100_000][..])
        );
        assert!(left.age() <= began.elapsed());
        let found = left.recover(table(&BLOCKS)).unwrap();
        assert_eq!(found.device_state(), expected);
    }
}
