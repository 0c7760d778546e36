//! A minimal secondary, written after the spec on the engine's wire parsers: a thread per channel, one memory for all
//! pages, answers as soon as it may.

use super::layout::Layout;
use crate::net::Address;
use crate::primary::{SyncMode, SynthOptions, Version};
use colo_ring::blocks::BlockTable;
use colo_ring::units::{PACKET_PAGES, PAGE_SIZE};
use colo_ring::wire::Parsed;
use colo_ring::wire::colo::{Message, check_device_state};
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, Init, PacketHeader, PageList};
use colo_ring::wire::ram::{BlockEntry, BlockList, BlockRef, RamRecord};
use colo_ring::wire::return_path::RpMessage;
use colo_ring::wire::stream::{Command, SECTION_FULL, Section, StreamHeader, parse_footer};
use colo_ring::wire::vmdesc::{EndFinder, Evidence};
use colo_ring::wire::xbzrle;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;

/// What the secondary has; checked by the test between checkpoints.
#[derive(Default)]
pub(super) struct Seen {
    table: OnceLock<BlockTable>,
    pub(super) memory: Mutex<Memory>,
    /// How long the next checkpoint keeps its answers back.
    pub(super) stall: Mutex<Duration>,
    sync: Mutex<Sync>,
    wake: Condvar,
}

#[derive(Default)]
pub(super) struct Memory {
    pub(super) blocks: Vec<Vec<u8>>,
    /// How often each page of the guest was received.
    pub(super) received: Vec<u32>,
    pub(super) device_state: Vec<u8>,
    pub(super) markers: u32,
    pub(super) syncs_with_pages: u32,
    pub(super) stale_packets: u32,
    pub(super) zero_on_main: u32,
    pub(super) deltas: u32,
    pub(super) zero_in_packets: u32,
}

#[derive(Default)]
struct Sync {
    arrived: usize,
    generation: u32,
    failed: bool,
}

impl Seen {
    fn write(&self, block: usize, offset: u64, content: &[u8; PAGE_SIZE]) {
        let table = self.table.get().expect("pages come after the block list");
        let (id, _) = table.iter().nth(block).unwrap();
        let page = usize::try_from(table.page(id, offset).unwrap().get()).unwrap();
        let mut memory = self.memory.lock().unwrap();
        memory.received[page] += 1;
        let offset = usize::try_from(offset).unwrap();
        memory.blocks[block][offset..offset + PAGE_SIZE].copy_from_slice(content);
    }

    /// A page's content after a delta, which is counted.
    fn with_delta(&self, block: usize, offset: u64, delta: &[u8]) -> [u8; PAGE_SIZE] {
        let mut memory = self.memory.lock().unwrap();
        memory.deltas += 1;
        let bytes = &memory.blocks[block][usize::try_from(offset).unwrap()..];
        let mut page: [u8; PAGE_SIZE] = *bytes.first_chunk().unwrap();
        xbzrle::apply(delta, &mut page).unwrap();
        page
    }

    fn block(&self, name: &[u8]) -> usize {
        usize::from(self.table.get().unwrap().by_name(name).expect("a known block").0)
    }

    /// On a channel, at SYNC.
    fn reached_sync(&self) {
        let mut sync = self.sync.lock().unwrap();
        let generation = sync.generation;
        sync.arrived += 1;
        self.wake.notify_all();
        let released = |sync: &mut Sync| sync.generation == generation && !sync.failed;
        drop(self.wake.wait_while(sync, released).unwrap());
    }

    /// On main, at a marker.
    fn marker(&self, channels: usize) {
        let sync = self.sync.lock().unwrap();
        let mut sync = self
            .wake
            .wait_while(sync, |sync| sync.arrived < channels && !sync.failed)
            .unwrap();
        assert!(!sync.failed, "a channel failed");
        (sync.arrived, sync.generation) = (0, sync.generation + 1);
        self.wake.notify_all();
    }
}

/// A stream and what was read of it.
struct Input {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Input {
    fn more(&mut self) -> Option<()> {
        let mut buffer = [0; 70_000];
        let read = self.stream.read(&mut buffer).unwrap();
        self.bytes.extend_from_slice(&buffer[..read]);
        (read > 0).then_some(())
    }

