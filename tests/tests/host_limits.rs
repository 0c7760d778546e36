//! The real command on hosts that lack something, and beside programs that are in its way. It reports what is missing
//! with the remedy, and continues where it can.

use colo_ring_tests::command::{RunningReceiver, Scratch, guest, run, without_io_uring, wrapped};
use colo_ring_tests::hostile::{HostilePrimary, Link};
use colo_ring_tools::net::Address;
use colo_ring_tools::primary::{SynthOptions, SynthPrimary};
use nix::libc;
use nix::sys::signal::Signal;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

const BACKENDS: [&str; 3] = ["uring", "epoll", "threads"];

fn socket_address(receiver: &RunningReceiver) -> SocketAddr {
    match receiver.address() {
        Address::Tcp(address) => address.parse().unwrap(),
        Address::Unix(_) => panic!("it listens on TCP"),
    }
}

#[test]
fn without_io_uring_it_goes_on_with_epoll_and_says_why() {
    for (errno, remedy) in [
        (libc::EPERM, "it is forbidden by a seccomp filter"),
        (libc::ENOSYS, "use a kernel with CONFIG_IO_URING"),
    ] {
        let receiver = without_io_uring(errno, || RunningReceiver::start(wrapped(&[]), &[]));
        let log = receiver.log();
        assert!(log.contains("the backend uring is not available"), "{log}");
        assert!(
            log.contains(remedy) && log.contains("receiving with epoll instead"),
            "{log}"
        );
        assert_eq!(receiver.protect()["checkpoint"], 5);
        assert_eq!(receiver.status()["backend"], "epoll");
        receiver.signal(Signal::SIGTERM);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    }
}

#[test]
fn without_io_uring_the_other_backends_miss_nothing() {
    for backend in ["epoll", "threads"] {
        let receiver = without_io_uring(libc::EPERM, || {
            RunningReceiver::start(wrapped(&[]), &["--backend", backend, "--hugepages", "off"])
        });
        // A stranger, so that the control thread reads and closes without io_uring too.
        let mut browser = Link::connect(socket_address(&receiver));
        browser.send(b"GET / HTTP/1.1\r\n\r\n");
        assert!(browser.is_closed());
        assert_eq!(receiver.protect()["checkpoint"], 5);
        assert_eq!(receiver.status()["backend"], backend);
        receiver.signal(Signal::SIGINT);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
        assert!(
            !ended.log.contains("instead"),
            "nothing was replaced: {}",
            ended.log
        );
    }
}

/// What runs a command line with so many bytes of lockable memory, and without the privilege that lifts the limit.
fn with_locked_memory(bytes: u32) -> Command {
    let limit = format!("--memlock={bytes}");
    let mut wrap = vec!["prlimit", &limit];
    if nix::unistd::geteuid().is_root() {
        wrap.splice(
            0..0,
            ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"],
        );
    }
    for program in wrap.iter().filter(|word| !word.starts_with('-')) {
        let found = Command::new(program).arg("--version").output();
        assert!(found.is_ok(), "this test needs {program}: install util-linux");
    }
    wrapped(&wrap)
}

#[test]
fn too_little_locked_memory_for_the_cache_costs_registered_buffers_only() {
    let receiver = RunningReceiver::start(with_locked_memory(4 << 20), &["--hugepages", "off"]);
    assert_eq!(receiver.protect()["checkpoint"], 5);
    assert_eq!(receiver.status()["backend"], "uring");
    let log = receiver.log();
    assert!(log.contains("received there without registered buffers"), "{log}");
    assert!(log.contains("raise `ulimit -l`"), "{log}");
}

/// Not every kernel counts a ring's own memory; where it does not, it is the buffers again.
#[test]
fn too_little_locked_memory_for_rings_costs_no_session() {
    for bytes in [0, 16 << 10, 64 << 10, 128 << 10] {
        let receiver = RunningReceiver::start(with_locked_memory(bytes), &["--hugepages", "off"]);
        assert_eq!(receiver.protect()["checkpoint"], 5);
        let log = receiver.log();
        let (buffers, rings) = (
            log.contains("raise `ulimit -l`"),
            log.contains("ulimit -l unlimited"),
        );
        assert!(buffers || rings, "{log}");
        receiver.signal(Signal::SIGTERM);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    }
}

#[test]
fn without_huge_pages_ordinary_ones_are_used() {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = memory
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"));
    let free = free.expect("a kernel with hugetlbfs").trim();
    assert_eq!(
        free, "0",
        "this test needs a host without free huge pages: `sysctl vm.nr_hugepages=0`"
    );
    let receiver = RunningReceiver::start(wrapped(&[]), &["--hugepages", "2M"]);
    let session = receiver.protect();
    assert!(
        receiver.log().contains("sysctl vm.nr_hugepages="),
        "{}",
        receiver.log()
    );
    assert!(!session["fallbacks"].as_array().unwrap().is_empty(), "{session}");
}

