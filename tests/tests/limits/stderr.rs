//! Standard error that is not read.

use super::socket_address;
use colo_ring_tests::command::{RunningReceiver, Scratch, guest, until, wrapped};
use colo_ring_tests::hostile::{Destination, Link};
use colo_ring_tools::primary::SynthPrimary;
use nix::sys::signal::Signal;
use std::io::Read;
use std::net::Ipv4Addr;

#[test]
fn unread_standard_error_holds_nothing_up() {
    for backend in ["uring", "epoll", "threads"] {
        let scratch = Scratch::new();
        let told = scratch.file("told");
        // It prints more than any pipe holds.
        let hook = format!("head -c 1048576 /dev/zero | tr '\\0' x; echo $COLO_RING_SESSION > {told}");
        let args = ["--hugepages", "off", "--backend", backend, "--on-loss", &hook];
        let (receiver, mut pipe) = RunningReceiver::with_unread_log(wrapped(&[]), &args);
        // 15 KiB of lines, where 4 KiB have room. One host alone makes few.
        for host in 1..=250 {
            let mut stranger = Link::connect(Destination {
                address: socket_address(&receiver),
                from: Ipv4Addr::new(127, 0, 0, host),
            });
            stranger.send(b"HELO");
            assert!(stranger.is_closed());
        }
        assert_eq!(receiver.status()["sessions"].as_array().map(Vec::len), Some(0));
        let mut primary = SynthPrimary::connect(receiver.address(), &guest()).expect("precopy");
        primary.checkpoint().expect("a checkpoint");
        receiver.check_dump(&primary, &receiver.protected(), 1);
        drop(primary);
        let written = || {
            std::fs::read_to_string(&told)
                .ok()
                .filter(|text| !text.is_empty())
        };
        assert_eq!(until("the hook", written), "1\n");
        receiver.signal(Signal::SIGTERM);
        let ended = receiver.wait();
        assert_eq!(ended.status.code(), Some(0), "{backend}");
        assert_eq!(ended.report["sessions"][0]["checkpoint"], 1);
        let mut unread = String::new();
        pipe.read_to_string(&mut unread).expect("what was in the pipe");
        assert!(
            unread.len() >= 3000 && unread.contains("HELO"),
            "it was not full: {unread}"
        );
    }
}
