//! Wrong and odd packets on the multifd channels.

use crate::{BACKENDS, be32, be64, good_packet};
use colo_ring::ring::BackendKind;
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::HEADER_LEN;
use colo_ring::wire::ram::RamRecord;
use colo_ring::wire::stream::Section;
use colo_ring_tests::hostile::bench::{At, Bench};
use colo_ring_tests::hostile::{
    HostilePrimary, PAGE, RAM, answers_to_checkpoint, end_of_body, message, packet, record, section,
    sync_packet,
};
use std::time::Duration;

/// A wrong packet: what stands at which byte of an otherwise good one, and what the message says.
type PacketCase = (&'static str, usize, Vec<u8>, &'static str);

fn name(text: &[u8]) -> Vec<u8> {
    [text, &[0]].concat()
}

fn packet_cases() -> Vec<PacketCase> {
    let unaligned = "offset 0x1001 is not a page of block pc.ram, which is 0x40000 bytes long";
    let payload = "payload size of a packet of uncompressed pages is";
    let twice = "offset 0x1000 of block \"pc.ram\" occurs twice in one packet";
    vec![
        (
            "magic",
            0,
            be32(0x1122_3345),
            "magic of a multifd packet is 0x11223345, expected 0x11223344",
        ),
        (
            "version",
            4,
            be32(2),
            "version of a multifd packet is 0x2, expected 0x1",
        ),
        (
            "unknown flag",
            8,
            be32(0x100),
            "flags of a multifd packet is 0x100",
        ),
        ("all flags", 8, be32(u32::MAX), "VFIO"),
        ("device state", 8, be32(0x40), "VFIO"),
        (
            "two methods",
            8,
            be32(0x06),
            "compression method of a packet is 0x6",
        ),
        (
            "zlib",
            8,
            be32(0x02),
            "a payload compressed with zlib, where those before it were compressed with none",
        ),
        (
            "zstd",
            8,
            be32(0x04),
            "compressed with zstd, where those before it",
        ),
        ("qpl", 8, be32(0x08), "compressed with qpl"),
        ("uadk", 8, be32(0x10), "compressed with uadk"),
        (
            "qatzip",
            8,
            be32(0x20),
            "compressed with qatzip, which cannot be received here; set its parameter multifd-compression",
        ),
        (
            "room for 129",
            12,
            be32(129),
            "pages_alloc is 129, expected at most 128",
        ),
        ("no room", 12, be32(0), "normal_pages is 2, expected at most 0"),
        ("room for all", 12, be32(u32::MAX), "pages_alloc is 4294967295"),
        (
            "129 pages",
            16,
            be32(129),
            "normal_pages is 129, expected at most 128",
        ),
        ("all pages", 16, be32(u32::MAX), "normal_pages is 4294967295"),
        (
            "127 zero pages",
            32,
            be32(127),
            "zero_pages is 127, expected at most 126",
        ),
        ("all zero pages", 32, be32(u32::MAX), "zero_pages is 4294967295"),
        (
            "sum overflows",
            32,
            be32(u32::MAX - 1),
            "zero_pages is 4294967294",
        ),
        ("no payload", 20, be32(0), payload),
        ("a byte less", 20, be32(8191), payload),
        ("a byte more", 20, be32(8193), payload),
        ("all the payload", 20, be32(u32::MAX), payload),
        (
            "first reserved",
            36,
            vec![1],
            "a reserved byte of a multifd packet is 0x1",
        ),
        (
            "last reserved",
            63,
            vec![0x80],
            "a reserved byte of a multifd packet is 0x80",
        ),
        (
            "unknown block",
            64,
            name(b"pc.rom"),
            "block \"pc.rom\" is not in the block list",
        ),
        ("no name", 64, name(b""), "block \"\" is not in the block list"),
        (
            "a beginning",
            64,
            name(b"pc.ra"),
            "block \"pc.ra\" is not in the block list",
        ),
        (
            "a longer name",
            64,
            name(b"pc.ram3"),
            "block \"pc.ram3\" is not in the block list",
        ),
        (
            "no end of name",
            64,
            vec![b'a'; 256],
            "block name is 256, expected at most 255",
        ),
        (
            "not UTF-8",
            64,
            name(b"\xff\xfe"),
            "block \"\\xff\\xfe\" is not in the block list",
        ),
        ("unaligned", 320, be64(0x1001), unaligned),
        ("at the end", 320, be64(0x4_0000), "offset 0x40000 is not a page"),
        (
            "over the end",
            320,
            be64(0x3_f001),
            "offset 0x3f001 is not a page",
        ),
        (
            "far away",
            320,
            be64(u64::MAX),
            "offset 0xffffffffffffffff is not a page",
        ),
        (
            "last page of all",
            320,
            be64(u64::MAX - 4095),
            "offset 0xfffffffffffff000 is not a page",
        ),
        (
            "sign",
            320,
            be64(1 << 63),
            "offset 0x8000000000000000 is not a page",
        ),
        ("second page", 328, be64(0x1001), unaligned),
        ("zero page", 336, be64(0x4_0000), "offset 0x40000 is not a page"),
        ("twice", 328, be64(0x1000), twice),
        ("normal and zero", 336, be64(0x1000), twice),
    ]
}

