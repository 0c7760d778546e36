//! A disk for measurements that is full for a while, or at the end; a pipe that nobody reads.

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, run, until, wrapped};
use colo_ring_tests::schema;
use colo_ring_tools::primary::SynthPrimary;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// A receiver whose files cannot be longer than a limit that is set later: writes end in the middle of a line, as on a disk that
/// is full.
fn with_limited_files() -> RunningReceiver {
    RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"])
}

fn limit_files(receiver: &RunningReceiver, bytes: &str) {
    let (pid, limit) = (receiver.pid().to_string(), format!("--fsize={bytes}:"));
    let status = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(status.expect("prlimit (util-linux)").success());
}

fn log_bytes(receiver: &RunningReceiver) -> u64 {
    let log = std::fs::metadata(format!("{}.pause.hlog", receiver.histograms()));
    log.expect("a log").len()
}

/// Checkpoints until something is found.
fn checkpoints_until(primary: &mut SynthPrimary, what: &str, found: impl Fn() -> bool) {
    until(what, || {
        primary.checkpoint().expect("a checkpoint");
        found().then_some(())
    });
}

#[test]
fn measurements_after_a_full_disk_can_be_read() {
    let receiver = with_limited_files();
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    let empty = log_bytes(&receiver);
    checkpoints_until(&mut primary, "an interval", || log_bytes(&receiver) > empty);
    limit_files(&receiver, &(log_bytes(&receiver) + 40).to_string());
    let lost = || receiver.status()["intervals_lost"].as_u64().expect("a number");
    checkpoints_until(&mut primary, "lost intervals", || lost() >= 2);
    limit_files(&receiver, "unlimited");
    let full = log_bytes(&receiver);
    checkpoints_until(&mut primary, "one more interval", || log_bytes(&receiver) > full);
    let log = std::fs::read_to_string(format!("{}.pause.hlog", receiver.histograms())).expect("a log");
    assert!(log.contains("intervals are missing here"), "{log}");
    for phase in ["reply", "transfer", "vmstate", "commit", "pause", "flush"] {
        let path = format!("{}.{phase}.hlog", receiver.histograms());
        let inspected = run(&["inspect", &path]);
        assert!(inspected.status.success(), "{inspected:?}");
    }
    assert!(
        receiver.log().contains("cannot write measurements"),
        "{}",
        receiver.log()
    );
    drop(primary);
    receiver.signal(Signal::SIGTERM);
    let ended = receiver.wait();
    assert!(
        ended.report["report"]["intervals_lost"].as_u64() >= Some(2),
        "{}",
        ended.report
    );
}

#[test]
fn measurements_that_cannot_be_written_at_the_end_do_not_cost_the_report() {
    let mut receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    std::fs::create_dir(format!("{}.json", receiver.histograms())).expect("a directory in its place");
    drop(primary);
    receiver.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || receiver.exit_code()), 1);
    let report = schema::document(receiver.output().as_bytes());
    assert_eq!(report["sessions"][0]["checkpoint"], 1);
    let log = receiver.log();
    assert!(log.contains("cannot write measurements"), "{log}");
}

/// A write to the pipe waits for ever: guests, the control socket and SIGTERM do not.
#[test]
fn a_log_that_takes_nothing_holds_nothing_up() {
    let scratch = Scratch::new();
    let path = scratch.file("hist.pause.hlog");
    mkfifo(&*path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe");
    // Open for both, so that no end waits for the other.
    let mut both = File::options();
    both.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let mut pipe = both.open(&path).expect("the pipe");
    fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(4096)).expect("a size of a pipe");
    let mut receiver = RunningReceiver::start_in(scratch, wrapped(&[]), 2, &["--hugepages", "off"]);
    while pipe.write(b"#").is_ok() {}
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    // Some intervals.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        primary.checkpoint().expect("a checkpoint");
        assert!(receiver.status()["sessions"].is_array());
    }
    receiver.signal(Signal::SIGTERM);
    assert_eq!(until("its end", || receiver.exit_code()), 1);
    let report = schema::document(receiver.output().as_bytes());
    assert!(report["report"]["intervals_lost"].as_u64() >= Some(2), "{report}");
    let log = receiver.log();
    assert!(log.contains("the last measurements were not written to"), "{log}");
}
