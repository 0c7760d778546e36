//! The bytes of a session, piece by piece.

use super::{BLOCKS, PAGE, RAM, STATE_BYTES};
use colo_ring::blocks::{BLOCK_NAME_MAX, BlockTable};
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::codec::Method;
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::{HEADER_LEN, PacketFields, raw_payload_len};
use colo_ring::wire::ram::{BlockRef, RamRecord, encode_block_list};
use colo_ring::wire::return_path::RpMessage;
use colo_ring::wire::stream::{Command, Section, StreamHeader, encode_footer};

/// A packet of pages of one block: (offset, fill byte) of the normal ones, offsets of the zero ones.
///
/// # Panics
/// With more pages than fit.
#[must_use]
pub fn packet(block: &str, normal: &[(u64, u8)], zero: &[u64]) -> Vec<u8> {
    let offsets: Vec<u64> = normal.iter().map(|(offset, _)| *offset).collect();
    let mut header = [0; HEADER_LEN];
    PacketFields {
        sync: false,
        method: Method::None,
        pages_alloc: 128,
        payload_len: raw_payload_len(normal.len()),
        packet_num: 1,
        block: block.as_bytes(),
        normal: &offsets,
        zero,
    }
    .encode(&mut header);
    let mut bytes = header.to_vec();
    for (_, fill) in normal {
        bytes.extend_from_slice(&[*fill; PAGE_SIZE]);
    }
    bytes
}

/// A packet of pages of one block with a payload of any bytes, said to be compressed by this method.
#[must_use]
pub fn compressed_packet(method: Method, block: &str, offsets: &[u64], payload: &[u8]) -> Vec<u8> {
    let mut header = [0; HEADER_LEN];
    PacketFields {
        sync: false,
        method,
        pages_alloc: 128,
        payload_len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        packet_num: 1,
        block: block.as_bytes(),
        normal: offsets,
        zero: &[],
    }
    .encode(&mut header);
    [&header[..], payload].concat()
}

/// A SYNC without pages.
#[must_use]
pub fn sync_packet() -> Vec<u8> {
    let mut header = [0; HEADER_LEN];
    PacketFields::sync(0).encode(&mut header);
    header.to_vec()
}

/// The stream's header.
#[must_use]
pub fn header() -> Vec<u8> {
    let mut out = Vec::new();
    let header = StreamHeader {
        machine_type: "pc-i440fx-11.1".into(),
        target_page_bits: false,
        capabilities: false,
        uuid: None,
    };
    header.encode(&mut out);
    out
}

/// Commands one after the other.
#[must_use]
pub fn commands(commands: &[Command]) -> Vec<u8> {
    let mut out = Vec::new();
    commands.iter().for_each(|command| command.encode(&mut out));
    out
}

/// The head of the RAM section.
#[must_use]
pub fn ram_start() -> Vec<u8> {
    section(Section::RamStart { id: RAM })
}

/// The list of [`BLOCKS`].
///
/// # Panics
/// Never: they are a good list.
#[must_use]
pub fn block_list() -> Vec<u8> {
    let entries = BLOCKS
        .iter()
        .map(|(name, bytes)| (name.as_bytes().into(), *bytes));
    let total = BLOCKS.iter().map(|(_, bytes)| bytes).sum();
    let mut out = Vec::new();
    encode_block_list(
        &mut out,
        &BlockTable::new(entries.collect(), total).expect("a good list"),
    );
    out
}

/// A list of one block.
///
/// # Panics
/// If its length is not a number of pages.
#[must_use]
pub fn list_of_one_block(name: &str, bytes: u64) -> Vec<u8> {
    let table = BlockTable::new(vec![(name.as_bytes().into(), bytes)], bytes);
    let mut out = Vec::new();
    encode_block_list(&mut out, &table.expect("a good list"));
    out
}

