//! Wrong compressed payloads, and right ones, in small packets, which channels decode by themselves, and in large ones, which
//! workers decode where there are any: the backend `threads` has none.

use crate::{BACKENDS, good_packet};
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::codec::{Encoder, Method};
use colo_ring::wire::multifd::HEADER_LEN;
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{Cut, HostilePrimary, PAGE, answers_to_checkpoint, compressed_packet};

const METHODS: [Method; 2] = [Method::Zlib, Method::Zstd];

/// Pages of a small packet and of a large one.
const SIZES: [u8; 2] = [2, 32];

/// The channel that sends wrong bytes. Its stream begins in the checkpoint in which it does so.
const WRONG: usize = 1;

fn pages(fills: &[u8]) -> Vec<u8> {
    fills.iter().flat_map(|fill| [*fill; PAGE_SIZE]).collect()
}

fn encode(encoder: &mut Encoder, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    encoder.encode(bytes, &mut payload);
    payload
}

/// The payload of pages that are filled with one byte each.
fn payload(encoder: &mut Encoder, fills: &[u8]) -> Vec<u8> {
    encode(encoder, &pages(fills))
}

fn encoder(method: Method) -> Encoder {
    Encoder::new(method, 1).expect("a method that compresses")
}

/// A packet of pages 1 to `count` of `pc.ram`.
fn packet(method: Method, count: u8, payload: &[u8]) -> Vec<u8> {
    let offsets: Vec<u64> = (1..=count).map(|page| u64::from(page) * PAGE).collect();
    compressed_packet(method, "pc.ram", &offsets, payload)
}

/// A right packet of the channel with this encoder.
fn right(encoder: &mut Encoder, count: u8) -> Vec<u8> {
    let fills: Vec<u8> = (0..count).collect();
    let payload = payload(encoder, &fills);
    packet(encoder.method(), count, &payload)
}

type Case = (&'static str, Vec<u8>, &'static str);

/// Wrong packets of `count` pages, and what the messages say. Each goes on from what `stream` has compressed until it is
/// made, so it is made when it is sent.
type MakeCase = fn(stream: &mut Encoder, count: u8) -> Case;

const DAMAGED: &str = "payload is damaged at its byte";
const MORE: &str = "gives more than the packet's pages";
const OTHER_METHOD: &str = "where those before it were compressed with";
const LESS: &str = "gives less than the packet's pages";

/// After right packets.
const CASES: &[MakeCase] = &[
    |stream, count| {
        let good = payload(stream, &vec![5; count.into()]);
        (
            "cut",
            packet(stream.method(), count, &good[..good.len() - 1]),
            DAMAGED,
        )
    },
    |stream, count| {
        let mut corrupt = payload(stream, &vec![5; count.into()]);
        // The reserved block type, of both formats.
        corrupt[0] |= 0x06;
        ("corrupt", packet(stream.method(), count, &corrupt), DAMAGED)
    },
    |stream, count| {
        let less = payload(stream, &vec![5; usize::from(count) - 1]);
        ("a page less", packet(stream.method(), count, &less), LESS)
    },
    |stream, count| {
        let bytes = pages(&vec![5; count.into()]);
        let less = encode(stream, &bytes[1..]);
        ("a byte less", packet(stream.method(), count, &less), LESS)
    },
    |stream, count| {
        let bytes = [pages(&vec![5; count.into()]), vec![5]].concat();
        let more = encode(stream, &bytes);
        ("a byte more", packet(stream.method(), count, &more), MORE)
    },
    |stream, count| {
        let more = payload(stream, &vec![5; usize::from(count) + 1]);
        ("a page more", packet(stream.method(), count, &more), MORE)
    },
    |stream, count| {
        let bomb = payload(stream, &[0; 4096]);
        ("bomb", packet(stream.method(), count, &bomb), MORE)
    },
    |stream, count| {
        let mut oversized = right(stream, count);
        oversized[20..24].copy_from_slice(&((1u32 << 20) + 1).to_be_bytes());
        ("oversized", oversized, "is 1048577, expected at most 1048576")
    },
    |stream, count| {
        let empty = packet(stream.method(), count, &[]);
        ("empty", empty, "payload size of a packet of compressed pages")
    },
    |stream, count| {
        let anew = right(&mut encoder(stream.method()), count);
        ("a stream that begins anew", anew, DAMAGED)
    },
    |stream, count| {
        let other = right(&mut encoder(other(stream.method())), count);
        ("another method", other, OTHER_METHOD)
    },
    |stream, count| {
        let longer = [payload(stream, &vec![5; count.into()]), vec![0]].concat();
        ("a stray byte", packet(stream.method(), count, &longer), DAMAGED)
    },
    |stream, count| {
        let longer = [payload(stream, &vec![5; count.into()]), vec![0, 0]].concat();
        (
            "two stray bytes",
            packet(stream.method(), count, &longer),
            DAMAGED,
        )
    },
    |stream, count| {
        let longer = [payload(stream, &vec![5; count.into()]), vec![0, 0, 0]].concat();
        ("an empty block", packet(stream.method(), count, &longer), DAMAGED)
    },
    |_, _| ("uncompressed", good_packet(), "compressed with none, where those"),
];