#[test]
fn wrong_packets() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        // What is checked does not depend on the backend, when and where it arrives does: of the others, some.
        let step = if backend == BackendKind::Uring { 1 } else { 5 };
        for (case, at, bytes, says) in packet_cases().into_iter().step_by(step) {
            let (session, mut primary) = bench.protected();
            primary.request();
            let mut wrong = good_packet();
            wrong[at..at + bytes.len()].copy_from_slice(&bytes);
            let place = At::channel(&primary, 1);
            primary.channels[1].send(&wrong);
            bench.survives(case, session, &mut primary, place, &[says]);
        }
        bench.end();
    }
}

#[test]
fn a_wrong_packet_behind_good_ones_is_found_where_it_is() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let (session, mut primary) = bench.protected();
        primary.request();
        for _ in 0..3 {
            primary.channels[1].send_packet(&good_packet());
        }
        let place = At::channel(&primary, 1);
        let mut wrong = good_packet();
        wrong[7] = 9;
        primary.channels[1].send(&wrong);
        bench.survives(
            "behind",
            session,
            &mut primary,
            place,
            &["version of a multifd packet is 0x9"],
        );
        bench.end();
    }
}

#[test]
fn a_channel_that_begins_with_pages() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        for first in [good_packet(), packet("pc.ram", &[], &[0x3000])] {
            let (session, mut primary) = bench.connected();
            let place = At::channel(&primary, 1);
            primary.channels[1].send(&first);
            let says = "the channel's first packet is not a SYNC without pages";
            bench.survives("first packet", session, &mut primary, place, &[says]);
            assert!(bench.dump(session).is_err(), "nothing was committed");
        }
        bench.end();
    }
}

#[test]
fn pages_that_come_when_none_may() {
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        // Of the next epoch, before it was asked for.
        let (session, mut primary) = bench.protected();
        let place = At::channel(&primary, 1);
        primary.channels[1].send(&good_packet());
        let says = "pages after the last sync of a checkpoint, before the next one was answered";
        bench.survives("early pages", session, &mut primary, place, &[says]);

        // Half a packet, which is still coming when the round ends.
        let (session, mut primary) = bench.protected();
        primary.request();
        primary.sync();
        primary.main.send(&message(Message::VmstateSend));
        primary
            .main
            .send(&[section(Section::End { id: RAM }), record(RamRecord::MultifdFlush)].concat());
        primary.channels[1].send(&good_packet()[..HEADER_LEN + PAGE_SIZE]);
        let half = &primary.channels[1];
        half.wait_until_read(half.bytes);
        primary
            .main
            .send(&[end_of_body(), section(Section::Eof)].concat());
        let says = "channel 1: a packet goes on after the last sync of a checkpoint";
        bench.survives("half a packet", session, &mut primary, At::Nowhere, &[says]);
        bench.end();
    }
}

