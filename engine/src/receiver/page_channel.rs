//! A multifd channel: packets in, pages into the guest's memory, a stop at every SYNC (spec §8, §10).
//!
//! The protocol is [`MultifdChannel`]'s. Here its actions become receives: one receive takes a packet's payload, each
//! page to its place, and the next packet's header behind it; the pages are marked when the receive has completed. A
//! compressed payload goes to [`Compressed`], which applies it later, while the channel receives on.

use super::decode::{Compressed, PacketPlace};
use super::end::ChannelError;
use super::guest_memory::{GuestMemory, MemoryLeases};
use super::live_session::LiveSession;
use crate::canary::{self, Canary};
use crate::ring::{Connection, Loss, Move, ReceivePlan, ReceiveStyle, StreamBuffer};
use crate::session::{MultifdChannel, PacketAction, Ticket};
use crate::store::{Landing, Store};
use crate::units::{ChannelId, PAGE_SIZE};
use crate::wire::codec::Method;
use crate::wire::multifd::{self, HEADER_LEN, PacketHeader, PageList, START_LEN};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How much more work a byte of compressed payload is than one that is only received.
const COMPRESSED_WORK: u64 = 16;

/// What is being received.
#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload(NextHeader),
    /// So many bytes of a compressed payload.
    Compressed(u32),
    /// Nothing, until there is room for the packet whose header is complete.
    NoRoom,
    /// Nothing, until all packets before a sync are applied.
    Draining,
    /// Nothing, until the channel is released.
    AtSync(Ticket),
}

/// Where the next packet's header is received to, together with a payload.
#[derive(Clone, Copy, Debug)]
enum NextHeader {
    /// It is received on its own.
    Separate,
    /// The channel's own buffer.
    InBuffer,
    /// Behind the pages, in their slab: one read cannot leave its registered buffer.
    InSlab,
}

/// The cores that drive a channel: positions among the plane's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cores {
    /// The home core, which drives the main channel too.
    pub(super) home: usize,
    /// Drives it while the home core falls behind.
    pub(super) offload: usize,
}

pub(super) struct PageChannel {
    link: Link,
    cores: Cores,
    /// None up to the release from the first sync point: before it the guest may have no memory.
    pages: Option<Pages>,
}

/// The channel's connection and its place in the protocol.
struct Link {
    session: Arc<LiveSession>,
    id: ChannelId,
    shard: usize,
    style: ReceiveStyle,
    protocol: MultifdChannel,
    plan: Box<ReceivePlan>,
    header: StreamBuffer,
    state: State,
}

/// The way of a packet's pages into the guest's memory.
struct Pages {
    store: Arc<Store>,
    /// The budget of what the channel needs besides.
    leases: Arc<MemoryLeases>,
    landing: Box<Landing>,
    normal: Box<PageList>,
    zero: Box<PageList>,
    /// From the first compressed packet on.
    compressed: Option<Box<Compressed>>,
}

impl PageChannel {
    /// The channel after its init packet.
    pub(super) fn new(
        session: Arc<LiveSession>,
        id: ChannelId,
        shard: usize,
        style: ReceiveStyle,
        cores: Cores,
    ) -> Self {
        let link = Link {
            session,
            id,
            shard,
            style,
            protocol: MultifdChannel::default(),
            plan: ReceivePlan::new(),
            header: StreamBuffer::new(HEADER_LEN),
            state: State::Header,
        };
        Self {
            link,
            cores,
            pages: None,
        }
    }

    fn step(&mut self, bytes: usize) -> Result<(), ChannelError> {
        let link = &mut self.link;
        link.plan.advance(bytes);
        match (link.state, &mut self.pages) {
            (State::Header, pages) => match (link.fill_header(bytes)?, pages) {
                (false, _) => Ok(()),
                (true, None) => link.first_packet(),
                (true, Some(pages)) => pages.packet(link),
            },
            (State::Payload(next), Some(pages)) if link.plan.remaining() == 0 => pages.landed(link, next),
            (State::Compressed(length), Some(pages)) if link.plan.remaining() == 0 => {
                pages.payload_received(link, length)
            }
            _ => Ok(()),
        }
    }

