//! What the flight recorder costs: nanoseconds to write a record, and to ask the kernel what a thread did.
//!
//! `cargo bench -p colo-ring-benches --bench flight`. A checkpoint writes two records, one when it is acknowledged and one when its
//! flush has ended, and asks the kernel twice; none of it lies between the primary's message and the answer to it.

use colo_ring::host::Machine;
use colo_ring::store::{FLIGHT_CHECKPOINTS, FlightRecord, HugePages, SchedulerTimes, Store, StoreOptions};
use colo_ring_benches::guest;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

/// More than the ring has places, so that none is in the processor's cache.
const RECORDS: u64 = 4 * FLIGHT_CHECKPOINTS;
const ROUNDS: usize = 7;

fn main() {
    println!("{}", Machine::read());
    let options = StoreOptions {
        hugepages: HugePages::Off,
        ..StoreOptions::default()
    };
    let (store, _) = Store::create(Arc::new(guest(256)), "bench-flight", &options).expect("memory");
    let flight = store.committed().flight().expect("a new one");
    let record = |checkpoint| FlightRecord {
        checkpoint,
        requested_at_ns: checkpoint * 1_000_003,
        loaded_ns: checkpoint,
        scheduler: Some(SchedulerTimes {
            ran_ns: checkpoint,
            runnable_ns: 3,
        }),
        ..FlightRecord::default()
    };
    print("a record", RECORDS, || {
        (0..RECORDS).for_each(|checkpoint| flight.write(&record(checkpoint)))
    });
    let file = File::open("/proc/thread-self/schedstat").expect("the kernel says it");
    let mut text = [0; 64];
    print("schedstat", RECORDS, || {
        for _ in 0..RECORDS {
            black_box(file.read_at(&mut text, 0).expect("three numbers"));
        }
    });
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    print("processor time", RECORDS, || {
        for _ in 0..RECORDS {
            black_box(nix::time::clock_gettime(clock).expect("every thread has one"));
        }
    });
}

fn print(name: &str, count: u64, mut work: impl FnMut()) {
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            work();
            begin.elapsed().as_nanos() / u128::from(count)
        })
        .collect();
    times.sort_unstable();
    println!(
        "{name:<16} {:>5} ns (least {}, most {})",
        times[ROUNDS / 2],
        times[0],
        times[ROUNDS - 1]
    );
}
