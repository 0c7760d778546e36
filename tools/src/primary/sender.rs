//! The multifd channels: one thread each, which sends packets straight from guest memory. Into a recording they are
//! written at once, so that it has one order.

use super::guest::GuestRam;
use super::link::{Destination, Line};
use super::{SynthError, SynthOptions};
use colo_ring::units::{ChannelId, PAGE_BYTES};
use colo_ring::wire::codec::Method;
use colo_ring::wire::multifd::{HEADER_LEN, Init, PacketFields};
use std::io::{self, IoSlice};
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
    /// As announced: QEMU 7.2 leaves a stale one in packets without pages, and nothing follows them.
    pub(super) payload_len: u32,
    pub(super) packet_num: u64,
    /// Position in the block list; `None` leaves the name empty.
    pub(super) block: Option<usize>,
    pub(super) normal: Vec<u64>,
    pub(super) zero: Vec<u64>,
}

impl Packet {
    /// Its length on the wire. What `payload_len` announces does not always follow.
    fn bytes(&self) -> u64 {
        HEADER_LEN as u64 + self.normal.len() as u64 * PAGE_BYTES
    }
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
    /// Bytes of all packets so far.
    bytes: u64,
}

enum Sender {
    Thread {
        jobs: SyncSender<Job>,
        thread: JoinHandle<io::Result<()>>,
    },
    Recording(SharedRam),
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
        let start = || {
            line.set_nodelay()?;
            line.write_parts(&mut [IoSlice::new(&Init { uuid, channel }.encode())])?;
            if let Destination::Recording(_) = destination {
                return Ok(Sender::Recording(ram));
            }
            let own = line.try_clone()?;
            let (jobs, queue) = sync_channel(QUEUE_PACKETS);
            let thread = std::thread::Builder::new()
                .name(format!("synth-{id}"))
                .spawn(move || send_packets(own, &queue, &ram))?;
            Ok(Sender::Thread { jobs, thread })
        };
        let sender = start().map_err(|source| io_error(id, "starting", source))?;
        Ok(Self {
            id,
            line,
            sender,
            bytes: 0,
        })
    }

    /// Queues a packet; waits while the queue is full.
    pub(super) fn send(&mut self, packet: Packet) -> Result<(), SynthError> {
        self.bytes += packet.bytes();
        match &self.sender {
            Sender::Recording(ram) => send_packet(&mut self.line, &packet, ram)
                .map_err(|source| io_error(self.id, "sending a packet", source)),
            Sender::Thread { .. } | Sender::Finished => self.tell(Job::Send(packet)),
        }
    }

    /// Bytes of all packets so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
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

fn send_packets(mut line: Line, queue: &Receiver<Job>, ram: &SharedRam) -> io::Result<()> {
    while let Ok(job) = queue.recv() {
        match job {
            Job::Send(packet) => send_packet(&mut line, &packet, ram)?,
            // The requester waits for it.
            Job::Report(report) => drop(report.send(())),
        }
    }
    Ok(())
}

fn send_packet(line: &mut Line, packet: &Packet, ram: &SharedRam) -> io::Result<()> {
    let ram = ram.read();
    let table = ram.table();
    let block = packet.block.and_then(|block| table.iter().nth(block));
    let mut header = [0; HEADER_LEN];
    PacketFields {
        sync: packet.sync,
        method: Method::None,
        pages_alloc: packet.pages_alloc,
        payload_len: packet.payload_len,
        packet_num: packet.packet_num,
        block: block.map_or(b"", |(_, block)| &block.name),
        normal: &packet.normal,
        zero: &packet.zero,
    }
    .encode(&mut header);
    let pages = packet
        .normal
        .iter()
        .flat_map(|&offset| packet.block.map(|block| ram.page(block, offset)));
    let header = [&header[..]].into_iter();
    let mut parts: Vec<_> = header
        .chain(pages.map(|page| &page[..]))
        .map(IoSlice::new)
        .collect();
    line.write_parts(&mut parts)
}
