//! How large a pool may become, and in slabs of which size, for a guest of so many pages.

use crate::store::cache::extents::{EXTENT_BYTES, EXTENT_SLOTS};
use crate::store::memory::index;

/// Extents of a slab of a small and of a large guest: 34 MiB in 2 MiB pages, and just below 512 MiB.
const SLAB_EXTENTS: (u32, u32) = (33, 508);

/// Extents that cursors may hold beyond what their pages need: one for each possible channel and receiving thread.
const HELD_MAX: u64 = 320;

/// What is populated when a guest arrives.
const FIRST_BYTES: u64 = 64 << 20;

/// How many slabs a pool has, and of what size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolLayout {
    /// Extents of a slab.
    pub(crate) slab_extents: u32,
    /// Slabs that exist from the beginning.
    pub(crate) first: usize,
    /// Slabs whose memory the guest has from the beginning, whatever other guests take.
    pub(crate) reserved: usize,
    /// Slabs up to which the pool grows ahead of need.
    pub(crate) keep: usize,
    /// The most slabs that there can ever be.
    pub(crate) limit: usize,
}

impl PoolLayout {
    /// For a guest of `pages` pages. `keep_bytes` is the operator's limit, if any.
    ///
    /// A checkpoint needs a slot for each page that it changes, so at most one for each page of the guest. Pages that a primary
    /// sends repeatedly, and extents that are not filled to their end, take more; the limit is twice as much.
    pub(crate) fn of_guest(pages: u64, keep_bytes: Option<u64>) -> Self {
        let extents = pages.div_ceil(u64::from(EXTENT_SLOTS - 1));
        let (small, large) = SLAB_EXTENTS;
        let grown = u32::try_from(extents / 32).unwrap_or(large);
        let small = u32::try_from(extents / 2 + 2).map_or(small, |half| half.clamp(4, small));
        Self::with_slabs(pages, keep_bytes, grown.clamp(small, large))
    }

    /// A checkpoint may change all of a guest, and seldom changes much of it: what is reserved is half of its RAM, and all that a small
    /// guest can need. An operator's limit says itself what that is.
    pub(crate) fn with_slabs(pages: u64, keep_bytes: Option<u64>, slab_extents: u32) -> Self {
        let extents = pages.div_ceil(u64::from(EXTENT_SLOTS - 1));
        let slabs = |extents: u64| index(extents.div_ceil(u64::from(slab_extents)));
        let limit = slabs(2 * extents + HELD_MAX);
        let bytes = u64::from(slab_extents) * EXTENT_BYTES;
        let keep = match keep_bytes {
            None => limit,
            Some(keep) => index((keep / bytes).max(1)).min(limit),
        };
        let first_slabs = index(FIRST_BYTES.div_ceil(bytes));
        let whole = slabs(extents + 8);
        let first = first_slabs.min(whole).min(keep);
        let usual = match keep_bytes {
            None => first_slabs + slabs(extents / 2),
            Some(_) => keep,
        };
        Self {
            slab_extents,
            first,
            reserved: usual.min(whole).max(first),
            keep,
            limit,
        }
    }

    pub(crate) fn slab_bytes(self) -> u64 {
        u64::from(self.slab_extents) * EXTENT_BYTES
    }
}
