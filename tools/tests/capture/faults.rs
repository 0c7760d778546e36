//! What befalls the disk or a side.

use crate::harness::{By, Running, capture, guest, read, receiver, run};
use colo_ring::net::HostWatch;
use colo_ring_tests::command::{Scratch, until};
use colo_ring_tools::capture_file::EndKind;
use colo_ring_tools::primary::SynthPrimary;
use colo_ring_tools::streams::Streams;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

const CHECKPOINTS: u64 = 50;

/// A session through a recorder whose recording ends early, which the session does not notice. Returns what it said.
fn session_outlives_the_recording(scratch: &Scratch, by: By<'_>, more: &[&str]) -> String {
    let mut secondary = receiver(scratch);
    let mut proxy = capture(scratch, &secondary.address, by, more);
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    for _ in 0..CHECKPOINTS {
        primary.checkpoint().unwrap();
    }
    proxy.wait_for("warning: the recording has ended");
    assert!(proxy.is_running());
    primary.close().unwrap();
    let received = secondary.wait();
    assert_eq!(received.code, Some(0), "{}", received.log);
    assert_eq!(received.report()["report"]["total"]["checkpoints"], CHECKPOINTS);
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(1), "{}", ended.log);
    assert!(ended.report()["ended_early"].is_string());
    assert_eq!(
        ended.report()["added"]["checkpoints"],
        CHECKPOINTS,
        "measuring goes on"
    );
    ended.log
}

/// The room ends in the middle of precopy: `ulimit -f` does to a write what a full disk does.
#[test]
fn a_full_disk_ends_the_recording_and_not_the_session() {
    let scratch = Scratch::new();
    // 512-byte blocks in sh: 2 MiB.
    let log =
        session_outlives_the_recording(&scratch, By::Limited("ulimit -f 4096"), &["--compress", "none"]);
    assert!(log.contains("ulimit -f unlimited"), "{log}");
    let contents = read(&scratch);
    let tear = contents.tear.expect("it is cut short");
    let length = std::fs::metadata(scratch.file("cap")).unwrap().len();
    assert!(tear.offset <= length && length <= 2 << 20, "{tear} of {length}");
    let recorded: usize = contents.flows.values().map(|flows| flows[0].bytes.len()).sum();
    assert!(recorded > 500_000, "only {recorded} bytes were kept");
}

#[test]
fn a_disk_that_is_full_from_the_start_is_reported() {
    let ended = run(&[
        "capture",
        "--listen",
        "tcp:127.0.0.1:0",
        "--to",
        "tcp:127.0.0.1:1",
        "--out",
        "/dev/full",
        "--force",
    ]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.log.contains("make room"), "{}", ended.log);
}

/// A queue of one byte is behind as soon as two things come at once. Before the guest is protected that only slows the
/// migration down, and nothing is lost.
#[test]
fn a_disk_that_is_too_slow_ends_the_recording_and_not_the_session() {
    let scratch = Scratch::new();
    let log = session_outlives_the_recording(&scratch, By::Itself, &["--queue", "1"]);
    assert!(log.contains("--when-behind wait"), "{log}");
    let contents = read(&scratch);
    assert_eq!(contents.tear, None, "what is there was finished");
    let ready = contents.beginning(b"QEVM")[1].bytes.len();
    assert!(ready >= 20, "PONG, SHUT and READY: {ready} bytes");
    assert!(
        contents.notes.iter().any(|note| note.contains("did not keep up")),
        "{:?}",
        contents.notes
    );
}

#[test]
fn waiting_for_the_disk_loses_nothing() {
    let scratch = Scratch::new();
    let mut secondary = receiver(&scratch);
    let more = ["--queue", "1", "--when-behind", "wait"];
    let mut proxy = capture(&scratch, &secondary.address, By::Itself, &more);
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    for _ in 0..10 {
        primary.checkpoint().unwrap();
    }
    primary.close().unwrap();
    assert_eq!(secondary.wait().code, Some(0));
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert_eq!(
        Streams::load(Path::new(&scratch.file("cap")))
            .unwrap()
            .checkpoints
            .len(),
        10
    );
}

#[test]
fn a_lost_secondary_is_the_primarys_loss_and_the_recording_is_complete() {
    let scratch = Scratch::new();
    let mut secondary = receiver(&scratch);
    let mut proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    primary.checkpoint().unwrap();
    secondary.kill();
    let lost = (0..100).find_map(|_| primary.checkpoint().err());
    assert!(lost.is_some(), "the primary must see it");
    drop(primary);
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    let contents = read(&scratch);
    assert_eq!(contents.tear, None);
    assert!(contents.flows.values().flatten().all(|flow| flow.end.is_some()));
    assert!(
        !Streams::load(Path::new(&scratch.file("cap")))
            .unwrap()
            .checkpoints
            .is_empty()
    );
}

