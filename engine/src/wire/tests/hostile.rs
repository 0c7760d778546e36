//! Input from a hostile or broken peer: each is refused at once, and nothing panics.

use super::hex;
use crate::blocks::{BLOCKS_MAX, BlockListError, BlockTable};
use crate::units::{PACKET_PAGES, PAGE_BYTES, PAGE_SIZE};
use crate::wire::codec::Method;
use crate::wire::colo::{Message, check_device_state};
use crate::wire::multifd::{
    HEADER_LEN, INIT_LEN, Init, PacketFields, PacketHeader, PageList, START_LEN, check_start,
};
use crate::wire::ram::{BlockEntry, BlockList, RamRecord};
use crate::wire::return_path::RpMessage;
use crate::wire::stream::{ChannelKind, Section, StreamHeader, classify, parse_footer};
use crate::wire::{Parsed, WireError, xbzrle};
use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt::Debug;

/// The error's text, which must hold `said`.
#[track_caller]
fn refused<T: Debug>(result: Result<T, WireError>, said: &str) {
    let text = result.expect_err("must be refused").to_string();
    assert!(text.contains(said), "{text:?} does not say {said:?}");
}

#[test]
fn foreign_connections() {
    assert_eq!(classify(*b"QEVM"), Ok(ChannelKind::Main));
    assert_eq!(classify([0x11, 0x22, 0x33, 0x44]), Ok(ChannelKind::Multifd));
    refused(
        classify(*b"GET "),
        "\"GET \", which is not a migration channel but HTTP",
    );
    refused(classify([0x16, 3, 1, 2]), "tls-creds");
    // The multifd magic in the other byte order, and nothing at all.
    refused(classify([0x44, 0x33, 0x22, 0x11]), "D3\\\"\\x11");
    refused(classify([0; 4]), "\\x00");
}

fn header_with(after_magic: &str, rest: &[u8]) -> Parsed<StreamHeader> {
    let mut bytes = b"QEVM".to_vec();
    bytes.extend(hex(after_magic));
    bytes.extend_from_slice(rest);
    StreamHeader::parse(&bytes)
}

#[test]
fn headers() {
    const PC: &str = "00000003 07 00000002 7063";
    refused(StreamHeader::parse(b"QEVN"), "magic");
    refused(header_with("00000002", b""), "version");
    refused(header_with("03000000", b""), "version");
    refused(header_with("00000003 01", b""), "send-configuration=off");
    refused(header_with("00000003 07 00000000", b""), "1 to 255");
    // Refused at its length, without a byte of it.
    refused(header_with("00000003 07 00000100", b""), "1 to 255");
    refused(header_with("00000003 07 ffffffff", b""), "1 to 255");
    refused(header_with("00000003 07 00000002 70ff", b""), "ASCII");
    let subsection = |name: &str, version: u8, body: &str| {
        let mut bytes = vec![5, u8::try_from(name.len()).unwrap()];
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&[0, 0, 0, version]);
        bytes.extend(hex(body));
        bytes
    };
    let with = |name, version, body| header_with(PC, &subsection(name, version, body));
    refused(with("configuration/target-page-bits", 1, "0000000e"), "4096");
    refused(with("configuration/target-page-bits", 2, "0000000c"), "version");
    let ignore_shared = "00000001 0f 782d69676e6f72652d736861726564";
    refused(
        with("configuration/capabilities", 1, ignore_shared),
        "x-ignore-shared",
    );
    refused(
        with("configuration/capabilities", 1, ignore_shared),
        "switch this capability off",
    );
    refused(with("configuration/other", 1, ""), "configuration/other");
    let uuid = subsection("configuration/uuid", 1, &"ab".repeat(16));
    refused(header_with(PC, &[&uuid[..], &uuid[..]].concat()), "count");
}

