//! A disk with its epochs against an array of bytes; its files after a kill.

use super::guest_disk::{
    Binding, Disk, DiskOptions, Link, Piece, RequestFailure, Source, Wanted, WriteTarget,
};
use super::pool::{RamPlace, RamShare};
use super::record::Ownership;
use super::recovery::{OrphanOutcome, StoredDisk, recover, recover_orphans};
use super::{DiskError, apply, path_of};
use crate::store::memory::ram_dir::{RamDirectory, RamFiles};
use nix::errno::Errno;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SIZE: usize = 256 << 10;
const SEGMENT: u64 = 16 << 10;

fn options(log_max: u64) -> DiskOptions {
    DiskOptions {
        log_max,
        segment_bytes: SEGMENT,
    }
}

/// A share that so much may be taken of.
struct Segments(Mutex<usize>);

impl RamShare for Segments {
    fn take(&self, _: u64) -> Option<Box<dyn Send + Sync>> {
        let mut left = self.0.lock().unwrap();
        *left = left.checked_sub(1)?;
        Some(Box::new(()))
    }
}

struct Bench {
    bases: tempfile::TempDir,
    ram: PathBuf,
    losses: Arc<Mutex<Vec<String>>>,
    warnings: Arc<Mutex<Vec<String>>>,
    /// Whether the client has closed its connection.
    is_gone: Arc<AtomicBool>,
    /// How often memory for an index may be taken.
    indexes: usize,
}

impl Bench {
    fn new() -> Self {
        let below = if Path::new("/dev/shm").is_dir() {
            "/dev/shm"
        } else {
            "/tmp"
        };
        let bases = tempfile::tempdir_in(below).unwrap();
        let ram = bases.path().join("ram");
        std::fs::create_dir(&ram).unwrap();
        std::fs::write(path_of(bases.path(), "disk"), vec![0xee; SIZE]).unwrap();
        Self {
            bases,
            ram,
            losses: Arc::default(),
            warnings: Arc::default(),
            is_gone: Arc::default(),
            indexes: usize::MAX,
        }
    }

    fn open(&self, log_max: u64) -> Disk {
        Disk::open(self.bases.path(), "disk", options(log_max)).unwrap()
    }

    fn files(&self) -> Arc<RamFiles> {
        let files = Arc::new(RamFiles::new(RamDirectory::open(&self.ram).unwrap(), "session-1"));
        // As a kill leaves them: no destructor removes one.
        files.keep(true);
        files
    }

    /// A session takes the disk; so many segments are in memory.
    fn bind(&self, disk: &Disk, segments_in_ram: Option<usize>) {
        self.try_bind(disk, segments_in_ram).unwrap();
        disk.commit(0, segments_in_ram.is_none());
    }

    fn try_bind(&self, disk: &Disk, segments_in_ram: Option<usize>) -> Result<(), DiskError> {
        let [full, base_full] = [self.warnings.clone(), self.warnings.clone()];
        let is_gone = self.is_gone.clone();
        let losses = self.losses.clone();
        let ram = segments_in_ram.map(|count| RamPlace {
            files: self.files(),
            share: Arc::new(Segments(Mutex::new(count))),
        });
        disk.bind(Binding {
            owner: Ownership {
                session: 1,
                leader: "disk".into(),
                ram_dir: ram.is_some().then(|| self.ram.display().to_string()),
            },
            ram,
            index: Arc::new(Segments(Mutex::new(self.indexes))),
            on_loss: Box::new(move |error| losses.lock().unwrap().push(error.to_string())),
            on_full: Box::new(move |_| full.lock().unwrap().push("log".to_owned())),
            on_base_full: Box::new(move |_, error| base_full.lock().unwrap().push(error.to_string())),
            link: Some(Link {
                hang_up: Box::new(|| {}),
                is_gone: Box::new(move || is_gone.load(Ordering::Relaxed)),
            }),
        })
    }

    fn base(&self) -> Vec<u8> {
        std::fs::read(path_of(self.bases.path(), "disk")).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let names = |directory: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(directory).unwrap();
            entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.contains('~'))
                .collect()
        };
        [names(self.bases.path()), names(&self.ram)].concat()
    }
}

