//! The multifd channels: one thread each, which sends packets straight from guest memory. Into a recording they are
//! written at once, so that it has one order.

use super::guest::GuestRam;
use super::link::{Destination, Line};
use super::{SynthError, SynthOptions};
use crate::page_compression::PageCompression;
use colo_ring::units::ChannelId;
use colo_ring::wire::codec::{Encoder, Method};
use colo_ring::wire::multifd::{HEADER_LEN, Init, PacketFields};
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;

/// Packets that may wait for a channel's thread.
const QUEUE_PACKETS: usize = 8;

/// Guest memory. The channels read it while they send; it is changed only after [`Channel::drain`] of all of them,
/// since a writer that waited for one channel would keep the others from sending what the first waits for.
#[derive(Clone)]
pub(super) struct SharedRam(Arc<RwLock<GuestRam>>);

impl SharedRam {
    pub(super) fn new(guest: GuestRam) -> Self {
        Self(Arc::new(RwLock::new(guest)))
    }

    // A thread that panicked has only read; and a panic fails whatever uses this.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, GuestRam> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, GuestRam> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One packet to be sent. The fields are those of the header; pages are offsets in the block.
#[derive(Clone, Debug, Default)]
pub(super) struct Packet {
    pub(super) sync: bool,
    pub(super) pages_alloc: u32,
    /// As announced for pages that are not compressed: QEMU 7.2 leaves a stale one in packets without pages, and
    /// nothing follows them.
    pub(super) payload_len: u32,
    pub(super) packet_num: u64,
    /// Position in the block list; `None` leaves the name empty.
    pub(super) block: Option<usize>,
    pub(super) normal: Vec<u64>,
    pub(super) zero: Vec<u64>,
}

/// What a channel has written so far.
#[derive(Default)]
struct Written {
    /// Bytes of all packets.
    bytes: AtomicU64,
    /// Those of them that are payload.
    payload: AtomicU64,
}

/// A request to a channel's thread.
enum Job {
    Send(Packet),
    /// Answered when everything before it has been written.
    Report(SyncSender<()>),
}

/// A channel. Dropping it closes the connection, by which its thread ends.
pub(super) struct Channel {
    id: u8,
    line: Line,
    sender: Sender,
    written: Arc<Written>,
}

enum Sender {
    Thread {
        jobs: SyncSender<Job>,
        thread: JoinHandle<io::Result<()>>,
    },
    Recording(Box<PacketWriter>),
    Finished,
}

impl Channel {
    /// Opens the channel and sends its init packet.
    pub(super) fn open(
        destination: &Destination<'_>,
        id: u8,
        options: &SynthOptions,
        ram: SharedRam,
    ) -> Result<Self, SynthError> {
        let mut line = destination.open(&name(id), options.patience)?;
        let channel = ChannelId(id);
        let uuid = options.uuid;
        let written = Arc::new(Written::default());
        let start = || {
            line.set_nodelay()?;
            line.write_parts(&mut [IoSlice::new(&Init { uuid, channel }.encode())])?;
            let (own, compression, count) = (line.try_clone()?, options.compression, written.clone());
            let writer = move || PacketWriter::new(own, ram, compression, count);
            if let Destination::Recording(_) = destination {
                return Ok(Sender::Recording(Box::new(writer())));
            }
            let (jobs, queue) = sync_channel(QUEUE_PACKETS);
            let thread = std::thread::Builder::new()
                .name(format!("synth-{id}"))
                .spawn(move || send_packets(writer(), &queue))?;
            Ok(Sender::Thread { jobs, thread })
        };
        let sender = start().map_err(|source| io_error(id, "starting", source))?;
        Ok(Self {
            id,
            line,
            sender,
            written,
        })
    }

    /// Queues a packet; waits while the queue is full.
    pub(super) fn send(&mut self, packet: Packet) -> Result<(), SynthError> {
        match &mut self.sender {
            Sender::Recording(writer) => writer
                .write(&packet)
                .map_err(|source| io_error(self.id, "sending a packet", source)),
            Sender::Thread { .. } | Sender::Finished => self.tell(Job::Send(packet)),
        }
    }

    /// Bytes of all packets that were written so far. Once the secondary has answered for a packet, it is among them.
    pub(super) fn bytes(&self) -> u64 {
        self.written.bytes.load(Ordering::Acquire)
    }

    /// Those of them that are payload.
    pub(super) fn payload_bytes(&self) -> u64 {
        self.written.payload.load(Ordering::Acquire)
    }