/// A list of so many blocks of one page with names as long as they can be, of bytes that are no text.
///
/// # Panics
/// With more blocks than a guest may have.
#[must_use]
pub fn list_of_tiny_blocks(count: usize) -> Vec<u8> {
    let name = |number: usize| {
        let mut name = vec![0xff; BLOCK_NAME_MAX];
        let digits = format!("{number:08}");
        name[..digits.len()].copy_from_slice(digits.as_bytes());
        name.into_boxed_slice()
    };
    let entries = (0..count).map(|number| (name(number), PAGE)).collect();
    let mut out = Vec::new();
    encode_block_list(
        &mut out,
        &BlockTable::new(entries, count as u64 * PAGE).expect("a good list"),
    );
    out
}

/// A section's head.
#[must_use]
pub fn section(section: Section<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    section.encode(&mut out);
    out
}

/// A RAM record.
#[must_use]
pub fn record(record: RamRecord<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

/// A page record with all bytes equal.
#[must_use]
pub fn page_record(block: BlockRef<'_>, offset: u64, fill: u8) -> Vec<u8> {
    let content = &[fill; PAGE_SIZE];
    record(RamRecord::Page {
        block,
        offset,
        content,
    })
}

/// EOS and the RAM section's footer.
#[must_use]
pub fn end_of_body() -> Vec<u8> {
    let mut out = record(RamRecord::Eos);
    encode_footer(&mut out, RAM);
    out
}

/// A COLO message.
#[must_use]
pub fn message(message: Message) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// One device section and the EOF byte, of equal length for every `moment`.
#[must_use]
pub fn device_state(moment: u8) -> Vec<u8> {
    let mut out = section(Section::Full {
        id: 5,
        idstr: b"cpu",
        instance: 0,
        version: 1,
    });
    out.extend_from_slice(&[moment; STATE_BYTES]);
    encode_footer(&mut out, 5);
    Section::Eof.encode(&mut out);
    out
}

/// The description of [`device_state`], with its head.
#[must_use]
pub fn vmdesc() -> Vec<u8> {
    vmdesc_of(STATE_BYTES)
}

/// The device state of a guest that has put the end of one into a buffer of its device: up to that end, and from there on. Behind that end
/// comes the request that would follow a real one.
#[must_use]
pub fn forged_end() -> (Vec<u8>, Vec<u8>) {
    let mut state = device_state(7);
    let tail = state.split_off(state.len() - 6);
    let head = state.len() - STATE_BYTES;
    state.extend_from_slice(&tail);
    state.extend_from_slice(&vmdesc());
    let mut rest = message(Message::CheckpointRequest);
    rest.extend_from_slice(b"more of the buffer");
    let body = state.len() - head + rest.len();
    rest.extend_from_slice(&tail);
    rest.extend_from_slice(&vmdesc_of(body));
    (state, rest)
}

/// The description of a state of one device with so many bytes.
fn vmdesc_of(bytes: usize) -> Vec<u8> {
    let text = format!(
        r#"{{"page_size": 4096, "devices": [{{"name": "cpu", "instance_id": 0, "vmsd_name": "cpu", "version": 1,
        "fields": [{{"name": "state", "type": "buffer", "size": {bytes}}}]}}]}}"#
    );
    let length = u32::try_from(text.len()).expect("a short text");
    let mut out = section(Section::VmDescription { length });
    out.extend_from_slice(text.as_bytes());
    out
}

/// PONG, SHUT and READY.
#[must_use]
pub fn answers_to_precopy() -> Vec<u8> {
    let mut out = Vec::new();
    RpMessage::Pong(1).encode(&mut out);
    RpMessage::Shut(0).encode(&mut out);
    Message::CheckpointReady.encode(&mut out);
    out
}

/// RECEIVED and LOADED.
#[must_use]
pub fn answers_to_checkpoint() -> Vec<u8> {
    [message(Message::VmstateReceived), message(Message::VmstateLoaded)].concat()
}
