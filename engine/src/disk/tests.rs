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

mod faults;

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
