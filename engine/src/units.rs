//! The numbers of this field as types of their own, so that none can be taken for another.

use serde::{Deserialize, Serialize};

/// Bytes of one guest page. The wire format allows others, but only for targets that this receiver refuses
/// (spec §3, `configuration/target-page-bits`).
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] for arithmetic on offsets, which is done in 64 bits throughout.
pub const PAGE_BYTES: u64 = 4096;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Most pages that one multifd packet can carry: 512 KiB of them (spec §8.2).
pub const PACKET_PAGES: usize = 128;

/// Number of a multifd channel within its session: 0 to N-1 (spec §8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u8);

/// Position of a RAM block in the primary's block list (spec §7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// A page of the guest, counted over all blocks in the order of the block list.
///
/// Values are made by [`crate::blocks::BlockTable`] alone and are thereby within the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(u64);

impl PageIndex {
    /// For [`crate::blocks::BlockTable`], which has checked the bound, and for scans over what it made.
    pub(crate) const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Consecutive pages of the guest, not all of which need be in one RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRun {
    /// The first of them.
    pub(crate) first: PageIndex,
    /// How many.
    pub(crate) pages: u64,
}

impl PageRun {
    /// A single page.
    pub(crate) fn one(page: PageIndex) -> Self {
        Self {
            first: page,
            pages: 1,
        }
    }

    /// The number after that of the last page.
    pub(crate) fn end(&self) -> u64 {
        self.first.get() + self.pages
    }

    /// What is left after the first `pages` of it.
    pub(crate) fn skip(self, pages: u64) -> Self {
        Self {
            first: PageIndex::new(self.first.get() + pages),
            pages: self.pages - pages,
        }
    }
}

/// Number of a committed checkpoint: 0 is the state at the end of precopy, 1 the first checkpoint after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CheckpointId(pub u64);

impl std::fmt::Display for ChannelId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "channel {}", self.0)
    }
}

impl std::fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
