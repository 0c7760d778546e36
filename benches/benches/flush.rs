//! The flush: nanoseconds per 4 KiB page from cache slot to RAM image, through `store::Store::commit`, with
//! non-temporal stores and with the C library's memcpy, by one thread and by two.
//!
//! `cargo bench -p colo-ring-benches --bench flush [-- 2M|1G|thp|off]` (pages of the guest's memory; default off). The four
//! ways take turns, each round begins with another of them, and each commit has pages of its own at random. "cold"
//! reads 128 MiB of other memory before each commit, so that slots and image are in no cache; "fresh" commits right
//! after the pages were received.

use colo_ring::host::Machine;
use colo_ring::store::{CacheKind, CommitMode, CopyMethod, Flusher, HugePages, Store, StoreOptions};
use colo_ring::units::{CheckpointId, PAGE_SIZE};
use colo_ring_benches::{guest, median, random_pages};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Pages of the guest: 1 GiB, of which the benchmark takes twice as much.
const GUEST_PAGES: u64 = 1 << 18;
const ROUNDS: usize = 25;
const EVICT_BYTES: usize = 128 << 20;

fn main() {
    println!("{}", Machine::read());
    let hugepages = match std::env::args().find(|word| ["2M", "1G", "thp", "off"].contains(&&word[..])) {
        Some(word) if word == "2M" => HugePages::Huge2M,
        Some(word) if word == "1G" => HugePages::Huge1G,
        Some(word) if word == "thp" => HugePages::Thp,
        _ => HugePages::Off,
    };
    let options = StoreOptions {
        hugepages,
        cache: CacheKind::Mirror,
        commit: CommitMode::Sync,
        ..StoreOptions::default()
    };
    let (store, notes) =
        Store::create(Arc::new(guest(GUEST_PAGES)), "flush", &options).expect("2 GiB of memory");
    notes.iter().for_each(|note| println!("note: {note}"));
    store.begin_colo();
    let mut bench = Bench {
        store,
        numbers: Xoshiro256PlusPlus::seed_from_u64(3),
        evict: vec![1; EVICT_BYTES],
        checkpoint: 0,
    };
    println!("ns/page, {hugepages:?}, median of {ROUNDS} commits (fastest)");
    println!(
        "{:>6} {:<6} {:<13} {:>16} {:>16}",
        "pages", "", "", "1 thread", "2 threads"
    );
    for (pages, cold) in [(1000, false), (1000, true), (10_000, true), (40_000, true)] {
        bench.row(pages, cold);
    }
}

struct Bench {
    store: Store,
    numbers: Xoshiro256PlusPlus,
    evict: Vec<u8>,
    checkpoint: u64,
}

impl Bench {
    /// Times all four ways with so many pages.
    fn row(&mut self, pages: usize, cold: bool) {
        let ways = [
            (CopyMethod::NonTemporal, 0),
            (CopyMethod::NonTemporal, 1),
            (CopyMethod::Memcpy, 0),
            (CopyMethod::Memcpy, 1),
        ];
        let flushers = ways.map(|(method, helpers)| Flusher::new(method, helpers, &[]).expect("a thread"));
        let mut times = [const { Vec::new() }; 4];
        for round in 0..ROUNDS {
            for turn in 0..flushers.len() {
                let way = (round + turn) % flushers.len();
                times[way].push(self.commit(&flushers[way], pages, cold) * 1e9 / pages as f64);
            }
        }
        let label = if cold { "cold" } else { "fresh" };
        let fastest = |times: &Vec<f64>| times.iter().copied().fold(f64::MAX, f64::min);
        let [nt_1, nt_2, memcpy_1, memcpy_2] = times
            .map(|times| (fastest(&times), median(times)))
            .map(|(fastest, median)| format!("{median:.0} ({fastest:.0})"));
        println!(
            "{pages:>6} {label:<6} {:<13} {nt_1:>16} {nt_2:>16}",
            "non-temporal"
        );
        println!(
            "{:>6} {:<6} {:<13} {memcpy_1:>16} {memcpy_2:>16}",
            "", "", "memcpy"
        );
    }

    /// Seconds of one commit of random pages.
    fn commit(&mut self, flusher: &Flusher, pages: usize, cold: bool) -> f64 {
        let dirty = random_pages(self.store.table(), pages, &mut self.numbers);
        let content = [self.checkpoint.to_le_bytes()[0]; PAGE_SIZE];
        dirty
            .iter()
            .for_each(|page| self.store.write(0, *page, &content).expect("memory for the page"));
        if cold {
            let lines = self.evict.iter().step_by(64).map(|byte| u64::from(*byte));
            black_box(lines.sum::<u64>());
        }
        let start = Instant::now();
        let report = self
            .store
            .commit(CheckpointId(self.checkpoint), &mut Vec::new(), flusher);
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(report.pages, pages as u64);
        self.checkpoint += 1;
        seconds
    }
}