    /// The next element; `None` at the end of the stream.
    fn next<T>(&mut self, parse: impl Fn(&[u8]) -> Parsed<T>) -> Option<T> {
        loop {
            if let Some((value, consumed)) = parse(&self.bytes).unwrap() {
                self.bytes.drain(..consumed);
                return Some(value);
            }
            self.more()?;
        }
    }

    fn peek(&mut self) -> u8 {
        while self.bytes.is_empty() {
            self.more().expect("more to come");
        }
        self.bytes[0]
    }
}

/// A record, owned. Pages are applied to `seen` while the input is borrowed.
enum Owned {
    MemSize(u64),
    Page,
    Flush,
    Eos,
}

fn apply_record(seen: &Seen, last: &mut Option<usize>, input: &[u8]) -> Parsed<Owned> {
    let Some((record, consumed)) = RamRecord::parse(input)? else {
        return Ok(None);
    };
    let mut block = |block: BlockRef<'_>| {
        if let BlockRef::Named(name) = block {
            *last = Some(seen.block(name));
        }
        last.expect("a block to continue")
    };
    let owned = match record {
        RamRecord::MemSize { total } => Owned::MemSize(total),
        RamRecord::Page {
            block: of,
            offset,
            content,
        } => {
            seen.write(block(of), offset, content);
            Owned::Page
        }
        RamRecord::Zero { block: of, offset } => {
            seen.write(block(of), offset, &[0; PAGE_SIZE]);
            seen.memory.lock().unwrap().zero_on_main += 1;
            Owned::Page
        }
        RamRecord::Xbzrle {
            block: of,
            offset,
            delta,
        } => {
            let of = block(of);
            let content = seen.with_delta(of, offset, delta);
            seen.write(of, offset, &content);
            Owned::Page
        }
        RamRecord::MultifdFlush => Owned::Flush,
        RamRecord::Eos => Owned::Eos,
    };
    Ok(Some((owned, consumed)))
}

struct MainSide {
    input: Input,
    seen: Arc<Seen>,
    channels: usize,
    mode: Option<SyncMode>,
    last_block: Option<usize>,
}

impl MainSide {
    fn say(&mut self, rp: &[RpMessage], messages: &[Message]) {
        let mut out = Vec::new();
        rp.iter().for_each(|message| message.encode(&mut out));
        messages.iter().for_each(|message| message.encode(&mut out));
        self.input.stream.write_all(&out).unwrap();
    }

    /// A RAM section's body and footer.
    fn ram_body(&mut self, id: u32) {
        loop {
            let (seen, last) = (Arc::clone(&self.seen), std::cell::RefCell::new(self.last_block));
            let record = self
                .input
                .next(|input| apply_record(&seen, &mut last.borrow_mut(), input));
            self.last_block = last.into_inner();
            match record.expect("a record") {
                Owned::Page => {}
                Owned::MemSize(total) => self.block_list(total),
                Owned::Flush => {
                    assert_ne!(self.mode, Some(SyncMode::PerSection));
                    self.mode = Some(SyncMode::PerRound);
                    self.marker();
                }
                Owned::Eos => {
                    if *self.mode.get_or_insert(SyncMode::PerSection) == SyncMode::PerSection {
                        self.marker();
                    }
                    break;
                }
            }
        }
        self.input
            .next(|input| parse_footer(input, id))
            .expect("a footer");
    }

    fn marker(&mut self) {
        if self.channels > 0 {
            self.seen.memory.lock().unwrap().markers += 1;
            self.seen.marker(self.channels);
        }
    }