#[test]
fn sections_and_commands() {
    refused(Section::parse(&[0x05]), "section's type");
    refused(Section::parse(&[0x07]), "section's type");
    refused(Section::parse(&[0x7e]), "section's type");
    refused(
        Section::parse(&hex("01 00000002 03 72616d 00000000 00000003")),
        "version 3",
    );
    refused(
        Section::parse(&hex("01 00000002 03 72616d 00000001 00000004")),
        "instance 1",
    );
    let bitmap = hex("01 00000002 0c 64697274792d6269746d6170 00000000 00000001");
    refused(Section::parse(&bitmap), "dirty-bitmaps");
    refused(
        Section::parse(&hex("01 00000002 04 76666961 00000000 00000001")),
        "VFIO",
    );
    refused(parse_footer(&[0x08], 1), "footer");
    refused(parse_footer(&hex("7e 00000002"), 1), "is 2, expected 1");
    // Refused at its head: the length of a refused command is not waited for.
    refused(Section::parse(&hex("08 0003 0010")), "postcopy-ram");
    refused(Section::parse(&hex("08 0007 0004")), "postcopy-ram");
    refused(Section::parse(&hex("08 0000 0000")), "unknown command 0");
    refused(Section::parse(&hex("08 000c ffff")), "unknown command 12");
    refused(Section::parse(&hex("08 0001 0004")), "data length");
    refused(Section::parse(&hex("08 0002 0000")), "data length");
    refused(Section::parse(&hex("08 0008 0001")), "data length");
}

#[test]
fn records() {
    let word = |word: u64| RamRecord::parse(&word.to_be_bytes()).map(drop);
    refused(word(0x000), "exactly one");
    refused(word(0x020), "exactly one");
    refused(word(0x00a), "exactly one");
    refused(word(0x012), "exactly one");
    refused(word(0x024), "exactly one");
    refused(word(0x030), "exactly one");
    refused(word(0x400), "exactly one");
    refused(word(0x808), "exactly one");
    refused(word(0x1010), "exactly one");
    refused(word(0x1200), "exactly one");
    refused(word(0x001), "FULL");
    refused(word(0x080), "RDMA");
    refused(word(0x100), "capability compress off");
    refused(word(0x120), "capability compress off");
    refused(RamRecord::parse(&hex("0000000000000022 01")), "fill byte");
    refused(RamRecord::parse(&hex("0000000000000060 02")), "encoding");
    refused(RamRecord::parse(&hex("0000000000000060 01 0000")), "1 to 0x1000");
    // Refused at its length, without waiting for 64 KiB.
    refused(RamRecord::parse(&hex("0000000000000060 01 1001")), "1 to 0x1000");
}

#[test]
fn block_lists() {
    let push = |list: &mut BlockList, name: &str, used_length: u64| {
        let name = name.as_bytes();
        list.push(BlockEntry { name, used_length })
            .map(|table| table.is_some())
    };
    let list = |total| BlockList::new(total).unwrap();
    refused(BlockList::new(0), "add up");
    refused(push(&mut list(8192), "a", 12288), "add up");
    refused(push(&mut list(8192), "a", u64::MAX - 4095), "add up");
    refused(push(&mut list(8192), "a", 0), "positive multiple");
    refused(push(&mut list(8192), "a", 8191 + 1 + 1), "positive multiple");
    refused(push(&mut list(4096), "", 4096), "empty name");
    let mut twice = list(8192);
    assert_eq!(push(&mut twice, "a", 4096), Ok(false));
    refused(push(&mut twice, "a", 4096), "twice");
    // 2^64 wrapped around to the total.
    let mut wrapped = list(8192);
    assert_eq!(push(&mut wrapped, "a", 4096), Ok(false));
    refused(push(&mut wrapped, "b", 0u64.wrapping_sub(4096)), "add up");
    refused(push(&mut list(8192), "a", u64::MAX), "positive multiple");
    let mut many = list(1 << 30);
    for i in 0..BLOCKS_MAX {
        assert_eq!(push(&mut many, &i.to_string(), 4096), Ok(false));
    }
    assert_eq!(
        push(&mut many, "one more", 4096),
        Err(BlockListError::TooMany.into())
    );
}

