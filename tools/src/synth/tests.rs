//! The synthetic primary against a minimal secondary that is written after the spec, on the engine's wire parsers:
//! a thread per channel, one memory for all pages, answers as soon as it may.

use super::{Address, Pattern, SyncMode, SynthError, SynthOptions, SynthPrimary, Version, run};
use colo_ring::blocks::BlockTable;
use colo_ring::units::{PACKET_PAGES, PAGE_SIZE};
use colo_ring::wire::Parsed;
use colo_ring::wire::colo::{Message, check_device_state};
use colo_ring::wire::multifd::{HEADER_LEN, INIT_LEN, Init, PacketHeader, PageList};
use colo_ring::wire::ram::{BlockEntry, BlockList, BlockRef, Record};
use colo_ring::wire::return_path::RpMessage;
use colo_ring::wire::stream::{Command, SECTION_FULL, Section, StreamHeader, parse_footer};
use colo_ring::wire::vmdesc::{EndFinder, Layout};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the secondary has; checked by the test between checkpoints.
#[derive(Default)]
struct Seen {
    table: OnceLock<BlockTable>,
    memory: Mutex<Memory>,
    sync: Mutex<Sync>,
    wake: Condvar,
}

#[derive(Default)]
struct Memory {
    blocks: Vec<Vec<u8>>,
    /// How often each page of the guest was received.
    received: Vec<u32>,
    device_state: Vec<u8>,
    syncs_with_pages: u32,
    stale_packets: u32,
    zero_on_main: u32,
    zero_in_packets: u32,
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
    let Some((record, consumed)) = Record::parse(input)? else {
        return Ok(None);
    };
    let mut block = |block: BlockRef<'_>| {
        if let BlockRef::Named(name) = block {
            *last = Some(seen.block(name));
        }
        last.expect("a block to continue")
    };
    let owned = match record {
        Record::MemSize { total } => Owned::MemSize(total),
        Record::Page {
            block: of,
            offset,
            content,
        } => {
            seen.write(block(of), offset, content);
            Owned::Page
        }
        Record::Zero { block: of, offset } => {
            seen.write(block(of), offset, &[0; PAGE_SIZE]);
            seen.memory.lock().unwrap().zero_on_main += 1;
            Owned::Page
        }
        Record::Xbzrle { .. } => panic!("no deltas are sent"),
        Record::MultifdFlush => Owned::Flush,
        Record::Eos => Owned::Eos,
    };
    Ok(Some((owned, consumed)))
}

struct MainSide {
    input: Input,
    seen: Arc<Seen>,
    channels: usize,
    mode: Option<SyncMode>,
    last_block: Option<usize>,
    markers: u32,
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
            self.markers += 1;
            self.seen.marker(self.channels);
        }
    }

    fn block_list(&mut self, total: u64) {
        let mut list = BlockList::new(total, 1 << 30).unwrap();
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
            if let Some(found) = finder.push(&chunk).unwrap() {
                break found;
            }
            self.input.more().expect("the end of the state");
            chunk = std::mem::take(&mut self.input.bytes);
        };
        let layout = Layout::parse(&found.vmdesc).unwrap();
        layout.walk(&found.device_state).unwrap();
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
        layout.walk(&blob).unwrap();
        self.seen.memory.lock().unwrap().device_state = blob;
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

/// Marks the session as failed when a thread panics, so that no other waits for it for ever.
struct FailOnPanic(Arc<Seen>);

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.sync.lock().unwrap().failed = true;
            self.0.wake.notify_all();
        }
    }
}

struct Secondary {
    address: Address,
    path: PathBuf,
    seen: Arc<Seen>,
    thread: JoinHandle<u32>,
}

fn secondary(options: &SynthOptions) -> Secondary {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "colo-synth-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
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
            markers: 0,
        };
        let checkpoints = side.run(version);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        checkpoints
    });
    let address = Address::Unix(path.clone());
    Secondary {
        address,
        path,
        seen,
        thread,
    }
}

fn small(version: Version) -> SynthOptions {
    SynthOptions {
        ram_bytes: 8 << 20,
        dirty_pages: 700,
        interval: Duration::ZERO,
        zero_share: 0.2,
        ..SynthOptions::new(version)
    }
}

/// Runs a session and compares all memory and the device state after precopy and after each checkpoint.
fn session(options: &SynthOptions, checkpoints: u32) -> Arc<Seen> {
    let secondary = secondary(options);
    let mut primary = SynthPrimary::connect(&secondary.address, options).unwrap();
    std::fs::remove_file(&secondary.path).unwrap();
    let same = |primary: &SynthPrimary| {
        let memory = secondary.seen.memory.lock().unwrap();
        for (position, (name, length)) in primary.blocks().iter().enumerate() {
            let image = primary.image(name).unwrap();
            assert_eq!(image.len() as u64, *length);
            assert!(*image == memory.blocks[position][..], "block {name} differs");
        }
        assert_eq!(primary.device_state(), memory.device_state);
        assert!(memory.received.iter().all(|&count| count > 0));
        memory.received.iter().sum::<u32>()
    };
    let mut received = same(&primary);
    for _ in 0..checkpoints {
        let report = primary.checkpoint().unwrap();
        assert_eq!(report.pages, options.dirty_pages);
        assert!(Duration::ZERO < report.received && report.received <= report.loaded);
        let before = std::mem::replace(&mut received, same(&primary));
        // 7.2 sends a page in passing again.
        let sent = u64::from(received - before);
        let twice = if options.version == Version::V7_2 { 3 } else { 0 };
        assert!(
            (report.pages..=report.pages + twice).contains(&sent),
            "{sent} of {}",
            report.pages
        );
    }
    primary.close().unwrap();
    assert_eq!(secondary.thread.join().unwrap(), checkpoints);
    secondary.seen
}

