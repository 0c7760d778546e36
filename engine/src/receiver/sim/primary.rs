//! The model primary: what a QEMU of some version sends in a COLO session, and which answers it waits for.
//!
//! It writes whole stages at once, the bytes of each connection by themselves: how they are cut into pieces and in which
//! order they arrive is the network's matter. Answers are compared byte for byte.

mod pages;

use super::memory::{Content, Memory, PAGE, Snapshot};
use super::rng::Rng;
use super::session::Intruder;
use crate::blocks::BlockTable;
use crate::units::PACKET_PAGES;
use crate::wire::codec::{Encoder, Method};
use crate::wire::colo::Message;
use crate::wire::ram::encode_block_list;
use crate::wire::stream::{Command, SECTION_EOF, Section, StreamHeader, encode_footer};
use std::collections::VecDeque;

/// Which primary it looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V7_2,
    V10_0,
    V11_1,
}

/// Where zero pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroPages {
    MainChannel,
    ZeroLists,
    AsNormal,
}

/// What stays the same for a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) version: Version,
    /// 0 is plain mode.
    pub(super) channels: usize,
    /// Sync points at MULTIFD_FLUSH; else at the end of each section.
    per_round: bool,
    zero_pages: ZeroPages,
    xbzrle: bool,
    /// How payloads of multifd channels are compressed.
    method: Method,
    /// A page may be sent twice between two syncs, with other content: on one channel its order says which is newer.
    repeats: bool,
    in_order: bool,
    packet_pages: usize,
    pub(super) checkpoints: u64,
}

impl Kind {
    pub(super) fn random(rng: &mut Rng) -> Self {
        let version = rng.pick(&[Version::V7_2, Version::V10_0, Version::V11_1]);
        let zeros = [ZeroPages::MainChannel, ZeroPages::ZeroLists, ZeroPages::AsNormal];
        let kind = Self {
            version,
            channels: rng.pick(&[0, 1, 2, 2, 3, 4, 4, 8]),
            per_round: version != Version::V7_2 && !rng.one_in(3),
            zero_pages: rng.pick(&zeros),
            repeats: false,
            xbzrle: rng.one_in(2),
            method: rng.pick(&[Method::None, Method::None, Method::Zlib, Method::Zstd]),
            in_order: rng.one_in(2),
            packet_pages: rng.any_size(PACKET_PAGES),
            checkpoints: rng.any_size(6) as u64,
        };
        if version != Version::V7_2 && rng.one_in(3) {
            return Self {
                channels: 1,
                // Several packets of a round wait for a worker, which must keep their order.
                method: rng.pick(&[Method::None, Method::Zlib, Method::Zstd, Method::Zstd]),
                per_round: true,
                zero_pages: ZeroPages::ZeroLists,
                repeats: true,
                ..kind
            };
        }
        kind
    }
}

/// What it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Start,
    /// Precopy is sent; it waits for CHECKPOINT_READY.
    WaitReady,
    /// It may ask for a checkpoint.
    Idle,
    WaitReply,
    /// A checkpoint is to be sent: its guest is stopped.
    Stopped,
    WaitLoaded,
    /// All its checkpoints are acknowledged.
    Done,
}

/// The answers, as bytes (spec §6, §12.1).
const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
const READY: [u8; 4] = [0, 0, 0, 0];
const REPLY: [u8; 4] = [0, 0, 0, 2];
const RECEIVED: [u8; 4] = [0, 0, 0, 5];
const LOADED: [u8; 4] = [0, 0, 0, 6];

const RAM_SECTION: u32 = 2;
const DEVICE_SECTION: u32 = 5;

/// One packet of a channel, until its round's sync.
#[derive(Clone, Default)]
struct Packet {
    block: usize,
    normal: Vec<(u64, Content)>,
    zero: Vec<u64>,
}

/// One connection's bytes.
#[derive(Default)]
pub(super) struct Stream {
    /// Not yet given to the network.
    pub(super) out: Vec<u8>,
    /// How many were, and are to be.
    pub(super) sent: usize,
    /// Where packets, records and messages begin.
    pub(super) starts: Vec<usize>,
    /// Where what a guest has put into one of its devices looks like the end of the device state.
    pub(super) false_end: Option<usize>,
}

impl Stream {
    fn put(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        self.starts.push(self.sent);
        let before = self.out.len();
        encode(&mut self.out);
        self.sent += self.out.len() - before;
    }
}

