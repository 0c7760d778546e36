//! Connections that end or stall: at every byte, in order and by a reset, one of them or all.

use crate::{BACKENDS, good_packet};
use colo_ring::ring::BackendKind;
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::multifd::HEADER_LEN;
use colo_ring::wire::ram::BlockRef;
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{
    Cut, HostilePrimary, Link, PAGE, answers_to_checkpoint, header, page_record, sync_packet,
};
use std::time::{Duration, Instant};

const DROPPED: &str =
    "the primary went away during a checkpoint, which is dropped; the last committed one is 1";
const IDLE: &str = "the primary went away; the last committed checkpoint is 1";
const PRECOPY: &str = "the primary went away before its initial state was complete";

/// Which connections are cut.
#[derive(Clone, Copy, Debug)]
enum Connections {
    Main,
    Channel,
    All,
}

impl Connections {
    const ALL: [Self; 3] = [Self::Main, Self::Channel, Self::All];

    fn cut(self, primary: &mut HostilePrimary, cut: Cut) {
        match self {
            Self::Main => primary.main.cut(cut),
            Self::Channel => primary.channels[0].cut(cut),
            Self::All => primary.cut(cut),
        }
    }
}

/// How many places to leave out: the parser is the same for all backends, so the others try some.
fn step(backend: BackendKind, others: usize) -> usize {
    if backend == BackendKind::Uring { 1 } else { others }
}

#[test]
fn the_main_channel_of_a_checkpoint_at_every_byte() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let length = HostilePrimary::connect(bench.address, 0)
            .checkpoint_bytes(2, &[])
            .len()
            + 8;
        for at in (0..length).step_by(step(backend, 9)) {
            for cut in Cut::ALL {
                let (session, mut primary) = bench.protected();
                primary.request();
                primary.channels[1].send_packet(&good_packet());
                primary.sync();
                let bytes = primary.checkpoint_bytes(2, &[]);
                assert_eq!(bytes.len(), length);
                primary.main.send(&bytes[..at]);
                let which = if at % 2 == 0 {
                    Connections::Main
                } else {
                    Connections::All
                };
                which.cut(&mut primary, cut);
                let name = format!("{cut:?} of {which:?} at byte {at} of {length}");
                bench.survives(&name, session, &mut primary, At::Nowhere, &[DROPPED]);
            }
        }
        bench.end();
    }
}

#[test]
fn a_channel_in_the_middle_of_a_checkpoint() {
    let packet = [good_packet(), sync_packet()].concat();
    let (page, next) = (HEADER_LEN + PAGE_SIZE, HEADER_LEN + 2 * PAGE_SIZE);
    let places = [
        0,
        1,
        4,
        8,
        11,
        12,
        13,
        63,
        64,
        319,
        320,
        321,
        327,
        328,
        343,
        344,
        HEADER_LEN - 1,
        HEADER_LEN,
        HEADER_LEN + 1,
        page - 1,
        page,
        page + 1,
        next - 1,
        next,
        next + 1,
        next + 12,
        packet.len() - 1,
    ];
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for at in places.into_iter().step_by(step(backend, 3)) {
            for (cut, which) in [
                (Cut::Fin, Connections::Channel),
                (Cut::Rst, Connections::Channel),
                (Cut::Rst, Connections::All),
            ] {
                let (session, mut primary) = bench.protected();
                primary.request();
                let bytes = primary.checkpoint_bytes(2, &[]);
                primary.main.send(&bytes);
                primary.channels[1].send_packet(&sync_packet());
                primary.channels[0].send(&packet[..at]);
                which.cut(&mut primary, cut);
                let name = format!("{cut:?} of {which:?} at byte {at} of {}", packet.len());
                bench.survives(&name, session, &mut primary, At::Nowhere, &[DROPPED]);
            }
        }
        bench.end();
    }
}