    /// Waits until all queued packets have been written.
    pub(super) fn drain(&mut self) -> Result<(), SynthError> {
        if let Sender::Recording(_) = self.sender {
            return Ok(());
        }
        let (report, reported) = sync_channel(1);
        self.tell(Job::Report(report))?;
        // The thread drops its end without an answer only if it has failed.
        if reported.recv().is_ok() {
            Ok(())
        } else {
            self.why_gone()
        }
    }

    fn tell(&mut self, job: Job) -> Result<(), SynthError> {
        match &self.sender {
            Sender::Thread { jobs, .. } if jobs.send(job).is_ok() => Ok(()),
            _ => self.why_gone(),
        }
    }

    fn why_gone(&mut self) -> Result<(), SynthError> {
        self.finish()?;
        let source = io::ErrorKind::BrokenPipe.into();
        Err(io_error(self.id, "sending after the end", source))
    }

    /// Waits until all queued packets have been written, ends the thread, and says how that went.
    pub(super) fn finish(&mut self) -> Result<(), SynthError> {
        let Sender::Thread { jobs, thread } = std::mem::replace(&mut self.sender, Sender::Finished) else {
            return Ok(());
        };
        drop(jobs);
        let ended = thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.map_err(|source| io_error(self.id, "sending a packet", source))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.line.shutdown();
    }
}

fn name(id: u8) -> String {
    format!("multifd channel {id}")
}

fn io_error(id: u8, doing: &'static str, source: io::Error) -> SynthError {
    SynthError::io(&name(id), doing, source)
}

fn send_packets(mut writer: PacketWriter, queue: &Receiver<Job>) -> io::Result<()> {
    while let Ok(job) = queue.recv() {
        match job {
            Job::Send(packet) => writer.write(&packet)?,
            // The requester waits for it.
            Job::Report(report) => drop(report.send(())),
        }
    }
    Ok(())
}

/// Writes the packets of one channel, compressed in one stream if they are to be.
struct PacketWriter {
    line: Line,
    ram: SharedRam,
    method: Method,
    /// None where pages are not compressed.
    encoder: Option<Encoder>,
    /// A packet's pages, and what they are compressed to.
    pages: Vec<u8>,
    payload: Vec<u8>,
    written: Arc<Written>,
}

impl PacketWriter {
    fn new(line: Line, ram: SharedRam, compression: PageCompression, written: Arc<Written>) -> Self {
        let method = compression.method;
        Self {
            line,
            ram,
            method,
            encoder: compression
                .level
                .and_then(|level| Encoder::new(method, level.into())),
            pages: Vec::new(),
            payload: Vec::new(),
            written,
        }
    }

    fn write(&mut self, packet: &Packet) -> io::Result<()> {
        let ram = self.ram.read();
        let table = ram.table();
        let block = packet.block.and_then(|block| table.iter().nth(block));
        let pages = packet
            .normal
            .iter()
            .flat_map(|&offset| packet.block.map(|block| ram.page(block, offset)));
        let mut payload_len = packet.payload_len;
        if let Some(encoder) = &mut self.encoder {
            if !packet.normal.is_empty() {
                self.pages.clear();
                pages.clone().for_each(|page| self.pages.extend_from_slice(page));
                self.payload.clear();
                encoder.encode(&self.pages, &mut self.payload);
            }
            // A stale length is that of the payload before.
            if payload_len > 0 {
                payload_len = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
            }
        }
        let mut header = [0; HEADER_LEN];
        PacketFields {
            sync: packet.sync,
            // A SYNC without pages carries none.
            method: match packet.normal.len() + packet.zero.len() {
                0 => Method::None,
                _ => self.method,
            },
            pages_alloc: packet.pages_alloc,
            payload_len,
            packet_num: packet.packet_num,
            block: block.map_or(b"", |(_, block)| &block.name),
            normal: &packet.normal,
            zero: &packet.zero,
        }
        .encode(&mut header);
        let mut parts = vec![IoSlice::new(&header)];
        match &self.encoder {
            None => parts.extend(pages.map(|page| IoSlice::new(page))),
            Some(_) if packet.normal.is_empty() => {}
            Some(_) => parts.push(IoSlice::new(&self.payload)),
        }
        let payload_bytes: u64 = parts[1..].iter().map(|part| part.len() as u64).sum();
        // Before it is written, so that whatever the secondary answers for is counted.
        let bytes = HEADER_LEN as u64 + payload_bytes;
        self.written.bytes.fetch_add(bytes, Ordering::Release);
        self.written.payload.fetch_add(payload_bytes, Ordering::Release);
        self.line.write_parts(&mut parts)
    }
}