pub(super) struct Primary {
    pub(super) kind: Kind,
    pub(super) stage: Stage,
    pub(super) memory: Memory,
    /// The state at the end of precopy, then that of each checkpoint that was sent.
    pub(super) snapshots: Vec<Snapshot>,
    /// How many of them were acknowledged.
    pub(super) acknowledged: usize,
    /// The main channel, then the multifd channels.
    pub(super) streams: Vec<Stream>,
    expected: VecDeque<u8>,
    /// One for each multifd channel, where payloads are compressed.
    encoders: Vec<Encoder>,
    /// Packets of the current round, by channel.
    queued: Vec<Vec<Packet>>,
    /// Where the last SYNC of each channel ended.
    synced_at: Vec<usize>,
    packets: u64,
    last_block: Option<usize>,
    /// Newest content sent on the main channel: what a delta is against.
    on_main: Vec<Option<Content>>,
    counted: (u64, u64),
}

impl Primary {
    pub(super) fn new(rng: &mut Rng, kind: Kind, pages_max: usize) -> Self {
        let memory = Memory::new(rng, pages_max);
        Self {
            kind,
            stage: Stage::Start,
            snapshots: Vec::new(),
            acknowledged: 0,
            streams: (0..=kind.channels).map(|_| Stream::default()).collect(),
            expected: VecDeque::new(),
            encoders: (0..kind.channels)
                .filter_map(|_| Encoder::new(kind.method, 1))
                .collect(),
            queued: vec![Vec::new(); kind.channels],
            synced_at: vec![0; kind.channels],
            packets: 0,
            last_block: None,
            on_main: vec![None; memory.pages.len()],
            counted: (0, 0),
            memory,
        }
    }

    /// Whether it could do something without an answer.
    pub(super) fn may_act(&self) -> bool {
        matches!(self.stage, Stage::Start | Stage::Idle | Stage::Stopped)
    }

    /// Does what comes next.
    pub(super) fn act(&mut self, rng: &mut Rng) {
        match self.stage {
            Stage::Start => self.precopy(rng),
            Stage::Idle if self.snapshots.len() as u64 > self.kind.checkpoints => self.stage = Stage::Done,
            Stage::Idle => {
                self.message(Message::CheckpointRequest);
                self.wait_for(Stage::WaitReply, &[&REPLY]);
            }
            Stage::Stopped => self.checkpoint(rng),
            _ => {}
        }
    }

    /// Takes bytes of the secondary's.
    ///
    /// # Errors
    /// If they are not what it waits for.
    pub(super) fn read_answers(&mut self, bytes: &[u8]) -> Result<(), String> {
        for byte in bytes {
            match self.expected.pop_front() {
                Some(expected) if expected == *byte => {}
                Some(expected) => {
                    let (stage, left) = (self.stage, self.expected.len());
                    return Err(format!(
                        "{stage:?}: answered by {byte:#x} where {expected:#x} and {left} more bytes belong"
                    ));
                }
                None => return Err(format!("{:?}: an answer ({bytes:x?}) to nothing", self.stage)),
            }
        }
        if self.expected.is_empty() && !bytes.is_empty() {
            self.answered();
        }
        Ok(())
    }

    /// Takes whatever comes for what it waits for. Returns true.
    pub(super) fn ignore_answers(&mut self) -> bool {
        self.expected.clear();
        self.answered();
        true
    }

    fn answered(&mut self) {
        self.stage = match self.stage {
            Stage::WaitReply => Stage::Stopped,
            Stage::WaitReady | Stage::WaitLoaded => {
                self.acknowledged += 1;
                Stage::Idle
            }
            other => other,
        };
    }

    fn wait_for(&mut self, stage: Stage, answers: &[&[u8]]) {
        self.stage = stage;
        self.expected
            .extend(answers.iter().flat_map(|bytes| bytes.iter()));
    }

    fn main(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        self.streams[0].put(encode);
    }

    fn message(&mut self, message: Message) {
        self.main(|out| message.encode(out));
    }

    fn section(&mut self, section: &Section<'_>) {
        self.main(|out| section.encode(out));
    }

