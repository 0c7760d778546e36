//! The worked examples of spec §19, byte for byte, in both directions.

use super::{every_cut_is_incomplete, hex, next};
use crate::blocks::BlockTable;
use crate::units::{BlockId, ChannelId, PAGE_BYTES, PAGE_SIZE};
use crate::wire::codec::Method;
use crate::wire::colo::Message;
use crate::wire::multifd::{HEADER_LEN, Init, PacketFields, PacketHeader, PageList, raw_payload_len};
use crate::wire::ram::{BlockEntry, BlockList, BlockRef, RamRecord, encode_block_list};
use crate::wire::return_path::RpMessage;
use crate::wire::stream::{Command, Section, StreamHeader, encode_footer, parse_footer};
use crate::wire::xbzrle;

const BLOCKS: [(&str, u64); 6] = [
    ("pc.ram", 0x0800_0000),
    ("/rom@etc/acpi/tables", 0x20000),
    ("pc.bios", 0x40000),
    ("pc.rom", 0x20000),
    ("/rom@etc/table-loader", 0x1000),
    ("/rom@etc/acpi/rsdp", 0x1000),
];

fn table() -> BlockTable {
    let entries = BLOCKS.map(|(name, length)| (name.as_bytes().into(), length));
    BlockTable::new(entries.into(), 0x0808_2000).unwrap()
}

