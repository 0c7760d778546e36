//! Captured sessions, cut to what matters to the protocol: of each section and packet list the first few, of the device state a small
//! one.

use super::fuzz::pieces;
use colo_ring::units::PAGE_SIZE;
use colo_ring::wire::codec::{Encoder, Method};
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, PacketFields, PacketHeader};
use colo_ring::wire::ram::{BlockEntry, RamRecord};
use colo_ring::wire::stream::{Section, StreamHeader, parse_footer};
use colo_ring_tests::hostile::{device_state, vmdesc};
use colo_ring_tools::streams::Streams;

/// Records of a section, packets of a channel between two syncs, and sections of precopy that are kept.
const KEPT: usize = 1;

/// Checkpoints that are kept.
const CHECKPOINTS: usize = 2;

/// The packets of a channel, without their payloads: up to each sync.
fn epochs(bytes: &[u8]) -> Vec<Vec<&[u8]>> {
    let mut epochs = vec![Vec::new()];
    let mut rest = &bytes[INIT_LEN..];
    while let Some((header, behind)) = rest.split_first_chunk::<HEADER_LEN>() {
        let packet = PacketHeader::decode(header).unwrap();
        epochs.last_mut().unwrap().push(&header[..]);
        if packet.is_sync() {
            epochs.push(Vec::new());
        }
        rest = behind.get(packet.payload_len() as usize..).unwrap_or(&[]);
    }
    epochs
}

/// A session that is being cut.
struct Cutter<'a> {
    main: &'a [u8],
    at: usize,
    channels: Vec<Vec<Vec<&'a [u8]>>>,
    /// Syncs so far.
    syncs: usize,
    /// Whether every section ends with a sync.
    per_section: bool,
    ram: u32,
    out: Vec<u8>,
}

impl Cutter<'_> {
    fn put(&mut self, stream: usize, bytes: &[u8]) {
        pieces::encode(stream, bytes, &mut self.out);
    }

    /// Puts the bytes that were just parsed.
    fn keep(&mut self, length: usize) {
        let bytes = &self.main[self.at..self.at + length];
        pieces::encode(0, bytes, &mut self.out);
        self.at += length;
    }

    /// A RAM section behind its head, and what the channels bring up to its syncs.
    fn body(&mut self, is_kept: bool, is_start: bool) {
        let (mut pages, mut syncs, mut kept) = (0, 0, Vec::new());
        loop {
            let (record, length) = RamRecord::parse(&self.main[self.at..]).unwrap().unwrap();
            self.at += length;
            match record {
                RamRecord::MemSize { total } => {
                    record.encode(&mut kept);
                    let mut sum = 0;
                    while sum < total {
                        let (entry, length) = BlockEntry::parse(&self.main[self.at..]).unwrap().unwrap();
                        sum += entry.used_length;
                        entry.encode(&mut kept);
                        self.at += length;
                    }
                }
                RamRecord::MultifdFlush => {
                    syncs += 1;
                    record.encode(&mut kept);
                }
                RamRecord::Eos => {
                    record.encode(&mut kept);
                    break;
                }
                _ if pages == KEPT => {}
                RamRecord::Page { block, offset, .. } => {
                    pages += 1;
                    let content = &[0x11; PAGE_SIZE];
                    RamRecord::Page {
                        block,
                        offset,
                        content,
                    }
                    .encode(&mut kept);
                }
                record => {
                    pages += 1;
                    record.encode(&mut kept);
                }
            }
        }
        let ((), length) = parse_footer(&self.main[self.at..], self.ram).unwrap().unwrap();
        kept.extend_from_slice(&self.main[self.at..self.at + length]);
        self.at += length;
        if is_start {
            self.per_section = syncs == 0;
        }
        let syncs = syncs.max(usize::from(self.per_section));
        if is_kept {
            self.put(0, &kept);
            for sync in self.syncs..self.syncs + syncs {
                self.packets(sync);
            }
        }
        self.syncs += syncs;
    }

    fn packets(&mut self, sync: usize) {
        for channel in 0..self.channels.len() {
            let packets = self.channels[channel].get(sync).cloned().unwrap_or_default();
            let count = packets.len();
            for (position, packet) in packets.into_iter().enumerate() {
                if position < KEPT || position + 1 == count {
                    self.put(channel + 1, packet);
                }
            }
        }
    }

    /// Sections up to one that is none of the RAM's.
    fn sections(&mut self) {
        let mut parts = 0;
        loop {
            let (section, length) = Section::parse(&self.main[self.at..]).unwrap().unwrap();
            let (is_kept, is_start) = match section {
                Section::Command(_) => {
                    self.keep(length);
                    continue;
                }
                Section::RamStart { id } => {
                    self.ram = id;
                    (true, true)
                }
                Section::Part { .. } => {
                    parts += 1;
                    (parts <= KEPT, false)
                }
                Section::End { .. } => (true, false),
                _ => return,
            };
            match is_kept {
                true => self.keep(length),
                false => self.at += length,
            }
            self.body(is_kept, is_start);
        }
    }

    fn checkpoint(&mut self, moment: u8) {
        let state = device_state(moment);
        self.sections();
        let mut end = Vec::new();
        Section::Eof.encode(&mut end);
        Message::VmstateSize(state.len() as u64).encode(&mut end);
        end.extend_from_slice(&state);
        self.put(0, &end);
    }
}

