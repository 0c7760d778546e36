//! The receive buffer of a main channel: memory of its own, or, in plain mode after precopy, a buffer in the guest's
//! page pool, where received pages stay.

use crate::ring::StreamBuffer;
use crate::store::{PoolBuffer, SlabId, Store, StoreError};
use crate::units::{PAGE_SIZE, PageIndex};
use std::collections::TryReserveError;
use std::sync::Arc;

/// Large enough for some dozens of pages, which arrive this way in precopy of plain mode.
const BUFFER_BYTES: usize = 256 << 10;

pub(super) enum MainBuffer {
    Own(StreamBuffer),
    Pool(PoolBuffer),
}

/// Where the next bytes go.
pub(super) struct Space {
    pub(super) address: *mut u8,
    pub(super) bytes: usize,
    /// The slab that it lies in.
    pub(super) slab: Option<SlabId>,
}

impl MainBuffer {
    /// With the first bytes of the channel.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(super) fn new(first: &[u8]) -> Result<Self, TryReserveError> {
        let mut buffer = StreamBuffer::try_new(BUFFER_BYTES)?;
        buffer.put(first);
        Ok(Self::Own(buffer))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(buffer) => buffer.bytes(),
            Self::Pool(pool) => pool.bytes(),
        }
    }

    pub(super) fn consume(&self, count: usize) {
        match self {
            Self::Own(buffer) => buffer.consume(count),
            Self::Pool(pool) => pool.consume(count),
        }
    }

    pub(super) fn fill(&mut self, count: usize) {
        match self {
            Self::Own(buffer) => buffer.fill(count),
            Self::Pool(pool) => pool.fill(count),
        }
    }

    /// Free space, if there is any. Only while no receive is posted.
    pub(super) fn space(&mut self) -> Result<Option<Space>, StoreError> {
        let (space, slab) = match self {
            Self::Own(buffer) => (buffer.space(), None),
            Self::Pool(pool) => {
                let space = pool.space()?;
                (space, Some(pool.slab()))
            }
        };
        Ok(space.map(|(address, bytes)| Space { address, bytes, slab }))
    }

    /// Moves to a buffer in the pool, if the store has one and everything that has arrived is parsed. Only while no receive
    /// is posted. `shard` is the calling thread's.
    pub(super) fn move_to_pool(&mut self, store: &Arc<Store>, shard: usize) -> Result<(), StoreError> {
        if let Self::Own(buffer) = self
            && buffer.bytes().is_empty()
            && let Some(pool) = store.pool_buffer(shard)?
        {
            *self = Self::Pool(pool);
        }
        Ok(())
    }

    /// Takes a page out of the received bytes: keeps it in place, or copies it.
    pub(super) fn keep(
        &self,
        store: &Store,
        shard: usize,
        page: PageIndex,
        bytes: &[u8; PAGE_SIZE],
    ) -> Result<(), StoreError> {
        match self {
            Self::Own(_) => store.write(shard, page, bytes)?,
            Self::Pool(pool) => store.adopt(shard, page, pool, bytes),
        }
        Ok(())
    }
}
