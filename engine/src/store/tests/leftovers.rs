//! What a process leaves in a RAM directory that is killed while it makes files or removes them, and which files are its own.

use super::recovery::{LABEL, copy_of, find, lasting, names, recovered, while_flushing};
use super::*;
use crate::budget::Budget;
use crate::failpoint::{self, Point};
use std::cell::RefCell;
use std::rc::Rc;

/// What the receiver after a killed one finds, of which nothing may stay: a checkpoint, whole, or files to remove.
fn cleaned_up(directory: &Path) -> Result<u64, String> {
    let found = recovered(directory);
    if let Err(error) = &found {
        assert_eq!(error, "nothing");
    }
    assert_eq!(names(directory), Vec::<String>::new(), "{found:?}");
    found
}

/// Kills the process at each instant of `work` on the files in `directory`, and the receiver after it at each of its own.
/// Returns at how many instants a checkpoint was found and none.
fn kill_in(directory: &Path, work: impl FnOnce()) -> (usize, usize) {
    let counts = Rc::new(RefCell::new((0, 0)));
    let (at, counted) = (directory.to_owned(), counts.clone());
    failpoint::on_kill(move || {
        let copy = copy_of(&at);
        if names(copy.path()).is_empty() {
            return;
        }
        let again = copy_of(copy.path());
        let in_recovery = again.path().to_owned();
        failpoint::on_kill(move || {
            let copy = copy_of(&in_recovery);
            if !names(copy.path()).is_empty() {
                drop(cleaned_up(copy.path()));
            }
        });
        drop(cleaned_up(again.path()));
        failpoint::clear(Point::Kill);
        let mut counts = counted.borrow_mut();
        match cleaned_up(copy.path()) {
            Ok(_) => counts.0 += 1,
            Err(_) => counts.1 += 1,
        }
    });
    work();
    failpoint::clear(Point::Kill);
    assert_eq!(names(directory), Vec::<String>::new(), "it has ended");
    *counts.borrow()
}

#[test]
fn a_kill_while_a_guests_files_are_made_leaves_none() {
    for cache in [CacheKind::Pool, CacheKind::Mirror] {
        let scratch = in_memory();
        let options = StoreOptions {
            cache,
            ..lasting(scratch.path(), CommitMode::Deferred)
        };
        let (found, nothing) = kill_in(scratch.path(), || {
            drop(Store::with_granularity(table(&BLOCKS), LABEL, &options, TEST_GRANULARITY).unwrap());
        });
        assert_eq!(found, 0);
        assert!(nothing > 3 * BLOCKS.len(), "{nothing}");
    }
}

#[test]
fn a_kill_while_a_checkpoint_is_discarded_leaves_all_of_it_or_nothing() {
    let (scratch, store) = while_flushing();
    // Kills in a flush are another test's.
    store.finish_flush();
    let directory = copy_of(scratch.path());
    // One whose session has ended in this process.
    let (found, nothing) = kill_in(scratch.path(), || {
        store.drop_uncommitted();
        store.committed().remove_files();
        assert_eq!(
            names(scratch.path()),
            Vec::<String>::new(),
            "gone when this returns"
        );
        drop(store);
    });
    assert!(found > 1 && nothing > BLOCKS.len(), "{found}, {nothing}");
    // A recovered one, which goes without a word when it is dropped.
    let (found, nothing) = kill_in(directory.path(), || {
        drop(
            find(directory.path())
                .unwrap()
                .recover(table(&BLOCKS), &Budget::unlimited())
                .unwrap(),
        );
    });
    assert!(found > 1 && nothing > BLOCKS.len(), "{found}, {nothing}");
}

/// Neither when a checkpoint is discarded, nor when the files of a killed receiver are removed.
#[test]
fn files_of_others_stay() {
    let (scratch, store) = while_flushing();
    let precopy = in_memory();
    let options = lasting(precopy.path(), CommitMode::Deferred);
    let unfinished = Store::with_granularity(table(&BLOCKS), LABEL, &options, TEST_GRANULARITY).unwrap();
    let killed = [copy_of(scratch.path()), copy_of(precopy.path())];
    drop((store, unfinished));
    let others = [
        "guest.~record.old",
        "guest.pc.ram.backup-by-operator",
        "guest2.pc.ram",
        "something-else",
    ];
    for (directory, is_checkpoint) in killed.iter().zip([true, false]) {
        for name in others {
            fs::write(directory.path().join(name), "precious").unwrap();
        }
        // Of the name of a file of ours, but not ours.
        std::os::unix::fs::symlink("elsewhere", directory.path().join("guest.~slab-77")).unwrap();
        match is_checkpoint {
            true => assert_eq!(recovered(directory.path()), Ok(1)),
            false => assert_eq!(find(directory.path()).err().unwrap(), "nothing"),
        }
        let mut left = others.map(str::to_owned).to_vec();
        left.push("guest.~slab-77".to_owned());
        left.sort();
        assert_eq!(names(directory.path()), left);
    }
}

