//! What goes wrong with a disk: writes at the wrong time, lost connections, full logs, damaged files.

use super::*;

#[test]
fn a_write_after_the_cut_loses_the_disk() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    assert!(!write(&disk, 0, &[2; 4096]));
    assert!(bench.losses.lock().unwrap()[0].contains("checkpoint 1"));
    assert!(disk.check_commit(1).is_err());
}

#[test]
fn a_write_that_is_not_complete_prevents_the_cut() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    let mut wanted = Wanted::default();
    assert_eq!(disk.begin_write((0, 4096), &mut wanted), Ok(WriteTarget::Log));
    assert!(matches!(*disk.cut(1).unwrap_err(), DiskError::Unfinished { .. }));
}

#[test]
fn a_lost_connection_prevents_the_next_checkpoint() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    assert!(disk.disconnected());
    disk.note_loss(DiskError::ConnectionLost {
        disk: "disk".into(),
        reason: "a test".into(),
    });
    assert!(disk.cut(2).is_err());
    assert!(!write(&disk, 0, &[1]));
}

/// The connection's own thread has not noticed yet.
#[test]
fn a_connection_that_is_closed_prevents_the_cut() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    bench.is_gone.store(true, Ordering::Relaxed);
    assert!(matches!(
        *disk.cut(2).unwrap_err(),
        DiskError::ConnectionLost { .. }
    ));
    assert!(disk.check_commit(2).is_err());
    disk.end_session();
    drop(disk);
    // Nor is it taken.
    let disk = bench.open(1 << 30);
    let refused = bench.try_bind(&disk, Some(9)).unwrap_err();
    assert!(matches!(refused, DiskError::ConnectionLost { .. }));
}

#[test]
fn a_copy_with_an_error_is_not_taken() {
    type Step = fn(&Disk) -> Result<(), RequestFailure>;
    let steps: [Step; 4] = [
        |disk| disk.zero(0, 4096, true, false),
        |disk| disk.trim(0, 4096),
        Disk::flush,
        |disk| {
            disk.change_failed(RequestFailure::Invalid);
            Err(RequestFailure::Invalid)
        },
    ];
    for step in steps {
        let bench = Bench::new();
        let disk = bench.open(1 << 30);
        disk.base().fail(Some(Errno::ENOSPC));
        assert!(step(&disk).is_err());
        disk.base().fail(None);
        assert!(write(&disk, 0, &[1; 4096]) && disk.is_changed());
        let refused = bench.try_bind(&disk, Some(9)).unwrap_err();
        assert!(matches!(refused, DiskError::CopyFailed { .. }), "{refused}");
    }
    // What cannot be done fast is done in another way.
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    disk.base().fail(Some(Errno::EOPNOTSUPP));
    assert_eq!(disk.zero(0, 4096, true, true), Err(RequestFailure::Unsupported));
    disk.base().fail(None);
    bench.bind(&disk, Some(9));
}

#[test]
fn a_write_that_fails_loses_the_disk_of_a_session() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    disk.change_failed(RequestFailure::Invalid);
    assert!(bench.losses.lock().unwrap()[0].contains("not valid"));
    assert!(disk.cut(1).is_err());
}

#[test]
fn zeros_that_wait_for_room_prevent_the_cut() {
    let bench = Bench::new();
    let disk = Arc::new(bench.open(SEGMENT));
    bench.bind(&disk, Some(9));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    disk.acknowledged();
    let zeroing = disk.clone();
    let thread = std::thread::spawn(move || zeroing.zero(0, 4096, true, true));
    while bench.warnings.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    assert!(matches!(*disk.cut(2).unwrap_err(), DiskError::Unfinished { .. }));
    disk.end_session();
    assert!(thread.join().unwrap().is_err());
    while apply::step(&disk) {}
}

