//! The store as a whole, against a model that is a list of page contents.

use super::*;
use crate::units::{PACKET_PAGES, PAGE_BYTES};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::AtomicU64;
use std::thread;

/// Pages in a slab of these tests' stores: few, so that packets and runs cross slabs.
const TEST_SLAB_PAGES: u64 = 64;

const SHARDS: usize = 2;

fn table(blocks: &[(&str, u64)]) -> Arc<BlockTable> {
    let entry = |(name, pages): &(&str, u64)| (name.as_bytes().into(), pages * PAGE_BYTES);
    let total = blocks.iter().map(|(_, pages)| pages * PAGE_BYTES).sum();
    Arc::new(BlockTable::new(blocks.iter().map(entry).collect(), total).unwrap())
}

fn options() -> StoreOptions {
    StoreOptions {
        hugepages: HugePages::Off,
        shards: SHARDS,
        ..StoreOptions::default()
    }
}

fn store(blocks: &[(&str, u64)]) -> Store {
    let (store, notes) = Store::with_slabs(table(blocks), "test", &options(), TEST_SLAB_PAGES).unwrap();
    assert_eq!(notes, []);
    store
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
    store.place(&indices, landing);
    let bytes: Vec<u8> = pages.iter().flat_map(|(_, stamp)| content(*stamp)).collect();
    landing.fill_by_kernel(&bytes);
    store.landed(shard, landing);
}

fn image_stamp(store: &Store, index: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    copy::read(store.image().span(PageRun::one(page(index))), &mut bytes);
    stamp(&bytes)
}

fn newest_stamp(store: &Store, index: u64) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    store.read_newest(page(index), &mut bytes);
    stamp(&bytes)
}

/// The page numbers of a dump, in the order of the guest's pages.
fn dumped_stamps(report: &DumpReport) -> Vec<u64> {
    let mut stamps = Vec::new();
    for block in &report.blocks {
        let bytes = fs::read(&block.file).unwrap();
        assert_eq!(u64::try_from(bytes.len()).unwrap(), block.bytes);
        stamps.extend(bytes.as_chunks().0.iter().map(stamp));
    }
    stamps
}

/// A directory below the system's temporary one, gone with its test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(below: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(below).join(format!("colo-ring-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn temporary() -> Self {
        Self::new(std::env::temp_dir().to_str().unwrap())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

const BLOCKS: [(&str, u64); 4] = [("pc.ram", 150), ("rom", 1), ("vga", 70), ("bios", 3)];
const PAGES: u64 = 224;

#[derive(Clone, Debug)]
enum Step {
    /// Shard, first page, pages; the packet takes them upwards, or scattered.
    Land(usize, Vec<u64>),
    Write(usize, u64),
    Zero(usize, u64),
    Commit,
    Dump,
}

fn step() -> impl Strategy<Value = Step> {
    let shard = 0..SHARDS;
    let run = (0..PAGES, 1..100u64).prop_map(|(first, count)| (first..PAGES.min(first + count)).collect());
    let scattered = prop::collection::vec(0..PAGES, 0..20);
    let packet = prop_oneof![run, scattered];
    prop_oneof![
        8 => (shard.clone(), packet).prop_map(|(shard, pages)| Step::Land(shard, pages)),
        4 => (shard.clone(), 0..PAGES).prop_map(|(shard, page)| Step::Write(shard, page)),
        4 => (shard, 0..PAGES).prop_map(|(shard, page)| Step::Zero(shard, page)),
        3 => Just(Step::Commit),
        1 => Just(Step::Dump),
    ]
}

/// What a store should hold: numbers of page contents.
#[derive(Default)]
struct Model {
    colo: bool,
    newest: Vec<u64>,
    committed: Vec<u64>,
    dirty: BTreeSet<u64>,
    received: BTreeSet<u64>,
    commits: u64,
    next_stamp: u64,
}

impl Model {
    fn stamp(&mut self) -> u64 {
        self.next_stamp += 1;
        self.next_stamp
    }

    fn receive(&mut self, page: u64, stamp: u64) {
        let at = usize::try_from(page).unwrap();
        self.newest[at] = stamp;
        self.received.insert(page);
        if self.colo {
            self.dirty.insert(page);
        } else {
            self.committed[at] = stamp;
        }
    }

