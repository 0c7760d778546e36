//! The session itself: what a primary sends and waits for, in order (spec §1, §12).

use super::deltas::{DeltaCache, Form};
use super::disks::Disks;
use super::guest::{GuestRam, Image, Page};
use super::link::{Destination, MainLink};
use super::recording::Recording;
use super::schedule::Schedule;
use super::sender::{Channel, Packet, SharedRam};
use super::{CheckpointReport, SyncMode, SynthError, SynthOptions, Version, device};
use crate::capture_file::CaptureWriter;
use crate::net::Address;
use colo_ring::units::{PACKET_PAGES, PAGE_BYTES};
use colo_ring::wire::colo::Message;
use colo_ring::wire::multifd::raw_payload_len;
use colo_ring::wire::ram::{BlockRef, RamRecord, encode_block_list};
use colo_ring::wire::return_path::RpMessage;
use colo_ring::wire::stream::{Command, Section, StreamHeader, encode_footer};
use std::time::{Duration, Instant};

/// Pages that one PART section of precopy covers.
const PART_PAGES: usize = 16_384;

/// The time since the session's start.
enum Clock {
    Real(Instant),
    Recording(Recording),
}

impl Clock {
    fn now(&self) -> Duration {
        match self {
            Self::Real(start) => start.elapsed(),
            Self::Recording(recording) => recording.now(),
        }
    }

    fn wait_until(&self, then: Duration) {
        match self {
            Self::Real(start) => std::thread::sleep(then.saturating_sub(start.elapsed())),
            Self::Recording(recording) => recording.pass(then.max(recording.now())),
        }
    }
}

/// A primary in COLO, between two checkpoints.
pub struct SynthPrimary {
    options: SynthOptions,
    main: MainLink,
    channels: Vec<Channel>,
    ram: SharedRam,
    ram_section: u32,
    /// Block of the last page record on the main channel: CONTINUE refers to it for the whole session.
    last_block: Option<usize>,
    /// The page after the last one sent: where the next scan for dirty pages begins.
    scan_from: (usize, u64),
    next_channel: usize,
    packets: u64,
    /// Bytes of page content on the main channel.
    main_payload: u64,
    /// With XBZRLE.
    deltas: Option<DeltaCache>,
    /// Looking like 7.2: each channel's newest packet, not sent until it is known whether a SYNC follows.
    unsent: Vec<Option<Packet>>,
    checkpoints: u64,
    schedule: Schedule,
    clock: Clock,
    precopy: Duration,
    device_state: Vec<u8>,
    disks: Option<Disks>,
}

impl SynthPrimary {
    /// Connects to the secondary and goes through precopy until it says that it is ready.
    ///
    /// # Errors
    /// See [`SynthError`].
    pub fn connect(address: &Address, options: &SynthOptions) -> Result<Self, SynthError> {
        Self::begin(&Destination::Secondary(address), options)
    }

    /// Writes the session to a capture, together with the answers of a secondary, and goes through precopy. Checkpoints
    /// are recorded at the times when they are due; their reports have no durations, because no secondary is measured.
    ///
    /// # Errors
    /// See [`SynthError`].
    pub fn record(capture: CaptureWriter, options: &SynthOptions) -> Result<Self, SynthError> {
        Self::begin(&Destination::Recording(&Recording::new(capture)), options)
    }

    fn begin(destination: &Destination<'_>, options: &SynthOptions) -> Result<Self, SynthError> {
        options.check()?;
        let ram = SharedRam::new(GuestRam::new(options));
        let clock = match destination {
            Destination::Secondary(_) => Clock::Real(Instant::now()),
            Destination::Recording(recording) => Clock::Recording((*recording).clone()),
        };
        // As with QEMU, they are there before the migration begins.
        let disks = match destination {
            Destination::Secondary(_) => Disks::connect(options)?,
            Destination::Recording(_) => None,
        };
        let socket = destination.open("main channel", options.patience)?;
        let channels: Vec<_> = (0..options.channels)
            .map(|id| Channel::open(destination, id, options, ram.clone()))
            .collect::<Result<_, _>>()?;
        let mut primary = Self {
            options: options.clone(),
            main: MainLink::over(socket, options.patience),
            unsent: vec![None; channels.len()],
            channels,
            ram,
            ram_section: if options.version == Version::V7_2 { 2 } else { 1 },
            last_block: None,
            scan_from: (0, 0),
            next_channel: 0,
            packets: 0,
            main_payload: 0,
            deltas: options.xbzrle.then(DeltaCache::default),
            checkpoints: 0,
            schedule: Schedule::new(Duration::ZERO, options.interval, options.closed_loop),
            clock,
            precopy: Duration::ZERO,
            device_state: Vec::new(),
            disks,
        };
        primary.start()?;
        primary.precopy_rounds()?;
        primary.initial_state()?;
        primary.precopy = primary.clock.now();
        Ok(primary)
    }

