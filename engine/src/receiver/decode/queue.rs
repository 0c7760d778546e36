//! What a channel with compressed payloads shares with the workers. See [`super`] for the contract.

use super::backlog::{Applied, Backlog};
use super::memory::DecodeMemory;
use crate::canary::{self, Canary};
use crate::receiver::end::{ChannelError, SessionEnd};
use crate::receiver::guest_memory::MemoryLeases;
use crate::receiver::live_session::{LiveSession, SessionPart};
use crate::ring::StreamBuffer;
use crate::store::Store;
use crate::sync::ArrayQueue;
use crate::units::{ChannelId, PAGE_SIZE, PageIndex};
use crate::wire::codec::{self, Decoder, Method, PAYLOAD_MAX, PageBuffer};
use crate::wire::multifd::PageList;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Packets of a channel, so most payloads of it in flight: one that is received, one that is decoded, and two between them,
/// so that neither side waits for the other's wake-up.
pub(super) const PACKETS: u32 = 4;

/// How many pending packets a channel waits for that has no free one: it is woken for two packets at a time.
pub(super) const RESUME_AT: u32 = PACKETS / 2;

/// A packet's payload and the pages that it changes.
pub(super) struct Packet {
    /// Empty if the packet has zero pages only.
    pub(super) payload: StreamBuffer,
    pub(super) normal: Box<PageList>,
    pub(super) zero: Box<PageList>,
    /// Where it is in its channel's stream, for errors.
    pub(super) place: PacketPlace,
}

/// Where a packet is in its channel's stream.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::receiver) struct PacketPlace {
    /// Its number, counted from 0.
    pub(in crate::receiver) packet: u64,
    /// Where it begins, counted from the channel's first byte.
    pub(in crate::receiver) position: u64,
}

impl PacketPlace {
    /// The end of a session by an error of this packet.
    pub(in crate::receiver) fn error(self, channel: ChannelId, error: ChannelError) -> SessionEnd {
        SessionEnd::Channel {
            channel,
            packet: self.packet,
            position: self.position,
            error,
        }
    }
}

/// See the module. What is dropped last comes last: the part of the session says that all else is dropped.
pub(in crate::receiver) struct DecodeQueue {
    store: Arc<Store>,
    channel: ChannelId,
    backlog: Backlog,
    free: ArrayQueue<Box<Packet>>,
    pending: ArrayQueue<Box<Packet>>,
    /// A place for one: in it whenever no packet is being decoded.
    decoder: ArrayQueue<Box<ChannelDecoder>>,
    memory: Arc<DecodeMemory>,
    session: SessionPart,
}

struct ChannelDecoder {
    decoder: Decoder,
    /// Whether the memory has what grows with the stream.
    is_charged: bool,
}

impl DecodeQueue {
    /// For a channel's first compressed packet.
    ///
    /// # Errors
    /// If there is no decoder for the method, or no memory for it.
    pub(super) fn open(
        method: Method,
        session: &Arc<LiveSession>,
        store: &Arc<Store>,
        leases: &MemoryLeases,
        channel: ChannelId,
    ) -> Result<Self, ChannelError> {
        let memory = session.decode_memory.open(method, session.channels(), leases)?;
        let decoder = Decoder::open(method)?.expect("uncompressed payloads go straight to their pages");
        let queue = Self {
            store: store.clone(),
            channel,
            backlog: Backlog::new(),
            free: ArrayQueue::new(PACKETS as usize),
            pending: ArrayQueue::new(PACKETS as usize),
            decoder: ArrayQueue::new(1),
            memory,
            session: SessionPart::new(session),
        };
        let is_charged = false;
        queue.put_decoder(Box::new(ChannelDecoder { decoder, is_charged }));
        for _ in 0..PACKETS {
            let payload = StreamBuffer::try_new(PAYLOAD_MAX as usize);
            let payload = payload.map_err(|error| ChannelError::NoMemory(error.to_string()))?;
            queue.put_free(Box::new(Packet {
                payload,
                normal: Box::default(),
                zero: Box::default(),
                place: PacketPlace::default(),
            }));
        }
        Ok(queue)
    }

    pub(super) fn backlog(&self) -> &Backlog {
        &self.backlog
    }

    /// A packet to receive into.
    pub(super) fn take_free(&self) -> Option<Box<Packet>> {
        self.free.pop()
    }