    fn check(&self, store: &Store) {
        for at in 0..PAGES {
            let index = usize::try_from(at).unwrap();
            assert_eq!(image_stamp(store, at), self.committed[index], "image, page {at}");
            assert_eq!(newest_stamp(store, at), self.newest[index], "newest, page {at}");
            assert_eq!(store.was_received(page(at)), self.received.contains(&at));
        }
        assert_eq!(store.dirty_pages(), u64::try_from(self.dirty.len()).unwrap());
        assert_eq!(
            store.unseen_pages(),
            PAGES - u64::try_from(self.received.len()).unwrap()
        );
        assert_eq!(store.committed(), self.commits.checked_sub(1).map(CheckpointId));
    }
}

/// Applies a step to both, and compares what the step itself answers.
fn apply(step: Step, store: &Store, model: &mut Model, landing: &mut Landing, flusher: &Flusher) {
    match step {
        Step::Land(shard, pages) => {
            let packet: Vec<_> = pages.iter().map(|page| (*page, model.stamp())).collect();
            land(store, shard, &packet, landing);
            packet
                .iter()
                .for_each(|(page, stamp)| model.receive(*page, *stamp));
        }
        Step::Write(shard, at) => {
            let stamp = model.stamp();
            store.write(shard, page(at), &content(stamp));
            model.receive(at, stamp);
        }
        Step::Zero(shard, at) => {
            store.zero(shard, page(at));
            model.receive(at, 0);
        }
        Step::Commit if !model.colo => {}
        Step::Commit => {
            let mut device_state = model.commits.to_le_bytes().to_vec();
            let report = store.commit(CheckpointId(model.commits), &mut device_state, flusher);
            assert!(device_state.is_empty());
            assert_eq!(report.pages, u64::try_from(model.dirty.len()).unwrap());
            assert!(report.runs <= report.pages);
            model.dirty.clear();
            model.committed.clone_from(&model.newest);
            model.commits += 1;
        }
        Step::Dump => {
            let scratch = Scratch::temporary();
            match store.dump(&scratch.0) {
                Err(StoreError::NothingCommitted) => {
                    assert_eq!(model.commits, 0);
                    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
                }
                dumped => check_dump(&dumped.unwrap(), model),
            }
        }
    }
}

