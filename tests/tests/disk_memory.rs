//! What the redo log of a disk takes of the host's memory: at most 10 % more than the data of its epoch, and the rest of a segment.
//!
//! Counted, not argued: the segments by the files in the RAM directory, the index by what this process, in which the receiver
//! runs, has allocated.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use colo_ring::receiver::{DiskServing, ListenAddress, Receiver, ReceiverOptions};
use colo_ring::ring::BackendKind;
use colo_ring::store::StoreOptions;
use colo_ring_tests::hostile::HostilePrimary;
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tests::nbd::NbdClient;
use colo_ring_tests::receiver_options;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicI64, Ordering};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 512 * MIB;

/// What an epoch changes of its disk. The rest of one segment is then a small part of it.
const EPOCH_BYTES: u64 = 32 * MIB;

const SEGMENT_BYTES: u64 = 4 * MIB;

struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Bytes that are allocated, with what the allocator adds to each piece.
static ALLOCATED: AtomicI64 = AtomicI64::new(0);

/// What glibc takes for so many bytes.
fn taken(size: usize) -> i64 {
    let with_head = (size + 8).next_multiple_of(16).max(32);
    i64::try_from(with_head).unwrap_or(i64::MAX)
}

// SAFETY: every method passes its arguments unchanged to the system's allocator and returns what that returns; the
// counting beside it neither allocates nor unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATED.fetch_add(taken(size) - taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as in `alloc`; the pointer came from `System`, as all of this allocator's do.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn tcp(address: &ListenAddress) -> SocketAddr {
    match address {
        ListenAddress::Tcp(address) => *address,
        ListenAddress::Unix(_) => panic!("the receiver listens on TCP"),
    }
}

/// Bytes of memory that the files of the log take.
fn segment_bytes(ram: &SharedDirectory) -> u64 {
    let entries = std::fs::read_dir(ram.path()).expect("the RAM directory");
    let files = entries.map(|entry| entry.expect("a file"));
    files
        .filter(|file| file.file_name().to_string_lossy().contains("~log-"))
        .map(|file| file.metadata().expect("a file").blocks() * 512)
        .sum()
}

/// What the log takes of the memory after these writes of so many bytes each in one epoch.
fn log_bytes(length: usize, offsets: impl Iterator<Item = u64>) -> u64 {
    let bases = tempfile::tempdir().expect("a directory");
    let base = File::create(bases.path().join("d.raw")).expect("a base");
    base.set_len(DISK_BYTES).expect("a base");
    let ram = SharedDirectory::new().expect("a directory");
    let options = ReceiverOptions {
        store: StoreOptions {
            ram_dir: Some(ram.path().to_owned()),
            ..receiver_options(BackendKind::Epoll, 1).store
        },
        disks: Some(DiskServing {
            directory: bases.path().to_owned(),
            listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
            log_max_bytes: 1 << 30,
        }),
        ..receiver_options(BackendKind::Epoll, 1)
    };
    let receiver = Receiver::start(options, |_| {}).expect("a receiver");
    let mut client = NbdClient::go(tcp(&receiver.disk_addresses()[0]), "d").expect("the disk");
    let mut primary = HostilePrimary::connect(tcp(&receiver.addresses()[0]), 1);
    primary.precopy();
    let payload = vec![7; length];
    // Buffers that the connection keeps.
    client.write(0, &payload).expect("a write");
    client.read(0, length).expect("a read");
    let before = ALLOCATED.load(Ordering::Relaxed);
    for offset in offsets {
        client.write(offset, &payload).expect("a write");
    }
    let index = u64::try_from(ALLOCATED.load(Ordering::Relaxed) - before).unwrap_or(0);
    let segments = segment_bytes(&ram);
    drop(primary);
    receiver.stop_handle().stop();
    receiver.wait().expect("its end");
    println!("writes of {length} bytes: segments {segments}, index {index}");
    segments + index
}

/// Each unit of so many bytes that an epoch changes, spread over the disk in an order that is none.
fn scattered(length: u64) -> impl Iterator<Item = u64> + Clone {
    let (count, units) = (EPOCH_BYTES / length, DISK_BYTES / length);
    // Odd, so that it visits all units.
    let step = (units * 5 / 8) | 1;
    (1..=count).map(move |number| number.wrapping_mul(step) % units * length)
}

fn assert_small(what: &str, log: u64) {
    let most = EPOCH_BYTES + EPOCH_BYTES / 10 + SEGMENT_BYTES;
    let percent = log.saturating_sub(SEGMENT_BYTES) * 100 / EPOCH_BYTES;
    println!(
        "{what}: {log} bytes for an epoch of {EPOCH_BYTES}; without the rest of a segment at least {percent} %"
    );
    assert!(log <= most, "{what}: {log} bytes");
    assert!(log >= EPOCH_BYTES, "{what}: {log} bytes cannot hold it");
}

#[test]
fn a_log_takes_little_more_than_its_data() {
    for length in [512, 4096, 1 << 20] {
        let bytes = usize::try_from(length).expect("small");
        let scattered = scattered(length);
        assert_small(
            &format!("{length}, scattered"),
            log_bytes(bytes, scattered.clone()),
        );
        let descending = (0..EPOCH_BYTES / length).rev().map(|number| number * 2 * length);
        assert_small(&format!("{length}, descending"), log_bytes(bytes, descending));
        // The same again takes nothing.
        let again = scattered.clone().chain(scattered);
        assert_small(&format!("{length}, overwritten"), log_bytes(bytes, again));
    }
    // Neighbours that overlap by half, forwards and backwards.
    let halves = (0..EPOCH_BYTES / 2048).map(|number| number * 2048);
    let overlapping = halves.clone().chain(halves.rev());
    assert_small("4096, overlapping", log_bytes(4096, overlapping));
}
