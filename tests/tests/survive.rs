//! A receiver that is killed, and what the next one with the same RAM directory makes of it.

use colo_ring::wire::codec::Method;
use colo_ring_tests::command::{RunningReceiver, guest, run, until, wrapped};
use colo_ring_tests::random::generator;
use colo_ring_tools::page_compression::PageCompression;
use colo_ring_tools::primary::{SynthOptions, SynthPrimary};
use nix::sys::signal::Signal;
use rand::RngExt;
use std::fs;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Kills that are tried.
const RUNS: u32 = 60;

/// A directory on a tmpfs, gone with its test.
struct RamDirectory(TempDir);

impl RamDirectory {
    fn new() -> Self {
        let mut named = tempfile::Builder::new();
        Self(named.prefix("colo-ring-survive-").tempdir_in("/dev/shm").unwrap())
    }

    /// For two channels.
    fn start(&self, args: &[&str]) -> RunningReceiver {
        self.start_for(2, args)
    }

    fn start_for(&self, channels: u8, args: &[&str]) -> RunningReceiver {
        let ram_dir = ["--ram-dir", self.0.path().to_str().unwrap()];
        RunningReceiver::with_channels(wrapped(&[]), channels, &[&ram_dir, args].concat())
    }

    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// What a guest was at a checkpoint.
struct Snapshot {
    blocks: Vec<(String, Vec<u8>)>,
    device_state: Vec<u8>,
}

impl Snapshot {
    fn of(primary: &SynthPrimary) -> Self {
        let block = |(name, _): (String, u64)| {
            let bytes = primary.image(&name).unwrap().to_vec();
            (name, bytes)
        };
        Self {
            blocks: primary.blocks().into_iter().map(block).collect(),
            device_state: primary.device_state().to_vec(),
        }
    }
}

/// What the primary knew when its receiver was gone.
struct Known {
    /// Checkpoints that it saw acknowledged.
    acknowledged: u64,
    /// The last of them, and the guest as it was when the next one broke off.
    last: Snapshot,
    next: Snapshot,
}

/// Takes checkpoints as fast as it goes, until the receiver is gone.
fn until_it_is_gone(mut primary: SynthPrimary, begun: &mpsc::Sender<()>) -> Known {
    let mut last = Snapshot::of(&primary);
    begun.send(()).unwrap();
    for acknowledged in 0.. {
        if primary.checkpoint().is_err() {
            let next = Snapshot::of(&primary);
            return Known {
                acknowledged,
                last,
                next,
            };
        }
        last = Snapshot::of(&primary);
    }
    unreachable!("every receiver is killed")
}

/// Asks the receiver for the checkpoint of session 1, compares it with what the primary knew, and says which it was.
fn compare(receiver: &RunningReceiver, known: &Known) -> u64 {
    let (dumped, read) = receiver.dump(1);
    let checkpoint = dumped["checkpoint"].as_u64().unwrap();
    let acknowledged = known.acknowledged;
    assert!(
        (acknowledged..=acknowledged + 1).contains(&checkpoint),
        "checkpoint {checkpoint} is there, {acknowledged} was acknowledged"
    );
    let is_last = checkpoint == acknowledged;
    let expected = if is_last { &known.last } else { &known.next };
    let blocks = dumped["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), expected.blocks.len());
    for (block, (name, bytes)) in blocks.iter().zip(&expected.blocks) {
        assert_eq!(block["name"], **name);
        let found = read(block["file"].as_str().unwrap());
        assert!(found == *bytes, "block {name} of checkpoint {checkpoint} differs");
    }
    let device_state = read(dumped["device_state_file"].as_str().unwrap());
    // Of the one that was not acknowledged the primary keeps none, unless RECEIVED reached it.
    match is_last {
        true => assert!(checkpoint == 0 || device_state == known.last.device_state),
        false => assert_ne!(device_state, known.last.device_state),
    }
    checkpoint
}

fn small_guest(seed: u64) -> SynthOptions {
    SynthOptions {
        ram_bytes: 2 << 20,
        seed,
        ..guest()
    }
}

/// One kill. Returns whether the checkpoint that was found was not yet acknowledged.
fn kill_once(run: u32, delay: Duration) -> bool {
    let began = Instant::now();
    let directory = RamDirectory::new();
    let backend = ["uring", "epoll", "threads"][usize::try_from(run % 3).unwrap()];
    // Of the sessions of each kind, too.
    let commit = if (run + run / 12).is_multiple_of(4) {
        "sync"
    } else {
        "deferred"
    };
    let kinds = [
        (Method::None, false),
        (Method::Zstd, false),
        (Method::Zlib, false),
        (Method::None, true),
    ];
    let (method, xbzrle) = kinds[usize::try_from(run / 3 % 4).unwrap()];
    let channels = if xbzrle { 0 } else { 2 };
    let receiver = directory.start_for(channels, &["--backend", backend, "--commit", commit]);
    let shape = SynthOptions {
        channels,
        xbzrle,
        compression: PageCompression {
            method,
            level: (method != Method::None).then_some(1),
        },
        ..small_guest(u64::from(run))
    };
    let primary = SynthPrimary::connect(receiver.address(), &shape).unwrap();
    let (begun, begins) = mpsc::channel();
    let primary = std::thread::spawn(move || until_it_is_gone(primary, &begun));
    begins.recv().unwrap();
    std::thread::sleep(delay);
    // By SIGKILL, and waits for it.
    drop(receiver);
    let known = primary.join().unwrap();

    let receiver = directory.start(&[]);
    receiver.wait_for_log("session 1 of");
    let status = receiver.status();
    let session = &status["sessions"][0];
    assert_eq!(
        (&session["session"], &session["state"]),
        (&1.into(), &"recovered".into())
    );
    let age_ms = session["checkpoint_age_ms"].as_u64().unwrap();
    assert!(u128::from(age_ms) <= began.elapsed().as_millis(), "{age_ms}");
    let checkpoint = compare(&receiver, &known);
    assert_eq!(session["checkpoint"], checkpoint);
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "1"])["discarded"],
        1
    );
    assert_eq!(directory.files(), Vec::<String>::new());
    checkpoint > known.acknowledged
}