/// Writes as a connection does; whether it was taken.
pub(crate) fn write(disk: &Disk, offset: usize, bytes: &[u8]) -> bool {
    let mut wanted = Wanted::default();
    let Ok(target) = disk.begin_write((offset as u64, bytes.len() as u64), &mut wanted) else {
        return false;
    };
    let mut is_taken = true;
    match target {
        WriteTarget::Base => {
            if let Err(error) = disk.base().write(bytes, offset as u64) {
                disk.change_failed(RequestFailure::from(&error));
                is_taken = false;
            }
        }
        WriteTarget::Log => {
            let mut rest = bytes;
            for stretch in wanted.stretches() {
                let (now, later) = rest.split_at(stretch.length);
                stretch.segment.write(stretch.place, now);
                rest = later;
            }
            assert!(rest.is_empty());
        }
    }
    disk.end_write(target, &wanted).is_ok() && is_taken
}

/// Does something while every change of the base fails.
pub(crate) fn with_faulty_base<T>(disk: &Disk, errno: Errno, work: impl FnOnce(&Disk) -> T) -> T {
    disk.base().fail(Some(errno));
    let done = work(disk);
    disk.base().fail(None);
    done
}

/// Reads as a connection does.
pub(crate) fn read(disk: &Disk, offset: usize, length: usize) -> Vec<u8> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut out = Vec::new();
    let (mut at, end) = (offset as u64, (offset + length) as u64);
    while at < end {
        at = disk.pieces(at, end - at, &mut pieces);
        for piece in &pieces {
            assert_eq!(piece.offset, (offset + out.len()) as u64);
            let start = out.len();
            out.resize(start + usize::try_from(piece.length).unwrap(), 0);
            match &piece.source {
                Source::Segment(segment, place) => segment.read(*place, &mut out[start..]),
                Source::Zero => {}
                Source::Base => disk.base().read(&mut out[start..], piece.offset).unwrap(),
            }
        }
        assert_eq!(at, (offset + out.len()) as u64);
    }
    assert_eq!(out.len(), length);
    out
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Checkpoint,
    Apply,
}

fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![3 => Just(4096usize), 1 => 1..40_000usize];
    prop_oneof![
        8 => (0..SIZE / 512, length.clone(), any::<u8>()).prop_map(|(at, length, value)| Step::Write(at * 512, length, value)),
        2 => (0..SIZE / 512, length).prop_map(|(at, length)| Step::Zero(at * 512, length)),
        2 => Just(Step::Checkpoint),
        2 => Just(Step::Apply),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Reads see the newest data at any time; the base is at a checkpoint after the session; a later receiver finds the checkpoint that the
    /// record names, whatever was applied before.
    #[test]
    fn a_disk_is_what_was_written(steps in proptest::collection::vec(step(), 1..60), in_ram in 0usize..6, is_killed: bool) {
        let bench = Bench::new();
        let disk = bench.open(1 << 30);
        prop_assert!(write(&disk, 512, &[9; 1000]));
        bench.bind(&disk, Some(in_ram));
        let mut now = bench.base();
        let (mut committed, mut checkpoint) = (now.clone(), 0);
        for step in steps {
            match step {
                Step::Write(at, length, value) => {
                    let length = length.min(SIZE - at);
                    now[at..at + length].fill(value);
                    prop_assert!(write(&disk, at, &vec![value; length]));
                }
                Step::Zero(at, length) => {
                    let length = length.min(SIZE - at);
                    now[at..at + length].fill(0);
                    prop_assert!(disk.zero(at as u64, length as u64, true, true).is_ok());
                }
                Step::Checkpoint => {
                    checkpoint += 1;
                    disk.cut(checkpoint).unwrap();
                    disk.check_commit(checkpoint).unwrap();
                    disk.commit(checkpoint, false);
                    committed.clone_from(&now);
                }
                Step::Apply => drop(apply::step(&disk)),
            }
            prop_assert!(read(&disk, 0, SIZE) == now);
        }
        prop_assert!(bench.losses.lock().unwrap().is_empty());
        let stored = StoredDisk {
            directory: bench.bases.path().to_str().unwrap().into(),
            name: "disk".into(),
            log: disk.log(),
            size: SIZE as u64,
        };
        if is_killed {
            disk.keep_files();
            drop(disk);
            let found = recover(&stored, &bench.files(), checkpoint, false).unwrap();
            prop_assert!(bench.base() == committed);
            prop_assert_eq!(found.figures().epoch, Some(checkpoint));
            prop_assert_eq!(bench.names(), ["disk.~record"]);
            found.remove_files();
        } else {
            disk.end_session();
            while apply::step(&disk) {}
            disk.wait_drained().unwrap();
            prop_assert!(bench.base() == committed);
            disk.remove_files();
        }
        prop_assert!(bench.names().is_empty(), "{:?}", bench.names());
    }
}

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
