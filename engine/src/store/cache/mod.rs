//! Where received pages wait for their commit: the cache slots, of one of two kinds.
//!
//! [`mirror`] has a slot for every page of the guest; [`pool`] takes slots as pages arrive. On the path of a packet neither
//! takes a lock or allocates.
//!
//! A page has **newest content** in the cache from its arrival until it is flushed, or dropped because it was not committed;
//! a mirror has the newest content of every page at all times.

pub(crate) mod cursor;
pub(crate) mod extent_refs;
pub(crate) mod extents;
pub(crate) mod landing;
pub(crate) mod mirror;
pub(crate) mod plan;
pub(crate) mod pool;
pub(crate) mod pool_buffer;
pub(crate) mod pool_layout;
pub(crate) mod stack;

use crate::store::StoreError;
use crate::store::cache::landing::Landing;
use crate::store::cache::mirror::Mirror;
use crate::store::cache::plan::FlushPlan;
use crate::store::cache::pool::Pool;
use crate::store::memory::copy::CopyMethod;
use crate::store::memory::image::RamImage;
use crate::store::memory::slab::{Slab, SlabId};
use crate::units::{PAGE_SIZE, PageIndex};
use std::ops::Range;
use std::sync::Arc;

/// The cache of a store, shared with its flush. What only one kind does is asked of that one.
#[derive(Clone)]
pub(crate) enum Cache {
    Pool(Arc<Pool>),
    Mirror(Arc<Mirror>),
}

impl Cache {
    /// The pool, if the cache is one.
    pub(crate) fn pool(&self) -> Option<&Arc<Pool>> {
        match self {
            Self::Pool(pool) => Some(pool),
            Self::Mirror(_) => None,
        }
    }

    /// The mirror, if the cache is one.
    pub(crate) fn mirror(&self) -> Option<&Mirror> {
        match self {
            Self::Pool(_) => None,
            Self::Mirror(mirror) => Some(mirror),
        }
    }

    /// The most slabs that there can ever be.
    pub(crate) fn slab_limit(&self) -> usize {
        match self {
            Self::Pool(pool) => pool.extents().slab_limit(),
            Self::Mirror(mirror) => mirror.slab_limit(),
        }
    }

    /// One slab, if it exists yet. It then stays for the life of the cache.
    pub(crate) fn slab(&self, position: usize) -> Option<&Slab> {
        match self {
            Self::Pool(pool) => pool.extents().slab(position),
            Self::Mirror(mirror) => mirror.slab(position),
        }
    }

    /// A slab that exists, as those do that pages were placed in.
    pub(crate) fn existing(&self, id: SlabId) -> &Slab {
        match self {
            Self::Pool(pool) => pool.extents().existing(id),
            Self::Mirror(mirror) => &mirror.slabs()[usize::from(id.0)],
        }
    }

    /// Chooses where the pages of a packet land, and the header of the packet after it. `shard` is that of the calling thread.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub(crate) fn place(
        &self,
        shard: usize,
        pages: &[PageIndex],
        landing: &mut Landing,
    ) -> Result<(), StoreError> {
        match self {
            Self::Pool(pool) => pool.place(shard, pages, landing),
            Self::Mirror(mirror) => {
                mirror.place(pages, landing);
                Ok(())
            }
        }
    }

    /// A page of zeros is the newest content.
    pub(crate) fn zero(&self, page: PageIndex) {
        match self {
            Self::Pool(pool) => pool.zero(page),
            Self::Mirror(mirror) => mirror.zero(page),
        }
    }

    /// `contents` are the newest content of `pages`: at most a packet's. `shard` is that of the calling thread.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub(crate) fn write_all(
        &self,
        shard: usize,
        pages: &[PageIndex],
        contents: &[[u8; PAGE_SIZE]],
    ) -> Result<(), StoreError> {
        match self {
            Self::Pool(pool) => pool.write_all(shard, pages, contents),
            Self::Mirror(mirror) => {
                pages
                    .iter()
                    .zip(contents)
                    .for_each(|(page, bytes)| mirror.write(*page, bytes));
                Ok(())
            }
        }
    }

    /// Reads the newest content of a page and returns true, if the cache has it; otherwise the image has it.
    pub(crate) fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> bool {
        match self {
            Self::Pool(pool) => pool.read(page, out),
            Self::Mirror(mirror) => {
                mirror.read(page, out);
                true
            }
        }
    }

    /// Copies the newest content of the pages of some words of a plan to the image, returns the number of copies made, and
    /// frees the slots that are no longer needed. When it returns, every thread sees the copies.
    pub(crate) fn flush(
        &self,
        plan: &FlushPlan,
        words: Range<usize>,
        image: &RamImage,
        method: CopyMethod,
    ) -> u64 {
        match self {
            Self::Pool(pool) => pool.flush(plan, words, image, method),
            Self::Mirror(mirror) => mirror.flush(plan, words, image, method),
        }
    }

    /// Returns the memory to the host. The cache must not be used afterwards.
    pub(crate) fn give_back(&self) {
        match self {
            Self::Pool(pool) => pool.extents().slabs().for_each(|slab| _ = slab.give_back()),
            Self::Mirror(mirror) => mirror.slabs().iter().for_each(|slab| _ = slab.give_back()),
        }
    }
}
