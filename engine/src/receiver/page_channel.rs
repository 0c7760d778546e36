//! A multifd channel: packets in, pages into the guest's memory, a stop at every SYNC (spec §8, §10).
//!
//! The protocol is [`MultifdChannel`]'s. Here its actions become receives: one receive takes a packet's payload, each
//! page to its place, and the next packet's header behind it; the pages are marked when the receive has completed. A
//! compressed payload goes to [`Compressed`], which applies it later, while the channel receives on.

mod pages;

use super::decode::{Compressed, PacketPlace};
use super::end::ChannelError;
use super::live_session::LiveSession;
use crate::canary::{self, Canary};
use crate::host::thread_times::{self, ThreadTimes};
use crate::ring::{Connection, Loss, Move, ReceivePlan, ReceiveStyle, StreamBuffer};
use crate::session::{MultifdChannel, PacketAction, Ticket};
use crate::units::ChannelId;
use crate::wire::multifd::{self, HEADER_LEN, PacketHeader, START_LEN};
use pages::Pages;
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
    /// A payload, to where [`Pages`] has planned it.
    Payload,
    /// Nothing, until there is room for the packet whose header is complete.
    NoRoom,
    /// Nothing, until all packets before a sync are applied.
    Draining,
    /// Nothing, until the channel is released.
    AtSync(Ticket),
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
    /// The times of a core other than the home core, from when that drives the channel; until its next sync.
    away_since: Option<ThreadTimes>,
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
            away_since: None,
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
            (State::Header, pages) => {
                link.fill_header(bytes)?;
                match pages {
                    None => link.first_packet(),
                    Some(pages) => pages.packet(link),
                }
            }
            (State::Payload, Some(pages)) if link.plan.remaining() == 0 => pages.payload_received(link),
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
        self.pages.as_ref()?.compressed()
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
    /// Header bytes have arrived.
    fn fill_header(&mut self, bytes: usize) -> Result<(), ChannelError> {
        self.header.fill(bytes);
        if let Some(start) = self.header.bytes().first_chunk::<START_LEN>() {
            multifd::check_start(start)?;
        }
        Ok(())
    }

    /// Once the channel's first header is complete: it is a SYNC without pages.
    fn first_packet(&mut self) -> Result<(), ChannelError> {
        let Some(header) = decode(&self.header)? else {
            return Ok(());
        };
        let action = self.protocol.on_header(&header, &self.session.method)?;
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
        let waited = matches!(self.state, State::Draining);
        self.session.channel_synced(self.id, waited);
        if let Some(since) = self.away_since.take() {
            self.session.was_away(since);
        }
        let (ticket, last) = self.session.rendezvous.arrive();
        self.state = State::AtSync(ticket);
        if (last || self.style.wake_each) && !canary::is_set(Canary::LostWake) {
            self.session.wake_main();
        }
    }
}

/// None while the header is incomplete.
fn decode(header: &StreamBuffer) -> Result<Option<PacketHeader<'_>>, ChannelError> {
    let bytes = header.bytes().first_chunk::<HEADER_LEN>();
    Ok(bytes.map(PacketHeader::decode).transpose()?)
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
            State::Payload => {}
            State::Header => self.link.plan_header(),
        }
        Some(&mut self.link.plan)
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        if self.link.session.end().is_some() {
            return ControlFlow::Break(());
        }
        self.link.session.channel_received(self.link.id, bytes);
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
            session.warn(format!("{id}: {error}"));
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
        self.link.away_since = (core != self.cores.home).then(thread_times::read).flatten();
    }

    /// What decodes for it stays, too: the session of a compressed channel that is leaked does not end.
    fn leaked(&mut self) {
        self.link.session.close_channel(self.link.id);
        self.link.session.part_dropped();
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
        // The guest's memory is no longer in use once the last connection is dropped.
        self.pages = None;
        self.link.session.close_channel(self.link.id);
        if !canary::is_set(Canary::LostPart) {
            self.link.session.part_dropped();
        }
    }
}
