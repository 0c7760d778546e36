//! The way of compressed payloads: received into a buffer of the channel, decoded once they are complete, and copied page
//! by page into the guest's memory by the thread that drives the channel.
//!
//! What a channel needs for it is made when its first compressed packet is announced, and charged to the budget of RAM:
//! the payload's buffer at once, the decoder's memory when the first payload has told how much that is. A payload is
//! decoded into the thread's own [`PageBuffer`], so a packet that is damaged changes no page.

use super::budget::Lease;
use super::end::ChannelError;
use super::live_session::LiveSession;
use crate::ring::StreamBuffer;
use crate::store::Store;
use crate::units::PageIndex;
use crate::wire::codec::{self, Decoder, Method, PAYLOAD_MAX, PageBuffer};
use std::cell::RefCell;

thread_local! {
    /// Where the packets of all channels that the thread drives are decoded, one after the other.
    static PAGES: RefCell<PageBuffer> = RefCell::default();
}

/// What a channel with compressed payloads has besides.
pub(super) struct Compressed {
    decoder: Decoder,
    payload: StreamBuffer,
    lease: Lease,
    /// Whether the lease has the decoder's memory.
    is_charged: bool,
}

impl Compressed {
    /// For a channel's first compressed payload.
    ///
    /// # Errors
    /// If there is no decoder for the method, or no memory for it.
    pub(super) fn open(method: Method, session: &LiveSession) -> Result<Self, ChannelError> {
        let lease = session.lease_memory(PAYLOAD_MAX.into())?;
        let decoder = Decoder::open(method)?.expect("uncompressed payloads go straight to their pages");
        Ok(Self {
            decoder,
            payload: StreamBuffer::new(PAYLOAD_MAX.try_into().expect("addresses have 64 bits")),
            lease,
            is_charged: false,
        })
    }

    /// Where the next payload is to be received: room for the largest.
    pub(super) fn space(&mut self) -> *mut u8 {
        let (space, _) = self.payload.space().expect("the payload before it was consumed");
        space
    }

    /// A payload of `length` bytes has been received: it becomes the newest content of `pages`. `shard` is the calling
    /// thread's.
    ///
    /// # Errors
    /// If it does not decode to these pages, or there is no memory for them.
    pub(super) fn received(
        &mut self,
        length: usize,
        store: &Store,
        shard: usize,
        pages: &[PageIndex],
    ) -> Result<(), ChannelError> {
        self.payload.fill(length);
        let payload = self.payload.bytes();
        if !self.is_charged {
            let bytes = codec::memory_bytes(self.decoder.method(), payload)?;
            self.lease.grow(bytes)?;
            self.is_charged = true;
        }
        let normal = u16::try_from(pages.len()).expect("a packet has at most 128 pages");
        PAGES.with_borrow_mut(|buffer| -> Result<(), ChannelError> {
            let contents = self.decoder.decode(payload, normal, buffer)?;
            for (page, content) in pages.iter().zip(contents) {
                // While it is in the processor's cache, this costs little, and such a page then costs no slot.
                if codec::is_zero(content) {
                    store.zero(shard, *page);
                } else {
                    store.write(shard, *page, content)?;
                }
            }
            Ok(())
        })?;
        self.payload.consume(length);
        Ok(())
    }
}
