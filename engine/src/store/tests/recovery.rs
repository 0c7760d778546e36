//! What is left in a RAM directory, as a later receiver finds it.

use super::durable::layout::at;
use super::*;
use crate::budget::Budget;
use crate::failpoint::{self, Point};
use std::cell::RefCell;
use std::rc::Rc;

pub(super) const LABEL: &str = "guest";
const SESSION: &[u8] = b"what stays the same";

/// Options of a store whose checkpoints outlive it.
pub(super) fn lasting(directory: &Path, commit: CommitMode) -> StoreOptions {
    StoreOptions {
        cache: CacheKind::Pool,
        // One slab at first: tests copy these files thousands of times.
        pool_max: Some(1),
        commit,
        ram_dir: Some(directory.to_owned()),
        ..options()
    }
}

fn in_directory(directory: &Path, commit: CommitMode) -> Store {
    let options = lasting(directory, commit);
    let (store, notes) = Store::with_granularity(table(&BLOCKS), LABEL, &options, TEST_GRANULARITY).unwrap();
    assert_eq!(notes, []);
    store
}

/// Ends the session of a store, and keeps the files of its last checkpoint, as a receiver does that ends.
fn keep_files(store: &Store) -> KeptFiles {
    if store.committed().can_keep_files() {
        store.drop_uncommitted();
    }
    store.committed().keep_files()
}