#[test]
fn few_open_files_cost_connections_and_not_the_receiver() {
    for backend in BACKENDS {
        let wrap = ["prlimit", "--nofile=64"];
        let args = [
            "--backend",
            backend,
            "--hugepages",
            "off",
            "--accept-timeout",
            "1",
        ];
        let receiver = RunningReceiver::start(wrapped(&wrap), &args);
        let address = socket_address(&receiver);
        let mut silent: Vec<_> = (0..80).map(|_| Link::connect(address)).collect();
        receiver.wait_for_log("raise `ulimit -n`");
        assert!(silent.iter_mut().all(Link::is_closed));
        drop(silent);
        assert_eq!(receiver.protect()["checkpoint"], 5, "{backend}");
    }
}

#[test]
fn what_is_missing_at_the_start_is_reported_with_a_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("tcp:{}", taken.local_addr().unwrap());
    let scratch = Scratch::new();
    let missing = scratch.file("missing/file");
    let control = format!("unix:{missing}");
    let free = ["receive", "--listen", "tcp:127.0.0.1:0"];
    let cases = vec![
        (vec!["receive", "--listen", &port], vec!["ss -lntpx", &port]),
        (
            vec!["receive", "--listen", "tcp:192.0.2.1:0"],
            vec!["`ip address`"],
        ),
        (
            vec!["receive", "--listen", &control],
            vec![&missing, "No such file or directory"],
        ),
        (
            [&free[..], &["--control", &control]].concat(),
            vec![&missing, "No such file or directory"],
        ),
        (
            [&free[..], &["--hist", &missing]].concat(),
            vec![&missing, "No such file or directory"],
        ),
    ];
    for backend in BACKENDS {
        // What this machine cannot honour is wrong usage.
        let refused = run(&[&free[..], &["--cores", "0,1000", "--backend", backend]].concat());
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{backend}: {said}");
        assert!(
            said.contains("core 1000 is not there") && said.contains("may use"),
            "{said}"
        );
    }
    for (args, says) in cases {
        let output = run(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        for part in says {
            assert!(said.contains(part), "{args:?}: {part:?} is missing in: {said}");
        }
    }
}

#[test]
fn refused_guests_and_strangers_cost_nothing() {
    for backend in BACKENDS {
        let args = ["--backend", backend, "--ram-limit", "64M", "--hugepages", "off"];
        let receiver = RunningReceiver::start(wrapped(&[]), &args);
        let mut browser = Link::connect(socket_address(&receiver));
        browser.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(browser.is_closed());
        receiver.wait_for_log("but HTTP: this port is for QEMU's migrate command");
        let large = SynthOptions {
            ram_bytes: 64 << 20,
            ..guest()
        };
        assert!(SynthPrimary::connect(receiver.address(), &large).is_err());
        receiver.wait_for_log("MiB more exceed --ram-limit");
        assert_eq!(receiver.protect()["checkpoint"], 5, "{backend}");
        // The one that is kept takes its part of the limit.
        assert!(SynthPrimary::connect(receiver.address(), &guest()).is_err());
        receiver.wait_for_log("session 3 ended");
    }
}

/// In the middle of a checkpoint, with a connection that has not said what it is and half a session beside it.
#[test]
fn signals_end_it_in_the_middle_of_everything() {
    for backend in BACKENDS {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let receiver = RunningReceiver::start(
                wrapped(&[]),
                &[
                    "--backend",
                    backend,
                    "--hugepages",
                    "off",
                    "--accept-timeout",
                    "3600",
                ],
            );
            let address = socket_address(&receiver);
            let mut primary = HostilePrimary::protected(address, 2);
            primary.request();
            let bytes = primary.checkpoint_bytes(2, &[]);
            primary.main.send(&bytes[..bytes.len() / 2]);
            let (mut silent, mut half) = (Link::connect(address), Link::multifd(address, [3; 16], 0));
            receiver.signal(signal);
            assert!(primary.is_closed() && silent.is_closed() && half.is_closed());
            let ended = receiver.wait();
            assert!(!ended.log.contains("did not end within"), "{}", ended.log);
            assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
            let session = &ended.report["sessions"][0];
            assert_eq!(
                (&session["checkpoint"], &session["state"]),
                (&1.into(), &"ended".into())
            );
            assert_eq!(session["end"], "the receiver was stopped");
            assert_eq!(ended.histograms, ended.report["report"]);
            assert_eq!(ended.histograms["total"]["checkpoints"], 1);
        }
    }
}
