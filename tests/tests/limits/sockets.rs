//! What becomes of a primary that is in the middle of a write when its session ends: the write fails, at once. A QEMU whose write
//! hung would stand with its guest stopped.

use super::socket_address;
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::HEADER_LEN;
use colo_ring::wire::stream::Section;
use colo_ring_tests::command::{RunningReceiver, Scratch, until, wrapped};
use colo_ring_tests::hostile::{Cut, HostilePrimary, Link, RAM, message, packet, section, sync_packet};
use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How a session ends.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// By an error of its primary on the channel that is being read.
    Error,
    /// `colo-ring end`.
    Operator,
    /// `colo-ring failover`.
    Failover,
    /// One of the primary's channels ends, or is reset.
    Lost(Cut),
}

const WAYS: [Way; 5] = [
    Way::Error,
    Way::Operator,
    Way::Failover,
    Way::Lost(Cut::Fin),
    Way::Lost(Cut::Rst),
];

/// Sockets that the receiver has open, but for UNIX sockets: that on which it listens, and its primaries'.
fn sockets(receiver: &RunningReceiver) -> usize {
    let unix = std::fs::read_to_string("/proc/net/unix").expect("the kernel's table of UNIX sockets");
    let unix: HashSet<&str> = unix
        .lines()
        .filter_map(|line| line.split_whitespace().nth(6))
        .collect();
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", receiver.pid())).expect("it runs");
    let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let inode = |target: PathBuf| {
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        (!unix.contains(inode)).then(|| inode.to_owned())
    };
    targets.filter_map(inode).collect::<HashSet<_>>().len()
}

/// Writes until that fails.
fn write_on(link: &mut Link, name: &str) {
    let zeros = [0; 64 << 10];
    let error = loop {
        if let Err(error) = link.try_send(&zeros) {
            break error;
        }
    };
    let is_end = matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
    assert!(is_end, "{name}: {error}");
}

/// A session of a primary that writes on all of its connections while it ends: the main channel and the second channel are not
/// read any more, because they are at a sync which the first channel does not reach.
fn session_ends(receiver: &RunningReceiver, number: usize, way: Way, after: Duration, scratch: &Scratch) {
    let mut primary = HostilePrimary::protected(socket_address(receiver), 2);
    primary.request();
    let round = [
        message(Message::VmstateSend),
        section(Section::End { id: RAM }),
        primary.marker(),
    ];
    let main = &mut primary.main;
    main.send(&round.concat());
    let [first, second] = &mut primary.channels[..] else {
        panic!("two channels")
    };
    second.send_packet(&sync_packet());
    let (session, stream) = (
        number.to_string(),
        format!("file:{}", scratch.file(&number.to_string())),
    );
    let command: &[&str] = match way {
        Way::Operator => &["end", "--session", &session],
        Way::Failover => &[
            "failover",
            "--force",
            "--unfenced",
            "--session",
            &session,
            "--to",
            &stream,
        ],
        Way::Error | Way::Lost(_) => &[],
    };
    let stops = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| write_on(main, "the main channel"));
        scope.spawn(|| write_on(second, "the channel at the sync"));
        scope.spawn(|| {
            let pages = packet("pc.ram", &[], &[0]).repeat(16);
            while !stops.load(Ordering::Relaxed) && first.try_send(&pages).is_ok() {
                std::hint::spin_loop();
            }
            match way {
                Way::Lost(cut) => first.cut(cut),
                _ => {
                    // No packet begins like this, and what comes before it may have been cut short by the end of the session.
                    let _ = first.try_send(&[0xff; HEADER_LEN]);
                    write_on(first, "the channel that is read");
                }
            }
        });
        std::thread::sleep(after);
        if let [_, ..] = command {
            let done = receiver.command(command);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        stops.store(true, Ordering::Relaxed);
    });
}

fn no_write_hangs(backend: &str, rounds: u64) {
    let scratch = Scratch::new();
    let args = [
        "--hugepages",
        "off",
        "--backend",
        backend,
        "--sessions-per-origin",
        "1000",
    ];
    let receiver = RunningReceiver::start(wrapped(&[]), &args);
    let mut number = 0;
    for round in 0..rounds {
        for way in WAYS {
            number += 1;
            println!("{backend}, session {number}: {way:?}");
            session_ends(&receiver, number, way, Duration::from_millis(round), &scratch);
        }
        // Though the checkpoints are kept.
        until("its sockets to be closed", || {
            (sockets(&receiver) == 1).then_some(())
        });
    }
    assert_eq!(receiver.protect()["checkpoint"], 5);
}

#[test]
fn no_write_of_a_primary_hangs_when_its_session_ends() {
    no_write_hangs("uring", 10);
}

#[test]
fn no_write_hangs_with_epoll_or_threads() {
    no_write_hangs("epoll", 3);
    no_write_hangs("threads", 3);
}
