//! What a host does to the receiver as a process: it is stopped, and its clock is set.

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::lab::SharedDirectory;
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Whether all of its threads are.
fn is_stopped(receiver: &RunningReceiver) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", receiver.pid())).expect("it runs");
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.contains(") T ")
    })
}

/// A debugger, a snapshot of the host, or a freezer: the primary waits, and goes on with the receiver.
#[test]
fn a_receiver_that_was_stopped_goes_on() {
    for backend in ["uring", "epoll", "threads"] {
        let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off", "--backend", backend]);
        let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
        primary.checkpoint().expect("a checkpoint");
        receiver.signal(Signal::SIGSTOP);
        until("its stop", || is_stopped(&receiver).then_some(()));
        // In the middle of one, from its request on.
        std::thread::scope(|threads| {
            let checkpoint = threads.spawn(|| primary.checkpoint());
            std::thread::sleep(Duration::from_secs(2));
            assert!(!checkpoint.is_finished(), "{backend}: it was not stopped");
            receiver.signal(Signal::SIGCONT);
            let checkpoint = checkpoint.join().expect("no panic");
            checkpoint.expect("the checkpoint that had to wait");
        });
        primary.checkpoint().expect("one more");
        receiver.check_dump(&primary, &receiver.protected(), 3);
        receiver.signal(Signal::SIGTERM);
        assert_eq!(receiver.wait().status.code(), Some(0), "{backend}");
    }
}

/// The standard output of a failover, and nobody reads it.
#[test]
fn a_failover_that_nobody_reads_ends_with_the_receiver() {
    let mut receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    drop(primary);
    receiver.wait_for_log("session 1 ended");
    let mut failover = wrapped(&[]);
    failover.args(["failover", "--session", "1", "--to", "-"]);
    failover.args(["--control", &format!("unix:{}", receiver.control_path())]);
    failover.stdout(Stdio::piped()).stderr(Stdio::piped());
    let failover = failover.spawn().expect("the command");
    let is_claimed = || receiver.status()["sessions"][0]["promotion"].is_string();
    until("its claim", || is_claimed().then_some(()));
    // Its pipe is full then.
    std::thread::sleep(Duration::from_secs(1));
    receiver.signal(Signal::SIGTERM);
    until("its end", || receiver.exit_code());
    let ended = failover.wait_with_output().expect("its end");
    assert!(!ended.status.success());
}

/// A receiver whose clock shows what is in that file.
fn with_clock(clock: &Path) -> Command {
    let mut command = wrapped(&[]);
    let architecture = std::env::consts::ARCH;
    let library = format!("/usr/lib/{architecture}-linux-gnu/faketime/libfaketime.so.1");
    assert!(
        Path::new(&library).exists(),
        "{library} is missing: apt-get install faketime"
    );
    command
        .env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", clock)
        .env("FAKETIME_NO_CACHE", "1")
        // Nothing sets the monotonic clock.
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    command
}

/// The wall clock is for people: nothing is measured with it, and nothing waits for it.
#[test]
fn steps_of_the_clock_change_nothing() {
    let scratch = Scratch::new();
    let clock = scratch.path().join("clock");
    let ram = SharedDirectory::new().expect("a directory");
    let ram_dir = ram.path().display().to_string();
    let set = |offset: &str| std::fs::write(&clock, offset).expect("a file");
    set("+0");
    // The library that sets the clock reads that file in every thread.
    let args = ["--hugepages", "off", "--ram-dir", &ram_dir, "--sandbox", "off"];
    let receiver = RunningReceiver::start(with_clock(&clock), &args);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    for (at_commit, afterwards) in [
        ("+400d", "+800d"),
        ("-400d", "+0"),
        ("+1h", "-1h"),
        ("-1h", "+400d"),
        ("+0", "+400d"),
    ] {
        set(at_commit);
        primary.checkpoint().expect("a checkpoint");
        set(afterwards);
        let age = receiver.protected()["checkpoint_age_ms"]
            .as_u64()
            .expect("an age");
        assert!(age < 3_600_000, "{at_commit}, {afterwards}: {age} ms");
    }
    set("+400d");
    primary.checkpoint().expect("a checkpoint");
    receiver.check_dump(&primary, &receiver.protected(), 6);
    // The next receiver's clock is 400 days behind that of the one before.
    receiver.signal(Signal::SIGKILL);
    drop(receiver);
    set("+0");
    let next = RunningReceiver::start(with_clock(&clock), &args);
    let recovered = || {
        let status = next.status();
        let sessions = status["sessions"].as_array()?;
        sessions
            .iter()
            .find(|session| session["checkpoint"] == 6)
            .cloned()
    };
    let session: Value = until("the recovered checkpoint", recovered);
    next.check_dump(&primary, &session, 6);
    // By its clock it will be committed in 400 days.
    let age = session["checkpoint_age_ms"].as_u64().expect("an age");
    assert!(age < 3_600_000, "{age} ms");
}