    /// How long it took from the first connection to CHECKPOINT_READY.
    pub fn precopy(&self) -> Duration {
        self.precopy
    }

    /// What the secondary must hold of a block: all that the guest had at the last checkpoint, or at the end of
    /// precopy before the first. `None` if there is no such block. Drop it before the next checkpoint.
    pub fn image(&self, block: &str) -> Option<Image<'_>> {
        let guest = self.ram.read();
        let position = guest
            .table()
            .iter()
            .position(|(_, known)| &*known.name == block.as_bytes())?;
        Some(Image::new(guest, position))
    }

    /// The blocks' names and lengths in bytes, in the order of the list.
    pub fn blocks(&self) -> Vec<(String, u64)> {
        let guest = self.ram.read();
        let block = |(_, block): (_, &colo_ring::blocks::RamBlock)| (block.name_text(), block.used_length);
        guest.table().iter().map(block).collect()
    }

    /// The device state that the secondary must hold.
    pub fn device_state(&self) -> &[u8] {
        &self.device_state
    }

    /// Lets the guest run until the next checkpoint is due, then takes it.
    ///
    /// # Errors
    /// See [`SynthError`]. The session is then over.
    pub fn checkpoint(&mut self) -> Result<CheckpointReport, SynthError> {
        let dirty = self.run_guest()?;
        self.checkpoints += 1;
        let disk_blocks = match &mut self.disks {
            Some(disks) => disks.write_epoch(self.checkpoints)?,
            None => 0,
        };
        let device_state = device::state(self.checkpoints);
        let vmstate_bytes = device_state.len() as u64;
        let due = self.schedule.next(self.since_ready());
        self.clock.wait_until(self.precopy + due);

        let (written, payload) = (self.written(), self.payload());
        let begin = self.since_ready();
        let own_delay = self.schedule.begin(begin);
        self.say(Message::CheckpointRequest)?;
        self.main.expect(Message::CheckpointReply)?;
        let replied = self.since_ready();
        let sent = self.since_ready();
        self.send_checkpoint(&dirty, &device_state)?;
        self.main.expect(Message::VmstateReceived)?;
        let received = self.since_ready();
        self.device_state = device_state;
        self.main.expect(Message::VmstateLoaded)?;
        let end = self.since_ready();
        let waited = self.schedule.end(end);
        Ok(CheckpointReport {
            pages: dirty.len() as u64,
            zero_pages: dirty.iter().filter(|page| page.zero).count() as u64,
            disk_blocks,
            vmstate_bytes,
            bytes: self.written() - written,
            payload_bytes: self.payload() - payload,
            end,
            reply: replied - begin,
            received: waited + (received - sent),
            loaded: waited + (end - sent),
            waited,
            own_delay,
        })
    }

    /// VMSTATE_SEND and everything that follows it.
    fn send_checkpoint(&mut self, dirty: &[Page], device_state: &[u8]) -> Result<(), SynthError> {
        self.say(Message::VmstateSend)?;
        if self.options.version == Version::V10_0 {
            Command::SwitchoverStart.encode(&mut self.main.out);
        }
        self.end_section(dirty)?;
        Section::Eof.encode(&mut self.main.out);
        self.say(Message::VmstateSize(device_state.len() as u64))?;
        self.main.out.extend_from_slice(device_state);
        self.main.flush()
    }

    fn since_ready(&self) -> Duration {
        self.clock.now() - self.precopy
    }

    /// Bytes written on all channels so far.
    fn written(&self) -> u64 {
        self.main.written() + self.channels.iter().map(Channel::bytes).sum::<u64>()
    }

    /// Bytes of page content among them.
    fn payload(&self) -> u64 {
        self.main_payload + self.channels.iter().map(Channel::payload_bytes).sum::<u64>()
    }

    /// Ends the session as a primary that is killed does: by closing its connections. A capture is finished.
    ///
    /// # Errors
    /// If a channel had failed without having been noticed, or the end of a capture cannot be written.
    pub fn close(mut self) -> Result<(), SynthError> {
        self.main.shutdown();
        self.channels.iter_mut().try_for_each(Channel::finish)?;
        match &self.clock {
            Clock::Real(_) => Ok(()),
            Clock::Recording(recording) => recording.finish(),
        }
    }

    /// Header, commands, and the RAM section's START with the block list and the first sync point.
    fn start(&mut self) -> Result<(), SynthError> {
        let header = StreamHeader {
            machine_type: self.options.machine_type().to_owned(),
            target_page_bits: false,
            capabilities: false,
            uuid: None,
        };
        header.encode(&mut self.main.out);
        if self.has_return_path() {
            Command::OpenReturnPath.encode(&mut self.main.out);
            Command::Ping(1).encode(&mut self.main.out);
        } else {
            Command::EnableColo.encode(&mut self.main.out);
        }
        self.main.flush()?;
        let id = self.ram_section;
        Section::RamStart { id }.encode(&mut self.main.out);
        encode_block_list(&mut self.main.out, self.ram.read().table());
        self.flush_marker()?;
        self.end_of_section()
    }

    /// Every page once while the guest runs, then what it dirtied meanwhile, stopped.
    fn precopy_rounds(&mut self) -> Result<(), SynthError> {
        let pages = self.ram.read().all_pages();
        let id = self.ram_section;
        for part in pages.chunks(PART_PAGES) {
            Section::Part { id }.encode(&mut self.main.out);
            self.send_pages(part)?;
            self.end_of_section()?;
        }
        let dirty = self.run_guest()?;
        if self.options.version != Version::V7_2 {
            Command::SwitchoverStart.encode(&mut self.main.out);
        }
        self.end_section(&dirty)
    }

    /// Device sections and vmdesc, then the secondary's answers.
    fn initial_state(&mut self) -> Result<(), SynthError> {
        self.device_state = device::state(0);
        let vmdesc = device::vmdesc();
        let length = u32::try_from(vmdesc.len()).expect("a short text");
        self.main.out.extend_from_slice(&self.device_state);
        Section::VmDescription { length }.encode(&mut self.main.out);
        self.main.out.extend_from_slice(vmdesc.as_bytes());
        self.main.flush()?;
        if self.has_return_path() {
            self.main.expect(RpMessage::Pong(1))?;
            self.main.expect(RpMessage::Shut(0))?;
        }
        self.main.expect(Message::CheckpointReady)
    }

    /// Lets the guest work, and returns the pages that it dirtied.
    fn run_guest(&mut self) -> Result<Vec<Page>, SynthError> {
        self.channels.iter_mut().try_for_each(Channel::drain)?;
        let SynthOptions {
            dirty_pages,
            pattern,
            zero_share,
            ..
        } = self.options;
        Ok(self.ram.write().run(dirty_pages, pattern, zero_share))
    }

    fn has_return_path(&self) -> bool {
        self.options.version == Version::V11_1
    }

    fn say(&mut self, message: Message) -> Result<(), SynthError> {
        message.encode(&mut self.main.out);
        self.main.flush()
    }

    /// The RAM section's END with the pages that are dirty, the guest being stopped. The scan begins where the last one
    /// ended; where it wraps from the last page to the first, a round ends.
    fn end_section(&mut self, dirty: &[Page]) -> Result<(), SynthError> {
        let id = self.ram_section;
        Section::End { id }.encode(&mut self.main.out);
        let wrap = dirty.partition_point(|page| (page.block, page.offset) < self.scan_from);
        let (second, first) = dirty.split_at(wrap);
        self.send_pages(first)?;
        if !second.is_empty() {
            self.flush_marker()?;
            self.send_pages(second)?;
        }
        self.flush_marker()?;
        self.end_of_section()
    }

    /// EOS and footer. The footer stays in the buffer until something else is flushed, as with QEMU.
    fn end_of_section(&mut self) -> Result<(), SynthError> {
        if self.options.sync_mode == SyncMode::PerSection {
            self.sync_channels()?;
        }
        RamRecord::Eos.encode(&mut self.main.out);
        self.main.flush()?;
        encode_footer(&mut self.main.out, self.ram_section);
        Ok(())
    }

    /// In per-round mode: a sync point.
    fn flush_marker(&mut self) -> Result<(), SynthError> {
        if self.channels.is_empty() || self.options.sync_mode == SyncMode::PerSection {
            return Ok(());
        }
        self.sync_channels()?;
        RamRecord::MultifdFlush.encode(&mut self.main.out);
        self.main.flush()
    }

    /// SYNC on every channel, after all pages queued so far.
    fn sync_channels(&mut self) -> Result<(), SynthError> {
        for id in 0..self.channels.len() {
            let packet_num = self.packet_num();
            let mut sync = Packet {
                sync: true,
                packet_num,
                ..Packet::default()
            };
            if self.options.version == Version::V7_2 {
                sync.pages_alloc = full_packet();
            }
            match self.unsent[id].take() {
                None => self.channels[id].send(sync)?,
                Some(last) if packet_num.is_multiple_of(2) => self.sync_with_pages(id, last)?,
                Some(last) => {
                    stale_fields(&mut sync, &last);
                    self.channels[id].send(last)?;
                    self.channels[id].send(sync)?;
                }
            }
        }
        Ok(())
    }

    /// As 7.2 does it now and then: SYNC on the last packet with pages, then an empty one with the same number.
    fn sync_with_pages(&mut self, id: usize, mut last: Packet) -> Result<(), SynthError> {
        let mut empty = Packet {
            packet_num: last.packet_num,
            pages_alloc: full_packet(),
            ..Packet::default()
        };
        stale_fields(&mut empty, &last);
        last.sync = true;
        self.channels[id].send(last)?;
        self.channels[id].send(empty)
    }

    fn packet_num(&mut self) -> u64 {
        self.packets += 1;
        self.packets - 1
    }

    /// Sends pages, each where this kind of session sends it.
    fn send_pages(&mut self, pages: &[Page]) -> Result<(), SynthError> {
        let mut normal = Vec::with_capacity(PACKET_PAGES);
        let mut zero = Vec::with_capacity(PACKET_PAGES);
        for (position, page) in pages.iter().enumerate() {
            if self.channels.is_empty() || (page.zero && self.options.zero_pages_on_main) {
                self.send_record(page)?;
            } else if page.zero {
                zero.push(page.offset);
            } else {
                normal.push(page.offset);
            }
            let last_of_block = pages
                .get(position + 1)
                .is_none_or(|next| next.block != page.block);
            let queued = normal.len() + zero.len();
            if queued == PACKET_PAGES || (last_of_block && queued > 0) {
                self.send_packet(page.block, std::mem::take(&mut normal), std::mem::take(&mut zero))?;
                if self.options.version == Version::V7_2 && queued == PACKET_PAGES && !last_of_block {
                    // Now and then the last page of a full packet is sent again, on another channel.
                    normal.extend((self.packets.is_multiple_of(4) && !page.zero).then_some(page.offset));
                }
            }
        }
        if let Some(last) = pages.last() {
            self.scan_from = (last.block, last.offset + 1);
        }
        Ok(())
    }

    fn send_packet(&mut self, block: usize, normal: Vec<u64>, zero: Vec<u64>) -> Result<(), SynthError> {
        let id = self.next_channel;
        self.next_channel = (id + 1) % self.channels.len();
        let payload_len = raw_payload_len(normal.len());
        let packet = Packet {
            sync: false,
            pages_alloc: full_packet(),
            payload_len,
            packet_num: self.packet_num(),
            block: Some(block),
            normal,
            zero,
        };
        let due = if self.options.version == Version::V7_2 {
            self.unsent[id].replace(packet)
        } else {
            Some(packet)
        };
        due.map_or(Ok(()), |packet| self.channels[id].send(packet))
    }

    fn send_record(&mut self, page: &Page) -> Result<(), SynthError> {
        let ram = self.ram.read();
        let Page {
            block: position,
            offset,
            zero,
        } = *page;
        let content = ram.page(position, offset);
        let form = match &mut self.deltas {
            None => Form::Whole,
            Some(deltas) if zero => {
                deltas.send_zero(position, offset);
                Form::Whole
            }
            Some(deltas) => deltas.send(position, offset, content),
        };
        if let Form::Unchanged = form {
            return Ok(());
        }
        let block = if self.last_block.replace(position) == Some(position) {
            BlockRef::Continue
        } else {
            let (_, block) = ram.table().iter().nth(position).expect("a block of the list");
            BlockRef::Named(&block.name)
        };
        let record = match form {
            _ if zero => RamRecord::Zero { block, offset },
            Form::Delta(delta) => {
                self.main_payload += delta.len() as u64;
                RamRecord::Xbzrle { block, offset, delta }
            }
            Form::Whole | Form::Unchanged => {
                self.main_payload += PAGE_BYTES;
                RamRecord::Page {
                    block,
                    offset,
                    content,
                }
            }
        };
        record.encode(&mut self.main.out);
        drop(ram);
        self.main.flush_if_full()
    }
}

/// Gives a packet without pages what 7.2 leaves in it: block and size of the one before.
fn stale_fields(packet: &mut Packet, before: &Packet) {
    packet.block = before.block;
    packet.payload_len = before.payload_len;
}

fn full_packet() -> u32 {
    u32::try_from(PACKET_PAGES).expect("128 pages")
}