/// A record without content belongs to a guest without other files. With them, it was damaged.
#[test]
fn an_empty_record_is_removed_only_where_it_is_alone() {
    for content in [&[][..], &[0; PAGE_SIZE]] {
        let scratch = in_memory();
        fs::write(scratch.path().join("guest.~record"), content).unwrap();
        assert_eq!(cleaned_up(scratch.path()).unwrap_err(), "nothing");
        for name in ["guest.~record", "guest.pc.ram"] {
            fs::write(scratch.path().join(name), content).unwrap();
        }
        let error = find(scratch.path()).err().unwrap();
        assert!(
            error.contains("it is empty, and there are other files"),
            "{error}"
        );
        assert_eq!(names(scratch.path()).len(), 2);
    }
}

/// A tmpfs of so many bytes, gone with its test.
struct SmallTmpfs(TempDir);

impl SmallTmpfs {
    /// None if nothing can be mounted here.
    fn mount(bytes: u64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "colo-ring-test"]);
        let mounted = mount.arg(directory.path()).output();
        mounted.ok()?.status.success().then_some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn free(&self) -> u64 {
        let system = nix::sys::statfs::statfs(self.path()).unwrap();
        system.blocks_available() * u64::try_from(system.block_size()).unwrap()
    }

    /// Fills it up to so many bytes.
    fn fill_up_to(&self, left: u64) {
        let bytes = usize::try_from(self.free() - left).unwrap();
        fs::write(self.path().join("of-another-program"), vec![1; bytes]).unwrap();
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.path())
            .status();
        assert!(unmounted.unwrap().success());
    }
}

/// No room for a guest, for more slabs, for a longer device state: each is an error that says which directory has how much
/// room, nothing that was allocated in vain stays, and what was committed before is not lost to this process.
#[test]
fn a_full_directory_is_named_and_not_left_full() {
    let name = "a_full_directory_is_named_and_not_left_full";
    let Some(tmpfs) = SmallTmpfs::mount(20 << 20) else {
        return colo_ring_skip::skip(name, "a tmpfs cannot be mounted, which needs root");
    };
    let create = |pages, pool_max| {
        let table = table(&[("pc.ram", pages)]);
        let options = StoreOptions {
            pool_max,
            ..lasting(tmpfs.path(), CommitMode::Deferred)
        };
        let made = Store::with_granularity(table, LABEL, &options, TEST_GRANULARITY);
        made.map(|(store, _)| {
            store.begin_colo();
            store.record_session(|| Ok(Vec::new()));
            store.commit(CheckpointId(0), &mut vec![1; 10], &alone());
            store
        })
    };
    let is_named = |error: &StoreError, needed: &str| {
        let text = error.to_string();
        let directory = tmpfs.path().display();
        let expected = format!("{directory}, the --ram-dir, has no room: {needed} MiB more are needed, and ");
        assert!(text.contains(&expected) && text.contains("enlarge it"), "{text}");
    };
    let before = tmpfs.free();
    is_named(&create(10_000, None).err().unwrap(), "88");
    assert_eq!((tmpfs.free(), names(tmpfs.path())), (before, Vec::new()));

    // A slab that is added ahead of need, and one that pages wait for.
    for pool_max in [None, Some(1)] {
        let store = create(600, pool_max).unwrap();
        tmpfs.fill_up_to(64 << 10);
        let files = names(tmpfs.path());
        let receive = || (0..600).try_for_each(|at| store.write(0, page(at), &content(at + 1)));
        for _ in 0..2 {
            let refused = if pool_max.is_none() {
                store.grow()
            } else {
                receive()
            };
            is_named(&refused.unwrap_err(), "3");
            assert_eq!((tmpfs.free(), names(tmpfs.path())), (64 << 10, files.clone()));
        }
        fs::remove_file(tmpfs.path().join("of-another-program")).unwrap();
        // There is room again.
        store.grow().unwrap();
        receive().unwrap();
    }

    // A device state for which there is no room: the checkpoint is committed here, and a later receiver finds none.
    let store = create(100, None).unwrap();
    tmpfs.fill_up_to(64 << 10);
    for checkpoint in 1..4 {
        store.commit(CheckpointId(checkpoint), &mut vec![2; 100_000], &alone());
        let failure = store.take_failure();
        assert_eq!(failure.is_some(), checkpoint == 1, "it is tried once");
        failure.iter().for_each(|failure| is_named(failure, "1"));
        assert_eq!(tmpfs.free(), 64 << 10);
        assert_eq!(store.committed().device_state(), [2; 100_000]);
    }
    assert_eq!(store.committed().keep_files(), KeptFiles::NoCheckpoint);
}

/// Where files were removed under a receiver, that is reported in place of a promise.
#[test]
fn files_that_are_gone_are_not_promised() {
    let (scratch, store) = while_flushing();
    store.drop_uncommitted();
    for name in names(scratch.path()) {
        fs::remove_file(scratch.path().join(name)).unwrap();
    }
    assert_eq!(store.committed().keep_files(), KeptFiles::Gone);
}