#[test]
fn multifd_as_each_version_has_it() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Runs(50)] {
            let options = SynthOptions {
                pattern,
                ..small(version)
            };
            let seen = session(&options, 5);
            let memory = seen.memory.lock().unwrap();
            let old = version == Version::V7_2;
            assert_eq!(memory.syncs_with_pages > 0, old);
            assert_eq!(memory.stale_packets > 0, old);
            assert_eq!(memory.zero_on_main > 0, old);
            assert_eq!(memory.zero_in_packets > 0, !old);
        }
    }
}

#[test]
fn plain() {
    for version in [Version::V11_1, Version::V10_0, Version::V7_2] {
        let options = SynthOptions {
            channels: 0,
            ..small(version)
        };
        let seen = session(&options, 3);
        assert!(seen.memory.lock().unwrap().zero_on_main > 0);
    }
}

#[test]
fn machine_types_up_to_8_0_and_other_channel_counts() {
    for channels in [1, 2, 16] {
        let options = SynthOptions {
            channels,
            sync_mode: SyncMode::PerSection,
            zero_pages_on_main: true,
            ..small(Version::V11_1)
        };
        let seen = session(&options, 3);
        let memory = seen.memory.lock().unwrap();
        assert!(memory.zero_on_main > 0 && memory.zero_in_packets == 0);
    }
}

#[test]
fn idle_and_busy_guests() {
    for (dirty_pages, zero_share) in [(0, 0.0), (1, 1.0), (2048, 0.5), (2048, 0.0)] {
        let options = SynthOptions {
            dirty_pages,
            zero_share,
            ..small(Version::V11_1)
        };
        session(&options, 3);
    }
}

#[test]
fn the_same_seed_dirties_the_same_pages() {
    let guest = |seed| {
        let options = SynthOptions {
            seed,
            ..small(Version::V11_1)
        };
        let mut guest = super::guest::GuestRam::new(&options);
        let pages = guest.run(500, Pattern::Random, 0.3);
        let content: Vec<_> = pages
            .iter()
            .map(|page| *guest.page(page.block, page.offset))
            .collect();
        (pages, content)
    };
    assert_eq!(guest(3), guest(3));
    assert_ne!(guest(3), guest(4));
}

#[test]
fn a_secondary_that_goes_away_or_errs_is_named() {
    let options = SynthOptions {
        channels: 0,
        patience: Duration::from_millis(200),
        ..small(Version::V10_0)
    };
    let answered = |answer: Option<&'static [u8]>| {
        let path = std::env::temp_dir().join(format!("colo-synth-bad-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1 << 16];
            // Until the vmdesc's last byte, which no page of this guest ends a read with.
            while stream
                .read(&mut buffer)
                .is_ok_and(|read| read > 0 && !buffer[..read].ends_with(b"]}"))
            {}
            match answer {
                Some(answer) => stream.write_all(answer).unwrap(),
                None => std::thread::sleep(Duration::from_millis(400)),
            }
        });
        let result = run(&Address::Unix(path.clone()), &options);
        thread.join().unwrap();
        std::fs::remove_file(&path).unwrap();
        result.unwrap_err()
    };
    assert!(matches!(answered(None), SynthError::Silent { .. }));
    assert!(matches!(answered(Some(b"")), SynthError::Closed { .. }));
    assert!(matches!(
        answered(Some(&[0, 0, 0, 5])),
        SynthError::Unexpected { .. }
    ));
    assert!(matches!(answered(Some(&[9; 4])), SynthError::Unexpected { .. }));
    let nobody = Address::Unix("/nonexistent/socket".into());
    assert!(matches!(run(&nobody, &options), Err(SynthError::Connect { .. })));
}

#[test]
fn a_session_over_tcp() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address: Address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = [0; 4];
        stream.read_exact(&mut first).unwrap();
        first
    });
    let options = SynthOptions {
        channels: 0,
        ..small(Version::V11_1)
    };
    // Only that it connects and begins: the rest does not depend on the kind of socket.
    assert!(run(&address, &options).is_err());
    assert_eq!(thread.join().unwrap(), *b"QEVM");
}

#[test]
fn bad_options_are_refused() {
    let nobody = Address::Unix("/nonexistent/socket".into());
    let bad = |change: fn(&mut SynthOptions)| {
        let mut options = small(Version::V11_1);
        change(&mut options);
        matches!(run(&nobody, &options), Err(SynthError::Options(_)))
    };
    assert!(!bad(|_| ()));
    assert!(bad(|options| options.ram_bytes = 4097));
    assert!(bad(|options| options.ram_bytes = 0));
    assert!(bad(|options| options.zero_share = 1.5));
    assert!(bad(|options| options.zero_share = f64::NAN));
    assert!(bad(|options| options.dirty_pages = 2049));
    assert!(bad(|options| options.pattern = Pattern::Runs(0)));
    assert!(bad(|options| options.patience = Duration::ZERO));
    for text in ["", "tcp:", "tcp:host", "unix:", "udp:1:2", "host:1"] {
        assert!(
            matches!(text.parse::<Address>(), Err(SynthError::Address(_))),
            "{text}"
        );
    }
    assert_eq!(
        "tcp:[::1]:4444".parse::<Address>().unwrap().to_string(),
        "tcp:[::1]:4444"
    );
}
