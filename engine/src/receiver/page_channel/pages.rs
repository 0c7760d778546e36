//! The way of a packet's pages into the guest's memory: straight to their places, or through a decoder.

use super::{Link, State, decode};
use crate::canary::{self, Canary};
use crate::receiver::decode::{Compressed, PacketPlace};
use crate::receiver::end::ChannelError;
use crate::receiver::guest_memory::{GuestMemory, MemoryLeases};
use crate::session::{self, PacketAction};
use crate::store::{HeaderSlot, Landing, Store};
use crate::units::{ChannelId, PAGE_SIZE};
use crate::wire::codec::Method;
use crate::wire::multifd::{HEADER_LEN, PageList};
use std::sync::Arc;

/// See the module.
pub(super) struct Pages {
    store: Arc<Store>,
    /// The budget of what the channel allocates in addition.
    leases: Arc<MemoryLeases>,
    normal: Box<PageList>,
    zero: Box<PageList>,
    payloads: Payloads,
}

/// How payloads come into the guest's memory.
enum Payloads {
    /// Straight to their pages.
    Direct(Direct),
    /// Decoded: from the first compressed payload on, and then all of them.
    Compressed(Box<Decoding>),
}

/// Of a channel whose payloads need no decoding.
struct Direct {
    landing: Box<Landing>,
    /// Of the payload that is being received.
    next_header: NextHeader,
}

/// Of a channel whose payloads are decoded.
struct Decoding {
    compressed: Compressed,
    method: Method,
    /// Bytes of the payload that is being received.
    length: usize,
}

/// Where the next packet's header is received to, together with a payload.
#[derive(Clone, Copy, Debug)]
enum NextHeader {
    /// It is received on its own.
    Separate,
    /// The channel's own buffer.
    InBuffer,
    /// Behind the pages, in their slab: one read cannot leave its registered buffer.
    InSlab(HeaderSlot),
}

fn apply_zero(store: &Store, shard: usize, pages: &PageList) {
    for &page in pages.as_slice() {
        store.zero(shard, page);
    }
}

impl Decoding {
    /// A packet with these pages begins, whose payload of `length` bytes is received next.
    fn plan(
        &mut self,
        link: &mut Link,
        place: PacketPlace,
        (normal, zero): (&mut Box<PageList>, &mut Box<PageList>),
        length: u32,
    ) {
        let space = self.compressed.begin(place, normal, zero);
        self.length = length as usize;
        link.begin_plan();
        link.plan.push(space, self.length);
        link.state = State::Payload;
    }

    /// The error of a payload that has another method.
    fn other_method(&self, seen: Method) -> ChannelError {
        let error = session::ChannelError::OtherMethod {
            seen: seen.name(),
            pinned: self.method.name(),
        };
        error.into()
    }
}

impl Pages {
    pub(super) fn new(memory: &GuestMemory, channel: ChannelId) -> Self {
        Self {
            store: memory.store.clone(),
            leases: memory.leases.clone(),
            normal: Box::default(),
            zero: Box::default(),
            payloads: Payloads::Direct(Direct {
                landing: Box::new(Landing::of(channel)),
                next_header: NextHeader::Separate,
            }),
        }
    }