#[test]
fn messages() {
    refused(Message::parse(&hex("00000007")), "message id");
    refused(Message::parse(&hex("01000000")), "message id");
    refused(Message::parse(&hex("00000004 0000000000000001")), "at least 2");
    refused(
        Message::parse(&hex("00000004 0000000040000001")),
        "at most 1073741824",
    );
    refused(
        Message::parse(&hex("00000004 ffffffffffffffff")),
        "at most 1073741824",
    );
    refused(RpMessage::parse(&hex("0003")), "message type");
    refused(RpMessage::parse(&hex("0000 0000")), "message type");
    refused(RpMessage::parse(&hex("0001 ffff")), "length");
    refused(check_device_state(&[]), "length");
    refused(check_device_state(&[4]), "length");
    refused(check_device_state(&[5, 0]), "first byte");
    refused(check_device_state(&[4, 1]), "last byte");
    assert_eq!(check_device_state(&[4, 0]), Ok(()));
}

#[test]
fn deltas() {
    let apply = |delta: &str| {
        let mut page = [7; PAGE_SIZE];
        let result = xbzrle::apply(&hex(delta), &mut page);
        // Nothing is written by a delta that is refused, also where its first runs are fine.
        assert_eq!(result.is_err(), page == [7; PAGE_SIZE], "{delta}");
        result
    };
    refused(apply(""), "empty");
    refused(apply("00"), "ends before a run's length");
    refused(apply("80"), "ends before a run's length");
    refused(apply("00 01"), "ends inside");
    refused(apply("00 02 01"), "ends inside");
    refused(apply("00 00"), "empty run of new bytes");
    refused(apply("00 01 aa 05"), "ends before a run's length");
    refused(apply("00 01 aa 00 01 bb"), "not the first");
    refused(apply("80 80 01 01 aa"), "more than two bytes");
    refused(apply("80 20 01 aa"), "beyond the page");
    refused(apply("ff 7f ff 7f"), "beyond the page");
    refused(apply("ff 1f 02 aa bb"), "beyond the page");
    assert_eq!(apply("ff 1f 01 aa"), Ok(()));
    assert_eq!(apply("00 01 aa"), Ok(()));
}

#[test]
fn inits() {
    let init = |at: usize, byte: u8| {
        let mut bytes = [0; INIT_LEN];
        bytes[..8].copy_from_slice(&hex("11223344 00000001"));
        bytes[at] = byte;
        Init::decode(&bytes)
    };
    assert!(init(24, 255).is_ok());
    refused(init(0, 0x44), "magic");
    refused(init(7, 2), "version");
    refused(init(4, 1), "version");
    for reserved in 25..INIT_LEN {
        refused(init(reserved, 1), "reserved");
    }
}

/// A header with two normal pages and one zero page of the block "pc.ram", changed by `change`.
fn packet(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    PacketFields {
        sync: false,
        method: Method::None,
        pages_alloc: 128,
        payload_len: 8192,
        packet_num: 3,
        block: b"pc.ram",
        normal: &[0, 4096],
        zero: &[8192],
    }
    .encode(&mut bytes);
    change(&mut bytes);
    bytes
}

fn be32(at: usize, number: u32) -> impl FnOnce(&mut [u8; HEADER_LEN]) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&number.to_be_bytes())
}

