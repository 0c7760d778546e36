//! The store as a whole: what its tests share, and those of receiving and committing.

mod budget;
mod dumps;
mod leftovers;
mod memory;
mod model;
mod numa;
mod pool;
mod recovery;
mod running_guest;

use super::commit::flusher::FlushSizes;
use super::memory::copy;
use super::memory::span::fill_by_kernel;
use super::*;
use crate::units::{CheckpointId, PACKET_PAGES, PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use tempfile::TempDir;

/// Pages in a slab of these tests' stores: few, so that packets and runs cross slabs.
const TEST_SLAB_PAGES: u64 = 64;

const SHARDS: usize = 2;

fn table(blocks: &[(&str, u64)]) -> Arc<BlockTable> {
    let entry = |(name, pages): &(&str, u64)| (name.as_bytes().into(), pages * PAGE_BYTES);
    let total = blocks.iter().map(|(_, pages)| pages * PAGE_BYTES).sum();
    Arc::new(BlockTable::new(blocks.iter().map(entry).collect(), total).unwrap())
}

/// Each kind of cache with each commit mode.
const KINDS: [(CacheKind, CommitMode); 4] = [
    (CacheKind::Mirror, CommitMode::Sync),
    (CacheKind::Mirror, CommitMode::Deferred),
    (CacheKind::Pool, CommitMode::Sync),
    (CacheKind::Pool, CommitMode::Deferred),
];

const TEST_GRANULARITY: Granularity = Granularity {
    mirror_slab_pages: TEST_SLAB_PAGES,
    pool_slab_extents: Some(2),
    area_bytes: 4096,
    flight_checkpoints: 32,
    flush: FlushSizes {
        help_from_pages: 4,
        step_words: 1,
    },
};

fn options() -> StoreOptions {
    StoreOptions {
        hugepages: HugePages::Off,
        shards: SHARDS,
        cache: CacheKind::Mirror,
        commit: CommitMode::Sync,
        ..StoreOptions::default()
    }
}

fn store_of((cache, commit): (CacheKind, CommitMode), blocks: &[(&str, u64)]) -> Store {
    let options = StoreOptions {
        cache,
        commit,
        ..options()
    };
    let (store, notes) = Store::with_granularity(table(blocks), "test", &options, TEST_GRANULARITY).unwrap();
    assert_eq!(notes, []);
    store
}

/// A mirror that is flushed inside of the commit.
fn store(blocks: &[(&str, u64)]) -> Store {
    store_of(KINDS[0], blocks)
}

fn alone() -> Flusher {
    Flusher::new(CopyMethod::NonTemporal, 0, &[]).unwrap()
}

fn page(index: u64) -> PageIndex {
    PageIndex::new(index)
}

/// A page's content by number: the number over and over; 0 is a page of zeros.
fn content(stamp: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    bytes.as_chunks_mut().0.fill(stamp.to_le_bytes());
    bytes
}

/// The number of a page's content; panics on a mix.
fn stamp(bytes: &[u8; PAGE_SIZE]) -> u64 {
    let words = bytes.as_chunks::<8>().0;
    assert!(words.iter().all(|word| word == &words[0]), "a torn page");
    u64::from_le_bytes(words[0])
}

fn land(store: &Store, shard: usize, pages: &[(u64, u64)], landing: &mut Landing) {
    let indices: Vec<_> = pages.iter().map(|(index, _)| page(*index)).collect();
    store.place(0, &indices, landing).unwrap();
    let bytes: Vec<u8> = pages.iter().flat_map(|(_, stamp)| content(*stamp)).collect();
    fill_by_kernel(landing.runs(), &bytes);
    store.landed(shard, landing);
}

fn image_stamp(store: &Store, index: u64) -> u64 {
    committed_stamp(store.committed(), index)
}

/// The number of a page in the image.
fn committed_stamp(committed: &CommittedImage, index: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    copy::read(committed.image().span(PageRun::one(page(index))), &mut bytes);
    stamp(&bytes)
}

fn newest_stamp(store: &Store, index: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    store.read_newest(page(index), &mut bytes);
    stamp(&bytes)
}

/// The content of a dump.
#[derive(Debug)]
struct DumpContent {
    checkpoint: CheckpointId,
    /// The page numbers, in the order of the guest's pages.
    stamps: Vec<u64>,
    device_state: Vec<u8>,
}

fn dump(committed: &CommittedImage) -> Result<DumpContent, StoreError> {
    let file = || tempfile::tempfile().unwrap();
    let blocks: Vec<_> = committed.table().iter().map(|_| file()).collect();
    let device_state = file();
    let report = committed.dump(&DumpTargets {
        blocks: blocks.iter().collect(),
        device_state: &device_state,
    })?;
    let read = |file: &fs::File| {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let mut stamps = Vec::new();
    for ((_, block), file) in committed.table().iter().zip(&blocks) {
        let bytes = read(file);
        assert_eq!(u64::try_from(bytes.len()).unwrap(), block.used_length);
        stamps.extend(bytes.as_chunks().0.iter().map(stamp));
    }
    Ok(DumpContent {
        checkpoint: report.checkpoint,
        stamps,
        device_state: read(&device_state),
    })
}

/// A directory in memory, gone with its test.
fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

const BLOCKS: [(&str, u64); 4] = [("pc.ram", 150), ("rom", 1), ("vga", 70), ("bios", 3)];
const PAGES: u64 = 224;

#[test]
fn a_packet_in_one_slab_is_one_registered_buffer() {
    let store = store(&BLOCKS);
    let mut landing = Landing::default();
    let packet: Vec<_> = (10..20).chain([5]).map(page).collect();
    store.place(0, &packet, &mut landing).unwrap();
    assert_eq!(
        (landing.slab(), landing.runs().len()),
        (None, 2),
        "the image is no registered buffer"
    );
    store.begin_colo();
    store.place(0, &packet, &mut landing).unwrap();
    assert_eq!(landing.slab(), Some(SlabId(0)));
    let lengths: Vec<_> = landing.runs().iter().map(|run| run.length / PAGE_SIZE).collect();
    assert_eq!(lengths, [10, 1], "neighbours share a run");
    let slab = store.slab(0).unwrap();
    for run in landing.runs() {
        let offset = run.address.addr() - slab.base().addr();
        assert!(offset + run.length <= slab.bytes());
    }
    store.place(0, &[page(63), page(64)], &mut landing).unwrap();
    assert_eq!((landing.slab(), landing.runs().len()), (None, 2), "two slabs");
    store.place(0, &[page(PAGES - 1)], &mut landing).unwrap();
    assert_eq!(landing.slab(), Some(SlabId(3)));
    store.place(0, &[], &mut landing).unwrap();
    assert_eq!((landing.slab(), landing.runs().len()), (None, 0));
}

#[test]
fn headers_lie_in_the_slab_behind_all_slots() {
    let store = store(&BLOCKS);
    assert_eq!((store.slab_limit(), store.slab(4).is_none()), (4, true));
    store.begin_colo();
    for (slab, pages) in [64, 64, 64, 32].into_iter().enumerate() {
        let memory = store.slab(slab).unwrap();
        for channel in [0, 255] {
            let mut landing = Landing::of(crate::units::ChannelId(channel));
            let first = u64::try_from(slab).unwrap() * TEST_SLAB_PAGES;
            store.place(0, &[page(first)], &mut landing).unwrap();
            let offset = landing.header().unwrap().address().addr() - memory.base().addr();
            let header = usize::try_from(HEADER_BYTES).unwrap();
            assert_eq!(offset, pages * PAGE_SIZE + usize::from(channel) * header);
            assert!(offset + header <= memory.bytes());
        }
    }
}

#[test]
#[should_panic(expected = "at most 128 pages")]
fn a_packet_larger_than_the_wire_allows_is_a_mistake_of_the_caller() {
    let store = store(&BLOCKS);
    let pages: Vec<_> = (0..=PACKET_PAGES)
        .map(|at| page(u64::try_from(at).unwrap()))
        .collect();
    let _ = store.place(0, &pages, &mut Landing::default());
}

#[test]
#[should_panic(expected = "the session was ended")]
fn nothing_is_committed_after_the_end() {
    let store = store(&BLOCKS);
    store.begin_colo();
    store.drop_uncommitted();
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
}

#[test]
fn device_state_buffers_are_used_in_turn() {
    let store = store(&BLOCKS);
    store.begin_colo();
    let mut buffer = Vec::with_capacity(1000);
    let first = buffer.as_ptr();
    buffer.extend([1; 10]);
    store.commit(CheckpointId(0), &mut buffer, &alone());
    buffer.reserve(2000);
    let second = buffer.as_ptr();
    buffer.extend([2; 10]);
    store.commit(CheckpointId(1), &mut buffer, &alone());
    assert_eq!(buffer.as_ptr(), first);
    store.commit(CheckpointId(2), &mut buffer, &alone());
    assert_eq!(buffer.as_ptr(), second);
}

#[test]
fn helpers_flush_every_page_once() {
    const MANY: u64 = 6000;
    for kind in KINDS {
        helpers_flush(&store_of(kind, &[("pc.ram", MANY - 100), ("vga", 100)]), MANY);
    }
}

fn helpers_flush(store: &Store, many: u64) {
    store.begin_colo();
    for (checkpoint, method) in (0..).zip([CopyMethod::NonTemporal, CopyMethod::Memcpy]) {
        let flusher = Flusher::new(method, 2, &[]).unwrap();
        // Every page but each seventh, so that runs begin and end everywhere.
        let (mut landing, offset) = (Landing::default(), checkpoint * 10_000 + 1);
        let pages: Vec<_> = (0..many)
            .filter(|at| at % 7 != checkpoint)
            .map(|at| (at, at + offset))
            .collect();
        for packet in pages.chunks(PACKET_PAGES) {
            land(store, 1, packet, &mut landing);
        }
        let report = store.commit(CheckpointId(checkpoint), &mut Vec::new(), &flusher);
        store.finish_flush();
        assert_eq!(report.pages, u64::try_from(pages.len()).unwrap());
        assert!(report.helpers <= 2);
        for (at, stamp) in pages {
            assert_eq!(image_stamp(store, at), stamp, "page {at}");
        }
    }
}

#[test]
fn several_stores_share_the_helpers() {
    let flusher = Arc::new(Flusher::new(CopyMethod::NonTemporal, 1, &[]).unwrap());
    let guest = |guest: u64| {
        let flusher = flusher.clone();
        move || {
            let store = store(&[("pc.ram", 1500)]);
            store.begin_colo();
            for checkpoint in 0..20 {
                let stamp = guest * 1000 + checkpoint;
                (0..1500).for_each(|at| store.write(0, page(at), &content(stamp)).unwrap());
                let report = store.commit(CheckpointId(checkpoint), &mut Vec::new(), &flusher);
                assert_eq!(report.pages, 1500);
                assert!((0..1500).all(|at| image_stamp(&store, at) == stamp));
            }
        }
    };
    let guests: Vec<_> = (1..4).map(|number| thread::spawn(guest(number))).collect();
    guests.into_iter().for_each(|guest| guest.join().unwrap());
}

#[test]
fn a_core_that_is_not_there_is_an_error() {
    let refused = Flusher::new(CopyMethod::NonTemporal, 1, &[1023]).err().unwrap();
    assert!(refused.to_string().contains("core 1023"), "{refused}");
}

/// Spec §10, "the same page twice": the page is one or the other or a mix, and nothing else suffers.
#[test]
fn two_threads_may_write_one_page() {
    KINDS.into_iter().for_each(two_threads_write_one_page);
}

fn two_threads_write_one_page(kind: (CacheKind, CommitMode)) {
    let store = Arc::new(store_of(kind, &BLOCKS));
    store.begin_colo();
    let writer = |shard: usize, byte: u8| {
        let store = store.clone();
        thread::spawn(move || {
            let mut landing = Landing::default();
            for _ in 0..2000 {
                store.write(shard, page(7), &[byte; PAGE_SIZE]).unwrap();
                store.place(0, &[page(7)], &mut landing).unwrap();
                fill_by_kernel(landing.runs(), &[byte; PAGE_SIZE]);
                store.landed(shard, &mut landing);
            }
        })
    };
    let writers = [writer(0, 0x11), writer(1, 0x22)];
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    store.finish_flush();
    let mut bytes = [0; PAGE_SIZE];
    copy::read(store.image().span(PageRun::one(page(7))), &mut bytes);
    assert!(bytes.iter().all(|byte| [0x11, 0x22].contains(byte)));
    assert_eq!((image_stamp(&store, 6), image_stamp(&store, 8)), (0, 0));
}

/// A dump that ended a flush did not notify, and the main channel waited forever before it answered the next request: found by
/// the simulation (seed 269843797330736 of its day).
#[test]
fn the_end_of_a_flush_is_notified() {
    let store = store_of((CacheKind::Mirror, CommitMode::Deferred), &BLOCKS);
    let told = Arc::new(AtomicU64::new(0));
    let tell = told.clone();
    store.on_flushed(move || {
        tell.fetch_add(1, Ordering::Relaxed);
    });
    store.begin_colo();
    let commit = |checkpoint| {
        (0..PAGES).for_each(|at| store.write(0, page(at), &content(checkpoint)).unwrap());
        store.commit(CheckpointId(checkpoint), &mut Vec::new(), &alone());
        assert!(store.is_flushing());
    };
    commit(0);
    store.finish_flush();
    assert_eq!(told.load(Ordering::Relaxed), 1);
    store.finish_flush();
    commit(1);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    while store.flush_step() == FlushStep::Some {}
    assert_eq!((store.is_flushing(), told.load(Ordering::Relaxed)), (false, 2));
}

/// Other cores take part in a flush only when a caller waits for its end, and only where much is left.
#[test]
fn no_core_helps_with_a_flush_before_that_is_allowed() {
    let store = store_of((CacheKind::Pool, CommitMode::Deferred), &BLOCKS);
    store.begin_colo();
    let commit = |checkpoint, pages| {
        (0..pages).for_each(|at| store.write(0, page(at), &content(checkpoint)).unwrap());
        store.commit(CheckpointId(checkpoint), &mut Vec::new(), &alone());
    };
    assert!(!store.allow_flush_help(), "there is none");
    commit(0, PAGES);
    assert_eq!(store.help_flush(), FlushStep::Nothing);
    assert!(store.allow_flush_help());
    assert_eq!(store.help_flush(), FlushStep::Some);
    store.finish_flush();
    commit(1, PAGES);
    assert_eq!(
        store.help_flush(),
        FlushStep::Nothing,
        "the invitation was for the last one"
    );
    store.finish_flush();
    commit(2, 1);
    assert!(!store.allow_flush_help(), "one page is quickly done");
    assert_eq!(store.help_flush(), FlushStep::Nothing);
    store.finish_flush();
}

/// A reader of the checkpoint's number, a status for example, does not wait for a commit or a dump.
#[test]
fn the_committed_number_is_readable_during_a_commit() {
    let store = store(&BLOCKS);
    assert_eq!(store.committed().checkpoint(), None);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let record = store.committed().lock();
    let asked = thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let store = &store;
        scope.spawn(move || tell.send(store.committed().checkpoint()));
        // If it waits, it waits for what is dropped next.
        let asked = told.recv_timeout(std::time::Duration::from_secs(300));
        drop(record);
        asked
    });
    assert_eq!(asked, Ok(Some(CheckpointId(0))));
}

/// A commit that panicked may have torn the image, so that there is no checkpoint any more; but a caller that only asks
/// for it does not panic.
#[test]
fn a_commit_that_panicked_leaves_no_checkpoint() {
    let store = store(&BLOCKS);
    store.begin_colo();
    store.commit(CheckpointId(1), &mut vec![1], &alone());
    let backwards = || store.commit(CheckpointId(0), &mut vec![2], &alone());
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(backwards)).unwrap_err();
    assert_eq!(store.committed().checkpoint(), None);
}