    fn put_free(&self, packet: Box<Packet>) {
        let put = self.free.push(packet);
        assert!(put.is_ok(), "a place for each packet");
    }

    fn put_decoder(&self, decoder: Box<ChannelDecoder>) {
        let put = self.decoder.push(decoder);
        assert!(put.is_ok(), "the one decoder has its place");
    }

    /// A packet is received, whole. Returns whether the queue is to be handed over: it was the channel's until now.
    pub(super) fn add(&self, packet: Box<Packet>) -> bool {
        let added = self.pending.push(packet);
        assert!(added.is_ok(), "a place for each packet");
        self.backlog.add()
    }

    /// Applies the oldest packet. Only the worker that has the queue calls it, or the channel's thread if no worker took it;
    /// `shard` is that of the calling thread. Returns whether there are more; if not, the caller has it no longer.
    pub(super) fn apply_oldest(&self, shard: usize, pages: &mut PageBuffer) -> bool {
        let packet = self.pending.pop().expect("as many as the backlog says");
        if self.session.end().is_none()
            && let Err(error) = self.apply(&packet, shard, pages)
        {
            self.session.finish(packet.place.error(self.channel, error));
        }
        self.put_free(packet);
        let Applied { more, wake } = self.backlog.applied();
        if wake && !canary::is_set(Canary::LostDecodeWake) {
            self.session.wake_channel(self.channel);
        }
        more
    }

    /// Applies a packet: its zero pages become zero, and its payload the newest content of its normal pages, unless it is
    /// damaged: then no page changes. `shard` is the calling thread's, which has the queue. A panic ends the session, and no other
    /// that the calling thread drives or decodes for.
    ///
    /// # Errors
    /// If the payload does not decode to these pages, or there is no memory for them.
    pub(super) fn apply(
        &self,
        packet: &Packet,
        shard: usize,
        pages: &mut PageBuffer,
    ) -> Result<(), ChannelError> {
        let applied = catch_unwind(AssertUnwindSafe(|| self.decode_and_write(packet, shard, pages)));
        applied.unwrap_or_else(|_| {
            let error = io::Error::other("a thread that decodes panicked");
            self.session.finish(SessionEnd::NotDriven(error));
            Ok(())
        })
    }

    fn decode_and_write(
        &self,
        packet: &Packet,
        shard: usize,
        pages: &mut PageBuffer,
    ) -> Result<(), ChannelError> {
        let contents = if packet.payload.bytes().is_empty() {
            &[]
        } else {
            // None after a panic, which has ended the session.
            let Some(mut decoder) = self.decoder.pop() else {
                return Ok(());
            };
            let decoded = self.decode(&mut decoder, packet, pages);
            self.put_decoder(decoder);
            decoded?
        };
        for page in packet.zero.as_slice() {
            self.store.zero(shard, *page);
        }
        self.write(shard, packet.normal.as_slice(), contents)
    }

    fn decode<'p>(
        &self,
        decoder: &mut ChannelDecoder,
        packet: &Packet,
        pages: &'p mut PageBuffer,
    ) -> Result<&'p [[u8; PAGE_SIZE]], ChannelError> {
        let ChannelDecoder { decoder, is_charged } = decoder;
        let payload = packet.payload.bytes();
        if !*is_charged {
            self.memory
                .begin_stream(codec::stream_bytes(decoder.method(), payload)?)?;
            *is_charged = true;
        }
        Ok(decoder.decode(payload, packet.normal.count(), pages)?)
    }

    /// Brings decoded pages to the store, those between two pages of zeros in one call.
    fn write(
        &self,
        shard: usize,
        mut pages: &[PageIndex],
        mut contents: &[[u8; PAGE_SIZE]],
    ) -> Result<(), ChannelError> {
        while !pages.is_empty() {
            // While they are in the processor's cache, this costs little, and pages of zeros then take no slot.
            let zeros = contents
                .iter()
                .take_while(|content| codec::is_zero(content))
                .count();
            pages[..zeros]
                .iter()
                .for_each(|page| self.store.zero(shard, *page));
            (pages, contents) = (&pages[zeros..], &contents[zeros..]);
            let others = contents
                .iter()
                .take_while(|content| !codec::is_zero(content))
                .count();
            self.store
                .write_all(shard, &pages[..others], &contents[..others])?;
            (pages, contents) = (&pages[others..], &contents[others..]);
        }
        Ok(())
    }
}
