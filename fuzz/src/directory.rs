//! Files that an earlier receiver has left, with any content: the RAM directory, and disks with their records and logs.
//!
//! Each piece of the input is a part of one of the files, which are in a directory of their own, in memory, that is the current one:
//! the record of a session names its disks' directory.

use super::pieces::{Piece, Pieces, STREAMS};
use colo_ring::receiver::fuzz;
use std::cell::OnceCell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

/// Bytes of all files.
const BYTES_MAX: usize = 64 << 20;

/// Files of a session and of its disk, by the streams of the input.
pub const RAM_FILES: [&str; STREAMS] = [
    "session-1.~record",
    "session-1.~session",
    "session-1.~device-0",
    "session-1.~device-1",
    "session-1.~places",
    "session-1.pc.ram",
    "session-1.pc.ram2",
    "session-1.~slab-0",
    "session-1.~slab-1",
    "session-1.~slab-2",
    "session-1.~slab-3",
    "session-1.~log-disk-0-000000",
    "disk-0.raw",
    "disk-0.~record",
    "disk-0.~log-000000",
    "session-2.~record",
];

/// Disks, with the logs beside them.
pub const DISK_FILES: [&str; STREAMS] = [
    "disk-0.raw",
    "disk-0.~record",
    "disk-0.~log-000000",
    "disk-0.~log-000001",
    "disk-0.~log-000002",
    "disk-0.~log-4294967295",
    "disk-0.~log-000000x",
    "disk-1.raw",
    "disk-1.~record",
    "disk-1.~log-000000",
    "disk-1.~log-000001",
    "disk-1.~log-000002",
    "disk-2.~record",
    ".~record",
    "x.~record",
    "x.raw",
];

thread_local!(static DIRECTORY: OnceCell<TempDir> = const { OnceCell::new() });

/// Lays out files and lets `recover` look at them.
fn with_files(input: &[u8], names: [&str; STREAMS], recover: impl Fn(&Path) -> usize) -> usize {
    DIRECTORY.with(|directory| {
        let directory = directory.get_or_init(in_memory).path();
        std::env::set_current_dir(directory).expect("a directory");
        let mut files: [Option<(File, u64)>; STREAMS] = Default::default();
        for (stream, piece) in Pieces::new(input, BYTES_MAX) {
            let (file, length) = files[stream].get_or_insert_with(|| {
                let file = File::create(directory.join(names[stream]));
                (file.expect("a file"), 0)
            });
            append(file, length, piece);
        }
        drop(files);
        let recovered = recover(directory);
        for entry in fs::read_dir(directory).expect("a directory") {
            fs::remove_file(entry.expect("a file").path()).expect("an own file");
        }
        recovered
    })
}

/// Appends a piece to a file that has that length. Zeros are a hole.
fn append(file: &File, length: &mut u64, piece: Piece<'_>) {
    let mut bytes = Vec::new();
    let added = match piece {
        Piece::Fill(0, added) => added,
        piece => {
            piece.append_to(&mut bytes);
            file.write_all_at(&bytes, *length).expect("room in memory");
            bytes.len()
        }
    };
    *length += added as u64;
    file.set_len(*length).expect("a length");
}

fn in_memory() -> TempDir {
    tempfile::Builder::new()
        .prefix("colo-ring-fuzz-")
        .tempdir_in("/dev/shm")
        .expect("a tmpfs at /dev/shm")
}

/// The checkpoint of a session. A recovery leaves it as good for the next one.
pub fn ram_dir(input: &[u8]) -> usize {
    with_files(input, RAM_FILES, |directory| {
        let recovered = fuzz::recover(directory);
        assert_eq!(fuzz::recover(directory), recovered);
        recovered.len()
    })
}

/// Disks of sessions without a RAM directory.
pub fn disk_log(input: &[u8]) -> usize {
    with_files(input, DISK_FILES, fuzz::recover_disks)
}