/// Cuts a session.
pub fn cut(session: &Streams) -> Vec<u8> {
    let main = session.main.to_secondary.bytes();
    let channels = session.channels.iter();
    let channels: Vec<_> = channels
        .map(|channel| epochs(channel.connection.to_secondary.bytes()))
        .collect();
    let mut cutter = Cutter {
        main,
        at: 0,
        out: vec![u8::try_from(channels.len()).unwrap()],
        channels,
        syncs: 0,
        per_section: false,
        ram: 0,
    };
    let (_, length) = StreamHeader::parse(main).unwrap().unwrap();
    cutter.keep(length);
    cutter.sections();
    let devices = [device_state(0), vmdesc()].concat();
    cutter.put(0, &devices);
    for (moment, checkpoint) in (1..).zip(session.checkpoints.iter().take(CHECKPOINTS)) {
        cutter.at = checkpoint.request.start;
        cutter.keep(checkpoint.request.len());
        cutter.at = checkpoint.transfer.start;
        let (_, length) = Message::parse(&main[cutter.at..]).unwrap().unwrap();
        cutter.keep(length);
        cutter.checkpoint(moment);
    }
    cutter.out
}

/// The first packets of a session's first channel.
pub fn packets(session: &Streams) -> Vec<u8> {
    let bytes = session.channels[0].connection.to_secondary.bytes();
    let mut out = Vec::new();
    for packet in epochs(bytes).concat().iter().take(6) {
        pieces::encode(0, packet, &mut out);
    }
    out
}

/// Some packets of two pages that are compressed.
pub fn compressed(method: Method) -> Vec<u8> {
    let mut header = [0; HEADER_LEN];
    PacketFields::sync(0).encode(&mut header);
    let mut out = Vec::new();
    pieces::encode(0, &header, &mut out);
    let mut encoder = Encoder::new(method, 1).unwrap();
    for number in 0..3 {
        let text = format!("page {number}, of which every line is as every other\n").repeat(200);
        let mut payload = Vec::new();
        encoder.encode(&text.as_bytes()[..2 * PAGE_SIZE], &mut payload);
        let offset = 2 * number * PAGE_SIZE as u64;
        PacketFields {
            sync: false,
            method,
            pages_alloc: 128,
            payload_len: u32::try_from(payload.len()).unwrap(),
            packet_num: number,
            block: b"pc.ram",
            normal: &[offset, offset + PAGE_SIZE as u64],
            zero: &[],
        }
        .encode(&mut header);
        pieces::encode(0, &header, &mut out);
        pieces::encode(0, &payload, &mut out);
    }
    out
}