/// What a killed process leaves, since the lock goes with it: files of the same content in another directory.
pub(super) fn copy_of(directory: &Path) -> TempDir {
    let copy = in_memory();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

pub(super) fn find(directory: &Path) -> Result<RecoverableCheckpoint, String> {
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

/// A large one, which a receiving thread does not copy.
#[test]
fn a_device_state_is_written_before_its_commit() {
    let directory = in_memory();
    let store = in_directory(directory.path(), CommitMode::Deferred);
    store.record_session(|| Ok(SESSION.to_vec()));
    store.begin_colo();
    let found = || {
        let copy = copy_of(directory.path());
        let left = find(copy.path()).unwrap();
        left.recover(table(&BLOCKS), &Budget::unlimited())
            .unwrap()
            .device_state()
    };
    for checkpoint in 0..4u8 {
        let id = CheckpointId(checkpoint.into());
        let state = vec![checkpoint; 5000 * usize::from(checkpoint + 1)];
        store.write_device_state(id, &state);
        // Until the commit, the checkpoint before is whole.
        if let Some(before) = checkpoint.checked_sub(1) {
            assert!(found().iter().all(|byte| *byte == before));
        }
        // The commit itself copies nothing: it need not be given the same.
        store.commit(id, &mut vec![0xff; state.len()], &alone());
        store.finish_flush();
        assert!(found() == state, "checkpoint {checkpoint}");
    }
    // What was written for a commit that never came is not used for another.
    store.write_device_state(CheckpointId(4), b"never committed");
    commit(&store, 5);
    assert!(found() == state_of(5).1);
}

fn commit(store: &Store, checkpoint: u64) {
    let (_, mut device_state) = state_of(checkpoint);
    store.commit(CheckpointId(checkpoint), &mut device_state, &alone());
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What is recovered, after a check that it is a checkpoint, whole. Its files go with it.
fn recover_whole(directory: &Path) -> Result<(u64, CommittedImage), String> {
    let left = find(directory)?;
    assert_eq!(left.session(), SESSION);
    let found = left
        .recover(table(&BLOCKS), &Budget::unlimited())
        .map_err(|error| error.to_string())?;
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
    Ok((checkpoint, found))
}

/// The number of a checkpoint that is recovered whole, and then discarded.
pub(super) fn recovered(directory: &Path) -> Result<u64, String> {
    recover_whole(directory).map(|(checkpoint, _)| checkpoint)
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
            let last: Option<u64> = *last.borrow();
            if which % 3 == 0 {
                let mut left = which % 500;
                failpoint::on_kill(move || {
                    left = left.saturating_sub(1);
                    if left == 1 {
                        copy_is_whole(&again, last == Some(0));
                    }
                });
            }
            let found = recover_whole(copy.path());
            // Its removal is another matter: `leftovers.rs`.
            failpoint::clear(Point::Kill);
            match found {
                Err(nothing) => assert!(nothing == "nothing" && last == Some(0), "{nothing}, {last:?}"),
                Ok((found, _)) => {
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
        store.record_session(|| Ok(SESSION.to_vec()));
        for checkpoint in 0..3 {
            if checkpoint > 0 {
                receive(&store, checkpoint);
            }
            *begun.borrow_mut() = Some(checkpoint);
            *instants.borrow_mut() = 0;
            failpoint::on_kill(kill.clone());
            commit(&store, checkpoint);
            store.finish_flush();
            failpoint::clear(Point::Kill);
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

fn copy_is_whole(directory: &Path, may_be_none: bool) {
    let copy = copy_of(directory);
    if let Err(nothing) = recovered(copy.path()) {
        assert!(nothing == "nothing" && may_be_none, "{nothing}");
    }
}

/// A directory with a checkpoint of which pages are still in slots.
pub(super) fn while_flushing() -> (TempDir, Store) {
    let scratch = in_memory();
    let store = in_directory(scratch.path(), CommitMode::Deferred);
    (0..PAGES).for_each(|at| {
        store
            .write(0, page(at), &content(state_of(0).0[usize::try_from(at).unwrap()]))
            .unwrap()
    });
    store.begin_colo();
    store.record_session(|| Ok(SESSION.to_vec()));
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
    assert_eq!(keep_files(&store), KeptFiles::Kept);
    drop(store);
    let kept = names(scratch.path());
    assert_eq!(kept.len(), BLOCKS.len() + 5, "no slabs, no places: {kept:?}");
    // Found, and not taken: it stays.
    drop(find(scratch.path()).unwrap());
    assert_eq!(names(scratch.path()), kept);
    let store = find(scratch.path())
        .unwrap()
        .recover(table(&BLOCKS), &Budget::unlimited())
        .unwrap();
    assert_eq!(find(scratch.path()).err().unwrap(), "held");
    assert_eq!(store.keep_files(), KeptFiles::Kept, "once more");
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
    assert_eq!(keep_files(&store), KeptFiles::NoCheckpoint);
    drop(store);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    assert_eq!(find(copy.path()).err().unwrap(), "nothing");
    assert_eq!(
        fs::read_dir(copy.path()).unwrap().count(),
        0,
        "it would stay for ever"
    );
}

/// Every bit of the words of a record that a recovery reads and of some places, a bit of every byte of everything else that
/// it reads: an error names the file, and the next attempt finds everything as it was. What is not read may be damaged.
#[test]
fn a_flipped_bit_is_reported_where_it_matters() {
    let (scratch, store) = while_flushing();
    let flushing = copy_of(scratch.path());
    store.finish_flush();
    let flushed = copy_of(scratch.path());
    let words = |from: usize, count: usize| from..from + count * 8;
    let places = words(0, usize::try_from(PAGES).unwrap());
    for (directory, is_flushing) in [(flushing, true), (flushed, false)] {
        let read = [
            ("~record", words(at::MAGIC, 5), 8),
            ("~record", words(at::STATE, 1), 8),
            ("~record", words(at::SLOTS[1], 5), 8),
            ("~record", words(at::SESSION_LENGTH, 2), 8),
            ("~session", 0..SESSION.len(), 1),
            ("~device-1", 0..6000, 1),
            ("~places", words(0, 3), if is_flushing { 8 } else { 0 }),
            ("~places", places.clone(), usize::from(is_flushing)),
        ];
        for (name, bytes, bits) in read {
            flip(directory.path(), name, bytes.step_by(1), bits, |at| {
                let error = refusal(directory.path()).expect(at);
                assert!(error.contains("guest.~"), "{at}: {error}");
            });
        }
        let not_read = [
            ("~record", (at::NAMES_LENGTH..at::STATE).step_by(1)),
            ("~record", (at::STATE + 8..at::SLOTS[1]).step_by(1)),
            ("~record", (at::SLOTS[1] + 40..at::SESSION_LENGTH).step_by(1)),
            ("~record", (at::NAMES - 30..at::NAMES + 10).step_by(1)),
            ("~device-0", (0..3000).step_by(97)),
            (
                "~places",
                if is_flushing { 0..0 } else { places.clone() }.step_by(31),
            ),
        ];
        for (name, bytes) in not_read {
            flip(directory.path(), name, bytes, 1, |at| {
                assert_eq!(attempt(directory.path()), Ok(()), "{at}");
            });
        }
        assert_eq!(recovered(directory.path()), Ok(1));
    }
}

/// Flips so many bits of each of these bytes of a file in turn, and has a look.
fn flip(directory: &Path, name: &str, bytes: impl Iterator<Item = usize>, bits: usize, look: impl Fn(&str)) {
    let path = directory.join(format!("{LABEL}.{name}"));
    let whole = fs::read(&path).unwrap();
    for byte in bytes {
        for bit in 0..bits {
            let bit = (byte + bit) % 8;
            let mut spoilt = whole.clone();
            spoilt[byte] ^= 1 << bit;
            fs::write(&path, &spoilt).unwrap();
            look(&format!("{name}, byte {byte}, bit {bit}"));
        }
    }
    fs::write(&path, &whole).unwrap();
}

/// Why the checkpoint is not recovered. The files stay as they are then.
fn refusal(directory: &Path) -> Option<String> {
    let before = names(directory);
    let found = find(directory).map(|left| left.recover(table(&BLOCKS), &Budget::unlimited()));
    let refusal = match found {
        Ok(recovered) => recovered.err().map(|error| error.to_string()),
        Err(error) => Some(error),
    };
    assert!(refusal.is_none() || names(directory) == before, "{refusal:?}");
    refusal
}

/// Whether the checkpoint is recovered, whole, from a copy of these files.
fn attempt(directory: &Path) -> Result<(), String> {
    let copy = copy_of(directory);
    match recovered(copy.path()) {
        Ok(checkpoint) => {
            assert_eq!(checkpoint, 1);
            Ok(())
        }
        Err(error) => {
            assert_eq!(names(copy.path()), names(directory), "{error}");
            Err(error)
        }
    }
}

/// Its length is not charged, and not believed.
#[test]
fn a_recorder_that_is_damaged_or_gone_costs_no_checkpoint() {
    let (scratch, _store) = while_flushing();
    let recover = |change: fn(&Path)| {
        let copy = copy_of(scratch.path());
        change(&copy.path().join("guest.~flight"));
        let budget = Arc::new(Budget::new(64 << 20, "--ram-limit"));
        let image = find(copy.path())
            .unwrap()
            .recover(table(&BLOCKS), &budget)
            .unwrap();
        image.flight().map(drop)
    };
    assert_eq!(recover(|_| ()), Ok(()));
    let grow = |path: &Path| {
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(1 << 40)
            .unwrap()
    };
    assert_eq!(recover(grow), Err(NoFlight::Damaged));
    assert_eq!(
        recover(|path| fs::write(path, [0; 4096]).unwrap()),
        Err(NoFlight::Damaged)
    );
    let other_version = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[8..16].copy_from_slice(&1u64.to_ne_bytes());
        fs::write(path, bytes).unwrap();
    };
    assert_eq!(recover(other_version), Err(NoFlight::Version(1)));
    assert_eq!(
        recover(|path| fs::remove_file(path).unwrap()),
        Err(NoFlight::Missing)
    );
}

/// Every file gone, cut off at several lengths, or with a page of zeros where memory was lost. The pages of the guest themselves
/// have no checksum: of their files, only the length is known.
#[test]
fn lost_files_and_lost_pages_are_reported() {
    let (scratch, _store) = while_flushing();
    for name in names(scratch.path()) {
        let whole = fs::read(scratch.path().join(&name)).unwrap();
        // A checkpoint does without its flight recorder.
        let is_unused = name.ends_with("~device-0") || name.contains("~slab-") || name.ends_with("~flight");
        let is_pages = name.contains("~slab-") || !name.contains('~');
        let copy = copy_of(scratch.path());
        let path = copy.path().join(&name);
        let check = |content: Option<&[u8]>, may_be_whole: bool, what: String| {
            match content {
                None => fs::remove_file(&path).unwrap(),
                Some(content) => fs::write(&path, content).unwrap(),
            }
            match attempt(copy.path()) {
                Ok(()) => assert!(may_be_whole, "{name} {what}"),
                Err(error) => {
                    let is_named = error.contains("guest.") || error == "unknown";
                    assert!(is_named, "{name} {what}: {error}");
                }
            }
        };
        check(None, is_unused, "gone".into());
        for length in [0, 1, 8, 272, 4095, 4096, 8192, whole.len() - 1, whole.len() / 2] {
            let length = length.min(whole.len());
            // Of the record's second page only those need the names who find no checkpoint.
            let is_enough = length >= whole.len() || (name.ends_with("~record") && length >= PAGE_SIZE);
            check(
                Some(&whole[..length]),
                is_unused || is_enough,
                format!("of {length} bytes"),
            );
        }
        for page in (0..whole.len()).step_by(PAGE_SIZE).filter(|_| !is_pages) {
            let mut lost = whole.clone();
            let end = (page + PAGE_SIZE).min(lost.len());
            let is_zero = lost[page..end].iter().all(|byte| *byte == 0);
            lost[page..end].fill(0);
            let is_names = name.ends_with("~record") && page > 0;
            check(
                Some(&lost),
                is_unused || is_zero || is_names,
                format!("without byte {page}"),
            );
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(recovered(copy.path()), Ok(1), "{name}");
    }
}

/// What an earlier version has left is not understood, and not lost.
#[test]
fn another_version_is_refused_in_words() {
    let (scratch, _store) = while_flushing();
    let copy = copy_of(scratch.path());
    let record = copy.path().join("guest.~record");
    let mut older = fs::read(&record).unwrap();
    older[at::VERSION..at::VERSION + 8].copy_from_slice(&2u64.to_ne_bytes());
    fs::write(&record, older).unwrap();
    let error = attempt(copy.path()).unwrap_err();
    assert!(
        error.contains("version 2") && error.contains("let the colo-ring that wrote it"),
        "{error}"
    );
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
    store.record_session(|| Ok(vec![7; 100_000]));
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
        let found = left.recover(table(&BLOCKS), &Budget::unlimited()).unwrap();
        assert_eq!(found.device_state(), expected);
    }
}
