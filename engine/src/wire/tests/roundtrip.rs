//! Every type survives being written and read, and every cut of it asks for more bytes.

use super::every_cut_is_incomplete;
use crate::blocks::BlockTable;
use crate::units::{ChannelId, PACKET_PAGES, PAGE_BYTES, PAGE_SIZE, PageIndex};
use crate::wire::codec::Method;
use crate::wire::colo::Message;
use crate::wire::limits::{VMSTATE_MAX, VMSTATE_MIN};
use crate::wire::multifd::{HEADER_LEN, Init, PacketFields, PacketHeader, PageList, raw_payload_len};
use crate::wire::ram::{BlockEntry, BlockList, BlockRef, RECORD_MAX, RamRecord, encode_block_list};
use crate::wire::return_path::RpMessage;
use crate::wire::stream::{Command, Section, StreamHeader, encode_footer, parse_footer};
use crate::wire::xbzrle;
use proptest::collection::vec;
use proptest::prelude::*;

/// Checks `parse` on what `encode` wrote: whole, followed by other bytes, and cut anywhere.
macro_rules! round_trip {
    ($value:expr, $parse:expr) => {{
        let value = $value;
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        let length = bytes.len();
        prop_assert_eq!($parse(&bytes), Ok(Some((value.clone(), length))));
        every_cut_is_incomplete(&bytes, $parse);
        let mut more = bytes.clone();
        more.extend_from_slice(&[0xa5; 9]);
        prop_assert_eq!($parse(&more), Ok(Some((value, length))));
    }};
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![vec(any::<u8>(), 0..20), vec(any::<u8>(), 255..=255)]
}

fn offset() -> impl Strategy<Value = u64> {
    (0..=u64::MAX / PAGE_BYTES).prop_map(|page| page * PAGE_BYTES)
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        Just(Command::EnableColo),
        Just(Command::SwitchoverStart),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        Just(Message::CheckpointReady),
        Just(Message::CheckpointRequest),
        Just(Message::CheckpointReply),
        Just(Message::VmstateSend),
        (VMSTATE_MIN..=VMSTATE_MAX).prop_map(Message::VmstateSize),
        Just(Message::VmstateReceived),
        Just(Message::VmstateLoaded),
    ]
}

/// A page with long runs of equal bytes, and one that differs from it in places.
fn two_pages() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let changes = vec((0..PAGE_SIZE, 1..300usize, any::<u8>()), 1..20);
    (any::<u8>(), changes).prop_map(|(fill, changes)| {
        let old = vec![fill; PAGE_SIZE];
        let mut new = old.clone();
        for (at, length, byte) in changes {
            let end = (at + length).min(PAGE_SIZE);
            new[at..end].fill(byte);
        }
        (old, new)
    })
}

/// Distinct pages of a block of 1,024, in any order, and how many of them are normal.
fn packet_pages() -> impl Strategy<Value = (Vec<u64>, usize)> {
    let all: Vec<u64> = (0..1024).map(|page| page * PAGE_BYTES).collect();
    proptest::sample::subsequence(all, 0..=PACKET_PAGES)
        .prop_shuffle()
        .prop_flat_map(|pages| {
            let most = pages.len();
            (Just(pages), 0..=most)
        })
}