#[test]
fn precopy_at_every_few_bytes() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let parts = HostilePrimary::connect(bench.address, 2).precopy_parts();
        let all: Vec<u8> = parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
        for at in (4..all.len()).step_by(3 * step(backend, 9)) {
            for (cut, which) in Cut::ALL.into_iter().zip([Connections::Main, Connections::All]) {
                let (session, mut primary) = bench.connected();
                primary.sync();
                primary.channels[0].send_packet(&good_packet());
                primary.sync();
                primary.main.send(&all[4..at]);
                which.cut(&mut primary, cut);
                let name = format!("{cut:?} of {which:?} at byte {at} of {}", all.len());
                bench.survives(&name, session, &mut primary, At::Nowhere, &[PRECOPY]);
                assert!(bench.dump(session).is_err(), "nothing was committed");
            }
        }
        bench.end();
    }
}

#[test]
fn between_checkpoints() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for which in Connections::ALL {
            for cut in Cut::ALL {
                let (session, mut primary) = bench.protected();
                which.cut(&mut primary, cut);
                bench.survives(
                    &format!("{cut:?} of {which:?}"),
                    session,
                    &mut primary,
                    At::Nowhere,
                    &[IDLE],
                );
            }
        }
        let (session, mut primary) = bench.protected();
        primary.main.half_close();
        bench.survives("half of main", session, &mut primary, At::Nowhere, &[IDLE]);
        let (session, mut primary) = bench.protected();
        primary.channels[1].half_close();
        bench.survives("half of a channel", session, &mut primary, At::Nowhere, &[IDLE]);
        bench.end();
    }
}

/// What was sent whole is committed, though no primary waits for the answer any more.
#[test]
fn after_the_last_byte_of_a_checkpoint() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let (session, mut primary) = bench.protected();
        primary.request();
        primary.channels[1].send_packet(&good_packet());
        primary.sync();
        let bytes = primary.checkpoint_bytes(2, &[]);
        primary.main.send(&bytes);
        primary.main.expect(&answers_to_checkpoint());
        primary.cut(Cut::Rst);
        primary.committed(&[(0, 1, 0xaa), (0, 2, 0xab), (0, 3, 0)], 2);
        let says = "the primary went away; the last committed checkpoint is 2";
        bench.survives("after the answer", session, &mut primary, At::Nowhere, &[says]);
        bench.end();
    }
}

#[test]
fn a_primary_without_colo_leaves_its_state_here() {
    for backend in BACKENDS {
        for cut in Cut::ALL {
            let mut bench = Bench::start(backend, 2);
            let mut primary = HostilePrimary::connect(bench.address, 2);
            primary.precopy();
            let session = bench.began();
            primary.cut(cut);
            let says = "A plain migration, without the capability x-colo, completes like this";
            bench.survives(
                "plain migration",
                session,
                &mut primary,
                At::Nowhere,
                &[says, "x-colo"],
            );
            bench.end();
        }
    }
}

/// A session waits as long as its primary lives, and commits nothing half.
#[test]
fn syncs_on_some_channels_and_then_silence() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 3);
        let (session, mut primary) = bench.protected();
        primary.request();
        primary.channels[1].send_packet(&good_packet());
        let bytes = primary.checkpoint_bytes(2, &[]);
        primary.main.send(&bytes);
        for channel in 0..2 {
            let synced = &mut primary.channels[channel];
            synced.send_packet(&sync_packet());
            synced.wait_until_read(synced.bytes);
            assert!(
                primary.main.is_silent(Duration::from_millis(100)),
                "a channel has not synced"
            );
            assert_eq!(bench.compare(session, &primary), 1);
        }
        // The link is back.
        primary.channels[2].send_packet(&sync_packet());
        primary.main.expect(&answers_to_checkpoint());
        primary.committed(&[(0, 1, 0xaa), (0, 2, 0xab), (0, 3, 0)], 2);
        assert_eq!(bench.compare(session, &primary), 2);
        // And once more, for good.
        primary.request();
        primary.main.send(&bytes);
        let synced = &mut primary.channels[0];
        synced.send_packet(&sync_packet());
        synced.wait_until_read(synced.bytes);
        assert!(
            primary.main.is_silent(Duration::from_millis(100)),
            "two channels have not synced"
        );
        primary.cut(Cut::Fin);
        let says = "during a checkpoint, which is dropped; the last committed one is 2";
        bench.survives("silence", session, &mut primary, At::Nowhere, &[says]);
        bench.end();
    }
}