    /// Once the next header is complete: receives or does what follows, as soon as there is room for it.
    pub(super) fn packet(&mut self, link: &mut Link) -> Result<(), ChannelError> {
        let Some(header) = decode(&link.header)? else {
            return Ok(());
        };
        if let Payloads::Compressed(decoding) = &mut self.payloads
            && !decoding.compressed.has_room()
        {
            link.state = State::NoRoom;
            return Ok(());
        }
        let place = link.place();
        let action = link.protocol.on_header(&header, &link.session.method)?;
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
        match &mut self.payloads {
            Payloads::Compressed(decoding)
                if !decoding.compressed.is_empty() && !canary::is_set(Canary::EarlyZero) =>
            {
                let compressed = &mut decoding.compressed;
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
        let direct = match &mut self.payloads {
            Payloads::Direct(direct) => direct,
            Payloads::Compressed(decoding) => return Err(decoding.other_method(Method::None)),
        };
        let landing = &mut direct.landing;
        self.store.place(link.shard, self.normal.as_slice(), landing)?;
        link.begin_plan();
        let plan = &mut link.plan;
        for run in landing.runs() {
            if link.style.merge_adjacent {
                plan.push(run.address, run.length);
                continue;
            }
            for page in 0..run.length / PAGE_SIZE {
                plan.push(run.address.wrapping_add(page * PAGE_SIZE), PAGE_SIZE);
            }
        }
        direct.next_header = match landing.header() {
            _ if !then_header || !link.style.chain_header => NextHeader::Separate,
            Some(slot) => {
                plan.push(slot.address(), HEADER_LEN);
                NextHeader::InSlab(slot)
            }
            None => {
                let (space, bytes) = link.header.restart();
                plan.push(space, bytes);
                NextHeader::InBuffer
            }
        };
        plan.region = landing.slab().map(|slab| slab.0);
        link.state = State::Payload;
        Ok(())
    }

    fn plan_compressed(
        &mut self,
        link: &mut Link,
        place: PacketPlace,
        method: Method,
        length: u32,
    ) -> Result<(), ChannelError> {
        if canary::is_set(Canary::EarlyZero) {
            let zero = std::mem::take(&mut *self.zero);
            apply_zero(&self.store, link.shard, &zero);
        }
        let lists = (&mut self.normal, &mut self.zero);
        match &mut self.payloads {
            Payloads::Compressed(decoding) => decoding.plan(link, place, lists, length),
            Payloads::Direct(direct) => {
                let compressed = Compressed::open(method, &link.session, &self.store, &self.leases, link.id)?;
                let mut decoding = Box::new(Decoding {
                    compressed,
                    method,
                    length: 0,
                });
                decoding.plan(link, place, lists, length);
                self.store.release_landing(&mut direct.landing);
                self.payloads = Payloads::Compressed(decoding);
            }
        }
        Ok(())
    }

    /// The payload has arrived, and the next header if it was received with it.
    pub(super) fn payload_received(&mut self, link: &mut Link) -> Result<(), ChannelError> {
        let next_header = match &mut self.payloads {
            Payloads::Direct(direct) => {
                self.store.landed(link.shard, &mut direct.landing);
                direct.next_header
            }
            // Its next header is received separately: to decode is much more work than that, and begins earlier so.
            Payloads::Compressed(decoding) => {
                decoding.compressed.received(decoding.length, link.shard)?;
                NextHeader::Separate
            }
        };
        let action = self.end_packet(link);
        match next_header {
            NextHeader::Separate => {
                self.go_on(link, action);
                return Ok(());
            }
            NextHeader::InBuffer => link.header.fill(HEADER_LEN),
            NextHeader::InSlab(slot) => {
                let mut header = [0; HEADER_LEN];
                self.store.read_header(slot, &mut header);
                link.header.put(&header);
            }
        }
        self.packet(link)
    }

    /// What decodes the channel's payloads, if they are compressed.
    pub(super) fn compressed(&self) -> Option<&Compressed> {
        match &self.payloads {
            Payloads::Direct(_) => None,
            Payloads::Compressed(decoding) => Some(&decoding.compressed),
        }
    }

    /// All of a packet was received. For the gate it ends when it is applied; if that is later, at the next sync.
    fn end_packet(&self, link: &mut Link) -> PacketAction {
        let is_applied = match &self.payloads {
            Payloads::Direct(_) => true,
            Payloads::Compressed(decoding) => decoding.compressed.is_empty(),
        };
        if is_applied {
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
    pub(super) fn arrive(&mut self, link: &mut Link) {
        match &mut self.payloads {
            Payloads::Direct(direct) => self.store.idle_landing(&mut direct.landing),
            Payloads::Compressed(decoding) if decoding.compressed.is_drained() => {
                link.session.rendezvous.end_packet(link.id);
            }
            Payloads::Compressed(_) => {
                link.state = State::Draining;
                return;
            }
        }
        link.arrive();
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Payloads::Direct(direct) = &mut self.payloads {
            self.store.release_landing(&mut direct.landing);
        }
    }
}
