//! How pages travel: where each goes, in which packets and records, and the syncs between them (spec §7, §8, §10).

use super::super::memory::{Content, PAGE, is_zero};
use super::super::rng::Rng;
use super::{Packet, Primary, RAM_SECTION, Version, ZeroPages};
use crate::units::PACKET_PAGES;
use crate::wire::multifd::{HEADER_LEN, PacketFields, raw_payload_len};
use crate::wire::ram::{BlockRef, RamRecord};
use crate::wire::stream::encode_footer;
use crate::wire::xbzrle;

impl Primary {
    pub(super) fn send_dirty(&mut self, rng: &mut Rng, pages: &[usize]) {
        let content = |page: &usize| (*page, self.memory.pages[*page].clone());
        let contents = pages.iter().map(content).collect();
        for page in pages {
            self.memory.dirty.remove(page);
        }
        self.send_pages(rng, contents);
    }

    /// Sends pages, each where this kind of primary sends it, and none twice in a round with different content.
    pub(super) fn send_pages(&mut self, rng: &mut Rng, pages: Vec<(usize, Content)>) {
        let mut packet = Packet::default();
        for (page, content) in pages {
            let zero = is_zero(&content) && self.kind.zero_pages != ZeroPages::AsNormal;
            let on_main = self.kind.channels == 0
                || (zero && self.kind.zero_pages == ZeroPages::MainChannel)
                || (!self.kind.repeats && rng.one_in(100));
            if on_main {
                self.record(rng, page, zero, content);
                continue;
            }
            let (block, offset) = self.memory.locate(page);
            let full = packet.normal.len() + packet.zero.len() >= self.kind.packet_pages;
            if full || packet.block != block {
                let next = Packet {
                    block,
                    ..Packet::default()
                };
                let before = std::mem::replace(&mut packet, next);
                if self.kind.version == Version::V7_2 && full && before.block == block && rng.one_in(2) {
                    // The last page of a full packet again, on whichever channel.
                    packet.normal.extend(before.normal.last().cloned());
                }
                self.queue(rng, before);
            }
            if zero {
                packet.zero.push(offset);
            } else {
                packet.normal.push((offset, content));
            }
        }
        self.queue(rng, packet);
    }

    fn queue(&mut self, rng: &mut Rng, packet: Packet) {
        if !packet.normal.is_empty() || !packet.zero.is_empty() {
            self.counted.0 += packet.normal.len() as u64;
            self.counted.1 += packet.zero.len() as u64;
            let channel = rng.below(self.queued.len());
            self.queued[channel].push(packet);
        }
    }

    fn record(&mut self, rng: &mut Rng, page: usize, zero: bool, content: Content) {
        let (block, offset) = self.memory.locate(page);
        let name = self.memory.blocks[block].0.clone();
        let continued = self.last_block.replace(block) == Some(block) && !rng.one_in(8);
        let named = if continued {
            BlockRef::Continue
        } else {
            BlockRef::Named(name.as_bytes())
        };
        let mut delta = Vec::new();
        if self.kind.xbzrle
            && self.kind.channels == 0
            && let Some(before) = &self.on_main[page]
        {
            xbzrle::encode(before, &content, &mut delta);
        }
        let (block, content) = (named, &*self.on_main[page].insert(content));
        let delta = &*delta;
        let record = match delta.len() {
            _ if zero => RamRecord::Zero { block, offset },
            1..=PAGE => RamRecord::Xbzrle { block, offset, delta },
            _ => RamRecord::Page {
                block,
                offset,
                content,
            },
        };
        self.streams[0].put(|out| record.encode(out));
        if zero {
            self.counted.1 += 1;
        } else {
            self.counted.0 += 1;
        }
    }

    /// A sync point in a round.
    pub(super) fn marker(&mut self, rng: &mut Rng) {
        if self.kind.channels > 0 && self.kind.per_round {
            self.sync(rng);
            self.main(|out| RamRecord::MultifdFlush.encode(out));
        }
    }

    pub(super) fn end_of_section(&mut self, rng: &mut Rng) {
        if !self.kind.per_round {
            self.sync(rng);
        }
        self.main(|out| RamRecord::Eos.encode(out));
        self.main(|out| encode_footer(out, RAM_SECTION));
    }

    /// What is queued on every channel, and a SYNC behind it.
    fn sync(&mut self, rng: &mut Rng) {
        for channel in 0..self.kind.channels {
            let mut packets = std::mem::take(&mut self.queued[channel]);
            let last = packets.pop();
            for packet in packets {
                self.packet(channel, &packet, false);
            }
            // As 7.2 does it now and then: SYNC on the last packet with pages, then an empty one.
            let with_pages = self.kind.version == Version::V7_2 && rng.one_in(2);
            match last {
                Some(packet) if with_pages => {
                    self.packet(channel, &packet, true);
                    self.synced_at[channel] = self.streams[channel + 1].sent;
                    self.empty_packet(channel, &packet, false);
                }
                Some(packet) => {
                    self.packet(channel, &packet, false);
                    self.empty_packet(channel, &packet, true);
                    self.synced_at[channel] = self.streams[channel + 1].sent;
                }
                None => {
                    self.empty_packet(channel, &Packet::default(), true);
                    self.synced_at[channel] = self.streams[channel + 1].sent;
                }
            }
        }
    }

    pub(super) fn packet(&mut self, channel: usize, packet: &Packet, sync: bool) {
        let name = &self.memory.blocks[packet.block].0;
        let normal: Vec<u64> = packet.normal.iter().map(|(offset, _)| *offset).collect();
        let pages = packet
            .normal
            .iter()
            .flat_map(|(_, content)| content.iter().copied());
        let mut payload: Vec<u8> = pages.collect();
        if let (Some(encoder), false) = (self.encoders.get_mut(channel), payload.is_empty()) {
            let pages = std::mem::take(&mut payload);
            encoder.encode(&pages, &mut payload);
        }
        let mut header = [0; HEADER_LEN];
        PacketFields {
            sync,
            method: self.kind.method,
            pages_alloc: u32::try_from(PACKET_PAGES).expect("128"),
            payload_len: u32::try_from(payload.len()).expect("at most 1 MiB"),
            packet_num: self.packets,
            block: name.as_bytes(),
            normal: &normal,
            zero: &packet.zero,
        }
        .encode(&mut header);
        self.packets += 1;
        self.streams[channel + 1].put(|out| {
            out.extend_from_slice(&header);
            out.extend_from_slice(&payload);
        });
    }

    /// A packet without pages; 7.2 leaves block and size of the one before in it.
    fn empty_packet(&mut self, channel: usize, before: &Packet, sync: bool) {
        let mut fields = PacketFields {
            sync,
            ..PacketFields::sync(self.packets)
        };
        if self.kind.version == Version::V7_2 {
            fields.pages_alloc = u32::try_from(PACKET_PAGES).expect("128");
            fields.payload_len = raw_payload_len(before.normal.len());
            fields.block = self.memory.blocks[before.block].0.as_bytes();
        }
        let mut header = [0; HEADER_LEN];
        fields.encode(&mut header);
        self.packets += 1;
        self.streams[channel + 1].put(|out| out.extend_from_slice(&header));
    }
}