#[test]
fn a_lost_primary_is_the_secondarys_loss_and_the_recording_is_complete() {
    let scratch = Scratch::new();
    let mut secondary = receiver(&scratch);
    let mut proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    primary.checkpoint().unwrap();
    drop(primary);
    let received = secondary.wait();
    assert_eq!(
        received.report()["sessions"][0]["checkpoint"],
        1,
        "{}",
        received.log
    );
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert_eq!(read(&scratch).tear, None);
}

/// A recorder that is killed leaves what it had written.
#[test]
fn a_killed_recorder_leaves_a_readable_file() {
    let scratch = Scratch::new();
    let secondary = receiver(&scratch);
    let mut proxy = capture(&scratch, &secondary.address, By::Itself, &[]);
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    primary.checkpoint().unwrap();
    let path = scratch.file("cap");
    until("it is flushed", || {
        let streams = Streams::load(Path::new(&path)).ok()?;
        (streams.checkpoints.len() == 1).then_some(())
    });
    proxy.kill();
    assert!((0..100).find_map(|_| primary.checkpoint().err()).is_some());
    assert!(read(&scratch).tear.is_some());
    assert!(!Streams::load(Path::new(&path)).unwrap().checkpoints.is_empty());
}

/// A secondary that makes room for a large guest reads nothing for a while. Without a recorder a primary waits for it.
#[test]
fn a_secondary_that_reads_nothing_for_long_is_waited_for() {
    let scratch = Scratch::new();
    let secondary = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", secondary.local_addr().unwrap())
        .parse()
        .unwrap();
    let proxy = capture(&scratch, &to, By::Itself, &[]);
    let front = proxy.address.to_string();
    let mut primary = TcpStream::connect(front.strip_prefix("tcp:").unwrap()).unwrap();
    let (mut behind, _) = secondary.accept().unwrap();
    // More than the buffers on the way hold.
    const BYTES: usize = 64 << 20;
    let sending = std::thread::spawn(move || primary.write_all(&vec![1; BYTES]));
    std::thread::sleep(Duration::from_secs(
        u64::from(HostWatch::default().give_up_after_s) + 2,
    ));
    assert!(!sending.is_finished());
    let mut read = vec![0; BYTES];
    behind.read_exact(&mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 1));
    sending.join().unwrap().unwrap();
}

#[test]
fn without_a_secondary_connections_are_reset_and_the_next_attempt_counts() {
    let scratch = Scratch::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let to = format!("tcp:{address}").parse().unwrap();
    let mut proxy = capture(&scratch, &to, By::Itself, &[]);
    assert!(SynthPrimary::connect(&proxy.address, &guest()).is_err());
    proxy.wait_for("is the secondary listening there?");
    // It comes late.
    let secondary = Running::start(
        By::Itself,
        &[
            "receive",
            "--listen",
            &to.to_string(),
            "--channels",
            "2",
            "--hugepages",
            "off",
        ],
    );
    let mut primary = SynthPrimary::connect(&proxy.address, &guest()).unwrap();
    primary.checkpoint().unwrap();
    primary.close().unwrap();
    let ended = proxy.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    drop(secondary);
    let contents = read(&scratch);
    assert!(
        contents.notes.iter().any(|note| note.contains("was reset")),
        "{:?}",
        contents.notes
    );
    assert_eq!(
        contents.flows.values().next().unwrap()[0].end,
        Some(EndKind::Reset)
    );
}

#[test]
fn a_file_is_not_overwritten_unless_that_is_asked_for() {
    let scratch = Scratch::new();
    std::fs::write(scratch.file("cap"), "precious").unwrap();
    let (out, to) = (scratch.file("cap"), "tcp:127.0.0.1:1");
    let ended = run(&[
        "capture",
        "--listen",
        "tcp:127.0.0.1:0",
        "--to",
        to,
        "--out",
        &out,
    ]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.log.contains("--force"), "{}", ended.log);
    assert_eq!(std::fs::read(&out).unwrap(), b"precious");
    let proxy = capture(&scratch, &to.parse().unwrap(), By::Itself, &["--force"]);
    assert!(read(&scratch).flows.is_empty());
    drop(proxy);
}
