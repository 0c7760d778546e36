//! Wrong compressed payloads, and right ones.

use crate::{BACKENDS, good_packet};
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::codec::{Encoder, Method};
use colo_ring::wire::multifd::HEADER_LEN;
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{PAGE, answers_to_checkpoint, compressed_packet};

const METHODS: [Method; 2] = [Method::Zlib, Method::Zstd];

/// The payload of pages that are filled with one byte each.
fn payload(encoder: &mut Encoder, fills: &[u8]) -> Vec<u8> {
    let pages: Vec<u8> = fills.iter().flat_map(|fill| [*fill; PAGE_SIZE]).collect();
    let mut payload = Vec::new();
    encoder.encode(&pages, &mut payload);
    payload
}

fn encoder(method: Method) -> Encoder {
    Encoder::new(method, 1).expect("a method that compresses")
}

/// A packet of pages at the beginning of `pc.ram`.
fn packet(method: Method, offsets: &[u64], payload: &[u8]) -> Vec<u8> {
    compressed_packet(method, "pc.ram", offsets, payload)
}

type Case = (&'static str, Vec<u8>, &'static str);

/// How many there are.
const CASES: usize = 10;

/// A wrong packet, which goes on from what `stream` has compressed, and what the message says.
fn case(number: usize, method: Method, stream: &mut Encoder) -> Case {
    let other = match method {
        Method::Zlib => Method::Zstd,
        _ => Method::Zlib,
    };
    let two = [PAGE, 2 * PAGE];
    let damaged = "payload is damaged at its byte";
    let more = "gives more than the packet's pages";
    match number {
        0 => {
            let good = payload(stream, &[5, 6]);
            ("cut", packet(method, &two, &good[..good.len() - 1]), damaged)
        }
        1 => {
            let mut corrupt = payload(stream, &[5, 6]);
            // The reserved block type, of both formats.
            corrupt[0] |= 0x06;
            ("corrupt", packet(method, &two, &corrupt), damaged)
        }
        2 => {
            let less = packet(method, &two, &payload(stream, &[5]));
            ("a page less", less, "gives less than the packet's pages")
        }
        3 => {
            let longer = packet(method, &two, &payload(stream, &[5, 6, 7]));
            ("a page more", longer, more)
        }
        4 => ("bomb", packet(method, &two, &payload(stream, &[0; 4096])), more),
        5 => {
            let mut oversized = packet(method, &two, &payload(stream, &[5, 6]));
            oversized[20..24].copy_from_slice(&((1u32 << 20) + 1).to_be_bytes());
            ("oversized", oversized, "is 1048577, expected at most 1048576")
        }
        6 => {
            let empty = packet(method, &two, &[]);
            ("empty", empty, "payload size of a packet of compressed pages")
        }
        7 => {
            let anew = packet(method, &two, &payload(&mut encoder(method), &[5, 6]));
            ("a stream that begins anew", anew, damaged)
        }
        8 => {
            let bytes = payload(&mut encoder(other), &[5, 6]);
            let says = "where those before it were compressed with";
            ("another method", packet(other, &two, &bytes), says)
        }
        _ => ("uncompressed", good_packet(), "compressed with none, where those"),
    }
}

#[test]
fn wrong_payloads() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for method in METHODS {
            for number in 0..CASES {
                let (session, mut primary) = bench.protected_with(method);
                primary.request();
                let first = payload(&mut primary.encoders[1], &[1]);
                primary.channels[1].send_packet(&packet(method, &[PAGE], &first));
                let (case, wrong, says) = case(number, method, &mut primary.encoders[1]);
                let place = At::channel(&primary, 1);
                primary.channels[1].send(&wrong);
                bench.survives(case, session, &mut primary, place, &[says]);
            }
        }
        bench.end();
    }
}

/// The stream goes on through syncs and checkpoints, also where it comes in single bytes.
#[test]
fn compressed_checkpoints() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for method in METHODS {
            let (session, mut primary) = bench.protected_with(method);
            for moment in 2u8..6 {
                primary.request();
                let fills = [moment, moment + 1, 0];
                let payloads = [
                    payload(&mut primary.encoders[0], &fills),
                    payload(&mut primary.encoders[1], &[moment]),
                ];
                let offsets = [PAGE, 2 * PAGE, 3 * PAGE];
                let first = packet(method, &offsets, &payloads[0]);
                primary.channels[0].send(&first[..HEADER_LEN]);
                primary.channels[0].dribble(&first[HEADER_LEN..]);
                primary.channels[1].send_packet(&packet(method, &[4 * PAGE], &payloads[1]));
                primary.sync();
                let bytes = primary.checkpoint_bytes(moment, &[]);
                primary.main.send(&bytes);
                primary.main.expect(&answers_to_checkpoint());
                let pages = [(0, 1, fills[0]), (0, 2, fills[1]), (0, 3, 0), (0, 4, moment)];
                primary.committed(&pages, moment);
                assert_eq!(bench.compare(session, &primary), u64::from(moment));
            }
            bench.closes(session, &mut primary);
        }
        bench.end();
    }
}