#[test]
fn plain_mode_at_every_few_bytes() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 0);
        let page = page_record(BlockRef::Named(b"pc.ram"), PAGE, 0x55);
        let length = HostilePrimary::connect(bench.address, 0)
            .checkpoint_bytes(2, &page)
            .len();
        let ends = (0..40)
            .chain((40..length - 80).step_by(211))
            .chain(length - 80..length);
        for at in ends.step_by(step(backend, 9)) {
            let (session, mut primary) = bench.protected();
            primary.request();
            let bytes = primary.checkpoint_bytes(2, &page);
            primary.main.send(&bytes[..at]);
            let cut = Cut::ALL[at % 2];
            primary.cut(cut);
            let name = format!("{cut:?} at byte {at} of {length}");
            bench.survives(&name, session, &mut primary, At::Nowhere, &[DROPPED]);
        }
        bench.end();
    }
}

/// A primary that dies while it connects, and comes back at once.
#[test]
fn while_it_connects() {
    for cut in Cut::ALL {
        let mut bench = Bench::start(BackendKind::Uring, 2);
        let mut main = Link::connect(bench.address);
        main.send(&header());
        let uuid = [7; 16];
        let mut channel = Link::multifd(bench.address, uuid, 0);
        main.wait_until_read(4);
        channel.wait_until_read(channel.bytes);
        main.cut(cut);
        channel.cut(cut);
        let mut primary = HostilePrimary::connect_as(bench.address, 2, uuid);
        primary.precopy();
        let session = bench.began();
        primary.cut(cut);
        bench.warned("closed by the primary before all connections of its session were here");
        bench.survives(
            "it came back",
            session,
            &mut primary,
            At::Nowhere,
            &["A plain migration, without the capability x-colo"],
        );
        bench.end();
    }
}

/// Connections that are reset before they are accepted delay no other more than those that are closed: a pause of
/// 100 ms after each, as after an error of the listener, would be 100 s.
#[test]
fn resets_in_great_number() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let mut behind = |cut| {
            let since = Instant::now();
            for _ in 0..20 {
                for _ in 0..50 {
                    Link::connect(bench.address).cut(cut);
                }
                // Whoever is answered stands behind all others in the listener's queue. Where that queue is full, the
                // kernel drops a connection's first segment, and what is measured is how long it waits to send it again.
                let mut stranger = Link::connect(bench.address);
                stranger.send(b"HELO");
                assert!(stranger.is_closed());
            }
            let protected = bench.protected();
            (protected, since.elapsed())
        };
        let ((session, mut primary), closed) = behind(Cut::Fin);
        primary.cut(Cut::Rst);
        let ((second, mut other), reset) = behind(Cut::Rst);
        println!("{closed:?} behind closed connections, {reset:?} behind reset ones");
        assert!(
            reset < 6 * closed,
            "{closed:?} behind closed connections, {reset:?} behind reset ones"
        );
        other.cut(Cut::Rst);
        bench.survives("behind resets", second, &mut other, At::Nowhere, &[IDLE]);
        bench.survives("after resets", session, &mut primary, At::Nowhere, &[IDLE]);
        bench.end();
    }
}

/// As soon as a status says that a session has ended, its checkpoint can be discarded, however far the release of its connections is.
#[test]
fn an_ended_session_can_be_discarded_at_once() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for _ in 0..10 {
            let (session, mut primary) = bench.protected();
            primary.main.half_close();
            let has_ended = |bench: &Bench| {
                bench
                    .status_of(session)
                    .is_some_and(|status| status.end.is_some())
            };
            while !has_ended(&bench) {}
            bench.discard(session);
        }
        bench.end();
    }
}
