//! A multifd channel: packets in, pages into the guest's memory, a stop at every SYNC (spec §8, §10).
//!
//! One receive takes a packet's payload, each page to its place, and the next packet's header behind it; the page is
//! marked when the receive has completed. After a packet with SYNC nothing follows before the release, so there the
//! header is not asked for.

use super::end::{ChannelError, SessionEnd};
use super::guest::Guest;
use crate::canary::{self, Canary};
use crate::ring::{Buffers, Endpoint, Loss, ReceivePlan, ReceiveStyle, Staging};
use crate::session::Ticket;
use crate::store::{Landing, Slab};
use crate::units::{ChannelId, PAGE_SIZE};
use crate::wire::multifd::{self, HEADER_LEN, INIT_LEN, PacketHeader, PageList, START_LEN};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the channel is in the middle of.
#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload { sync: bool, header_follows: HeaderPlace },
    AtSync(Ticket),
}

/// Where the next packet's header is received to, with the payload.
#[derive(Clone, Copy, Debug)]
enum HeaderPlace {
    /// Not with it.
    None,
    /// The channel's own buffer.
    Own,
    /// Behind the pages, in their slab: one read cannot leave its registered buffer.
    Landing,
}

/// The cores that drive a channel: positions among the plane's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cores {
    /// Beside the main channel, where it meets it at syncs.
    pub(super) home: usize,
    /// While it carries much.
    pub(super) away: usize,
}

pub(super) struct PageChannel {
    guest: Arc<Guest>,
    id: ChannelId,
    shard: usize,
    style: ReceiveStyle,
    plan: Box<ReceivePlan>,
    header: Staging,
    landing: Box<Landing>,
    normal: Box<PageList>,
    zero: Box<PageList>,
    state: State,
    buffers: Buffers,
    cores: Cores,
    synced_once: bool,
    packets: u64,
    /// Where the current packet began on the channel.
    position: u64,
    pages_since_sync: u64,
    zero_pages_since_sync: u64,
    bytes_since_sync: u64,
}

impl PageChannel {
    /// The channel after its init packet.
    pub(super) fn new(
        guest: Arc<Guest>,
        id: ChannelId,
        shard: usize,
        style: ReceiveStyle,
        cores: Cores,
    ) -> Self {
        Self {
            guest,
            id,
            shard,
            style,
            plan: ReceivePlan::new(),
            header: Staging::new(HEADER_LEN),
            landing: Box::new(Landing::of(id)),
            normal: Box::default(),
            zero: Box::default(),
            state: State::Header,
            buffers: Buffers::default(),
            cores,
            synced_once: false,
            packets: 0,
            position: INIT_LEN as u64,
            pages_since_sync: 0,
            zero_pages_since_sync: 0,
            bytes_since_sync: 0,
        }
    }

    /// The header is complete: check it, apply its zero pages, and see what follows.
    fn packet(&mut self) -> Result<(), ChannelError> {
        let bytes = self.header.bytes().first_chunk::<HEADER_LEN>();
        let header = PacketHeader::decode(bytes.expect("called with a whole header"))?;
        let (sync, pages) = (header.is_sync(), header.has_pages());
        if !self.synced_once && (pages || !sync) {
            return Err(ChannelError::NoFirstSync);
        }
        self.synced_once = true;
        let payload = header.payload_len();
        if pages {
            let store = self.guest.store().ok_or(ChannelError::NoFirstSync)?;
            header.resolve(store.table(), &mut self.normal, &mut self.zero)?;
            self.guest
                .rendezvous
                .begin_packet(self.id)
                .map_err(|_| ChannelError::NotQuiet)?;
            for &page in self.zero.as_slice() {
                store.zero(self.shard, page);
            }
            self.zero_pages_since_sync += self.zero.as_slice().len() as u64;
            if payload == 0 {
                self.guest.rendezvous.end_packet(self.id);
            }
        }
        self.header.consume(HEADER_LEN);
        if payload > 0 {
            return self.plan_payload(sync);
        }
        self.end_of_packet(0);
        if sync {
            self.arrive();
        } else {
            self.state = State::Header;
        }
        Ok(())
    }

    fn plan_payload(&mut self, sync: bool) -> Result<(), ChannelError> {
        let store = self.guest.store().expect("checked with the packet's pages");
        store.place(self.shard, self.normal.as_slice(), &mut self.landing)?;
        self.plan.clear();
        self.plan.bulk = self.pages_since_sync >= self.style.bulk_from_pages;
        self.plan.wait_all = !self.plan.bulk;
        for run in self.landing.runs() {
            if self.style.coalesce {
                self.plan.push(run.address, run.length);
                continue;
            }
            for page in 0..run.length / PAGE_SIZE {
                self.plan
                    .push(run.address.wrapping_add(page * PAGE_SIZE), PAGE_SIZE);
            }
        }
        self.plan.registered = self.buffer();
        let header_follows = match self.landing.header() {
            _ if sync || !self.style.chain_header => HeaderPlace::None,
            Some(place) => {
                self.plan.push(place, HEADER_LEN);
                HeaderPlace::Landing
            }
            None => {
                let (space, bytes) = self.header.space().expect("the header was consumed");
                self.plan.push(space, bytes);
                HeaderPlace::Own
            }
        };
        self.state = State::Payload { sync, header_follows };
        Ok(())
    }

    /// The registered buffer that the payload's places lie in.
    fn buffer(&self) -> Option<u16> {
        self.landing.slab().and_then(|slab| self.buffers.index(slab))
    }