/// A method that compresses, and is not this one.
fn other(method: Method) -> Method {
    match method {
        Method::Zlib => Method::Zstd,
        _ => Method::Zlib,
    }
}

/// How a channel's stream must not begin where the session's other channel has sent payloads of `method`.
fn wrong_beginnings(method: Method, count: u8) -> Vec<Case> {
    let mut cases = wrong_streams(method, count);
    let another = right(&mut encoder(other(method)), count);
    cases.push(("another channel's method", another, OTHER_METHOD));
    cases.push(("no method", good_packet(), "compressed with none, where those"));
    cases
}

fn wrong_streams(method: Method, count: u8) -> Vec<Case> {
    let window = |byte| {
        let mut zstd = payload(&mut encoder(method), &vec![5; count.into()]);
        zstd[5] = byte;
        packet(method, count, &zstd)
    };
    if method == Method::Zlib {
        // FDICT, the dictionary's checksum, and the end of a sync flush.
        let dictionary = [0x78, 0xbb, 1, 2, 3, 4, 0, 0, 0xff, 0xff];
        let no_zlib = [0x1f, 0x8b, 8, 0, 0, 0, 0xff, 0xff];
        return vec![
            (
                "a dictionary",
                packet(method, count, &dictionary),
                "needs a preset dictionary",
            ),
            ("no zlib stream", packet(method, count, &no_zlib), DAMAGED),
        ];
    }
    let descriptor = "the descriptor of the channel's zstd frame is";
    vec![
        (
            "a dictionary",
            packet(method, count, &[0x28, 0xb5, 0x2f, 0xfd, 1, 0x58, 9]),
            descriptor,
        ),
        (
            "a content size",
            packet(method, count, &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x58]),
            descriptor,
        ),
        (
            "no zstd frame",
            packet(method, count, &[0x78, 0x01, 0, 0, 0xff, 0xff]),
            "no zstd frame begins there",
        ),
        (
            "a cut header",
            packet(method, count, &[0x28, 0xb5]),
            "it ends in the frame's header",
        ),
        // 2^27 bytes, which the format allows and this receiver's memory limit does not; then more than that.
        ("a large window", window(17 << 3), "MiB more exceed"),
        (
            "a larger window",
            window(18 << 3),
            "the window of the channel's zstd frame is",
        ),
    ]
}

#[test]
fn wrong_payloads() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for method in METHODS {
            for (case, count) in CASES.iter().flat_map(|case| SIZES.map(|count| (case, count))) {
                let (session, mut primary) = bench.protected_with(method);
                primary.request();
                // Two that wait for a worker, if there is one, when the wrong one comes.
                for _ in 0..2 {
                    let first = right(&mut primary.encoders[WRONG], count);
                    primary.channels[WRONG].send_packet(&first);
                }
                let (case, wrong, says) = case(&mut primary.encoders[WRONG], count);
                let place = At::channel(&primary, WRONG);
                primary.channels[WRONG].send(&wrong);
                // Whatever comes behind it changes nothing, and no checkpoint is made of it.
                let behind = right(&mut primary.encoders[WRONG], count);
                primary.channels[WRONG].send(&behind);
                primary.sync();
                let bytes = primary.checkpoint_bytes(2, &[]);
                primary.main.send(&bytes);
                let name = format!("{case}, {} of {count} pages", method.name());
                bench.survives(&name, session, &mut primary, place, &[says]);
            }
        }
        bench.end();
    }
}

