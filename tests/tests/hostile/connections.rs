//! Connections that belong to no session, or not together.

use colo_ring::ring::BackendKind;
use colo_ring::wire::multifd::Init;
use colo_ring_tests::hostile::bench::Bench;
use colo_ring_tests::hostile::{Link, header};
use std::time::Duration;

#[test]
fn strangers_among_connections() {
    let (mut bench, deadline) = Bench::start_with_deadline(BackendKind::Uring, 2);
    let init = |id, at: usize, byte: u8| {
        let channel = colo_ring::units::ChannelId(id);
        let mut bytes = Init {
            uuid: [3; 16],
            channel,
        }
        .encode();
        bytes[at] = byte;
        bytes.to_vec()
    };
    for (first, says) in [
        (
            b"HELO".to_vec(),
            "begins with \"HELO\", which is not a migration channel",
        ),
        (vec![0x16, 3, 1, 0], "but TLS: unset the parameter tls-creds"),
        (init(0, 7, 2), "the version of a multifd packet is 0x2"),
        (init(0, 25, 1), "a reserved byte of a multifd packet is 0x1"),
        (init(0, 63, 1), "a reserved byte of a multifd packet is 0x1"),
        (
            init(2, 0, 0x11),
            "channel 2 connected, but only channels 0 to 1 are expected",
        ),
        (
            init(255, 0, 0x11),
            "channel 255 connected, but only channels 0 to 1 are expected",
        ),
    ] {
        let mut stranger = Link::connect(bench.address);
        stranger.send(&first);
        bench.warned(says);
        assert!(stranger.is_closed(), "{says}");
    }
    // Silence, and a byte now and then, end at the deadline.
    let (mut silent, mut slow) = (Link::connect(bench.address), Link::connect(bench.address));
    let whole = init(0, 0, 0x11);
    for byte in &whole[..12] {
        slow.send(&[*byte]);
        std::thread::sleep(Duration::from_millis(100));
    }
    bench.warned(&format!("it sent nothing that identifies it within {deadline:?}"));
    bench.warned(&format!("it sent nothing that identifies it within {deadline:?}"));
    assert!(silent.is_closed() && slow.is_closed());
    // Cut in the middle of what identifies it.
    for sent in [0, 1, 3, 4, 24, 25, 63] {
        let mut cut = Link::connect(bench.address);
        cut.send(&whole[..sent]);
        cut.half_close();
        bench.warned("it was closed before its first bytes identified it");
        assert!(cut.is_closed());
    }
    let (session, mut primary) = bench.protected();
    // All are bound: one more belongs to no session.
    let mut late = Link::multifd(bench.address, [7; 16], 0);
    bench.warned(&format!(
        "1 of 2 multifd channels came, but no main channel, within {deadline:?}"
    ));
    assert!(late.is_closed());
    bench.closes(session, &mut primary);
    bench.end();
}

#[test]
fn channels_that_do_not_belong_together() {
    let (mut bench, deadline) = Bench::start_with_deadline(BackendKind::Uring, 2);
    let incomplete = format!("1 of 2 multifd channels and a main channel came within {deadline:?}");
    let start = |bench: &Bench| {
        let mut main = Link::connect(bench.address);
        main.send(&header());
        (main, Link::multifd(bench.address, [3; 16], 0))
    };
    // The same channel twice: the second is refused, the session still wants the other.
    let (mut main, mut first) = start(&bench);
    let mut twice = Link::multifd(bench.address, [3; 16], 0);
    bench.warned("channel 0 connected twice");
    assert!(twice.is_closed());
    bench.warned(&incomplete);
    assert!(main.is_closed() && first.is_closed());
    // Another guest's channel.
    let (mut main, mut first) = start(&bench);
    let mut foreign = Link::multifd(bench.address, [4; 16], 1);
    bench.warned(&incomplete);
    bench.warned(&format!(
        "1 of 2 multifd channels came, but no main channel, within {deadline:?}"
    ));
    assert!(main.is_closed() && first.is_closed() && foreign.is_closed());
    let (session, mut primary) = bench.protected();
    bench.closes(session, &mut primary);
    bench.end();
}
