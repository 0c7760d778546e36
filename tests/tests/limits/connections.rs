//! Connections of strangers.

use super::socket_address;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, wrapped};
use colo_ring_tests::hostile::{Destination, Link};
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

/// This process holds more connections than a shell usually allows.
fn raise_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    assert!(hard >= 8192, "this test needs `ulimit -Hn` of 8192 or more");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("a limit");
}

/// Silent connections, more than may wait, which are replaced all the time while `meanwhile` runs.
fn beside_silent_connections<T>(address: SocketAddr, meanwhile: impl FnOnce() -> T) -> T {
    raise_open_files();
    let over = AtomicBool::new(false);
    let mut silent: Vec<_> = (0..1100).map(|_| Link::connect(address)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                silent.rotate_left(20);
                let oldest = silent.len() - 20;
                silent[oldest..]
                    .iter_mut()
                    .for_each(|link| *link = Link::connect(address));
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        });
        // Also if it panics.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        over.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn silent_connections_keep_no_guest_out() {
    // They do not go by themselves.
    let args = ["--hugepages", "off", "--accept-timeout", "3600"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    beside_silent_connections(socket_address(&receiver), || {
        for _ in 0..3 {
            assert_eq!(receiver.protect()["checkpoint"], 5);
        }
    });
    assert!(
        receiver.log().contains("a silent connection was closed"),
        "{}",
        receiver.log()
    );
}

/// Two hosts hold all places with channels that have said what they are, and whose main channels do not come.
#[test]
fn halves_of_sessions_keep_no_guest_out() {
    raise_open_files();
    // They do not go by themselves.
    let args = ["--hugepages", "off", "--accept-timeout", "3600"];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let address = socket_address(&receiver);
    let hosts = [2, 3].map(|host| Destination {
        address,
        from: Ipv4Addr::new(127, 0, 0, host),
    });
    let channels = (0..1100_u128).flat_map(|number| {
        let uuid = (number + 1).to_le_bytes();
        hosts.map(|host| Link::multifd(host, uuid, 0))
    });
    let halves: Vec<_> = channels.collect();
    for _ in 0..3 {
        assert_eq!(receiver.protect()["checkpoint"], 5);
    }
    assert!(
        receiver.log().contains("the oldest make room"),
        "{}",
        receiver.log()
    );
    drop(halves);
}

/// As few as a shell allows a receiver by default: what strangers cannot take is for dumps, failovers and the control socket.
#[test]
fn few_descriptors_leave_some_for_the_operator() {
    let args = ["--hugepages", "off", "--accept-timeout", "3600"];
    let receiver = RunningReceiver::start(wrapped(&["prlimit", "--nofile=512"]), &args);
    let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
    primary.checkpoint().expect("a checkpoint");
    beside_silent_connections(socket_address(&receiver), || {
        for checkpoint in 1..4 {
            let session = receiver.protected();
            receiver.check_dump(&primary, &session, checkpoint);
            primary.checkpoint().expect("a checkpoint");
        }
        let mut other = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy of another");
        other.checkpoint().expect("a checkpoint");
    });
    assert!(receiver.log().contains("raise `ulimit -n`"), "{}", receiver.log());
}

#[test]
fn refused_connections_are_counted_and_not_all_logged() {
    const CONNECTIONS: usize = 3000;
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "off"]);
    for _ in 0..CONNECTIONS {
        let mut stranger = Link::connect(socket_address(&receiver));
        stranger.send(b"HELO");
        assert!(stranger.is_closed());
    }
    receiver.wait_for_log("more connections that did not say what they are were closed within");
    let log = receiver.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("which is not a migration channel"))
        .count();
    println!("{lines} lines for {CONNECTIONS} connections");
    // One host that checks this port every few seconds must not fill the log.
    assert!((1..10).contains(&lines), "{lines}");
    let counted = log
        .lines()
        .filter_map(|line| line.split_once(" more connections that did"));
    let counted: usize = counted
        .map(|(count, _)| {
            count
                .trim_start_matches("warning: ")
                .parse::<usize>()
                .expect("a count")
        })
        .sum();
    assert_eq!(lines + counted, CONNECTIONS, "{log}");
}

/// It looks whether the socket is in use some hundred times within a second.
#[test]
fn a_second_receiver_at_an_address_fills_no_log() {
    let scratch = Scratch::new();
    let address = format!("unix:{}", scratch.file("socket"));
    let receiver = RunningReceiver::start(wrapped(&[]), &["--listen", &address]);
    let mut second = wrapped(&["timeout", "60"]);
    let second = second
        .args(["receive", "--listen", &address])
        .output()
        .expect("the command");
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && text.contains("in use"), "{text}");
    receiver.wait_for_log("connections that did not say what they are were closed within");
    let log = receiver.log();
    let lines = log.lines().filter(|line| line.contains("closed before"));
    assert!((1..10).contains(&lines.count()), "{log}");
}