    /// The payload, and the header behind it if it was asked for, are where they belong.
    fn payload_landed(&mut self, sync: bool, header_follows: HeaderPlace) -> Result<(), ChannelError> {
        let store = self.guest.store().expect("the payload went there");
        store.landed(self.shard, &mut self.landing);
        self.guest.rendezvous.end_packet(self.id);
        let pages = self.normal.as_slice().len();
        self.pages_since_sync += pages as u64;
        match header_follows {
            HeaderPlace::None => {}
            HeaderPlace::Own => self.header.fill(HEADER_LEN),
            HeaderPlace::Landing => {
                let mut header = [0; HEADER_LEN];
                store.read_header(&self.landing, &mut header);
                self.header.put(&header);
            }
        }
        self.end_of_packet(pages);
        match (sync, header_follows) {
            (true, _) => self.arrive(),
            (false, HeaderPlace::None) => self.state = State::Header,
            (false, _) => return self.packet(),
        }
        Ok(())
    }

    fn end_of_packet(&mut self, pages: usize) {
        let bytes = (HEADER_LEN + pages * PAGE_SIZE) as u64;
        self.packets += 1;
        self.position += bytes;
        self.bytes_since_sync += bytes;
    }

    fn arrive(&mut self) {
        let counters = &self.guest.counters;
        counters
            .pages
            .fetch_add(std::mem::take(&mut self.pages_since_sync), Ordering::Relaxed);
        counters
            .zero_pages
            .fetch_add(std::mem::take(&mut self.zero_pages_since_sync), Ordering::Relaxed);
        counters
            .bytes
            .fetch_add(std::mem::take(&mut self.bytes_since_sync), Ordering::Relaxed);
        if let Some(store) = self.guest.store() {
            store.idle_landing(&mut self.landing);
        }
        let (ticket, last) = self.guest.rendezvous.arrive();
        self.state = State::AtSync(ticket);
        if (last || self.style.wake_each) && !canary::is_set(Canary::LostWake) {
            self.guest.wake_main();
        }
    }

    fn header_bytes_came(&mut self, bytes: usize) -> Result<(), ChannelError> {
        self.header.fill(bytes);
        if let Some(start) = self.header.bytes().first_chunk::<START_LEN>() {
            multifd::check_start(start)?;
        }
        if self.header.bytes().len() == HEADER_LEN {
            self.packet()
        } else {
            Ok(())
        }
    }

    fn step(&mut self, bytes: usize) -> Result<(), ChannelError> {
        self.plan.advance(bytes);
        match self.state {
            State::Header => self.header_bytes_came(bytes),
            State::Payload { sync, header_follows } if self.plan.remaining() == 0 => {
                self.payload_landed(sync, header_follows)
            }
            State::Payload { .. } | State::AtSync(_) => Ok(()),
        }
    }
}

impl Endpoint for PageChannel {
    fn fd(&self) -> RawFd {
        self.guest.channel_fd(self.id)
    }

    fn guest(&self) -> u64 {
        u64::from(self.guest.id)
    }

    fn plan(&mut self) -> Option<&mut ReceivePlan> {
        match self.state {
            State::AtSync(_) => return None,
            State::Payload { .. } => {}
            State::Header => {
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
        }
        Some(&mut self.plan)
    }

    fn received(&mut self, bytes: usize) -> ControlFlow<()> {
        if self.guest.end().is_some() {
            return ControlFlow::Break(());
        }
        let Err(error) = self.step(bytes) else {
            return ControlFlow::Continue(());
        };
        let (channel, packet, position) = (self.id, self.packets, self.position);
        self.guest.finish(SessionEnd::Channel {
            channel,
            packet,
            position,
            error,
        });
        ControlFlow::Break(())
    }

    fn lost(&mut self, loss: Loss) {
        if let Loss::Error(error) = loss
            && error.kind() != ErrorKind::ConnectionReset
            && self.guest.end().is_none()
        {
            // How the session ends says the main channel; this is why.
            (self.guest.services.warn)(format!("session {}: {}: {error}", self.guest.id, self.id));
        }
        self.guest.channel_ended();
    }

    fn resume(&mut self) -> ControlFlow<()> {
        if self.guest.end().is_some() {
            return ControlFlow::Break(());
        }
        if let State::AtSync(ticket) = self.state
            && self.guest.rendezvous.is_released(ticket)
        {
            self.state = State::Header;
        }
        ControlFlow::Continue(())
    }

    fn attached(&mut self, core: usize, buffers: Buffers) {
        self.shard = core;
        self.buffers = buffers;
        // A payload that was planned on another core has that one's index.
        if matches!(self.state, State::Payload { .. }) {
            self.plan.registered = self.buffer();
        }
    }

    fn slab_limit(&self) -> usize {
        self.guest.store().map_or(0, |store| store.slab_limit())
    }

    fn slab(&self, position: usize) -> Option<&Slab> {
        self.guest.store()?.slab(position)
    }

    fn use_buffers(&mut self, buffers: Buffers) {
        self.buffers = buffers;
    }

    fn moves_to(&self, queued: &dyn Fn() -> u64) -> Option<usize> {
        let spread = self.style.spread;
        match self.state {
            State::AtSync(_) => Some(self.cores.home),
            _ if self.pages_since_sync >= spread.from_pages && queued() >= spread.from_queued => {
                Some(self.cores.away)
            }
            _ => None,
        }
    }
}

impl Drop for PageChannel {
    fn drop(&mut self) {
        if let Some(store) = self.guest.store() {
            store.release_landing(&mut self.landing);
        }
        if !canary::is_set(Canary::LostLeave) {
            self.guest.leave();
        }
    }
}