    /// Everything up to CHECKPOINT_READY.
    fn precopy(&mut self, rng: &mut Rng) {
        self.start();
        for round in 0..rng.range(1, 3) {
            let mut pages: Vec<usize> = self.memory.dirty.iter().copied().collect();
            self.order(rng, &mut pages);
            let mut new_round = round > 0;
            while !pages.is_empty() {
                let part = rng.any_size(pages.len());
                let part: Vec<usize> = pages.drain(..part).collect();
                self.section(&Section::Part { id: RAM_SECTION });
                if std::mem::take(&mut new_round) {
                    self.marker(rng);
                }
                self.memory.run(rng, 8);
                self.send_dirty(rng, &part);
                self.end_of_section(rng);
            }
        }
        if self.kind.version != Version::V7_2 {
            self.main(|out| Command::SwitchoverStart.encode(out));
        }
        self.last_part(rng);
        let mut device_state = device_state(rng, 0);
        let false_end = forge_end(&mut device_state);
        let main = &mut self.streams[0];
        main.false_end = false_end.map(|at| main.sent + at);
        let vmdesc = vmdesc(device_state.len() - DEVICE_HEAD - DEVICE_TAIL);
        self.main(|out| {
            out.extend_from_slice(&device_state);
            out.extend_from_slice(&vmdesc);
        });
        self.take_snapshot(device_state);
        if self.kind.version == Version::V11_1 {
            self.wait_for(Stage::WaitReady, &[&PONG, &SHUT, &READY]);
        } else {
            self.wait_for(Stage::WaitReady, &[&READY]);
        }
    }

