//! The dirty bitmap of guests of 6 GiB, 64 GiB and 1 TiB: nanoseconds to mark a page, microseconds to take all
//! marks of a checkpoint, beside a flat bitmap that does the same.
//!
//! `cargo bench -p colo-ring-benches --bench dirty_bitmap`. Two-level is `store::DirtyBitmap`, with one shard and with
//! four; pages are random, and marked by packets of 128 where it says so.

use colo_ring::host::Machine;
use colo_ring::store::{DirtyBitmap, FlushPlan};
use colo_ring::units::{PACKET_PAGES, PageIndex};
use colo_ring_benches::{guest, median, random_pages};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const ROUNDS: usize = 51;
const PAGES_PER_GIB: u64 = 1 << 18;

fn main() {
    println!("{}", Machine::read());
    println!("medians of {ROUNDS} checkpoints");
    println!(
        "{:>9} {:>7}  {:<20} {:>13} {:>10}",
        "guest", "dirty", "bitmap", "mark, ns/page", "take, µs"
    );
    for gib in [6, 64, 1024] {
        for dirty in [1000, 10_000] {
            for (name, timing) in compare(gib * PAGES_PER_GIB, dirty) {
                let (mark, take) = timing.medians(dirty);
                println!("{gib:>5} GiB {dirty:>7}  {name:<20} {mark:>13.1} {take:>10.1}");
            }
        }
    }
}

/// Seconds of each round.
#[derive(Default)]
struct Timing {
    mark: Vec<f64>,
    take: Vec<f64>,
}

impl Timing {
    fn round(&mut self, mark: impl FnOnce(), take: impl FnOnce() -> u64, dirty: usize) {
        let start = Instant::now();
        mark();
        self.mark.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let taken = take();
        self.take.push(start.elapsed().as_secs_f64());
        assert_eq!(taken, dirty as u64, "a mark was lost");
    }

    /// Nanoseconds a page, and microseconds.
    fn medians(self, dirty: usize) -> (f64, f64) {
        (median(self.mark) * 1e9 / dirty as f64, median(self.take) * 1e6)
    }
}

/// All bitmaps in turn, each round with other pages.
fn compare(pages: u64, dirty: usize) -> [(&'static str, Timing); 4] {
    let table = guest(pages);
    let mut numbers = Xoshiro256PlusPlus::seed_from_u64(7);
    let (flat, one, four) = (
        Flat::new(pages),
        DirtyBitmap::new(pages, 1).expect("memory"),
        DirtyBitmap::new(pages, 4).expect("memory"),
    );
    let [mut flat_time, mut one_time, mut packets_time, mut four_time] = <[Timing; 4]>::default();
    let (mut plan, mut words) = (FlushPlan::default(), Vec::new());
    for _ in 0..ROUNDS {
        let dirty_pages = random_pages(&table, dirty, &mut numbers);
        let each = |mark: &dyn Fn(PageIndex)| dirty_pages.iter().for_each(|page| mark(*page));
        flat_time.round(|| each(&|page| flat.mark(page)), || flat.take(&mut words), dirty);
        one_time.round(
            || each(&|page| one.mark(0, page)),
            || take(&one, &mut plan),
            dirty,
        );
        let by_packet = || {
            let packets = dirty_pages.chunks(PACKET_PAGES);
            packets.for_each(|packet| one.mark_all(0, packet));
        };
        packets_time.round(by_packet, || take(&one, &mut plan), dirty);
        let by_four = || {
            let quarters = dirty_pages.chunks(dirty.div_ceil(4));
            quarters
                .zip(0..)
                .for_each(|(quarter, shard)| four.mark_all(shard, quarter));
        };
        four_time.round(by_four, || take(&four, &mut plan), dirty);
    }
    [
        ("flat", flat_time),
        ("two-level", one_time),
        ("two-level, packets", packets_time),
        ("two-level, 4 shards", four_time),
    ]
}

fn take(bitmap: &DirtyBitmap, plan: &mut FlushPlan) -> u64 {
    bitmap.take(plan);
    plan.pages()
}

/// One bit a page and nothing above: every take reads it whole.
struct Flat(Vec<AtomicU64>);

impl Flat {
    fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn mark(&self, page: PageIndex) {
        let word = usize::try_from(page.get() / 64).expect("a 64-bit machine");
        self.0[word].fetch_or(1 << (page.get() % 64), Ordering::Release);
    }

    /// Moves all marks into `plan`; says how many they were.
    fn take(&self, plan: &mut Vec<(usize, u64)>) -> u64 {
        plan.clear();
        let mut pages = 0;
        for (index, word) in self.0.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::Acquire);
                plan.push((index, bits));
                pages += u64::from(bits.count_ones());
            }
        }
        pages
    }
}
