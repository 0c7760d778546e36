//! Where received pages wait for their commit: the placement of cache slots.
//!
//! The store asks a [`Cache`] and nothing else, so that a placement is one file: [`crate::store::cache::mirror`], a slot for every
//! page of the guest, and [`crate::store::cache::pool`], slots that are taken as pages arrive.
#![deny(unsafe_code)]

pub(crate) mod extent_refs;
pub(crate) mod extents;
pub(crate) mod landing;
pub(crate) mod mirror;
pub(crate) mod pool;
pub(crate) mod pool_buffer;
pub(crate) mod stack;

use crate::store::StoreError;
use crate::store::cache::extents::Extents;
use crate::store::cache::landing::Landing;
use crate::store::cache::pool_buffer::BufferedPage;
use crate::store::commit::plan::Plan;
use crate::store::memory::copy::CopyMethod;
use crate::store::memory::image::RamImage;
use crate::store::memory::numa::NodeIndex;
use crate::store::memory::slab::Slab;
use crate::units::{PAGE_SIZE, PageIndex};
use std::ops::Range;

/// A placement. On the way of a packet it takes no lock and allocates nothing.
///
/// A page has **newest content** here from the moment it was received until it is flushed, or dropped because it was
/// not committed; a mirror has the newest content of every page at all times.
pub(crate) trait Cache: Send + Sync {
    /// Most slabs there can ever be.
    fn slab_limit(&self) -> usize;

    /// One slab, if it is there (yet). Once there, it stays for the cache's life.
    fn slab(&self, position: usize) -> Option<&Slab>;

    /// Says where the pages of a packet are to land, and the header of the packet behind it. `shard` is the calling thread's.
    ///
    /// # Errors
    /// If there is no memory for them.
    fn place(&self, shard: usize, pages: &[PageIndex], landing: &mut Landing) -> Result<(), StoreError>;

    /// The places of `landing` are filled: they hold their pages' newest content now.
    fn landed(&self, landing: &mut Landing);

    /// A page of zeros is the newest content.
    fn zero(&self, page: PageIndex);

    /// These bytes are the newest content. `shard` is the calling thread's.
    ///
    /// # Errors
    /// If there is no memory for them.
    fn write(&self, shard: usize, page: PageIndex, bytes: &[u8; PAGE_SIZE]) -> Result<(), StoreError>;

    /// A page that lies in one of this cache's windows is the newest content.
    fn adopt(&self, page: PageIndex, arrived: BufferedPage);

    /// Reads a page's newest content, if it is here; else the image has it.
    fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> bool;

    /// A page of precopy has come to the image: a cache that mirrors it follows.
    fn copy_from_image(&self, page: PageIndex, image: &RamImage);

    /// Copies the newest content of the pages of some words of a plan to the image, in as many pieces as it says, and gives
    /// back the slots that are no longer needed. When it returns, the copies are there for everybody to see.
    fn flush(&self, plan: &Plan, words: Range<usize>, image: &RamImage, method: CopyMethod) -> u64;

    /// Drops the newest content of pages: they were not committed.
    fn drop_pages(&self, plan: &Plan, words: Range<usize>);

    /// A channel may not use its landing for some time.
    fn idle_landing(&self, landing: &mut Landing);

    /// A channel's landing is used no more.
    fn release_landing(&self, landing: &mut Landing);

    /// Nothing is received any more.
    fn release_cursors(&self);

    /// Its extents, if it has any.
    fn pool(&self) -> Option<&Extents>;

    /// The node of a shard, whose extents are near to it.
    fn node(&self, shard: usize) -> NodeIndex;

    /// Gives the memory back to the host. Nothing may be asked of the cache afterwards.
    fn give_back(&self);
}
