//! The channel's end: receives packets into free ones, and hands them to the workers or applies them itself.

use super::queue::{DecodeQueue, Packet, PacketPlace, RESUME_AT};
use super::workers::Workers;
use crate::canary::{self, Canary};
use crate::receiver::end::ChannelError;
use crate::receiver::guest_memory::MemoryLeases;
use crate::receiver::live_session::LiveSession;
use crate::store::Store;
use crate::units::ChannelId;
use crate::wire::codec::{Method, PageBuffer};
use crate::wire::multifd::PageList;
use std::cell::RefCell;
use std::sync::Arc;

thread_local! {
    /// Where the packets are decoded that the thread's channels do not hand over, one after the other.
    static PAGES: RefCell<PageBuffer> = RefCell::default();
}

/// What a channel needs in addition once its payloads are compressed.
pub(in crate::receiver) struct Compressed {
    workers: Arc<Workers>,
    queue: Arc<DecodeQueue>,
    /// The packet that is received next, or is being received.
    current: Option<Box<Packet>>,
}

impl Compressed {
    /// For a channel's first compressed payload.
    ///
    /// # Errors
    /// If there is no decoder for the method, or no memory for it.
    pub(in crate::receiver) fn open(
        method: Method,
        session: &Arc<LiveSession>,
        store: &Arc<Store>,
        leases: &MemoryLeases,
        channel: ChannelId,
    ) -> Result<Self, ChannelError> {
        let queue = Arc::new(DecodeQueue::open(method, session, store, leases, channel)?);
        Ok(Self {
            workers: session.services.shared().workers.clone(),
            current: queue.take_free(),
            queue,
        })
    }

    /// Whether workers decode for the channel.
    pub(in crate::receiver) fn has_workers(&self) -> bool {
        self.workers.exist()
    }

    /// Whether there is room for another packet. If not, the channel receives nothing until it is woken.
    pub(in crate::receiver) fn has_room(&mut self) -> bool {
        if self.current.is_none() {
            self.current = self.queue.take_free();
        }
        if self.current.is_none() && self.queue.backlog().reaches(RESUME_AT) {
            self.current = self.queue.take_free();
        }
        self.current.is_some()
    }

    /// Whether all packets are applied.
    pub(in crate::receiver) fn is_empty(&self) -> bool {
        self.queue.backlog().is_empty()
    }

    /// Whether all packets are applied. If not, the channel is woken when they are, and adds none until then.
    pub(in crate::receiver) fn is_drained(&self) -> bool {
        self.queue.backlog().reaches(0) || canary::is_set(Canary::EarlyArrival)
    }

    /// A packet with these pages begins: the lists are exchanged for empty ones. Returns where its payload is to be received:
    /// room for the largest.
    ///
    /// # Panics
    /// Without [room](Self::has_room).
    pub(in crate::receiver) fn begin(
        &mut self,
        place: PacketPlace,
        normal: &mut Box<PageList>,
        zero: &mut Box<PageList>,
    ) -> *mut u8 {
        let packet = self.current.as_mut().expect("the channel has asked for room");
        packet.place = place;
        std::mem::swap(&mut packet.normal, normal);
        std::mem::swap(&mut packet.zero, zero);
        let (space, _) = packet.payload.restart();
        space
    }

    /// The packet that began last has been received, with a payload of `bytes` bytes. `shard` is the calling thread's.
    ///
    /// # Errors
    /// If it was applied at once, and that failed.
    pub(in crate::receiver) fn received(&mut self, bytes: usize, shard: usize) -> Result<(), ChannelError> {
        let mut packet = self.current.take().expect("it began");
        packet.payload.fill(bytes);
        if self.is_empty()
            && self
                .workers
                .leave_to_channel(packet.normal.as_slice().len(), bytes)
        {
            let applied = PAGES.with_borrow_mut(|pages| self.queue.apply(&packet, shard, pages));
            self.current = Some(packet);
            return applied;
        }
        if self.queue.add(packet)
            && let Err(queue) = self.workers.hand_over(self.queue.clone())
        {
            PAGES.with_borrow_mut(|pages| while queue.apply_oldest(shard, pages) {});
        }
        Ok(())
    }
}
