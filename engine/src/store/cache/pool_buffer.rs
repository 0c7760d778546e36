//! A receive buffer in the pool, in which pages stay where they have arrived: for plain mode, where pages and messages come in
//! one stream, and the position of a page is known only after it has arrived.
//!
//! The kernel fills it at its end while its beginning is being read. When it is full, it continues in another extent; the few
//! bytes that were not parsed by then are moved. A page that arrived is **adopted**: it keeps a reference to its extent, like a
//! page of a packet.
//!
//! # Contract
//! [`PoolBuffer::space`] is called only while no receive into the buffer is posted, and bytes after `filled` are never read.
//! Nothing writes bytes before `filled` as long as the buffer holds the extent. So what Rust sees as a slice and what the kernel
//! writes never overlap, and a flush beside it only reads. This is the one reference to guest memory in the store: see
//! `memory/copy.rs`.

#![expect(unsafe_code, reason = "a buffer that the kernel fills is lent as a slice")]

use crate::store::StoreError;
use crate::store::cache::extent_refs::ExtentId;
use crate::store::cache::extents::{EXTENT_BYTES, Extents};
use crate::store::cache::pool::Pool;
use crate::store::memory::index;
use crate::store::memory::numa::NodeIndex;
use crate::store::memory::slab::SlabId;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex};
use std::cell::Cell;
use std::sync::Arc;

/// Space below which the buffer continues in another extent: a page record with a block's name, and a little more, so that
/// a receive is not of a single record.
const SPACE_MIN: usize = 4 * PAGE_SIZE;

/// See the module.
pub struct PoolBuffer {
    pool: Arc<Pool>,
    extent: ExtentId,
    node: NodeIndex,
    pos: Cell<usize>,
    filled: usize,
}

impl PoolBuffer {
    /// An empty buffer. `shard` is that of the thread that will fill it.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn open(pool: &Arc<Pool>, shard: usize) -> Result<Self, StoreError> {
        let node = pool.node_of_shard(shard);
        Ok(Self {
            extent: pool.extents().take(node)?,
            node,
            pool: pool.clone(),
            pos: Cell::new(0),
            filled: 0,
        })
    }

    fn extents(&self) -> &Extents {
        self.pool.extents()
    }

    fn base(&self) -> *mut u8 {
        self.base_of(self.extent)
    }

    fn base_of(&self, extent: ExtentId) -> *mut u8 {
        let (_, slab, begin) = self.extents().locate(extent);
        slab.memory().bytes(index(begin), index(EXTENT_BYTES))
    }

    /// The slab that [`Self::space`] lies in.
    pub fn slab(&self) -> SlabId {
        self.extents().locate(self.extent).0
    }

    /// What has arrived and was not consumed.
    pub fn bytes(&self) -> &[u8] {
        let pos = self.pos.get();
        // SAFETY: pos <= filled <= EXTENT_BYTES always, and the extent lies in a slab of the pool that this holds. Bytes
        // below `filled` are not written while this borrow lives: the buffer holds the extent, `space`, which continues in
        // another one, needs `&mut self`, and the kernel has addresses after `filled` only.
        unsafe { std::slice::from_raw_parts(self.base().add(pos), self.filled - pos) }
    }

    /// The first `count` of [`Self::bytes`] are consumed. They stay readable through slices taken before.
    pub fn consume(&self, count: usize) {
        assert!(
            count <= self.filled - self.pos.get(),
            "no more can be consumed than has arrived"
        );
        self.pos.set(self.pos.get() + count);
    }

    /// A page that is a part of [`Self::bytes`] is the newest content, where it lies.
    ///
    /// # Panics
    /// If it does not lie in this buffer.
    pub(crate) fn adopt(&self, page: PageIndex, bytes: &[u8; PAGE_SIZE]) {
        let offset = bytes.as_ptr().addr().checked_sub(self.base().addr());
        let offset = offset.filter(|offset| offset + PAGE_SIZE <= self.filled);
        let offset = offset.expect("the page is a part of this buffer's bytes");
        let offset = u64::try_from(offset).expect("an offset in an extent");
        self.pool.adopt(page, self.extent, offset);
    }

    /// The kernel has put `count` bytes into the space it was given.
    pub fn fill(&mut self, count: usize) {
        assert!(
            count <= index(EXTENT_BYTES) - self.filled,
            "the kernel fills no more than it was given"
        );
        self.filled += count;
    }

    /// As if the kernel had received the first of these bytes: as many as there is space for. Returns how many.
    #[cfg(test)]
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let (space, free) = self.space().unwrap().expect("space");
        let count = bytes.len().min(free);
        // SAFETY: the space is free, as the exclusive reference says that no receive is posted.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), space, count) };
        self.fill(count);
        count
    }

    /// Free space, if what has arrived and was not consumed leaves any. Only to be called while no receive is posted.
    ///
    /// # Errors
    /// If there is no memory for another extent.
    pub fn space(&mut self) -> Result<Option<(*mut u8, usize)>, StoreError> {
        let (pos, capacity) = (self.pos.get(), index(EXTENT_BYTES));
        if pos == self.filled && self.extents().refs().is_empty(self.extent) {
            self.pos.set(0);
            self.filled = 0;
            if self.extents().refs().is_retiring(self.extent) {
                self.move_on()?;
            }
        } else if capacity - self.filled < SPACE_MIN && pos > 0 {
            self.move_on()?;
        }
        let free = capacity - self.filled;
        Ok((free > 0).then_some((self.base().wrapping_add(self.filled), free)))
    }

    /// Continues in another extent, with what was not consumed.
    fn move_on(&mut self) -> Result<(), StoreError> {
        let next = self.extents().take(self.node)?;
        let (pos, rest) = (self.pos.get(), self.filled - self.pos.get());
        // SAFETY: `rest` bytes of this extent, which nothing writes, to the beginning of one that was taken just now, so that
        // nothing else uses it; both are EXTENT_BYTES long, and they are different.
        unsafe { std::ptr::copy_nonoverlapping(self.base().add(pos), self.base_of(next), rest) };
        self.extents().refs().release(self.extent, 1);
        self.extent = next;
        self.pos.set(0);
        self.filled = rest;
        Ok(())
    }
}

impl Drop for PoolBuffer {
    fn drop(&mut self) {
        self.extents().refs().release(self.extent, 1);
    }
}

const _: () = assert!(EXTENT_BYTES > 16 * PAGE_BYTES);