fn wait(what: impl Fn() -> bool) {
    while !what() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_base_without_room_is_tried_again() {
    let bench = Bench::new();
    let disk = Arc::new(bench.open(1 << 30));
    bench.bind(&disk, Some(9));
    let applying = disk.clone();
    let thread = std::thread::spawn(move || apply::run(&applying));
    let epoch = |checkpoint: u8| {
        assert!(write(&disk, 0, &[checkpoint; 4096]));
        disk.cut(checkpoint.into()).unwrap();
        disk.commit(checkpoint.into(), false);
        disk.acknowledged();
    };
    disk.base().fail(Some(Errno::ENOSPC));
    epoch(1);
    epoch(2);
    wait(|| !bench.warnings.lock().unwrap().is_empty());
    disk.base().fail(None);
    wait(|| disk.figures().lag_epochs == 0);
    assert!(bench.base()[..4096].iter().all(|byte| *byte == 2));
    assert!(bench.losses.lock().unwrap().is_empty());
    assert_eq!(bench.warnings.lock().unwrap().len(), 1);
    // Once the session is over, each caller that needs the disk tries again.
    disk.base().fail(Some(Errno::ENOSPC));
    epoch(3);
    disk.end_session();
    thread.join().unwrap();
    assert!(disk.wait_drained().is_err());
    assert!(disk.wait_drained().is_err());
    disk.base().fail(None);
    disk.wait_drained().unwrap();
    assert!(bench.base()[..4096].iter().all(|byte| *byte == 3));
    disk.remove_files();
    drop(disk);
    assert!(
        bench.names().iter().all(|name| !name.contains(".~")),
        "{:?}",
        bench.names()
    );
}

#[test]
fn a_base_that_cannot_be_written_loses_the_disk_and_not_the_log() {
    let bench = Bench::new();
    let disk = Arc::new(bench.open(1 << 30));
    bench.bind(&disk, Some(9));
    let applying = disk.clone();
    let thread = std::thread::spawn(move || apply::run(&applying));
    disk.base().fail(Some(Errno::EIO));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    disk.acknowledged();
    thread.join().unwrap();
    assert!(bench.losses.lock().unwrap()[0].contains("writing its base"));
    disk.end_session();
    assert!(disk.wait_drained().is_err());
    disk.base().fail(None);
    disk.wait_drained().unwrap();
    assert!(bench.base()[..4096].iter().all(|byte| *byte == 1));
}

#[test]
fn a_damaged_record_of_a_checkpoint_stays() {
    /// Its words: the magic, the checksum, the length of a text.
    const WORDS: [u64; 3] = [0, 32, 128];
    for at in WORDS {
        let bench = Bench::new();
        let disk = bench.open(1 << 30);
        bench.bind(&disk, Some(9));
        disk.keep_files();
        drop(disk);
        let path = bench.bases.path().join("disk.~record");
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 8], at).unwrap();
        drop(file);
        let damaged = std::fs::read(&path).unwrap();
        for _ in 0..2 {
            let refused = Disk::open(bench.bases.path(), "disk", options(1 << 30))
                .err()
                .unwrap();
            assert!(matches!(refused, DiskError::Damaged { .. }), "{at}: {refused}");
            assert!(std::fs::read(&path).unwrap() == damaged, "{at}");
        }
        std::fs::write(&path, &damaged[..500]).unwrap();
        let refused = Disk::open(bench.bases.path(), "disk", options(1 << 30))
            .err()
            .unwrap();
        assert!(matches!(refused, DiskError::Damaged { .. }), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap().len(), 500);
    }
}

#[test]
fn a_full_log_waits_for_applying_and_is_an_error_in_one_epoch() {
    let bench = Bench::new();
    let disk = Arc::new(bench.open(4 * SEGMENT));
    bench.bind(&disk, Some(9));
    let applying = disk.clone();
    let thread = std::thread::spawn(move || apply::run(&applying));
    for checkpoint in 1..50 {
        for block in 0..6 {
            assert!(write(&disk, block * 4096, &[7; 4096]));
        }
        disk.cut(checkpoint).unwrap();
        disk.commit(checkpoint, false);
        disk.acknowledged();
    }
    let full = (0..SIZE / 4096).any(|block| !write(&disk, block * 4096, &[8; 4096]));
    assert!(full);
    assert!(bench.losses.lock().unwrap()[0].contains("--disk-log-max"));
    disk.end_session();
    thread.join().unwrap();
    assert!(bench.base()[..6 * 4096].iter().all(|byte| *byte == 7));
    assert!(bench.base()[6 * 4096..].iter().all(|byte| *byte == 0xee));
}

#[test]
fn an_index_without_memory_is_a_full_log() {
    let bench = Bench {
        indexes: 2,
        ..Bench::new()
    };
    let disk = Arc::new(bench.open(1 << 30));
    bench.bind(&disk, Some(99));
    let applying = disk.clone();
    let thread = std::thread::spawn(move || apply::run(&applying));
    // 512 bytes each, so that every second write needs a new extent. 14 or more segments.
    let fill = || (0..SIZE / 1024).all(|block| write(&disk, block * 1024, &[7; 512]));
    assert!(!fill());
    assert!(bench.losses.lock().unwrap()[0].contains("index"));
    disk.end_session();
    thread.join().unwrap();
    assert!(bench.base().iter().all(|byte| *byte == 0xee));
}