#[test]
fn wrong_beginnings_of_a_stream() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for (method, count) in METHODS
            .iter()
            .flat_map(|method| SIZES.map(|count| (*method, count)))
        {
            for (case, wrong, says) in wrong_beginnings(method, count) {
                let (session, mut primary) = bench.protected_with(method);
                primary.request();
                let place = At::channel(&primary, WRONG);
                primary.channels[WRONG].send(&wrong);
                let name = format!("{case}, {} of {count} pages", method.name());
                bench.survives(&name, session, &mut primary, place, &[says]);
            }
        }
        bench.end();
    }
}

/// A primary that goes away in the middle of a payload: what its streams were ends with it. Its next session begins new ones.
#[test]
fn a_checkpoint_that_is_aborted_in_a_payload() {
    let dropped = "the primary went away during a checkpoint, which is dropped; the last committed one is 1";
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for (method, count) in METHODS
            .iter()
            .flat_map(|method| SIZES.map(|count| (*method, count)))
        {
            for (cut, of_256) in [(Cut::Fin, 0), (Cut::Rst, 0), (Cut::Fin, 128), (Cut::Rst, 255)] {
                let (session, mut primary) = bench.protected_with(method);
                primary.request();
                let whole = right(&mut primary.encoders[WRONG], count);
                primary.channels[WRONG].send_packet(&whole);
                let part = right(&mut primary.encoders[WRONG], count);
                let payload_bytes = part.len() - HEADER_LEN;
                primary.channels[WRONG].send(&part[..HEADER_LEN + payload_bytes * of_256 / 256]);
                primary.cut(cut);
                let name = format!("{cut:?} at {of_256}/256 of a payload, {}", method.name());
                bench.survives(&name, session, &mut primary, At::Nowhere, &[dropped]);
                let (session, mut primary) = bench.protected_with(method);
                checkpoint(&mut primary, method, count, 2);
                assert_eq!(bench.compare(session, &primary), 2);
                bench.closes(session, &mut primary);
            }
        }
        bench.end();
    }
}

/// A checkpoint of packets of `count` pages on both channels, one of them sent byte by byte.
fn checkpoint(primary: &mut HostilePrimary, method: Method, count: u8, moment: u8) {
    primary.request();
    let mut fills: Vec<u8> = (moment..).take(count.into()).collect();
    // A page that decodes to zeros.
    fills[1] = 0;
    let first = payload(&mut primary.encoders[0], &fills);
    let first = packet(method, count, &first);
    primary.channels[0].send(&first[..HEADER_LEN]);
    primary.channels[0].dribble(&first[HEADER_LEN..]);
    let offsets: Vec<u64> = (40..64).take(count.into()).map(|page| page * PAGE).collect();
    let second = payload(&mut primary.encoders[1], &vec![moment; offsets.len()]);
    primary.channels[1].send_packet(&compressed_packet(method, "pc.ram", &offsets, &second));
    primary.sync();
    let bytes = primary.checkpoint_bytes(moment, &[]);
    primary.main.send(&bytes);
    primary.main.expect(&answers_to_checkpoint());
    let mut committed: Vec<(usize, u64, u8)> =
        (1..).zip(&fills).map(|(page, fill)| (0, page, *fill)).collect();
    committed.extend(offsets.iter().map(|offset| (0, offset / PAGE, moment)));
    primary.committed(&committed, moment);
}

/// The stream goes on through syncs and checkpoints, also where it comes in single bytes.
#[test]
fn compressed_checkpoints() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for (method, count) in METHODS
            .iter()
            .flat_map(|method| SIZES.map(|count| (*method, count)))
        {
            let (session, mut primary) = bench.protected_with(method);
            for moment in 2..6 {
                checkpoint(&mut primary, method, count, moment);
                assert_eq!(bench.compare(session, &primary), u64::from(moment));
            }
            bench.closes(session, &mut primary);
        }
        bench.end();
    }
}