fn decode(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> Result<(), WireError> {
    PacketHeader::decode(&packet(change)).map(drop)
}

#[test]
fn packet_starts() {
    assert_eq!(decode(|_| ()), Ok(()));
    let start = |flags: &str| {
        let start: [u8; START_LEN] = hex(&format!("11223344 00000001 {flags}")).try_into().unwrap();
        let pure = packet(|bytes| {
            bytes[..START_LEN].copy_from_slice(&start);
            bytes[START_LEN..36].fill(0);
        });
        let both = (check_start(&start), PacketHeader::decode(&pure).map(drop));
        assert_eq!(both.0, both.1);
        both.0
    };
    assert_eq!(start("00000001"), Ok(()));
    refused(start("00000040"), "VFIO");
    refused(start("00000041"), "VFIO");
    refused(start("00000080"), "flags");
    refused(start("80000000"), "flags");
    refused(start("00000006"), "method");
    refused(start("0000003e"), "method");
    refused(decode(be32(0, 0x4433_2211)), "magic");
    refused(decode(be32(4, 2)), "version");
    refused(decode(be32(4, 0x0100_0000)), "version");
    for reserved in 36..64 {
        refused(decode(|bytes| bytes[reserved] = 1), "reserved");
    }
}

#[test]
fn packet_counts_and_sizes() {
    refused(decode(be32(12, 129)), "pages_alloc is 129");
    refused(decode(be32(12, u32::MAX)), "pages_alloc");
    refused(decode(be32(12, 0)), "normal_pages is 2, expected at most 0");
    refused(decode(be32(12, 2)), "zero_pages is 1, expected at most 0");
    refused(decode(be32(16, 129)), "normal_pages");
    refused(decode(be32(16, u32::MAX)), "normal_pages");
    refused(decode(be32(16, 0x1_0002)), "normal_pages");
    refused(decode(be32(32, 127)), "zero_pages is 127, expected at most 126");
    refused(decode(be32(32, u32::MAX - 1)), "zero_pages");
    for size in [0, 1, 4096, 8191, 8193, 12288, 1 << 20, u32::MAX] {
        refused(decode(be32(20, size)), "expected 8192");
    }
    for (bits, method) in [(2, "zlib"), (4, "zstd"), (8, "qpl"), (16, "uadk"), (32, "qatzip")] {
        // The length is checked against the method; without normal pages any is a stale one.
        if method == "qatzip" {
            refused(decode(be32(8, bits)), "multifd-compression to zstd");
        } else {
            decode(be32(8, bits)).unwrap();
        }
        let both = |size: u32| {
            decode(|bytes| {
                be32(8, bits)(bytes);
                be32(20, size)(bytes);
            })
        };
        refused(
            both(0),
            if method == "qatzip" {
                method
            } else {
                "payload size"
            },
        );
        refused(
            both((1 << 20) + 1),
            if method == "qatzip" {
                method
            } else {
                "payload size"
            },
        );
        let mut empty = packet(be32(8, bits));
        empty[16..20].fill(0);
        let header = PacketHeader::decode(&empty).unwrap();
        assert_eq!((header.payload_len(), header.zero_pages()), (0, 1));
        assert_eq!(header.method().name(), method);
    }
}

fn table() -> BlockTable {
    let entry = |name: &str, pages: u64| (name.as_bytes().into(), pages * PAGE_BYTES);
    BlockTable::new(vec![entry("pc.ra", 2), entry("pc.ram", 5000)], 5002 * PAGE_BYTES).unwrap()
}

fn resolve(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> Result<(usize, usize), WireError> {
    let bytes = packet(change);
    let (mut normal, mut zero) = <(PageList, PageList)>::default();
    let resolved = PacketHeader::decode(&bytes)?.resolve(&table(), &mut normal, &mut zero);
    let lengths = (normal.as_slice().len(), zero.as_slice().len());
    assert!(
        resolved.is_ok() || lengths == (0, 0),
        "pages of a refused packet are left"
    );
    resolved.map(|_| lengths)
}

#[test]
fn packet_addresses() {
    assert_eq!(resolve(|_| ()), Ok((2, 1)));
    let name = |name: &'static [u8]| {
        move |bytes: &mut [u8; HEADER_LEN]| {
            bytes[64..320].fill(0);
            bytes[64..64 + name.len()].copy_from_slice(name);
        }
    };
    refused(resolve(name(b"pc.bios")), "pc.bios");
    refused(resolve(name(b"pc.r")), "\"pc.r\" is not in");
    refused(resolve(name(b"pc.ramx")), "pc.ramx");
    refused(resolve(name(b"")), "\"\" is not in");
    refused(resolve(name(b"\xff\n")), "\\xff\\n");
    refused(resolve(|bytes| bytes[64..320].fill(b'p')), "block name is 256");
    // Bytes after the name's end mean nothing.
    assert_eq!(resolve(|bytes| bytes[64 + 7..320].fill(b'p')), Ok((2, 1)));

    let offset = |slot: usize, offset: u64| {
        move |bytes: &mut [u8; HEADER_LEN]| {
            bytes[320 + 8 * slot..328 + 8 * slot].copy_from_slice(&offset.to_be_bytes());
        }
    };
    let length = 5000 * PAGE_BYTES;
    for slot in 0..3 {
        for bad in [
            1,
            length,
            length - PAGE_BYTES + 1,
            u64::MAX,
            u64::MAX - 4095,
            1 << 63,
        ] {
            refused(resolve(offset(slot, bad)), "is not a page");
        }
        assert_eq!(resolve(offset(slot, length - PAGE_BYTES)), Ok((2, 1)));
    }
    refused(
        resolve(offset(1, 0)),
        "offset 0x0 of block \"pc.ram\" occurs twice",
    );
    refused(resolve(offset(2, 4096)), "twice");
    // Pages that share a bit of the quick test are no repetition.
    assert_eq!(resolve(offset(1, 4096 * PAGE_BYTES)), Ok((2, 1)));
    // Offsets after the last page mean nothing, and neither does anything in a packet without pages.
    assert_eq!(resolve(offset(3, u64::MAX)), Ok((2, 1)));
    let without_pages = |bytes: &mut [u8; HEADER_LEN]| {
        (be32(16, 0))(bytes);
        (be32(32, 0))(bytes);
        bytes[64..].fill(0xff);
    };
    assert_eq!(resolve(without_pages), Ok((0, 0)));
}

#[test]
fn every_repetition_in_a_full_packet_is_found() {
    let pages: Vec<u64> = (0..PACKET_PAGES as u64)
        .map(|page| page * 37 % 4001 * PAGE_BYTES)
        .collect();
    for (first, second) in [(0, 1), (0, 127), (63, 64), (64, 127), (126, 127), (3, 90)] {
        for normal in [0, 64, 128] {
            let mut repeated = pages.clone();
            repeated[second] = repeated[first];
            let (normal, zero) = repeated.split_at(normal);
            let mut bytes = [0; HEADER_LEN];
            PacketFields {
                sync: false,
                method: Method::None,
                pages_alloc: 128,
                payload_len: crate::wire::multifd::raw_payload_len(normal.len()),
                packet_num: 0,
                block: b"pc.ram",
                normal,
                zero,
            }
            .encode(&mut bytes);
            let header = PacketHeader::decode(&bytes).unwrap();
            let resolved = header.resolve(&table(), &mut PageList::default(), &mut PageList::default());
            refused(resolved, "twice");
        }
    }
}

proptest! {
    /// For all input, every parser returns and takes no more than there is.
    #[test]
    fn arbitrary_bytes(bytes in vec(prop_oneof![any::<u8>(), 0..9u8], 0..600), id: u32) {
        fn sane<T>(parsed: Parsed<T>, length: usize) -> bool {
            parsed.ok().flatten().is_none_or(|(_, consumed)| 0 < consumed && consumed <= length)
        }
        let length = bytes.len();
        prop_assert!(sane(Section::parse(&bytes), length));
        prop_assert!(sane(parse_footer(&bytes, id), length));
        prop_assert!(sane(RamRecord::parse(&bytes), length));
        prop_assert!(sane(BlockEntry::parse(&bytes), length));
        prop_assert!(sane(Message::parse(&bytes), length));
        prop_assert!(sane(RpMessage::parse(&bytes), length));
        let mut header = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x05".to_vec();
        header.extend_from_slice(&bytes);
        prop_assert!(sane(StreamHeader::parse(&header), header.len()));
        prop_assert!(sane(StreamHeader::parse(&bytes), length));
        let mut page = [0; PAGE_SIZE];
        let _ = xbzrle::apply(&bytes, &mut page);
    }

    /// A header with a few bytes changed is refused, or keeps every promise of the decoder.
    #[test]
    fn damaged_packets(changes in vec((0..HEADER_LEN, any::<u8>()), 1..6)) {
        let bytes = packet(|bytes| changes.iter().for_each(|&(at, byte)| bytes[at] = byte));
        let Ok(header) = PacketHeader::decode(&bytes) else { return Ok(()) };
        let (n, z) = (usize::from(header.normal_pages()), usize::from(header.zero_pages()));
        prop_assert!(n + z <= PACKET_PAGES);
        prop_assert_eq!(header.payload_len() as usize, n * PAGE_SIZE);
        let (mut normal, mut zero) = <(PageList, PageList)>::default();
        if header.resolve(&table(), &mut normal, &mut zero).is_ok() {
            prop_assert_eq!((normal.as_slice().len(), zero.as_slice().len()), (n, z));
            let mut all = [normal.as_slice(), zero.as_slice()].concat();
            prop_assert!(all.iter().all(|page| page.get() < table().total_pages()));
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len(), n + z);
        }
    }
}
