//! Seeds that always run, the proof that runs find what is broken, and `simulate`, which `scripts/simulate` calls.

use super::{How, Tally, run};
use crate::canary::Canary;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
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
    for seed in 0..240 {
        let tally = run(seed, How::default()).unwrap_or_else(|error| panic!("{}", again(seed, &error)));
        all.add(&tally);
    }
    println!("{all:?}");
    // A simulation in which little happens proves little.
    assert!(
        all.untouched > 60
            && all.commits > 400
            && all.dumps > 1
            && all.false_ends > 20
            && all.strangers > 3
            && all.moves > 60
            && all.decoded > 600
            && all.disk_writes > 400
            && all.seen > 300
            && all.hostile > 50
            && all.refused > 5
            && all.frozen > 10
            && all.applied > 20,
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
    on_all_cores(|| {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= MORTAL_SEEDS {
            return false;
        }
        let tally = run(seed, how).unwrap_or_else(|error| panic!("{} --kill", again(seed, &error)));
        all.lock().unwrap().add(&tally);
        true
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

/// Each break, and within how many seeds it is found.
const CANARIES: [(Canary, u64); 31] = [
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
    (Canary::IgnoredLoss, 500),
    (Canary::AppliedEarly, 100),
    (Canary::ForgottenDisk, 100),
    (Canary::SkippedBlock, 100),
    (Canary::EarlyLoaded, 500),
    (Canary::EarlyCommitted, 500),
    (Canary::EarlyRelease, 500),
    (Canary::SilentBegin, 100),
    (Canary::UnguardedBeginning, 500),
    (Canary::Overdraft, 100),
    (Canary::LostLease, 10),
    (Canary::SilentLack, 100),
    (Canary::EarlyEnd, 100),
    (Canary::EarlyAdmission, 500),
];

/// The same for those of a receiver that is killed.
const CANARIES_OF_KILLS: [(Canary, u64); 5] = [
    (Canary::EndlessFlush, 100),
    (Canary::EarlyFlushed, 500),
    (Canary::OneDeviceState, 500),
    (Canary::UnwrittenState, 100),
    (Canary::FreedEarly, 3000),
];

#[test]
fn canaries_do_not_survive() {
    find_all(&CANARIES, false);
}

#[test]
fn canaries_do_not_survive_a_kill() {
    find_all(&CANARIES_OF_KILLS, true);
}

fn find_all(canaries: &[(Canary, u64)], is_mortal: bool) {
    for (canary, limit) in canaries {
        let found = find(*canary, is_mortal, 0..*limit);
        let (seed, error) = found.unwrap_or_else(|| panic!("{canary:?} was not found in {limit} seeds"));
        println!("{canary:?}: seed {seed}, {error}");
    }
}

/// What is watched of hostile primaries, and of the sessions beside one that stands still, can fail.
#[test]
fn every_kind_of_session_is_watched() {
    for (canary, says) in [
        (Canary::EarlyImage, "of a hostile primary is not what it was"),
        (Canary::LostWake, "is held up by session"),
        (Canary::EarlyAdmission, "with a stranger among its channels"),
    ] {
        let how = How {
            canary: Some(canary),
            ..How::default()
        };
        let found = (0..1000).any(|seed| run(seed, how).is_err_and(|error| error.contains(says)));
        assert!(found, "{canary:?} was not found: nothing {says}");
    }
}

/// The first seed that finds a break.
fn find(canary: Canary, is_mortal: bool, mut seeds: std::ops::Range<u64>) -> Option<(u64, String)> {
    let how = How {
        canary: Some(canary),
        is_mortal,
        trace: false,
    };
    seeds.find_map(|seed| run(seed, how).err().map(|error| (seed, error)))
}

/// Starting points of the seeds by which a canary is looked for.
const STARTS: u64 = 20;

/// How many seeds it takes to find each canary, from several seeds on: by luck, if the median is not far below the limit.
#[test]
#[ignore = "run by scripts/simulate --canaries"]
fn seeds_to_find_canaries() {
    println!(
        "{:<18} {:>6} {:>6} {:>6} {:>6}",
        "canary", "limit", "median", "most", "late"
    );
    let all = CANARIES.map(|canary| (canary, false));
    let of_kills = CANARIES_OF_KILLS.map(|canary| (canary, true));
    for ((canary, limit), is_mortal) in all.into_iter().chain(of_kills) {
        let next = AtomicU64::new(0);
        let taken = Mutex::new(Vec::new());
        on_all_cores(|| {
            let start = next.fetch_add(1, Ordering::Relaxed);
            if start >= STARTS {
                return false;
            }
            let first = (start + 1) * 1_000_000;
            let found = find(canary, is_mortal, first..first + limit);
            let seeds = found.map_or(u64::MAX, |(seed, _)| seed - first + 1);
            taken.lock().unwrap().push(seeds);
            true
        });
        let mut taken = taken.into_inner().unwrap();
        taken.sort_unstable();
        let shown = |seeds: u64| match seeds {
            u64::MAX => "-".to_owned(),
            seeds => seeds.to_string(),
        };
        let late = taken.iter().filter(|seeds| **seeds == u64::MAX).count();
        let (median, most) = (taken[taken.len() / 2], taken[taken.len() - 1]);
        let name = format!("{canary:?}");
        println!(
            "{name:<18} {limit:>6} {:>6} {:>6} {late:>6}",
            shown(median),
            shown(most)
        );
    }
}

/// Does work on all cores, in each until it says that there is no more.
fn on_all_cores(work: impl Fn() -> bool + Sync) {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| while work() {});
        }
    });
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
    )
}

fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(now.map_or(0, |now| now.as_micros())).unwrap_or(0)
}

/// As many seeds as the environment says, on all cores: see `scripts/simulate`.
#[test]
#[ignore = "run by scripts/simulate"]
fn simulate() {
    let trace = setting("SIM_TRACE").is_some();
    let is_mortal = setting("SIM_KILL").is_some();
    let first = setting("SIM_SEED").unwrap_or_else(any_seed);
    let end = setting("SIM_MINUTES").map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let most = setting("SIM_SEEDS").unwrap_or(if end.is_some() { u64::MAX } else { 1 });
    println!("seeds from {first}");
    let next = AtomicU64::new(0);
    let (all, failed) = (Mutex::new((0u64, Tally::default())), Mutex::new(Vec::new()));
    let start = Instant::now();
    let how = How {
        trace,
        is_mortal,
        canary: None,
    };
    on_all_cores(|| {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let late = end.is_some_and(|end| Instant::now() > end);
        if number >= most || late || !failed.lock().unwrap().is_empty() {
            return false;
        }
        let seed = first.wrapping_add(number);
        match run(seed, how) {
            Ok(tally) => {
                let mut all = all.lock().unwrap();
                all.0 += 1;
                all.1.add(&tally);
            }
            Err(error) => failed.lock().unwrap().push(again(seed, &error)),
        }
        true
    });
    let (runs, tally) = all.into_inner().unwrap();
    println!("{runs} runs in {:.1} s: {tally:?}", start.elapsed().as_secs_f64());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