/// Odd, but QEMU versions do such things, or nothing forbids them.
#[test]
fn odd_packets_that_are_right() {
    fn numbered(number: u64) -> Vec<u8> {
        let mut bytes = good_packet();
        bytes[24..32].copy_from_slice(&number.to_be_bytes());
        bytes
    }
    fn changed(mut bytes: Vec<u8>, at: usize, to: u32) -> Vec<u8> {
        bytes[at..at + 4].copy_from_slice(&to.to_be_bytes());
        bytes
    }
    let good = [(0, 1, 0xaa), (0, 2, 0xab), (0, 3, 0)];
    let one = |fill| packet("pc.ram", &[(PAGE, fill)], &[]);
    let zero = || packet("pc.ram", &[], &[PAGE]);
    type Odd = (&'static str, Vec<Vec<u8>>, Vec<(usize, u64, u8)>);
    let cases: Vec<Odd> = vec![
        (
            "numbers that go back",
            vec![numbered(u64::MAX), numbered(5), numbered(5)],
            good.to_vec(),
        ),
        (
            "just enough room",
            vec![changed(good_packet(), 12, 3)],
            good.to_vec(),
        ),
        (
            "a stale size",
            vec![changed(zero(), 20, u32::MAX)],
            vec![(0, 1, 0)],
        ),
        (
            "an empty packet",
            vec![changed(changed(zero(), 32, 0), 20, 4096), one(3)],
            vec![(0, 1, 3)],
        ),
        ("zero over content", vec![one(4), zero()], vec![(0, 1, 0)]),
        ("content over zero", vec![zero(), one(5)], vec![(0, 1, 5)]),
        ("twice", vec![one(6), one(7)], vec![(0, 1, 7)]),
        (
            "last pages",
            vec![packet("pc.ram2", &[(7 * PAGE, 8)], &[0])],
            vec![(1, 7, 8), (1, 0, 0)],
        ),
    ];
    for backend in BACKENDS {
        let mut bench = Bench::start(backend, 2);
        let (session, mut primary) = bench.protected();
        for (moment, (case, packets, pages)) in (2u8..).zip(&cases) {
            println!("{case}");
            primary.request();
            packets
                .iter()
                .for_each(|packet| primary.channels[1].send_packet(packet));
            primary.sync();
            let bytes = primary.checkpoint_bytes(moment, &[]);
            primary.main.send(&bytes);
            primary.main.expect(&answers_to_checkpoint());
            primary.committed(pages, moment);
            assert_eq!(bench.compare(session, &primary), u64::from(moment));
        }
        sync_with_pages(&mut bench, session, &mut primary);
        bench.closes(session, &mut primary);
        bench.end();
    }
}

/// As QEMU 7.2 sends it; and the marker first, the SYNCs late, byte by byte, from channel to channel.
fn sync_with_pages(bench: &mut Bench, session: u32, primary: &mut HostilePrimary) {
    primary.request();
    let bytes = primary.checkpoint_bytes(99, &[]);
    primary.main.dribble(&bytes);
    let mut packet = good_packet();
    packet[11] = 1;
    primary.channels[0].dribble(&packet[..HEADER_LEN + 100]);
    primary.channels[0].send(&packet[HEADER_LEN + 100..]);
    primary.channels[0].wait_until_read(primary.channels[0].bytes);
    assert!(
        primary.main.is_silent(Duration::from_millis(50)),
        "one channel has not synced"
    );
    primary.channels[1].dribble(&sync_packet());
    primary.main.expect(&answers_to_checkpoint());
    primary.committed(&[(0, 1, 0xaa), (0, 2, 0xab), (0, 3, 0)], 99);
    bench.compare(session, primary);
}
