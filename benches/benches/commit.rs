//! The commit, deferred: microseconds from the complete checkpoint to its record, without a RAM directory and with one, where
//! the record and the device state are written down for a receiver to come.
//!
//! `cargo bench -p colo-ring-benches --bench commit [-- DIR]` (a directory on tmpfs or hugetlbfs; default /dev/shm). Both ways
//! take turns, with 100 dirty pages and device states as small and as large as were seen.

use colo_ring::host::Machine;
use colo_ring::store::{CopyMethod, Flusher, HugePages, Store, StoreOptions};
use colo_ring::units::{CheckpointId, PAGE_SIZE};
use colo_ring_benches::{guest, random_pages};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages of the guest: 256 MiB.
const GUEST_PAGES: u64 = 1 << 16;
const DIRTY_PAGES: usize = 100;
const ROUNDS: u64 = 5000;
const DEVICE_STATES: [usize; 2] = [13_000, 400_000];

fn main() {
    println!("{}", Machine::read());
    let directory = std::env::args().skip(1).find(|word| word.starts_with('/'));
    let directory = PathBuf::from(directory.unwrap_or_else(|| "/dev/shm".to_owned()));
    println!(
        "microseconds a commit, {ROUNDS} commits of {DIRTY_PAGES} pages; named files in {}",
        directory.display()
    );
    println!(
        "{:>12} {:<10} {:>8} {:>8} {:>8}",
        "device state", "", "p50", "p99", "max"
    );
    let flusher = Flusher::new(CopyMethod::NonTemporal, 0, &[]).expect("no helper, no error");
    for bytes in DEVICE_STATES {
        let stores = [None, Some(directory.clone())].map(store);
        let mut times = [const { Vec::new() }; 2];
        let mut numbers = Xoshiro256PlusPlus::seed_from_u64(3);
        for round in 0..ROUNDS {
            for turn in 0..2 {
                let way = usize::from((round + turn).is_multiple_of(2));
                times[way].push(commit(&stores[way], round, bytes, &mut numbers, &flusher));
            }
        }
        for (name, mut times) in ["unnamed", "named"].into_iter().zip(times) {
            times.sort_unstable();
            let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e6;
            println!(
                "{bytes:>12} {name:<10} {:>8.1} {:>8.1} {:>8.1}",
                at(50),
                at(99),
                at(100)
            );
        }
    }
}

fn store(ram_dir: Option<PathBuf>) -> Store {
    let options = StoreOptions {
        hugepages: HugePages::Off,
        ram_dir,
        ..StoreOptions::default()
    };
    let label = format!("bench-commit-{}", std::process::id());
    let (store, notes) = Store::create(Arc::new(guest(GUEST_PAGES)), &label, &options).expect("memory");
    notes.iter().for_each(|note| println!("note: {note}"));
    store.begin_colo();
    store.record_session(|| Ok(vec![1; 1000]));
    store
}

/// Receives pages and commits them; the flush is not part of what is timed.
fn commit(
    store: &Store,
    checkpoint: u64,
    bytes: usize,
    numbers: &mut Xoshiro256PlusPlus,
    flusher: &Flusher,
) -> Duration {
    for page in random_pages(store.table(), DIRTY_PAGES, numbers) {
        store.write(0, page, &[7; PAGE_SIZE]).expect("memory");
    }
    let mut device_state = vec![3; bytes];
    let began = Instant::now();
    store.commit(CheckpointId(checkpoint), &mut device_state, flusher);
    let took = began.elapsed();
    store.finish_flush();
    took
}
