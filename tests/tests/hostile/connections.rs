//! Connections that belong to no session, or not together.

use colo_ring::ring::BackendKind;
use colo_ring::units::ChannelId;
use colo_ring::wire::multifd::Init;
use colo_ring_tests::command::until;
use colo_ring_tests::hostile::bench::Bench;
use colo_ring_tests::hostile::{HostilePrimary, Link, header};
use std::time::Duration;

#[test]
fn strangers_among_connections() {
    let (mut bench, deadline) = Bench::start_with_deadline(BackendKind::Uring, 2);
    let init = |id, at: usize, byte: u8| {
        let channel = ChannelId(id);
        let mut bytes = Init {
            uuid: [3; 16],
            channel,
        }
        .encode();
        bytes[at] = byte;
        bytes.to_vec()
    };
    // Each of a host of its own: of one host not all are logged.
    let mut hosts = 1..;
    let mut connect = move |to| Link::connect_from(hosts.next().expect("few"), to);
    for (first, says) in [
        (
            b"HELO".to_vec(),
            "begins with \"HELO\", which is not a migration channel",
        ),
        (vec![0x16, 3, 1, 0], "but TLS: start the receiver with --tls"),
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
        let mut stranger = connect(bench.address);
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
        let mut cut = connect(bench.address);
        cut.send(&whole[..sent]);
        cut.half_close();
        bench.warned("it was closed before its first bytes identified it");
        assert!(cut.is_closed());
    }
    let (session, mut primary) = bench.protected();
    // All are bound, and it has a checkpoint: one more belongs to no session, whatever it says.
    let mut late = Link::multifd(bench.address, primary.uuid, 0);
    bench.warned(&format!(
        "1 of 2 multifd channels came, but no main channel, within {deadline:?}"
    ));
    let mut high = Link::multifd(bench.address, primary.uuid, 2);
    bench.warned("channel 2 connected, but only channels 0 to 1");
    assert!(late.is_closed() && high.is_closed());
    primary.checkpoint(&[(0, 4, 0x14)]);
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
    // The same channel twice: one of them is a stranger's.
    let (mut main, mut first) = start(&bench);
    let mut twice = Link::multifd(bench.address, [3; 16], 0);
    bench.warned("channel 0 connected twice");
    assert!(main.is_closed() && first.is_closed() && twice.is_closed());
    // One too many: the pages on it would be missing.
    let (mut main, mut first) = start(&bench);
    let mut high = Link::multifd(bench.address, [3; 16], 2);
    bench.warned("channel 2 connected, but only channels 0 to 1");
    assert!(main.is_closed() && first.is_closed() && high.is_closed());
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

/// A session that has begun without one of its guest's channels, or with a stranger's, never commits.
#[test]
fn a_channel_that_comes_after_the_beginning_ends_what_has_no_checkpoint() {
    let mut bench = Bench::start(BackendKind::Uring, 2);
    for id in [0, 2] {
        let mut primary = HostilePrimary::connect(bench.address, 2);
        primary.main.send(&header());
        let session = bench.began();
        let mut own = Link::multifd(bench.address, primary.uuid, id);
        let status = bench.ended(session);
        let end = status.end.expect("it has ended");
        assert!(end.contains(&format!("(channel {id})")), "{end}");
        assert_eq!(status.checkpoint, None);
        assert!(primary.is_closed());
        own.half_close();
    }
    // Of another guest of that host: it says nothing about this one.
    let mut primary = HostilePrimary::connect(bench.address, 2);
    let mut foreign = Link::multifd(bench.address, [8; 16], 0);
    primary.precopy();
    let session = bench.began();
    foreign.half_close();
    bench.closes(session, &mut primary);
    bench.end();
}

/// A connection that came before the first checkpoint, and has not said what it is, may be the channel that is missing.
#[test]
fn nothing_is_committed_before_all_have_said_what_they_are() {
    let mut bench = Bench::start(BackendKind::Uring, 2);
    let is_found = (0..10).any(|_| {
        let mut primary = HostilePrimary::connect(bench.address, 2);
        let mut unknown = Link::connect(bench.address);
        let parts = primary.precopy_parts();
        parts.iter().for_each(|(_, bytes)| primary.main.send(bytes));
        primary.sync();
        primary.sync();
        let session = bench.began();
        std::thread::sleep(Duration::from_millis(300));
        let init = Init {
            uuid: primary.uuid,
            channel: ChannelId(0),
        };
        unknown.send(&init.encode());
        let checkpoint = until("the session's end or checkpoint", || {
            // Without a checkpoint nothing is left of one that has ended.
            let Some(status) = bench.status_of(session) else {
                return Some(None);
            };
            status.checkpoint.is_some().then_some(status.checkpoint)
        });
        primary.main.half_close();
        let end = bench.ended(session).end.expect("it has ended");
        // On a machine that is busy for seconds, the unknown connection was closed for its silence.
        checkpoint.is_none() && end.contains("(channel 0)")
    });
    assert!(is_found);
    // One that stays silent is closed, and then the session commits.
    let mut primary = HostilePrimary::connect(bench.address, 2);
    let mut silent = Link::connect(bench.address);
    primary.precopy();
    bench.warned("a connection was closed that was silent");
    assert!(silent.is_closed());
    let session = bench.began();
    bench.closes(session, &mut primary);
    bench.end();
}
