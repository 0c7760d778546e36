//! A disk that is copied again beside a kept checkpoint: both are whole until one of them is given up, whenever the receiver is killed.

use super::*;
use crate::failpoint::{self, Point};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

fn share() -> Arc<dyn RamShare> {
    Arc::new(Segments(Mutex::new(usize::MAX)))
}

impl Bench {
    /// The disk of a session that has ended with checkpoint 1.
    fn kept(&self) -> Disk {
        let disk = self.open(1 << 30);
        assert!(write(&disk, 0, &[1; 100_000]));
        self.bind(&disk, Some(9));
        assert!(write(&disk, 4096, &[2; 8192]));
        disk.cut(1).unwrap();
        disk.commit(1, false);
        disk.end_session();
        while apply::step(&disk) {}
        disk.pool.trim_all();
        disk
    }

    fn try_beside(&self, earlier: &Disk, log_max: u64) -> Result<Arc<Disk>, DiskError> {
        Disk::open_beside(earlier, self.bases.path(), options(log_max), share(), 7)
    }

    fn beside(&self, earlier: &Disk) -> Arc<Disk> {
        self.try_beside(earlier, 1 << 30).unwrap()
    }

    fn stored(&self, disk: &Disk) -> StoredDisk {
        StoredDisk {
            directory: self.bases.path().to_str().unwrap().into(),
            name: "disk".into(),
            log: disk.log(),
            size: SIZE as u64,
        }
    }
}

fn ram_files(ram: &Path, session: &str) -> Arc<RamFiles> {
    let files = Arc::new(RamFiles::new(RamDirectory::open(ram).unwrap(), session));
    files.keep(true);
    files
}

/// What a mirror does: all of the disk is made zero, and then what is not is written.
fn mirror(disk: &Disk, content: &[u8]) {
    disk.zero(0, SIZE as u64, true, false).unwrap();
    for (number, block) in content.chunks(10_000).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            assert!(write(disk, number * 10_000, block));
        }
    }
    assert!(read(disk, 0, SIZE) == content);
}

fn commit(disk: &Disk, checkpoint: u64) {
    disk.cut(checkpoint).unwrap();
    disk.check_commit(checkpoint).unwrap();
    disk.commit(checkpoint, false);
}

fn discard(disk: Disk) {
    disk.give_up();
    disk.remove_files();
}

/// The guest's disk some time after its kept checkpoint.
fn changed(base: &[u8]) -> Vec<u8> {
    let mut content = base.to_vec();
    content[50_000..60_000].fill(9);
    content[150_000..].fill(0);
    content
}

#[test]
fn a_copy_beside_a_checkpoint_leaves_it_whole_and_takes_its_base_when_that_is_given_up() {
    let bench = Bench::new();
    let earlier = bench.kept();
    let base = bench.base();
    let content = changed(&base);
    let later = bench.beside(&earlier);
    mirror(&later, &content);
    // What is the same takes nothing.
    assert_eq!(later.figures().log_bytes, SEGMENT);
    bench.bind(&later, Some(9));
    assert!(later.check_commit(0).is_err() && write(&later, 7000, &[7; 9000]));
    let mut expected = content;
    expected[7000..16_000].fill(7);
    commit(&later, 1);
    assert!(read(&later, 0, SIZE) == expected && later.read_committed() == expected);
    assert!(!apply::step(&later) && bench.base() == base);
    assert!(matches!(
        later.wait_drained().unwrap_err(),
        DiskError::AwaitsBase(_)
    ));
    // Somebody reads the base still.
    earlier.give_up();
    earlier.remove_files();
    assert!(!apply::step(&later) && bench.base() == base);
    drop(earlier);
    while apply::step(&later) {}
    assert!(bench.base() == expected);
    // The next one is copied beside this one.
    later.end_session();
    later.wait_drained().unwrap();
    later.pool.trim_all();
    let next = bench.beside(&later);
    mirror(&next, &base);
    drop(next);
    assert!(
        bench.base() == expected && bench.names() == ["disk.~record-b"],
        "{:?}",
        bench.names()
    );
    later.remove_files();
    drop(later);
    drop(bench.open(1 << 30));
}