    fn start(&mut self) {
        let header = StreamHeader {
            machine_type: "pc-i440fx".to_owned(),
            target_page_bits: false,
            capabilities: false,
            uuid: None,
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        // The first bytes are read before there is a session.
        self.main(|out| out.extend_from_slice(&bytes[crate::receiver::identify::FIRST_LEN..]));
        if self.kind.version == Version::V11_1 {
            self.main(|out| Command::OpenReturnPath.encode(out));
            self.main(|out| Command::Ping(1).encode(out));
        } else {
            self.main(|out| Command::EnableColo.encode(out));
        }
        let entry = |(name, pages): &(String, usize)| (name.as_bytes().into(), (pages * PAGE) as u64);
        let entries = self.memory.blocks.iter().map(entry).collect();
        let table = BlockTable::new(entries, (self.memory.pages.len() * PAGE) as u64);
        let table = table.expect("distinct names of blocks with pages");
        self.section(&Section::RamStart { id: RAM_SECTION });
        self.main(|out| encode_block_list(out, &table));
        // Every channel begins with a SYNC without pages.
        let mut rng = Rng::new(0);
        self.marker(&mut rng);
        self.end_of_section(&mut rng);
    }

    fn order(&self, rng: &mut Rng, pages: &mut [usize]) {
        if self.kind.in_order {
            let from = rng.below(pages.len().max(1));
            pages.rotate_left(from);
        } else {
            rng.shuffle(pages);
        }
    }

    /// The guest runs no more: all that is dirty, and then the round's last sync.
    fn last_part(&mut self, rng: &mut Rng) {
        let mut dirty: Vec<usize> = self.memory.dirty.iter().copied().collect();
        self.order(rng, &mut dirty);
        let sends_stale = !rng.one_in(if self.kind.repeats { 4 } else { 2 }) && !dirty.is_empty();
        if sends_stale {
            // The same pages before, in a round of their own and with other content: which of the two wins matters.
            let again = rng.any_size(dirty.len());
            let stale: Vec<_> = dirty[..again]
                .iter()
                .map(|page| (*page, self.memory.content(rng, *page)))
                .collect();
            self.section(&Section::Part { id: RAM_SECTION });
            self.marker(rng);
            self.send_pages(rng, stale);
            self.end_of_section(rng);
        }
        self.section(&Section::End { id: RAM_SECTION });
        if !(sends_stale && self.kind.repeats) {
            self.marker(rng);
        }
        let wrap = rng.below(dirty.len() + 1);
        self.send_dirty(rng, &dirty[..wrap]);
        if rng.one_in(2) {
            self.marker(rng);
        }
        self.send_dirty(rng, &dirty[wrap..]);
        self.marker(rng);
        self.end_of_section(rng);
    }

    fn checkpoint(&mut self, rng: &mut Rng) {
        let most = if rng.one_in(4) { 0 } else { self.memory.pages.len() };
        let most = most.min(rng.any_size(self.memory.pages.len()));
        self.memory.run(rng, most);
        self.message(Message::VmstateSend);
        if self.kind.version == Version::V10_0 {
            self.main(|out| Command::SwitchoverStart.encode(out));
        }
        self.last_part(rng);
        self.section(&Section::Eof);
        let device_state = device_state(rng, self.snapshots.len());
        self.message(Message::VmstateSize(device_state.len() as u64));
        self.main(|out| out.extend_from_slice(&device_state));
        self.take_snapshot(device_state);
        self.wait_for(Stage::WaitLoaded, &[&RECEIVED, &LOADED]);
    }

    /// Sends a page on a channel, after the last sync of the checkpoint that is on its way, or before the answer to the
    /// request for the next.
    pub(super) fn intrude(&mut self, rng: &mut Rng) -> Option<Intruder> {
        let state = match self.stage {
            Stage::WaitReady | Stage::WaitLoaded => self.snapshots.len() - 1,
            Stage::WaitReply => self.snapshots.len(),
            _ => return None,
        };
        if self.kind.channels == 0 {
            return None;
        }
        let page = self.intruded(rng);
        let mut bytes = [0xee; PAGE];
        bytes[..8].copy_from_slice(&rng.next().to_le_bytes());
        let content = Content::new(bytes);
        let (block, offset) = self.memory.locate(page);
        let packet = Packet {
            block,
            normal: vec![(offset, content.clone())],
            zero: Vec::new(),
        };
        let channel = rng.below(self.kind.channels);
        self.packet(channel, &packet, false);
        Some(Intruder::new(channel, state, page, content))
    }

    /// Which page: one that the last checkpoint has changed more often than another, since its content is on its way to the image.
    fn intruded(&self, rng: &mut Rng) -> usize {
        let page = rng.below(self.memory.pages.len());
        let [.., before, last] = &self.snapshots[..] else {
            return page;
        };
        let changed = |page: &usize| before.pages[*page] != last.pages[*page];
        let from_there = (page..self.memory.pages.len()).find(changed);
        from_there.filter(|_| !rng.one_in(3)).unwrap_or(page)
    }

    fn take_snapshot(&mut self, device_state: Vec<u8>) {
        let main = self.streams[0].sent;
        self.snapshots.push(Snapshot {
            pages: self.memory.pages.clone(),
            device_state,
            sent: std::mem::take(&mut self.counted),
            complete_at: [main].into_iter().chain(self.synced_at.iter().copied()).collect(),
        });
    }
}

/// One device section and the EOF byte. No two are equal.
fn device_state(rng: &mut Rng, checkpoint: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let section = Section::Full {
        id: DEVICE_SECTION,
        idstr: b"cpu",
        instance: 0,
        version: 1,
    };
    section.encode(&mut out);
    out.extend_from_slice(&checkpoint.to_be_bytes());
    for _ in 0..rng.any_size(4000) {
        out.push(rng.next().to_le_bytes()[0]);
    }
    encode_footer(&mut out, DEVICE_SECTION);
    out.push(SECTION_EOF);
    out
}

/// What a state has before and behind the body of its section.
const DEVICE_HEAD: usize = 1 + 4 + (1 + 3) + 4 + 4;
const DEVICE_TAIL: usize = 5 + 1;

/// The description of a state with a body of so many bytes, with its head.
fn vmdesc(body: usize) -> Vec<u8> {
    let text = format!(
        r#"{{"configuration": {{}}, "page_size": 4096, "devices": [{{"name": "cpu", "instance_id": 0, "size": {body}}}]}}"#
    );
    let mut out = Vec::new();
    let length = u32::try_from(text.len()).expect("a short text");
    Section::VmDescription { length }.encode(&mut out);
    out.extend_from_slice(text.as_bytes());
    out
}

/// A guest that knows its machine puts the end of a device state into a buffer of its device, and behind it the request that would follow a
/// real one. Returns where that end is; in a part of all states there is none.
fn forge_end(state: &mut Vec<u8>) -> Option<usize> {
    let body = state.len() - DEVICE_HEAD - DEVICE_TAIL;
    if body.is_multiple_of(3) {
        return None;
    }
    let before = body / 2;
    let mut forged = Vec::new();
    encode_footer(&mut forged, DEVICE_SECTION);
    forged.push(SECTION_EOF);
    forged.extend_from_slice(&vmdesc(before));
    let end = DEVICE_HEAD + before + forged.len();
    Message::CheckpointRequest.encode(&mut forged);
    state.splice(DEVICE_HEAD + before..DEVICE_HEAD + before, forged);
    Some(end)
}