    fn block_list(&mut self, total: u64) {
        let mut list = BlockList::new(total).unwrap();
        let table = loop {
            let entry = |input: &[u8]| {
                let entry = BlockEntry::parse(input)?;
                Ok(entry.map(|(entry, consumed)| ((entry.name.to_vec(), entry.used_length), consumed)))
            };
            let (name, used_length) = self.input.next(entry).expect("an entry");
            let name = &name[..];
            if let Some(table) = list.push(BlockEntry { name, used_length }).unwrap() {
                break table;
            }
        };
        let mut memory = self.seen.memory.lock().unwrap();
        // Not zero, so that zero pages that never came are noticed.
        let length = |block: &colo_ring::blocks::RamBlock| usize::try_from(block.used_length).unwrap();
        memory.blocks = table.iter().map(|(_, block)| vec![0xee; length(block)]).collect();
        memory.received = vec![0; usize::try_from(table.total_pages()).unwrap()];
        self.seen.table.set(table).unwrap();
    }

    /// The whole session; returns the number of checkpoints.
    fn run(mut self, version: Version) -> u32 {
        self.input.next(StreamHeader::parse).expect("a header");
        let mut commands = Vec::new();
        let section = |input: &[u8]| {
            let section = Section::parse(input)?;
            Ok(section.map(|(section, consumed)| match section {
                Section::RamStart { id } | Section::Part { id } => ((Some(id), false, None), consumed),
                Section::End { id } => ((Some(id), true, None), consumed),
                Section::Command(command) => ((None, false, Some(command)), consumed),
                other => panic!("{other:?}"),
            }))
        };
        loop {
            match self.input.next(section).expect("a section") {
                (Some(id), end, _) => {
                    self.ram_body(id);
                    if end {
                        break;
                    }
                }
                (None, _, command) => {
                    commands.extend(command);
                    if let Some(Command::Ping(value)) = command {
                        self.say(&[RpMessage::Pong(value)], &[]);
                    }
                }
            }
        }
        let expected: &[Command] = match version {
            Version::V11_1 => &[
                Command::OpenReturnPath,
                Command::Ping(1),
                Command::SwitchoverStart,
            ],
            Version::V10_0 => &[Command::EnableColo, Command::SwitchoverStart],
            Version::V7_2 => &[Command::EnableColo],
        };
        assert_eq!(commands, expected);
        let layout = self.initial_state();
        let shut: &[RpMessage] = if version == Version::V11_1 {
            &[RpMessage::Shut(0)]
        } else {
            &[]
        };
        self.say(shut, &[Message::CheckpointReady]);
        let mut checkpoints = 0;
        while let Some(message) = self.input.next(Message::parse) {
            assert_eq!(message, Message::CheckpointRequest);
            self.checkpoint(version, &layout);
            checkpoints += 1;
        }
        checkpoints
    }

    fn initial_state(&mut self) -> Layout {
        assert_eq!(self.input.peek(), SECTION_FULL);
        let mut finder = EndFinder::default();
        let mut chunk = std::mem::take(&mut self.input.bytes);
        let found = loop {
            if let Some(evidence) = finder.push(&chunk).unwrap() {
                assert_eq!(evidence, Evidence::Described);
                break finder.finish().unwrap().expect("it looks ended");
            }
            self.input.more().expect("the end of the state");
            chunk = std::mem::take(&mut self.input.bytes);
        };
        let layout = Layout::parse(&found.vmdesc);
        layout.check(&found.device_state);
        self.seen.memory.lock().unwrap().device_state = found.device_state;
        layout
    }

    fn checkpoint(&mut self, version: Version, layout: &Layout) {
        self.say(&[], &[Message::CheckpointReply]);
        assert_eq!(self.input.next(Message::parse), Some(Message::VmstateSend));
        if version == Version::V10_0 {
            let command =
                |input: &[u8]| Ok(Section::parse(input)?.map(|(s, n)| (matches!(s, Section::Command(_)), n)));
            assert_eq!(self.input.next(command), Some(true));
        }
        let end = |input: &[u8]| {
            Ok(Section::parse(input)?.map(|(section, consumed)| match section {
                Section::End { id } => (id, consumed),
                other => panic!("{other:?}"),
            }))
        };
        let id = self.input.next(end).unwrap();
        self.ram_body(id);
        let eof = |input: &[u8]| Ok(Section::parse(input)?.map(|(section, n)| (section == Section::Eof, n)));
        assert_eq!(self.input.next(eof), Some(true));
        let Some(Message::VmstateSize(size)) = self.input.next(Message::parse) else {
            panic!("no size")
        };
        let size = usize::try_from(size).unwrap();
        while self.input.bytes.len() < size {
            self.input.more().expect("the whole blob");
        }
        let blob: Vec<u8> = self.input.bytes.drain(..size).collect();
        check_device_state(&blob).unwrap();
        layout.check(&blob);
        self.seen.memory.lock().unwrap().device_state = blob;
        let stall = std::mem::take(&mut *self.seen.stall.lock().unwrap());
        std::thread::sleep(stall);
        self.say(&[], &[Message::VmstateReceived, Message::VmstateLoaded]);
    }
}