#[test]
fn a_killed_receiver_leaves_the_last_checkpoint_whole() {
    let mut random = generator("COLO_RING_SURVIVE_SEED");
    let mut unacknowledged = 0;
    for run in 0..RUNS {
        let delay = Duration::from_micros(random.random_range(..60_000));
        println!("run {run}: killed after {delay:?}");
        unacknowledged += u32::from(kill_once(run, delay));
    }
    println!("{unacknowledged} of {RUNS} were not acknowledged yet");
}

/// Killed, ended, killed again: always there; new sessions beside it; then an end that leaves nothing.
#[test]
fn a_checkpoint_stays_through_any_number_of_receivers() {
    let directory = RamDirectory::new();
    let receiver = directory.start(&[]);
    let mut primary = SynthPrimary::connect(receiver.address(), &small_guest(1)).unwrap();
    for _ in 0..3 {
        primary.checkpoint().unwrap();
    }
    // No receiver starts beside it.
    let ram_dir = directory.0.path().to_str().unwrap();
    let beside = run(&["receive", "--listen", "tcp:127.0.0.1:0", "--ram-dir", ram_dir]);
    let refused = String::from_utf8_lossy(&beside.stderr);
    let named = format!("is used by another process, {}:", receiver.pid());
    assert!(!beside.status.success() && refused.contains(&named), "{refused}");
    assert!(refused.contains("a directory of its own"), "{refused}");
    primary.checkpoint().unwrap();
    let known = Known {
        acknowledged: 4,
        last: Snapshot::of(&primary),
        next: Snapshot::of(&primary),
    };
    receiver.signal(Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(ended.status.success());
    assert!(
        ended.log.contains("its last checkpoint stays in"),
        "{}",
        ended.log
    );
    for end in [Some(Signal::SIGTERM), None, Some(Signal::SIGINT)] {
        let receiver = directory.start(&[]);
        assert_eq!(compare(&receiver, &known), 4);
        let beside = receiver.protect();
        assert_eq!(beside["session"], 2, "not the number of one that is kept");
        assert_eq!(
            receiver.ask(&["discard", "--json", "--session", "2"])["discarded"],
            2
        );
        if let Some(signal) = end {
            receiver.signal(signal);
            assert!(receiver.wait().status.success());
        }
    }
    let receiver = directory.start(&[]);
    assert_eq!(
        receiver.ask(&["discard", "--json", "--session", "1"])["discarded"],
        1
    );
    assert_eq!(directory.files(), Vec::<String>::new());
}

/// What a receiver was killed with in precopy is removed; what is damaged, or not ours, stays, with a warning.
#[test]
fn what_cannot_be_used_is_reported() {
    let directory = RamDirectory::new();
    let write = |name: &str, bytes: &[u8]| fs::write(directory.0.path().join(name), bytes).unwrap();
    write("session-4.pc.ram", &[0; 4096]);
    write("session-5.~record", &[1; 4096]);
    write("session-6.~record", b"short");
    write("somebody-else.img", b"");
    let before = directory.files();
    let receiver = directory.start(&[]);
    receiver.wait_for_log("session-4.* cannot be used and stay as they are: there is no commit record");
    receiver.wait_for_log("it is not a commit record of a receiver");
    receiver.wait_for_log("session-6.* cannot be used");
    assert_eq!(directory.files(), before);
    let session = receiver.protect();
    assert_eq!(session["session"], 7);
}

/// A mirror's checkpoints go with their receiver: that is logged, and the next one removes what a killed one has left.
#[test]
fn a_mirror_does_not_last_and_leaves_nothing() {
    let directory = RamDirectory::new();
    let receiver = directory.start(&["--cache", "mirror"]);
    let _ = receiver.protect();
    receiver.wait_for_log("do not outlive this receiver");
    assert!(!directory.files().is_empty());
    drop(receiver);
    assert!(!directory.files().is_empty());
    let receiver = directory.start(&[]);
    receiver.wait_for_log("no checkpoint in them outlives its receiver");
    assert_eq!(directory.files(), Vec::<String>::new());
}

/// The receiver ends in order, at a moment at which a thread is making the memory of a guest.
#[test]
fn an_end_while_memory_is_made_leaves_nothing() {
    let directory = RamDirectory::new();
    let receiver = directory.start(&[]);
    let (address, shape) = (
        receiver.address().clone(),
        SynthOptions {
            ram_bytes: 512 << 20,
            ..guest()
        },
    );
    let primary = std::thread::spawn(move || SynthPrimary::connect(&address, &shape).is_ok());
    until("files", || (!directory.files().is_empty()).then_some(()));
    receiver.signal(Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(ended.status.success(), "{}", ended.log);
    assert_eq!(directory.files(), Vec::<String>::new(), "{}", ended.log);
    assert!(
        !primary.join().unwrap(),
        "its memory was made too fast for this test"
    );
}

/// Files whose names are like those of sessions: their numbers are not used, whatever they are, and nothing of them is removed
/// with a session.
#[test]
fn files_of_others_are_left_alone() {
    let directory = RamDirectory::new();
    let write = |name: &str| fs::write(directory.0.path().join(name), "precious").unwrap();
    let others = ["session-2.notes", "session-4294967295.x"];
    others.iter().for_each(|name| write(name));
    let receiver = directory.start(&[]);
    for number in [1, 3] {
        let session = receiver.protect();
        assert_eq!(session["session"], number);
        let copy = format!("session-{number}.pc.ram.backup-by-operator");
        write(&copy);
        let discard = ["discard", "--json", "--session", &number.to_string()];
        assert_eq!(receiver.ask(&discard)["discarded"], number);
        let mut left: Vec<_> = others.map(str::to_owned).into();
        left.push(copy.clone());
        left.sort();
        assert_eq!(directory.files(), left);
        fs::remove_file(directory.0.path().join(copy)).unwrap();
    }
}
