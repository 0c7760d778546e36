//! Captured sessions of QEMU 7.2 and 10.0, played by `colo-ring replay` to a receiver: what it holds then must equal a
//! naive reading of the same bytes, also after the checkpoints were played more than once.

use colo_ring::receiver::{Receiver, ReceiverOptions, Request, Response};
use colo_ring::ring::BackendKind;
use colo_ring::store::{CacheKind, CommitMode, StoreOptions};
use colo_ring_tests::capture::{Capture, capture_file};
use colo_ring_tests::command::{Scratch, run};
use colo_ring_tests::model::Model;
use colo_ring_tests::receiver::dump;
use colo_ring_tests::receiver_options;
use colo_ring_tests::schema;
use serde_json::Value;
use std::path::PathBuf;

const PASSES: u64 = 3;

/// The commands of the wire that tell the versions apart.
const OPEN_RETURN_PATH: usize = 1;
const ENABLE_COLO: usize = 8;
const SWITCHOVER_START: usize = 11;

/// Every backend, both kinds of cache and both commit modes.
const KINDS: [(BackendKind, CacheKind, CommitMode); 4] = [
    (BackendKind::Uring, CacheKind::Pool, CommitMode::Deferred),
    (BackendKind::Epoll, CacheKind::Pool, CommitMode::Sync),
    (BackendKind::Threads, CacheKind::Mirror, CommitMode::Deferred),
    (BackendKind::Epoll, CacheKind::Mirror, CommitMode::Sync),
];

fn receiver((backend, cache, commit): (BackendKind, CacheKind, CommitMode)) -> Receiver {
    let options = receiver_options(backend, 4);
    let store = StoreOptions {
        cache,
        commit,
        ..options.store
    };
    Receiver::start(ReceiverOptions { store, ..options }, drop).unwrap()
}

/// Plays a capture to every kind of receiver. Returns the model, for what is special in it.
fn play(name: &str, pace: &[&str]) -> Model {
    let model = Model::of(&Capture::read(name));
    assert!(!model.commands.contains(&OPEN_RETURN_PATH));
    assert_eq!(model.commands[0], ENABLE_COLO);
    for kind in KINDS {
        play_to(receiver(kind), name, pace, &model);
    }
    model
}

/// Plays a capture and compares what the receiver has committed with the model.
fn play_to(receiver: Receiver, name: &str, pace: &[&str], model: &Model) {
    let scratch = Scratch::new();
    let file = capture_file(name);
    let file = file.to_str().unwrap();
    let address = receiver.addresses()[0].to_string();
    let out = scratch.file("run");
    let passes = PASSES.to_string();
    let played = run(&[
        &[
            "replay", file, "--to", &address, "--loop", &passes, "--json", "--out", &out,
        ],
        pace,
    ]
    .concat());
    let said = String::from_utf8_lossy(&played.stderr);
    assert!(played.status.success(), "{said}");
    let report = schema::document(&played.stdout);
    assert_eq!(report["capture"]["checkpoints"], model.checkpoints);
    assert_eq!(report["phases"]["loaded"]["count"], PASSES * model.checkpoints);

    let Ok(Response::Status(status)) = receiver.ask(Request::Status) else {
        panic!("no status")
    };
    let directory = PathBuf::from(scratch.file("dump"));
    std::fs::create_dir(&directory).unwrap();
    let dumped = dump(&receiver, status.sessions[0].session, &directory).unwrap();
    let dumped = serde_json::to_value(dumped).unwrap();
    assert_eq!(dumped["checkpoint"], PASSES * model.checkpoints);
    let blocks = dumped["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), model.blocks.len());
    let read = |file: &Value| std::fs::read(directory.join(file.as_str().unwrap())).unwrap();
    for (block, (name, content)) in blocks.iter().zip(&model.blocks) {
        assert_eq!(block["name"].as_str().unwrap().as_bytes(), name);
        assert!(
            read(&block["file"]) == *content,
            "block {} differs",
            block["name"]
        );
    }
    assert!(read(&dumped["device_state_file"]) == model.device_state);
    receiver.stop_handle().stop();
    receiver.wait().unwrap();
}

#[test]
fn a_session_of_qemu_7_2() {
    let model = play("colo-multifd4-7.2", &["--pace", "max"]);
    assert!(!model.commands.contains(&SWITCHOVER_START));
    assert!(model.syncs_with_pages > 0 && model.stale_sizes > 0 && model.twice > 0);
}

#[test]
fn a_session_of_qemu_10() {
    let model = play("colo-multifd4-10", &["--interval", "20"]);
    let switchovers = model.commands.iter().filter(|id| **id == SWITCHOVER_START);
    assert!(
        switchovers.count() as u64 > model.checkpoints,
        "one in precopy and one in each checkpoint"
    );
}

/// What a replay adds to a checkpoint of 30 MiB is less than a tenth of it. The time for which the replay is preempted
/// counts as its own, so the best of some runs decides.
#[test]
fn the_replays_own_share_is_small() {
    const RUNS: usize = 20;
    const SHARE_MAX: f64 = 0.1;
    let scratch = Scratch::new();
    let file = scratch.file("session.cap");
    let made = run(&[
        "synth",
        "--out",
        &file,
        "--ram",
        "64M",
        "--pages",
        "7700",
        "--zero",
        "0",
        "--checkpoints",
        "4",
        "--interval",
        "100",
    ]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let is_small = |share: f64| (0.0001..SHARE_MAX).contains(&share);
    let mut shares = Vec::new();
    for _ in 0..RUNS {
        let played = run(&[
            "replay",
            &file,
            "--sink",
            "--pace",
            "max",
            "--checkpoints",
            "40",
            "--json",
        ]);
        assert!(
            played.status.success(),
            "{}",
            String::from_utf8_lossy(&played.stderr)
        );
        let report = schema::document(&played.stdout);
        assert!(report["capture"]["bytes_per_checkpoint_mean"].as_u64().unwrap() >= 30 << 20);
        let share = report["replay_share"]["share"].as_f64().unwrap();
        shares.push(share);
        if is_small(share) {
            break;
        }
    }
    println!("{shares:?}");
    assert!(shares.last().copied().is_some_and(is_small), "{shares:?}");
}