fn channel(mut stream: UnixStream, seen: &Seen) {
    let mut init = [0; INIT_LEN];
    stream.read_exact(&mut init).unwrap();
    Init::decode(&init).unwrap();
    let mut header = [0; HEADER_LEN];
    let mut payload = vec![0; PACKET_PAGES * PAGE_SIZE];
    let (mut normal, mut zero) = <(PageList, PageList)>::default();
    let mut first = true;
    while stream.read_exact(&mut header).is_ok() {
        let packet = PacketHeader::decode(&header).unwrap();
        assert!(
            !first || (packet.is_sync() && !packet.has_pages()),
            "the first packet is a pure SYNC"
        );
        first = false;
        let payload = &mut payload[..packet.payload_len() as usize];
        stream.read_exact(payload).unwrap();
        if packet.has_pages() {
            packet
                .resolve(seen.table.get().unwrap(), &mut normal, &mut zero)
                .unwrap();
            let block = seen.block(packet.block_name().unwrap());
            for (offset, content) in packet.normal_offsets().zip(payload.as_chunks().0) {
                seen.write(block, offset, content);
            }
            for offset in packet.zero_offsets() {
                seen.write(block, offset, &[0; PAGE_SIZE]);
            }
        }
        let mut memory = seen.memory.lock().unwrap();
        memory.zero_in_packets += u32::from(packet.zero_pages());
        memory.syncs_with_pages += u32::from(packet.is_sync() && packet.has_pages());
        let announced = u32::from_be_bytes(*header[20..].first_chunk().unwrap());
        memory.stale_packets += u32::from(!packet.has_pages() && announced != 0);
        drop(memory);
        if packet.is_sync() {
            seen.reached_sync();
        }
    }
}

/// Marks the session as failed when a thread panics, so that no other waits for it endlessly.
struct FailOnPanic(Arc<Seen>);

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.sync.lock().unwrap().failed = true;
            self.0.wake.notify_all();
        }
    }
}

pub(super) struct Secondary {
    pub(super) address: Address,
    /// Holds the socket; gone with this.
    _directory: TempDir,
    pub(super) seen: Arc<Seen>,
    pub(super) thread: JoinHandle<u32>,
}

/// Starts a secondary for one session as `options` has it.
pub(super) fn secondary(options: &SynthOptions) -> Secondary {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secondary");
    let listener = UnixListener::bind(&path).unwrap();
    let seen = Arc::new(Seen::default());
    let (shared, version, channels) = (Arc::clone(&seen), options.version, usize::from(options.channels));
    let thread = std::thread::spawn(move || {
        let _guard = FailOnPanic(Arc::clone(&shared));
        // This primary connects its main channel first.
        let (stream, _) = listener.accept().unwrap();
        let mut threads = Vec::new();
        for _ in 0..channels {
            let (stream, _) = listener.accept().unwrap();
            let seen = Arc::clone(&shared);
            threads.push(std::thread::spawn(move || {
                let _guard = FailOnPanic(Arc::clone(&seen));
                channel(stream, &seen);
            }));
        }
        let bytes = Vec::new();
        let input = Input { stream, bytes };
        let side = MainSide {
            input,
            seen: shared,
            channels,
            mode: None,
            last_block: None,
        };
        let checkpoints = side.run(version);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        checkpoints
    });
    let address = Address::Unix(path);
    Secondary {
        address,
        _directory: directory,
        seen,
        thread,
    }
}