/// §19.1: from the magic to the first device section's head.
fn main_channel_start() -> Vec<u8> {
    let mut bytes = hex("51 45 56 4d 00 00 00 03
         07 00 00 00 0e 70 63 2d 69 34 34 30 66 78 2d 31 31 2e 31
         08 00 01 00 00
         08 00 02 00 04 00 00 00 01
         01 00 00 00 01 03 72 61 6d 00 00 00 00 00 00 00 04
         00 00 00 00 08 08 20 04
         06 70 63 2e 72 61 6d  00 00 00 00 08 00 00 00
         14 2f 72 6f 6d 40 65 74 63 2f 61 63 70 69 2f 74 61 62 6c 65 73  00 00 00 00 00 02 00 00
         07 70 63 2e 62 69 6f 73  00 00 00 00 00 04 00 00
         06 70 63 2e 72 6f 6d  00 00 00 00 00 02 00 00");
    assert_eq!(bytes.len(), 0x8d);
    bytes.extend_from_slice(b"\x15/rom@etc/table-loader\0\0\0\0\0\0\x10\0");
    bytes.extend_from_slice(b"\x12/rom@etc/acpi/rsdp\0\0\0\0\0\0\x10\0");
    assert_eq!(bytes.len(), 0xc6);
    bytes.extend(hex("00 00 00 00 00 00 02 00
         00 00 00 00 00 00 00 10  7e 00 00 00 01
         02 00 00 00 01  00 00 00 00 00 00 00 10  7e 00 00 00 01
         02 00 00 00 01  00 00 00 00 00 00 00 10  7e 00 00 00 01
         08 00 0b 00 00
         03 00 00 00 01
         00 00 00 00 00 00 02 00
         00 00 00 00 00 00 02 00
         00 00 00 00 00 00 00 10  7e 00 00 00 01
         04 00 00 00 06 04 61 70 69 63 00 00 00 00 00 00 00 03"));
    assert_eq!(bytes.len(), 0x138);
    bytes
}

#[test]
fn main_channel_start_is_read() {
    let bytes = main_channel_start();
    let input = &mut &bytes[..];
    let header = next(input, StreamHeader::parse);
    assert_eq!(header.machine_type, "pc-i440fx-11.1");
    assert_eq!(bytes.len() - input.len(), 0x1b);
    assert_eq!(
        next(input, Section::parse),
        Section::Command(Command::OpenReturnPath)
    );
    assert_eq!(next(input, Section::parse), Section::Command(Command::Ping(1)));
    assert_eq!(next(input, Section::parse), Section::RamStart { id: 1 });
    let RamRecord::MemSize { total } = next(input, RamRecord::parse) else {
        panic!()
    };
    let mut list = BlockList::new(total).unwrap();
    let read = loop {
        if let Some(table) = list.push(next(input, BlockEntry::parse)).unwrap() {
            break table;
        }
    };
    assert_eq!(read, table());
    assert_eq!(bytes.len() - input.len(), 0xc6);
    assert_eq!(next(input, RamRecord::parse), RamRecord::MultifdFlush);
    assert_eq!(next(input, RamRecord::parse), RamRecord::Eos);
    next(input, |input| parse_footer(input, 1));
    for _ in 0..2 {
        assert_eq!(next(input, Section::parse), Section::Part { id: 1 });
        assert_eq!(next(input, RamRecord::parse), RamRecord::Eos);
        next(input, |input| parse_footer(input, 1));
    }
    assert_eq!(
        next(input, Section::parse),
        Section::Command(Command::SwitchoverStart)
    );
    assert_eq!(next(input, Section::parse), Section::End { id: 1 });
    assert_eq!(next(input, RamRecord::parse), RamRecord::MultifdFlush);
    assert_eq!(next(input, RamRecord::parse), RamRecord::MultifdFlush);
    assert_eq!(next(input, RamRecord::parse), RamRecord::Eos);
    next(input, |input| parse_footer(input, 1));
    let full = Section::Full {
        id: 6,
        idstr: b"apic",
        instance: 0,
        version: 3,
    };
    assert_eq!(next(input, Section::parse), full);
    assert!(input.is_empty());
}

#[test]
fn main_channel_start_is_written() {
    let mut out = Vec::new();
    let header = StreamHeader {
        machine_type: "pc-i440fx-11.1".to_owned(),
        target_page_bits: false,
        capabilities: false,
        uuid: None,
    };
    header.encode(&mut out);
    Command::OpenReturnPath.encode(&mut out);
    Command::Ping(1).encode(&mut out);
    Section::RamStart { id: 1 }.encode(&mut out);
    encode_block_list(&mut out, &table());
    RamRecord::MultifdFlush.encode(&mut out);
    RamRecord::Eos.encode(&mut out);
    encode_footer(&mut out, 1);
    for _ in 0..2 {
        Section::Part { id: 1 }.encode(&mut out);
        RamRecord::Eos.encode(&mut out);
        encode_footer(&mut out, 1);
    }
    Section::Command(Command::SwitchoverStart).encode(&mut out);
    Section::End { id: 1 }.encode(&mut out);
    RamRecord::MultifdFlush.encode(&mut out);
    RamRecord::MultifdFlush.encode(&mut out);
    RamRecord::Eos.encode(&mut out);
    encode_footer(&mut out, 1);
    let (idstr, id, instance, version) = (b"apic", 6, 0, 3);
    Section::Full {
        id,
        idstr,
        instance,
        version,
    }
    .encode(&mut out);
    assert_eq!(out, main_channel_start());
}

#[test]
fn reverse_direction() {
    let bytes = hex("00 02 00 04 00 00 00 01  00 01 00 04 00 00 00 00
         00 00 00 00  00 00 00 02  00 00 00 05  00 00 00 06  00 00 00 02 00 00 00 05 00 00 00 06");
    let input = &mut &bytes[..];
    assert_eq!(next(input, RpMessage::parse), RpMessage::Pong(1));
    assert_eq!(next(input, RpMessage::parse), RpMessage::Shut(0));
    let mut out = Vec::new();
    RpMessage::Pong(1).encode(&mut out);
    RpMessage::Shut(0).encode(&mut out);
    use Message::{CheckpointReady, CheckpointReply, VmstateLoaded, VmstateReceived};
    let checkpoint = [CheckpointReply, VmstateReceived, VmstateLoaded];
    for message in [CheckpointReady].into_iter().chain(checkpoint).chain(checkpoint) {
        assert_eq!(next(input, Message::parse), message);
        message.encode(&mut out);
    }
    assert!(input.is_empty());
    assert_eq!(out, bytes);
}

#[test]
fn one_checkpoint_on_main() {
    let bytes = hex("00 00 00 01  00 00 00 03  03 00 00 00 01
         00 00 00 00 00 00 02 00  00 00 00 00 00 00 02 00  00 00 00 00 00 00 00 10
         7e 00 00 00 01  00  00 00 00 04  00 00 00 00 00 00 32 df  04 00 00 00 06 04 61 70 69 63");
    let input = &mut &bytes[..];
    assert_eq!(next(input, Message::parse), Message::CheckpointRequest);
    assert_eq!(next(input, Message::parse), Message::VmstateSend);
    assert_eq!(next(input, Section::parse), Section::End { id: 1 });
    assert_eq!(next(input, RamRecord::parse), RamRecord::MultifdFlush);
    assert_eq!(next(input, RamRecord::parse), RamRecord::MultifdFlush);
    assert_eq!(next(input, RamRecord::parse), RamRecord::Eos);
    next(input, |input| parse_footer(input, 1));
    assert_eq!(next(input, Section::parse), Section::Eof);
    assert_eq!(next(input, Message::parse), Message::VmstateSize(13023));
    assert_eq!(input[0], 0x04);
}

#[test]
fn multifd_channel() {
    let mut init = hex("11 22 33 44 00 00 00 01");
    init.resize(64, 0);
    let init: [u8; 64] = init.try_into().unwrap();
    let decoded = Init::decode(&init).unwrap();
    assert_eq!((decoded.uuid, decoded.channel), ([0; 16], ChannelId(0)));
    assert_eq!(decoded.encode(), init);

    let mut sync = hex("11 22 33 44 00 00 00 01 00 00 00 01
         00 00 00 00 00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 01");
    sync.resize(HEADER_LEN, 0);
    let sync: [u8; HEADER_LEN] = sync.try_into().unwrap();
    let header = PacketHeader::decode(&sync).unwrap();
    assert!(header.is_sync() && !header.has_pages());
    assert_eq!((header.packet_num(), header.payload_len()), (1, 0));
    let mut encoded = [0xff; HEADER_LEN];
    PacketFields::sync(1).encode(&mut encoded);
    assert_eq!(encoded, sync);
}

#[test]
fn multifd_packet_with_pages() {
    let normal: Vec<u64> = [0, 0x20000, 0x1f000]
        .into_iter()
        .chain((0..7).map(|i| 0x30000 + i * PAGE_BYTES))
        .collect();
    let zero: Vec<u64> = (0..118).map(|i| 0x10_0000 + i * PAGE_BYTES).collect();
    let mut bytes = hex(
        "11 22 33 44 00 00 00 01 00 00 00 00  00 00 00 80  00 00 00 0a  00 00 a0 00
         00 00 00 00 00 00 00 09  00 00 00 76",
    );
    bytes.resize(64, 0);
    bytes.extend_from_slice(b"pc.ram");
    bytes.resize(320, 0);
    bytes.extend(normal.iter().chain(&zero).flat_map(|offset| offset.to_be_bytes()));
    let bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();

    let header = PacketHeader::decode(&bytes).unwrap();
    assert_eq!((header.normal_pages(), header.zero_pages()), (10, 118));
    assert_eq!((header.payload_len(), header.packet_num()), (40960, 9));
    assert_eq!(header.block_name().unwrap(), b"pc.ram");
    assert!(!header.is_sync());
    let (mut normal_pages, mut zero_pages) = <(PageList, PageList)>::default();
    let block = header
        .resolve(&table(), &mut normal_pages, &mut zero_pages)
        .unwrap();
    assert_eq!(block, Some(BlockId(0)));
    let offset = |page: &crate::units::PageIndex| page.get() * PAGE_BYTES;
    assert_eq!(
        normal_pages.as_slice().iter().map(offset).collect::<Vec<_>>(),
        normal
    );
    assert_eq!(zero_pages.as_slice().iter().map(offset).collect::<Vec<_>>(), zero);

    let mut encoded = [0xff; HEADER_LEN];
    PacketFields {
        sync: false,
        method: Method::None,
        pages_alloc: 128,
        payload_len: raw_payload_len(normal.len()),
        packet_num: 9,
        block: b"pc.ram",
        normal: &normal,
        zero: &zero,
    }
    .encode(&mut encoded);
    assert_eq!(encoded, bytes);
}

#[test]
fn plain_records_and_delta() {
    let mut bytes = hex("02 00 00 00 01  00 00 00 00 00 00 00 08 06 70 63 2e 72 61 6d");
    bytes.extend_from_slice(&[0x5a; PAGE_SIZE]);
    bytes.extend(hex("00 00 00 00 00 00 10 22 00"));
    let delta = hex("c0 03 01 40  28 02 51 5f  d5 09 01 01  37 08 b6 b9 89 d8 5b b9 ec f1");
    bytes.extend(hex("00 00 00 00 02 bc 70 60  01 00 16"));
    bytes.extend_from_slice(&delta);
    let input = &mut &bytes[..];
    assert_eq!(next(input, Section::parse), Section::Part { id: 1 });
    let page = RamRecord::Page {
        block: BlockRef::Named(b"pc.ram"),
        offset: 0,
        content: &[0x5a; PAGE_SIZE],
    };
    every_cut_is_incomplete(&input[..8 + 7 + PAGE_SIZE], RamRecord::parse);
    assert_eq!(next(input, RamRecord::parse), page);
    let block = BlockRef::Continue;
    assert_eq!(
        next(input, RamRecord::parse),
        RamRecord::Zero {
            block,
            offset: 0x1000
        }
    );
    let xbzrle = RamRecord::Xbzrle {
        block,
        offset: 0x2bc_7000,
        delta: &delta,
    };
    assert_eq!(next(input, RamRecord::parse), xbzrle);
    assert!(input.is_empty());

    let mut expected = [0xee; PAGE_SIZE];
    let mut page = expected;
    expected[448] = 0x40;
    expected[489..491].copy_from_slice(&[0x51, 0x5f]);
    expected[491 + 1237] = 0x01;
    let last = 491 + 1237 + 1 + 55;
    expected[last..last + 8].copy_from_slice(&hex("b6 b9 89 d8 5b b9 ec f1"));
    let mut encoded = Vec::new();
    xbzrle::encode(&page, &expected, &mut encoded);
    assert_eq!(encoded, delta);
    xbzrle::apply(&delta, &mut page).unwrap();
    assert_eq!(page, expected);
}
