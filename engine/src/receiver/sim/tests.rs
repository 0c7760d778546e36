//! Seeds that always run, the proof that runs find what is broken, and `simulate`, which `scripts/simulate` calls.

use super::{How, Tally, run};
use crate::canary::Canary;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A directory, in memory if possible.
pub(super) fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let below = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    let mut named = tempfile::Builder::new();
    named
        .prefix("colo-ring-sim-")
        .tempdir_in(below)
        .expect("a directory")
}

/// Seeds of receivers that are killed.
const MORTAL_SEEDS: u64 = 1000;

fn again(seed: u64, error: &str) -> String {
    format!("seed {seed}, {error}\n  again, step by step: scripts/simulate --seed {seed} --trace")
}

#[test]
fn what_is_committed_is_always_a_checkpoint_whole() {
    let mut all = Tally::default();
    for seed in 0..100 {
        let tally = run(seed, How::default()).unwrap_or_else(|error| panic!("{}", again(seed, &error)));
        all.add(&tally);
    }
    println!("{all:?}");
    // A simulation in which little happens proves little.
    assert!(
        all.untouched > 30
            && all.commits > 200
            && all.dumps > 0
            && all.moves > 30
            && all.decoded > 300
            && all.disk_writes > 200
            && all.applied > 10,
        "{all:?}"
    );
}

/// Wherever the receiver is killed: the next one finds the last checkpoint, whole.
#[test]
fn a_killed_receiver_leaves_a_checkpoint_whole() {
    let how = How {
        is_mortal: true,
        ..How::default()
    };
    let (all, next) = (Mutex::new(Tally::default()), AtomicU64::new(0));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= MORTAL_SEEDS {
                return;
            }
            let tally = run(seed, how).unwrap_or_else(|error| panic!("{} --kill", again(seed, &error)));
            all.lock().unwrap().add(&tally);
        }
    };
    std::thread::scope(|scope| {
        (0..2).for_each(|_| drop(scope.spawn(work)));
    });
    let all = all.into_inner().unwrap();
    println!("{all:?}");
    assert!(all.kills > MORTAL_SEEDS, "{all:?}");
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..10 {
        assert_eq!(
            run(seed, How::default()),
            run(seed, How::default()),
            "seed {seed}"
        );
    }
}

/// Each break is found, within that many seeds.
#[test]
fn canaries_do_not_survive() {
    let canaries = [
        (Canary::EarlySync, 10),
        (Canary::OpenGate, 100),
        (Canary::LostWake, 10),
        (Canary::LostMark, 10),
        (Canary::EarlyImage, 100),
        (Canary::EarlyAcknowledge, 10),
        (Canary::SilentFlushEnd, 500),
        (Canary::SkippedPage, 10),
        (Canary::StaleDeviceState, 10),
        (Canary::LostPart, 10),
        (Canary::EarlyReply, 100),
        (Canary::EarlyFlushEnd, 100),
        (Canary::EarlyGate, 500),
        (Canary::EarlyArrival, 100),
        (Canary::EarlyZero, 500),
        (Canary::LostDecodeWake, 100),
        (Canary::LateCut, 500),
        (Canary::AppliedEarly, 100),
        (Canary::ForgottenDisk, 100),
        (Canary::SkippedBlock, 100),
    ];
    find_all(&canaries, false);
}

/// The same for those of a receiver that is killed.
#[test]
fn canaries_do_not_survive_a_kill() {
    find_all(
        &[
            (Canary::EndlessFlush, 100),
            (Canary::EarlyFlushed, 500),
            (Canary::OneDeviceState, 500),
            (Canary::FreedEarly, 3000),
        ],
        true,
    );
}

fn find_all(canaries: &[(Canary, u64)], is_mortal: bool) {
    for (canary, seeds) in canaries {
        let how = How {
            canary: Some(*canary),
            is_mortal,
            trace: false,
        };
        let found = (0..*seeds).find_map(|seed| run(seed, how).err().map(|error| (seed, error)));
        let (seed, error) = found.unwrap_or_else(|| panic!("{canary:?} was not found in {seeds} seeds"));
        println!("{canary:?}: seed {seed}, {error}");
    }
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
    )
}

/// As many seeds as the environment says, on all cores: see `scripts/simulate`.
#[test]
#[ignore = "run by scripts/simulate"]
fn simulate() {
    let trace = setting("SIM_TRACE").is_some();
    let is_mortal = setting("SIM_KILL").is_some();
    let first = setting("SIM_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish() >> 16);
    let end = setting("SIM_MINUTES").map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let most = setting("SIM_SEEDS").unwrap_or(if end.is_some() { u64::MAX } else { 1 });
    println!("seeds from {first}");
    let next = AtomicU64::new(0);
    let (all, failed) = (Mutex::new((0u64, Tally::default())), Mutex::new(Vec::new()));
    let start = Instant::now();
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let late = end.is_some_and(|end| Instant::now() > end);
            if number >= most || late || !failed.lock().unwrap().is_empty() {
                return;
            }
            let seed = first.wrapping_add(number);
            let how = How {
                trace,
                is_mortal,
                canary: None,
            };
            match run(seed, how) {
                Ok(tally) => {
                    let mut all = all.lock().unwrap();
                    all.0 += 1;
                    all.1.add(&tally);
                }
                Err(error) => failed.lock().unwrap().push(again(seed, &error)),
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        (0..workers).for_each(|_| drop(scope.spawn(work)));
    });
    let (runs, tally) = all.into_inner().unwrap();
    println!("{runs} runs in {:.1} s: {tally:?}", start.elapsed().as_secs_f64());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