fn check_dump(report: &DumpReport, model: &Model) {
    assert_eq!(report.checkpoint, CheckpointId(model.commits - 1));
    assert_eq!(dumped_stamps(report), model.committed);
    assert_eq!(
        fs::read(&report.device_state).unwrap(),
        (model.commits - 1).to_le_bytes()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_image_is_the_last_committed_checkpoint(
        precopy in prop::collection::vec(step(), 0..15),
        colo in prop::collection::vec(step(), 0..40),
    ) {
        let store = store(&BLOCKS);
        let zeros = vec![0; usize::try_from(PAGES).unwrap()];
        let mut model = Model { newest: zeros.clone(), committed: zeros, ..Model::default() };
        let (mut landing, flusher) = (Landing::default(), alone());
        for step in precopy {
            apply(step, &store, &mut model, &mut landing, &flusher);
        }
        model.check(&store);
        store.begin_colo();
        model.colo = true;
        for step in colo {
            let committing = matches!(step, Step::Commit);
            apply(step, &store, &mut model, &mut landing, &flusher);
            if committing {
                model.check(&store);
            }
        }
        model.check(&store);
        // The primary is lost: what was not committed never happened.
        store.drop_uncommitted();
        let scratch = Scratch::temporary();
        if model.commits > 0 {
            check_dump(&store.dump(&scratch.0).unwrap(), &model);
        }
    }
}

#[test]
fn a_packet_in_one_slab_is_one_registered_buffer() {
    let store = store(&BLOCKS);
    let mut landing = Landing::default();
    let packet: Vec<_> = (10..20).chain([5]).map(page).collect();
    store.place(&packet, &mut landing);
    assert_eq!(
        (landing.slab(), landing.runs().len()),
        (None, 2),
        "the image is no registered buffer"
    );
    store.begin_colo();
    store.place(&packet, &mut landing);
    assert_eq!(landing.slab(), Some(SlabId(0)));
    let lengths: Vec<_> = landing.runs().iter().map(|run| run.length / PAGE_SIZE).collect();
    assert_eq!(lengths, [10, 1], "neighbours share a run");
    let slab = &store.slabs()[0];
    for run in landing.runs() {
        let offset = run.address.addr() - slab.base().addr();
        assert!(offset + run.length <= slab.bytes());
    }
    store.place(&[page(63), page(64)], &mut landing);
    assert_eq!((landing.slab(), landing.runs().len()), (None, 2), "two slabs");
    store.place(&[page(PAGES - 1)], &mut landing);
    assert_eq!(landing.slab(), Some(SlabId(3)));
    store.place(&[], &mut landing);
    assert_eq!((landing.slab(), landing.runs().len()), (None, 0));
}

#[test]
fn headers_lie_in_the_slab_behind_all_slots() {
    let store = store(&BLOCKS);
    assert_eq!(store.slabs().len(), 4);
    let slots = [64, 64, 64, 32];
    for (slab, pages) in store.slabs().iter().zip(slots) {
        let first = slab.header(crate::units::ChannelId(0)).addr() - slab.base().addr();
        assert_eq!(first, pages * PAGE_SIZE);
        let last = slab.header(crate::units::ChannelId(255)).addr() - slab.base().addr();
        assert_eq!(last + usize::try_from(HEADER_BYTES).unwrap(), slab.bytes());
    }
}

#[test]
#[should_panic(expected = "at most 128 pages")]
fn a_packet_larger_than_the_wire_allows_is_a_mistake_of_the_caller() {
    let store = store(&BLOCKS);
    let pages: Vec<_> = (0..=PACKET_PAGES)
        .map(|at| page(u64::try_from(at).unwrap()))
        .collect();
    store.place(&pages, &mut Landing::default());
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
    let store = store(&[("pc.ram", MANY - 100), ("vga", 100)]);
    store.begin_colo();
    for (checkpoint, method) in (0..).zip([CopyMethod::NonTemporal, CopyMethod::Memcpy]) {
        let flusher = Flusher::new(method, 2, &[]).unwrap();
        // Every page but each seventh, so that runs begin and end everywhere.
        let (mut landing, offset) = (Landing::default(), checkpoint * 10_000 + 1);
        let pages: Vec<_> = (0..MANY)
            .filter(|at| at % 7 != checkpoint)
            .map(|at| (at, at + offset))
            .collect();
        for packet in pages.chunks(PACKET_PAGES) {
            land(&store, 1, packet, &mut landing);
        }
        let report = store.commit(CheckpointId(checkpoint), &mut Vec::new(), &flusher);
        assert_eq!(report.pages, u64::try_from(pages.len()).unwrap());
        assert!(report.helpers <= 2);
        for (at, stamp) in pages {
            assert_eq!(image_stamp(&store, at), stamp, "page {at}");
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
                (0..1500).for_each(|at| store.write(0, page(at), &content(stamp)));
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
    let store = Arc::new(store(&BLOCKS));
    store.begin_colo();
    let writer = |shard: usize, byte: u8| {
        let store = store.clone();
        thread::spawn(move || {
            let mut landing = Landing::default();
            for _ in 0..2000 {
                store.write(shard, page(7), &[byte; PAGE_SIZE]);
                store.place(&[page(7)], &mut landing);
                landing.fill_by_kernel(&[byte; PAGE_SIZE]);
                store.landed(shard, &landing);
            }
        })
    };
    let writers = [writer(0, 0x11), writer(1, 0x22)];
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    store.commit(CheckpointId(0), &mut Vec::new(), &alone());
    let mut bytes = [0; PAGE_SIZE];
    copy::read(store.image().span(PageRun::one(page(7))), &mut bytes);
    assert!(bytes.iter().all(|byte| [0x11, 0x22].contains(byte)));
    assert_eq!((image_stamp(&store, 6), image_stamp(&store, 8)), (0, 0));
}

/// Dumps beside a thread that commits without a pause: each dump is one of its checkpoints, whole.
#[test]
fn a_dump_is_of_one_checkpoint_while_others_are_committed() {
    const MANY: u64 = 4000;
    /// Content of a page at a checkpoint: each checkpoint writes two thirds of the pages.
    fn expected(at: u64, checkpoint: u64) -> u64 {
        let back = u64::from((at + checkpoint).is_multiple_of(3));
        checkpoint.checked_sub(back).map_or(0, |wrote| wrote + 1)
    }
    let store = Arc::new(store(&[("pc.ram", MANY - 1), ("rom", 1)]));
    store.begin_colo();
    let stop = Arc::new(AtomicBool::new(false));
    let committed_once = Arc::new(std::sync::Barrier::new(2));
    let committer = {
        let (store, stop, committed_once) = (store.clone(), stop.clone(), committed_once.clone());
        thread::spawn(move || {
            let flusher = Flusher::new(CopyMethod::NonTemporal, 1, &[]).unwrap();
            let mut device_state = Vec::new();
            for checkpoint in 0.. {
                for at in (0..MANY).filter(|at| (at + checkpoint) % 3 != 0) {
                    store.write(0, page(at), &content(checkpoint + 1));
                }
                device_state.extend(checkpoint.to_le_bytes());
                store.commit(CheckpointId(checkpoint), &mut device_state, &flusher);
                if checkpoint == 0 {
                    committed_once.wait();
                }
                if stop.load(Ordering::Relaxed) {
                    return checkpoint;
                }
            }
            unreachable!("the range has no end")
        })
    };
    committed_once.wait();
    let scratch = Scratch::temporary();
    let mut seen = BTreeSet::new();
    // Into one directory: each replaces the one before.
    for _ in 0..10 {
        let report = store.dump(&scratch.0).unwrap();
        let checkpoint = report.checkpoint.0;
        let device_state = fs::read(&report.device_state).unwrap();
        assert_eq!(device_state, checkpoint.to_le_bytes());
        for (at, stamp) in (0..).zip(dumped_stamps(&report)) {
            assert_eq!(
                stamp,
                expected(at, checkpoint),
                "page {at} at checkpoint {checkpoint}"
            );
        }
        seen.insert(checkpoint);
    }
    stop.store(true, Ordering::Relaxed);
    let last = committer.join().unwrap();
    assert!(
        seen.len() > 1 && last > 0,
        "nothing was committed beside the dumps: {seen:?}, {last}"
    );
    assert_eq!(
        fs::read_dir(&scratch.0).unwrap().count(),
        3,
        "pc.ram, rom, device-state.bin"
    );
}

#[test]
fn a_dump_that_fails_leaves_nothing_behind() {
    let store = store(&BLOCKS);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let scratch = Scratch::temporary();
    // A directory in the way of the third block's file, which shows when the others are open already.
    let obstacle = scratch.0.join("vga~part");
    fs::create_dir(&obstacle).unwrap();
    let refused = store.dump(&scratch.0).unwrap_err();
    assert!(refused.to_string().contains("vga~part"), "{refused}");
    let left: Vec<_> = fs::read_dir(&scratch.0)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(left, std::slice::from_ref(&obstacle));
    fs::remove_dir(obstacle).unwrap();
    assert_eq!(store.dump(&scratch.0).unwrap().checkpoint, CheckpointId(0));
}

/// Whatever the primary calls its blocks, the files that are put beside a dump overwrite none of them.
#[test]
fn blocks_keep_out_of_the_way_of_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let store = store(&[
        (RESERVED_FILES[0], 1),
        (RESERVED_FILES[1], 1),
        (RESERVED_FILES[2], 1),
    ]);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let scratch = Scratch::temporary();
    for block in store.dump(&scratch.0).unwrap().blocks {
        let name = block.file.file_name().unwrap().to_str().unwrap();
        assert!(!RESERVED_FILES.contains(&name), "{name}");
        let mode = fs::metadata(&block.file).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "others may not look at a guest's memory");
    }
}

#[test]
fn named_files_hold_the_image_and_go_with_it() {
    let scratch = Scratch::new("/dev/shm");
    let options = StoreOptions {
        ram_dir: Some(scratch.0.clone()),
        ..options()
    };
    let (store, notes) = Store::create(table(&BLOCKS), "guest", &options).unwrap();
    assert_eq!(notes, []);
    store.write(0, page(3), &content(33));
    let file = scratch.0.join("guest.pc.ram");
    assert_eq!(
        fs::read(&file).unwrap()[3 * PAGE_SIZE..4 * PAGE_SIZE],
        content(33)
    );
    let refused = Store::create(table(&BLOCKS), "guest", &options).err().unwrap();
    assert!(matches!(refused, StoreError::RamFileExists(_)), "{refused}");
    assert!(file.exists(), "the refused store took the other's file away");
    drop(store);
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
}

#[test]
fn a_ram_directory_must_be_memory() {
    let options = StoreOptions {
        ram_dir: Some("/proc".into()),
        ..options()
    };
    let refused = Store::create(table(&BLOCKS), "guest", &options).err().unwrap();
    assert!(matches!(refused, StoreError::RamDirectory(_)), "{refused}");
}

#[test]
fn a_guest_beyond_the_address_space_is_an_error() {
    let refused = Store::create(table(&[("pc.ram", 1 << 43)]), "guest", &options())
        .err()
        .unwrap();
    assert!(matches!(refused, StoreError::NoImageMemory { .. }), "{refused}");
}

/// Huge pages are not what this test's machine must have: without them there are notes, with them there are none.
#[test]
fn a_lack_of_huge_pages_is_told() {
    let free = || {
        let read = |file: &str| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
            fs::read_to_string(path).map_or(0, |text| text.trim().parse::<u64>().unwrap())
        };
        read("free_hugepages").saturating_sub(read("resv_hugepages"))
    };
    // 4 MiB of image, and as much and the header area of cache.
    let before = free();
    let options = StoreOptions {
        hugepages: HugePages::Huge2M,
        ..options()
    };
    let (store, notes) = Store::create(table(&[("pc.ram", 1024), ("rom", 1)]), "guest", &options).unwrap();
    let text: Vec<_> = notes.iter().map(ToString::to_string).collect();
    match before {
        0 => {
            assert!(
                matches!(
                    notes[..],
                    [
                        Fallback::Image { needed: 2, .. },
                        Fallback::Cache { needed: 3, .. }
                    ]
                ),
                "{text:?}"
            );
            assert!(
                text.iter().all(|note| note.contains("sysctl vm.nr_hugepages=")),
                "{text:?}"
            );
        }
        1..5 => assert!(!notes.is_empty()),
        _ => {
            assert_eq!(notes, []);
            assert!(free() < before, "no huge page was taken");
        }
    }
    store.write(0, page(1024), &content(5));
    assert_eq!(image_stamp(&store, 1024), 5);
}

#[test]
fn transparent_huge_pages_are_used_or_the_lack_told() {
    let options = StoreOptions {
        hugepages: HugePages::Thp,
        ..options()
    };
    let (_store, notes) = Store::create(table(&[("pc.ram", 1024)]), "guest", &options).unwrap();
    for note in &notes {
        let Fallback::Transparent { file, setting, .. } = note else {
            panic!("{note}")
        };
        let text = fs::read_to_string(file).unwrap_or_default();
        assert!(
            text.is_empty() || text.contains(&format!("[{setting}]")),
            "{note}"
        );
        assert!(!text.contains("[always]"), "{note}");
    }
}

/// Who asks for the checkpoint's number, as a status does, does not wait for a commit or a dump.
#[test]
fn the_committed_number_waits_for_nobody() {
    let store = store(&BLOCKS);
    assert_eq!(store.committed(), None);
    store.begin_colo();
    store.commit(CheckpointId(0), &mut vec![1], &alone());
    let record = store.committed.lock();
    let asked = thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let store = &store;
        scope.spawn(move || tell.send(store.committed()));
        let asked = told.recv_timeout(std::time::Duration::from_secs(5));
        drop(record);
        asked
    });
    assert_eq!(asked, Ok(Some(CheckpointId(0))));
}