    /// Goes on after packets were applied, or at a sync after the release.
    fn go_on(&mut self) -> Result<(), ChannelError> {
        let link = &mut self.link;
        match (link.state, &mut self.pages) {
            (State::NoRoom, Some(pages)) => return pages.packet(link),
            (State::Draining, Some(pages)) => pages.arrive(link),
            (State::AtSync(ticket), pages) if link.session.rendezvous.is_released(ticket) => {
                link.protocol.on_release();
                link.state = State::Header;
                if pages.is_none() {
                    let memory = link.session.memory();
                    *pages = memory.map(|memory| Pages::new(memory, link.id));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn compressed(&self) -> Option<&Compressed> {
        self.pages.as_ref()?.compressed.as_deref()
    }

    fn end_if_err(&self, result: Result<(), ChannelError>) -> ControlFlow<()> {
        let Err(error) = result else {
            return ControlFlow::Continue(());
        };
        let link = &self.link;
        link.session.finish(link.place().error(link.id, error));
        ControlFlow::Break(())
    }
}

impl Link {
    /// Header bytes have arrived. Returns whether the header is complete.
    fn fill_header(&mut self, bytes: usize) -> Result<bool, ChannelError> {
        self.header.fill(bytes);
        if let Some(start) = self.header.bytes().first_chunk::<START_LEN>() {
            multifd::check_start(start)?;
        }
        Ok(self.header.bytes().len() == HEADER_LEN)
    }

    /// The channel's first header is complete: a SYNC without pages.
    fn first_packet(&mut self) -> Result<(), ChannelError> {
        let header = decode(&self.header)?;
        let action = self.protocol.on_header(&header)?;
        self.header.consume(HEADER_LEN);
        match action {
            PacketAction::Arrive => self.arrive(),
            _ => return Err(crate::session::ChannelError::NoFirstSync.into()),
        }
        Ok(())
    }

    /// Of the first packet that is not complete.
    fn place(&self) -> PacketPlace {
        PacketPlace {
            packet: self.protocol.packets(),
            position: self.protocol.position(),
        }
    }

    fn plan_header(&mut self) {
        let (space, free) = self.header.space().expect("an incomplete header has room");
        let have = HEADER_LEN - free;
        let want = if self.style.split_header && have < START_LEN {
            START_LEN - have
        } else {
            free
        };
        self.plan.clear();
        self.plan.wait_all = self.style.split_header;
        self.plan.bulk = false;
        self.plan.push(space, want);
    }

    /// Begins the plan of a payload.
    fn begin_plan(&mut self) {
        self.plan.clear();
        self.plan.bulk = self.protocol.pages_since_sync() >= self.style.bulk_from_pages;
        self.plan.wait_all = !self.plan.bulk;
    }

    fn arrive(&mut self) {
        let traffic = self.protocol.take_traffic();
        let counters = &self.session.counters;
        counters.pages.fetch_add(traffic.pages, Ordering::Relaxed);
        counters
            .zero_pages
            .fetch_add(traffic.zero_pages, Ordering::Relaxed);
        counters.bytes.fetch_add(traffic.bytes, Ordering::Relaxed);
        let (ticket, last) = self.session.rendezvous.arrive();
        self.state = State::AtSync(ticket);
        if (last || self.style.wake_each) && !canary::is_set(Canary::LostWake) {
            self.session.wake_main();
        }
    }
}

fn length_of(payload: u32) -> usize {
    usize::try_from(payload).expect("addresses have 64 bits")
}

fn decode(header: &StreamBuffer) -> Result<PacketHeader<'_>, ChannelError> {
    let bytes = header.bytes().first_chunk::<HEADER_LEN>();
    Ok(PacketHeader::decode(bytes.expect("called with a whole header"))?)
}

fn apply_zero(store: &Store, shard: usize, pages: &PageList) {
    for &page in pages.as_slice() {
        store.zero(shard, page);
    }
}

impl Pages {
    fn new(memory: &GuestMemory, channel: ChannelId) -> Self {
        Self {
            store: memory.store.clone(),
            leases: memory.leases.clone(),
            landing: Box::new(Landing::of(channel)),
            normal: Box::default(),
            zero: Box::default(),
            compressed: None,
        }
    }

    /// The next header is complete: receives or does what follows, once there is room for it.
    fn packet(&mut self, link: &mut Link) -> Result<(), ChannelError> {
        if let Some(compressed) = &mut self.compressed
            && !compressed.has_room()
        {
            link.state = State::NoRoom;
            return Ok(());
        }
        let header = decode(&link.header)?;
        let place = link.place();
        let action = link.protocol.on_header(&header)?;
        if header.has_pages() {
            header.resolve(self.store.table(), &mut self.normal, &mut self.zero)?;
            link.session.rendezvous.begin_packet(link.id)?;
        }
        link.header.consume(HEADER_LEN);
        match action {
            PacketAction::Place { then_header, .. } => {
                apply_zero(&self.store, link.shard, &self.zero);
                self.plan_payload(link, then_header)
            }
            PacketAction::Decode { method, payload_len } => {
                self.plan_compressed(link, place, method, payload_len)
            }
            PacketAction::Zero => self.zero_packet(link, place),
            PacketAction::ReadHeader | PacketAction::Arrive => {
                self.go_on(link, action);
                Ok(())
            }
        }
    }

    /// A packet with zero pages alone: applied now, or behind the packets that are not applied yet.
    fn zero_packet(&mut self, link: &mut Link, place: PacketPlace) -> Result<(), ChannelError> {
        match &mut self.compressed {
            Some(compressed) if !compressed.is_empty() && !canary::is_set(Canary::EarlyZero) => {
                compressed.begin(place, &mut self.normal, &mut self.zero);
                compressed.received(0, link.shard)?;
            }
            _ => apply_zero(&self.store, link.shard, &self.zero),
        }
        let next = self.end_packet(link);
        self.go_on(link, next);
        Ok(())
    }

    fn plan_payload(&mut self, link: &mut Link, then_header: bool) -> Result<(), ChannelError> {
        self.store
            .place(link.shard, self.normal.as_slice(), &mut self.landing)?;
        link.begin_plan();
        let plan = &mut link.plan;
        for run in self.landing.runs() {
            if link.style.merge_adjacent {
                plan.push(run.address, run.length);
                continue;
            }
            for page in 0..run.length / PAGE_SIZE {
                plan.push(run.address.wrapping_add(page * PAGE_SIZE), PAGE_SIZE);
            }
        }
        let next_header = match self.landing.header() {
            _ if !then_header || !link.style.chain_header => NextHeader::Separate,
            Some(place) => {
                plan.push(place, HEADER_LEN);
                NextHeader::InSlab
            }
            None => {
                let (space, bytes) = link.header.space().expect("the header was consumed");
                plan.push(space, bytes);
                NextHeader::InBuffer
            }
        };
        plan.region = self.landing.slab().map(|slab| slab.0);
        link.state = State::Payload(next_header);
        Ok(())
    }

    fn plan_compressed(
        &mut self,
        link: &mut Link,
        place: PacketPlace,
        method: Method,
        length: u32,
    ) -> Result<(), ChannelError> {
        let compressed = match &mut self.compressed {
            Some(compressed) => compressed,
            none => {
                let first = Compressed::open(method, &link.session, &self.store, &self.leases, link.id)?;
                none.insert(Box::new(first))
            }
        };
        if canary::is_set(Canary::EarlyZero) {
            let zero = std::mem::take(&mut *self.zero);
            apply_zero(&self.store, link.shard, &zero);
        }
        let space = compressed.begin(place, &mut self.normal, &mut self.zero);
        link.begin_plan();
        link.plan.push(space, length_of(length));
        link.state = State::Compressed(length);
        Ok(())
    }

    /// A compressed payload has arrived. The next header is received separately: to decode is much more work than that, and
    /// begins earlier so.
    fn payload_received(&mut self, link: &mut Link, length: u32) -> Result<(), ChannelError> {
        let compressed = self.compressed.as_mut().expect("the payload went there");
        compressed.received(length_of(length), link.shard)?;
        self.after_payload(link, NextHeader::Separate)
    }

    /// The payload has arrived, and the next header if it was received with it.
    fn landed(&mut self, link: &mut Link, next_header: NextHeader) -> Result<(), ChannelError> {
        self.store.landed(link.shard, &mut self.landing);
        self.after_payload(link, next_header)
    }

    /// The payload's pages are applied.
    fn after_payload(&mut self, link: &mut Link, next_header: NextHeader) -> Result<(), ChannelError> {
        let action = self.end_packet(link);
        match next_header {
            NextHeader::Separate => {
                self.go_on(link, action);
                return Ok(());
            }
            NextHeader::InBuffer => link.header.fill(HEADER_LEN),
            NextHeader::InSlab => {
                let mut header = [0; HEADER_LEN];
                self.store.read_header(&self.landing, &mut header);
                link.header.put(&header);
            }
        }
        self.packet(link)
    }

    /// All of a packet was received. For the gate it ends when it is applied; if that is later, at the next sync.
    fn end_packet(&self, link: &mut Link) -> PacketAction {
        if self
            .compressed
            .as_ref()
            .is_none_or(|compressed| compressed.is_empty())
        {
            link.session.rendezvous.end_packet(link.id);
        }
        link.protocol.on_pages()
    }

    /// After a packet.
    fn go_on(&mut self, link: &mut Link, action: PacketAction) {
        if action == PacketAction::Arrive {
            self.arrive(link);
        } else {
            link.state = State::Header;
        }
    }

    /// A SYNC was read: the channel arrives as soon as all before it is applied.
    fn arrive(&mut self, link: &mut Link) {
        if let Some(compressed) = &self.compressed {
            if !compressed.is_drained() {
                link.state = State::Draining;
                return;
            }
            link.session.rendezvous.end_packet(link.id);
        }
        self.store.idle_landing(&mut self.landing);
        link.arrive();
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.store.release_landing(&mut self.landing);
    }
}

impl Connection for PageChannel {
    fn fd(&self) -> RawFd {
        self.link.session.channel_fd(self.link.id)
    }

    fn tenant(&self) -> u64 {
        u64::from(self.link.session.id)
    }

    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        match self.link.state {
            State::NoRoom | State::Draining | State::AtSync(_) => return None,
            State::Payload(_) | State::Compressed(..) => {}
            State::Header => self.link.plan_header(),
        }
        Some(&mut self.link.plan)
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        if self.link.session.end().is_some() {
            return ControlFlow::Break(());
        }
        let result = self.step(bytes);
        self.end_if_err(result)
    }

    fn lost(&mut self, loss: Loss) {
        let (session, id) = (&self.link.session, self.link.id);
        if let Loss::Error(error) = loss
            && error.kind() != ErrorKind::ConnectionReset
            && session.end().is_none()
        {
            // The main channel's end decides how the session ends; this is the cause.
            session
                .services
                .warn(format!("session {}: {id}: {error}", session.id));
        }
        session.channel_ended();
    }

    fn resume(&mut self) -> ControlFlow<()> {
        if self.link.session.end().is_some() {
            return ControlFlow::Break(());
        }
        let result = self.go_on();
        self.end_if_err(result)
    }

    fn attached(&mut self, core: usize) {
        self.link.shard = core;
    }

    fn moves_to(&self) -> Option<Move> {
        let offload = self.link.style.offload;
        let (core, from_queued) = match self.link.state {
            // Its packets are decoded on any core. What waits in its socket waits for that.
            _ if self.compressed().is_some_and(Compressed::has_workers) => (self.cores.home, 0),
            State::AtSync(_) => (self.cores.home, 0),
            _ if self.link.protocol.pages_since_sync() < offload.from_pages => return None,
            _ if self.compressed().is_some() => (self.cores.offload, offload.from_queued / COMPRESSED_WORK),
            _ => (self.cores.offload, offload.from_queued),
        };
        Some(Move { core, from_queued })
    }
}

impl Drop for PageChannel {
    fn drop(&mut self) {
        // The guest's memory is in use no more once the last connection has left.
        self.pages = None;
        if !canary::is_set(Canary::LostPart) {
            self.link.session.part_dropped();
        }
    }
}