#[test]
fn a_copy_that_is_given_up_leaves_nothing() {
    let bench = Bench::new();
    let earlier = bench.kept();
    let base = bench.base();
    let later = bench.beside(&earlier);
    mirror(&later, &changed(&base));
    bench.bind(&later, Some(0));
    later.end_session();
    later.give_up();
    later.remove_files();
    drop(later);
    assert!(bench.base() == base && bench.names() == ["disk.~record"]);
    assert!(Disk::check_copy(bench.bases.path(), "disk").is_err());
    // Neither does one without a checkpoint.
    let later = bench.beside(&earlier);
    mirror(&later, &changed(&base));
    drop(later);
    assert!(bench.base() == base && bench.names() == ["disk.~record"]);
    assert!(earlier.later().is_none());
}

#[test]
fn a_base_has_one_later_disk_and_only_when_it_is_at_its_checkpoint() {
    let bench = Bench::new();
    let earlier = bench.open(1 << 30);
    bench.bind(&earlier, Some(9));
    let refused = |earlier: &Disk| bench.try_beside(earlier, 1 << 30).err().unwrap();
    assert!(matches!(refused(&earlier), DiskError::NotDrained(_)));
    assert!(write(&earlier, 0, &[1; 4096]));
    commit(&earlier, 1);
    earlier.end_session();
    assert!(matches!(refused(&earlier), DiskError::NotDrained(_)));
    while apply::step(&earlier) {}
    assert!(!earlier.knows_copy(7));
    let later = bench.beside(&earlier);
    // A mirror that connects again is no copy.
    assert!(earlier.knows_copy(7) && later.knows_copy(7) && !later.knows_copy(8));
    assert!(matches!(refused(&earlier), DiskError::OtherReceiver(_)));
    assert!(matches!(refused(&later), DiskError::AwaitsBase(_)));
}

#[test]
fn a_copy_that_differs_by_more_than_its_log_is_not_taken() {
    let bench = Bench::new();
    let earlier = bench.kept();
    let base = bench.base();
    let later = bench.try_beside(&earlier, 4 * SEGMENT).unwrap();
    let full = (0..SIZE / 4096).any(|block| !write(&later, block * 4096, &[8; 4096]));
    assert!(full && later.copy_loss().unwrap().to_string().contains("--disk-log-max"));
    assert!(matches!(
        bench.try_bind(&later, Some(9)).unwrap_err(),
        DiskError::CopyFailed { .. }
    ));
    drop(later);
    assert!(bench.base() == base && bench.names() == ["disk.~record"]);
}

/// A failover of the earlier checkpoint begins.
#[test]
fn a_copy_gives_way_unless_a_session_has_it() {
    let bench = Bench::new();
    let earlier = bench.kept();
    let later = bench.beside(&earlier);
    assert!(later.give_way());
    assert!(matches!(
        bench.try_bind(&later, Some(9)).unwrap_err(),
        DiskError::ConnectionLost { .. }
    ));
    drop(later);
    let later = bench.beside(&earlier);
    bench.try_bind(&later, Some(9)).unwrap();
    assert!(!later.give_way());
    later.commit(0, false);
    assert!(!later.give_way());
}

/// Without a RAM directory both are committed as far as their first disks' records say.
#[test]
fn disks_without_memory_are_left_at_the_last_checkpoint_of_the_later_session() {
    for is_committed in [false, true] {
        let bench = Bench::new();
        let earlier = bench.open(1 << 30);
        bench.bind(&earlier, None);
        assert!(write(&earlier, 0, &[1; 4096]));
        earlier.cut(1).unwrap();
        earlier.commit(1, true);
        earlier.end_session();
        while apply::step(&earlier) {}
        let mut expected = bench.base();
        let later = bench.beside(&earlier);
        mirror(&later, &changed(&expected));
        if is_committed {
            let binding = Ownership {
                session: 2,
                leader: "disk".into(),
                ram_dir: None,
            };
            bench.bind_as(&later, binding, None).unwrap();
            later.commit(0, true);
            expected = changed(&expected);
        }
        for disk in [&earlier, &*later] {
            disk.keep_files();
        }
        drop((earlier, later));
        let outcomes: Vec<_> = recover_orphans(bench.bases.path()).unwrap();
        assert!(
            matches!(
                outcomes[..],
                [
                    (_, OrphanOutcome::At(1)),
                    (_, OrphanOutcome::At(0) | OrphanOutcome::Beside)
                ]
            ),
            "{is_committed}"
        );
        assert!(
            bench.base() == expected && bench.names().is_empty(),
            "{:?}",
            bench.names()
        );
    }
}