/// Without a RAM directory: the record of the first disk says what is committed.
#[test]
fn disks_without_memory_are_left_at_an_epoch() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, None);
    for checkpoint in 1..4 {
        assert!(write(&disk, 0, &[u8::try_from(checkpoint).unwrap(); 10_000]));
        disk.cut(checkpoint).unwrap();
        disk.commit(checkpoint, true);
    }
    assert!(write(&disk, 0, &[99; 20_000]));
    disk.keep_files();
    drop(disk);
    let refused = Disk::open(bench.bases.path(), "disk", options(1 << 30))
        .err()
        .unwrap();
    assert!(matches!(refused, DiskError::Orphan { .. }));
    let outcomes = recover_orphans(bench.bases.path()).unwrap();
    assert!(matches!(outcomes[..], [(_, OrphanOutcome::At(3))]));
    assert!(bench.base()[..10_000].iter().all(|byte| *byte == 3));
    assert!(bench.base()[10_000..].iter().all(|byte| *byte == 0xee));
    assert!(bench.names().is_empty(), "{:?}", bench.names());
    drop(bench.open(1 << 30));
}

#[test]
fn a_disk_of_a_checkpoint_elsewhere_is_left_alone() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    disk.keep_files();
    drop(disk);
    let outcomes = recover_orphans(bench.bases.path()).unwrap();
    assert!(matches!(
        outcomes[..],
        [(_, OrphanOutcome::Kept(DiskError::Orphan { .. }))]
    ));
    let refused = Disk::open(bench.bases.path(), "disk", options(1 << 30))
        .err()
        .unwrap();
    assert!(refused.to_string().contains("--ram-dir"), "{refused}");
    assert!(bench.base().iter().all(|byte| *byte == 0xee));
}

/// A kill in the middle of a discard: the checkpoint's record is removed, the disk's is not.
#[test]
fn a_disk_of_a_discarded_checkpoint_is_needed_by_none() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    disk.end_session();
    while apply::step(&disk) {}
    disk.wait_drained().unwrap();
    disk.give_up();
    disk.keep_files();
    let stored = StoredDisk {
        directory: bench.bases.path().to_str().unwrap().into(),
        name: "disk".into(),
        log: disk.log(),
        size: SIZE as u64,
    };
    drop(disk);
    // Where the checkpoint is still found, the disk is its own again.
    let found = recover(&stored, &bench.files(), 1, false).unwrap();
    found.keep_files();
    drop(found);
    let outcomes = recover_orphans(bench.bases.path()).unwrap();
    assert!(matches!(outcomes[..], [(_, OrphanOutcome::Kept(_))]));
    let found = recover(&stored, &bench.files(), 1, false).unwrap();
    found.give_up();
    found.keep_files();
    drop(found);
    let outcomes = recover_orphans(bench.bases.path()).unwrap();
    assert!(matches!(outcomes[..], [(_, OrphanOutcome::Discarded)]));
    assert!(bench.base()[..4096].iter().all(|byte| *byte == 1));
    assert!(bench.names().is_empty(), "{:?}", bench.names());
    drop(bench.open(1 << 30));
}

#[test]
fn what_is_no_name_of_a_disk_is_refused() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    bench.bind(&disk, Some(9));
    assert!(write(&disk, 0, &[1; 4096]));
    disk.cut(1).unwrap();
    disk.commit(1, false);
    disk.keep_files();
    let directory = bench.bases.path().to_str().unwrap().to_owned();
    let good = StoredDisk {
        directory: directory.clone(),
        name: "disk".into(),
        log: disk.log(),
        size: SIZE as u64,
    };
    drop(disk);
    let last = bench.bases.path().file_name().unwrap().to_str().unwrap();
    for (directory, name) in [
        (&*directory, format!("../{last}/disk")),
        (&directory, format!("{directory}/disk")),
        (&directory, String::new()),
        (&directory, ".".to_owned()),
        (&directory, "disk\n".to_owned()),
        ("", "disk".to_owned()),
        (".", "disk".to_owned()),
    ] {
        let stored = StoredDisk {
            directory: directory.to_owned(),
            name,
            ..good.clone()
        };
        let refused = recover(&stored, &bench.files(), 1, false).err().unwrap();
        assert!(matches!(refused, DiskError::NoDisk { .. }), "{refused}");
    }
    recover(&good, &bench.files(), 1, false).unwrap().remove_files();
}

#[test]
fn a_disk_has_one_receiver() {
    let bench = Bench::new();
    let disk = bench.open(1 << 30);
    let refused = Disk::open(bench.bases.path(), "disk", options(1 << 30))
        .err()
        .unwrap();
    assert!(matches!(refused, DiskError::OtherReceiver(_)));
    drop(disk);
    drop(bench.open(1 << 30));
}