proptest! {
    #[test]
    fn header(
        machine in "[!-~]{1,255}",
        bits in any::<bool>(),
        capabilities in any::<bool>(),
        uuid in any::<Option<[u8; 16]>>(),
    ) {
        let header = StreamHeader { machine_type: machine, target_page_bits: bits, capabilities, uuid };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        let length = bytes.len();
        // Only the byte after it tells that the configuration has ended.
        every_cut_is_incomplete(&bytes, StreamHeader::parse);
        prop_assert_eq!(StreamHeader::parse(&bytes), Ok(None));
        bytes.push(0x08);
        prop_assert_eq!(StreamHeader::parse(&bytes), Ok(Some((header, length))));
    }

    #[test]
    fn sections(id: u32, idstr in name(), instance: u32, version: u32, command in command()) {
        let idstr = &idstr[..];
        round_trip!(Section::Eof, Section::parse);
        round_trip!(Section::RamStart { id }, Section::parse);
        round_trip!(Section::Part { id }, Section::parse);
        round_trip!(Section::End { id }, Section::parse);
        round_trip!(Section::Full { id, idstr, instance, version }, Section::parse);
        round_trip!(Section::VmDescription { length: id }, Section::parse);
        round_trip!(Section::Command(command), Section::parse);
    }

    #[test]
    fn footer(id: u32, other: u32) {
        let mut bytes = Vec::new();
        encode_footer(&mut bytes, id);
        prop_assert_eq!(parse_footer(&bytes, id), Ok(Some(((), 5))));
        every_cut_is_incomplete(&bytes, |input| parse_footer(input, id));
        prop_assert_eq!(parse_footer(&bytes, other).is_ok(), id == other);
    }

    #[test]
    fn messages(message in message(), value: u32) {
        round_trip!(message, Message::parse);
        round_trip!(RpMessage::Shut(value), RpMessage::parse);
        round_trip!(RpMessage::Pong(value), RpMessage::parse);
    }

    #[test]
    fn small_records(name in name(), named: bool, offset in offset(), delta in vec(any::<u8>(), 1..80)) {
        let block = if named { BlockRef::Named(&name) } else { BlockRef::Continue };
        round_trip!(RamRecord::Zero { block, offset }, RamRecord::parse);
        round_trip!(RamRecord::Xbzrle { block, offset, delta: &delta }, RamRecord::parse);
        round_trip!(RamRecord::MemSize { total: offset }, RamRecord::parse);
        round_trip!(RamRecord::Eos, RamRecord::parse);
        round_trip!(RamRecord::MultifdFlush, RamRecord::parse);
        round_trip!(BlockEntry { name: &name, used_length: offset }, BlockEntry::parse);
    }

    #[test]
    fn block_list(lengths in vec(1..1u64 << 40, 1..40)) {
        let entries: Vec<_> = lengths
            .iter()
            .enumerate()
            .map(|(i, pages)| (format!("block {i}").into_bytes().into(), pages * PAGE_BYTES))
            .collect();
        let total = lengths.iter().sum::<u64>() * PAGE_BYTES;
        let table = BlockTable::new(entries, total).unwrap();
        let mut bytes = Vec::new();
        encode_block_list(&mut bytes, &table);
        let input = &mut &bytes[..];
        prop_assert_eq!(super::next(input, RamRecord::parse), RamRecord::MemSize { total });
        let mut list = BlockList::new(total).unwrap();
        for _ in 1..table.iter().len() {
            prop_assert_eq!(list.push(super::next(input, BlockEntry::parse)), Ok(None));
        }
        prop_assert_eq!(list.push(super::next(input, BlockEntry::parse)), Ok(Some(table)));
        prop_assert!(input.is_empty());
    }

    #[test]
    fn xbzrle_delta((old, new) in two_pages()) {
        let (mut page, new): ([u8; PAGE_SIZE], [u8; PAGE_SIZE]) = (old.try_into().unwrap(), new.try_into().unwrap());
        let mut delta = Vec::new();
        xbzrle::encode(&page, &new, &mut delta);
        if page == new {
            prop_assert!(delta.is_empty());
            return Ok(());
        }
        let whole_runs = whole_runs(&delta);
        for cut in 0..delta.len() {
            let before = page;
            if !whole_runs.contains(&cut) {
                prop_assert!(xbzrle::apply(&delta[..cut], &mut page).is_err(), "cut at {}", cut);
                prop_assert_eq!(page, before);
            }
        }
        prop_assert_eq!(xbzrle::apply(&delta, &mut page), Ok(()));
        prop_assert_eq!(page, new);
    }

    #[test]
    fn init(uuid: [u8; 16], channel: u8) {
        let init = Init { uuid, channel: ChannelId(channel) };
        prop_assert_eq!(Init::decode(&init.encode()), Ok(init));
    }

    #[test]
    fn packet((pages, normal) in packet_pages(), sync: bool, packet_num: u64, name in "[!-~]{1,255}") {
        let first: (Box<[u8]>, u64) = (b"first".as_slice().into(), 3 * PAGE_BYTES);
        let second: (Box<[u8]>, u64) = (name.as_bytes().into(), 1024 * PAGE_BYTES);
        let table = BlockTable::new(vec![first, second], 1027 * PAGE_BYTES).unwrap();
        let (normal, zero) = pages.split_at(normal);
        let mut bytes = [0; HEADER_LEN];
        PacketFields {
            sync,
            method: Method::None,
            pages_alloc: 128,
            payload_len: raw_payload_len(normal.len()),
            packet_num,
            block: name.as_bytes(),
            normal,
            zero,
        }
        .encode(&mut bytes);

        let header = PacketHeader::decode(&bytes).unwrap();
        prop_assert_eq!(header.is_sync(), sync);
        prop_assert_eq!(header.method(), Method::None);
        prop_assert_eq!(header.packet_num(), packet_num);
        prop_assert_eq!(header.payload_len() as usize, normal.len() * PAGE_SIZE);
        prop_assert_eq!(header.block_name(), Ok(name.as_bytes()));
        prop_assert!(header.normal_offsets().eq(normal.iter().copied()));
        prop_assert!(header.zero_offsets().eq(zero.iter().copied()));
        let (mut normal_pages, mut zero_pages) = <(PageList, PageList)>::default();
        let block = header.resolve(&table, &mut normal_pages, &mut zero_pages).unwrap();
        prop_assert_eq!(block, table.by_name(name.as_bytes()).filter(|_| !pages.is_empty()));
        let index = |offset: &u64| PageIndex::new(3 + offset / PAGE_BYTES);
        prop_assert!(normal_pages.as_slice().iter().copied().eq(normal.iter().map(index)));
        prop_assert!(zero_pages.as_slice().iter().copied().eq(zero.iter().map(index)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn page_records(name in name(), named: bool, offset in offset(), seed: u8, delta_len in 1..=PAGE_SIZE) {
        let block = if named { BlockRef::Named(&name) } else { BlockRef::Continue };
        let content: [u8; PAGE_SIZE] = std::array::from_fn(|i| seed.wrapping_add(i.to_le_bytes()[0]));
        round_trip!(RamRecord::Page { block, offset, content: &content }, RamRecord::parse);
        round_trip!(RamRecord::Xbzrle { block, offset, delta: &content[..delta_len] }, RamRecord::parse);
    }
}

/// Lengths at which a delta ends after a whole run of new bytes: cut there, it is a valid shorter delta.
fn whole_runs(delta: &[u8]) -> Vec<usize> {
    let start = delta.as_ptr().addr();
    let end = |run: xbzrle::Run<'_>| run.bytes.as_ptr().addr() - start + run.bytes.len();
    xbzrle::runs(delta).map(|run| end(run.unwrap())).collect()
}

#[test]
fn the_longest_record_is_as_long_as_stated() {
    let mut bytes = Vec::new();
    let record = RamRecord::Page {
        block: BlockRef::Named(&[b'n'; 255]),
        offset: 0,
        content: &[0; PAGE_SIZE],
    };
    record.encode(&mut bytes);
    assert_eq!(bytes.len(), RECORD_MAX);
}