/// What is to be found after a kill at this instant.
struct World {
    stored: Vec<StoredDisk>,
    /// Whether the earlier checkpoint's own files are there, and what its disk is.
    earlier: Cell<bool>,
    earlier_content: Vec<u8>,
    /// What is committed of the later one, by its checkpoints.
    later: RefCell<Vec<Vec<u8>>>,
    kills: Cell<usize>,
}

impl World {
    fn kill(&self, from: &Path) {
        self.kills.set(self.kills.get() + 1);
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let copy = |from: &Path, to: &Path| {
            for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
                }
            }
        };
        let ram = scratch.path().join("ram");
        std::fs::create_dir(&ram).unwrap();
        copy(from, scratch.path());
        copy(&from.join("ram"), &ram);
        let base = || std::fs::read(path_of(scratch.path(), "disk")).unwrap();
        let find = |number: usize, checkpoint: u64| {
            let stored = StoredDisk {
                directory: scratch.path().to_str().unwrap().into(),
                ..self.stored[number].clone()
            };
            let files = ram_files(&ram, &format!("session-{}", number + 1));
            Arc::new(recover(&stored, &files, checkpoint, false).unwrap())
        };
        let earlier = self.earlier.get().then(|| find(0, 1));
        let committed = self.later.borrow();
        let later = committed.len().checked_sub(1).map(|last| find(1, last as u64));
        drop(recover_orphans(scratch.path()).unwrap());
        if let Some(earlier) = earlier {
            assert!(base() == self.earlier_content, "kill {}", self.kills.get());
            if let Some(later) = &later {
                earlier.is_followed_by(later);
            }
            discard(Arc::into_inner(earlier).unwrap());
        }
        if let Some(later) = later {
            later.wait_drained().unwrap();
            assert!(
                base() == *committed[committed.len() - 1],
                "kill {}",
                self.kills.get()
            );
            discard(Arc::into_inner(later).unwrap());
        }
        // Whether what has changed since the copy would do.
        let is_copied = Disk::check_copy(scratch.path(), "disk").is_ok();
        assert_eq!(is_copied, !committed.is_empty(), "kill {}", self.kills.get());
        drop(Disk::open(scratch.path(), "disk", options(1 << 30)).unwrap());
    }
}

#[test]
fn a_kill_at_any_time_leaves_both_checkpoints_whole() {
    let bench = Bench::new();
    let earlier = bench.kept();
    let base = bench.base();
    let later = bench.beside(&earlier);
    let world = Rc::new(World {
        stored: vec![bench.stored(&earlier), bench.stored(&later)],
        earlier: Cell::new(true),
        earlier_content: base.clone(),
        later: RefCell::default(),
        kills: Cell::new(0),
    });
    let (killed, from) = (world.clone(), bench.bases.path().to_owned());
    let kill = move || killed.kill(&from);
    failpoint::on_kill(kill.clone());
    let mut content = changed(&base);
    mirror(&later, &content);
    kill();
    let ram = RamPlace {
        files: ram_files(&bench.ram, "session-2"),
        share: Arc::new(Segments(Mutex::new(3))),
    };
    let owner = Ownership {
        session: 2,
        leader: "disk".into(),
        ram_dir: Some(bench.ram.display().to_string()),
    };
    bench.bind_as(&later, owner, Some(ram)).unwrap();
    for checkpoint in 0..4u64 {
        if checkpoint > 0 {
            let at = 30_000 * usize::try_from(checkpoint).unwrap();
            content[at..at + 20_000].fill(100);
            assert!(write(&later, at, &[100; 20_000]));
            kill();
            later.cut(checkpoint).unwrap();
        }
        // The RAM's record has it.
        world.later.borrow_mut().push(content.clone());
        kill();
        later.commit(checkpoint, false);
        kill();
    }
    earlier.give_up();
    kill();
    world.earlier.set(false);
    kill();
    earlier.remove_files();
    drop(earlier);
    kill();
    while apply::step(&later) {
        kill();
    }
    failpoint::clear(Point::Kill);
    assert!(
        bench.base() == content && world.kills.get() > 20,
        "{}",
        world.kills.get()
    );
}
