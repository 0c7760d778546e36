//! The position in an extent from which its holder fills it: that of a channel's landing, or of a receiving thread.

use crate::store::StoreError;
use crate::store::cache::extent_refs::ExtentId;
use crate::store::cache::extents::{EXTENT_SLOTS, Extents};
use crate::store::memory::numa::NodeIndex;

/// Where its holder goes on in an extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    held: Option<(u32, u32)>,
}

impl Cursor {
    /// Reserves `slots` slots in an extent, and returns the extent and the first of them. The holder may fill them until
    /// [`Self::advance`] records that pages have arrived in them, or the next call. `node` is where the holder is now.
    ///
    /// # Errors
    /// See [`Extents::take`].
    pub(crate) fn reserve(
        &mut self,
        extents: &Extents,
        node: NodeIndex,
        slots: u32,
    ) -> Result<(ExtentId, u32), StoreError> {
        debug_assert!(slots <= EXTENT_SLOTS, "a packet and a header");
        if let Some((extent, used)) = self.held {
            let extent = ExtentId(extent);
            let is_empty = extents.refs().is_empty(extent);
            let used = if is_empty { 0 } else { used };
            // At its beginning a cursor can as well move to another extent.
            let should_move =
                is_empty && (extents.refs().is_retiring(extent) || !extents.refs().is_of(extent, node));
            if used + slots <= EXTENT_SLOTS && !should_move {
                self.held = Some((extent.0, used));
                return Ok((extent, used));
            }
            self.held = None;
            extents.refs().release(extent, 1);
        }
        let extent = extents.take(node)?;
        self.held = Some((extent.0, 0));
        Ok((extent, 0))
    }

    /// How many slots can be reserved without leaving some of an extent unused: at least one.
    pub(crate) fn room(&self) -> u32 {
        match self.held {
            Some((_, used)) if used < EXTENT_SLOTS => EXTENT_SLOTS - used,
            _ => EXTENT_SLOTS,
        }
    }

    /// Pages have arrived in the first `pages` slots that were reserved last.
    pub(crate) fn advance(&mut self, extents: &Extents, pages: u32) -> ExtentId {
        let (extent, used) = self.held.as_mut().expect("reserved before");
        let extent = ExtentId(*extent);
        extents.refs().add(extent, pages);
        *used += pages;
        extent
    }

    /// Releases the extent if nothing is in it and its slab retires: its holder may have nothing to fill for a long time.
    pub(crate) fn idle(&mut self, extents: &Extents) {
        let held = self.held.map(|(extent, _)| ExtentId(extent));
        if held.is_some_and(|extent| extents.refs().is_retiring(extent) && extents.refs().is_empty(extent)) {
            self.release(extents);
        }
    }

    /// Releases the extent.
    pub(crate) fn release(&mut self, extents: &Extents) {
        if let Some((extent, _)) = self.held.take() {
            extents.refs().release(ExtentId(extent), 1);
        }
    }

    /// As one word, for a cursor behind a shared reference that only one thread uses.
    pub(crate) fn pack(self) -> u64 {
        self.held.map_or(0, |(extent, used)| {
            (u64::from(extent) + 1) << 16 | u64::from(used)
        })
    }

    /// The opposite of [`Self::pack`].
    pub(crate) fn unpack(word: u64) -> Self {
        let part = |value: u64| u32::try_from(value).expect("packed from 32 bits");
        let held = (word >> 16)
            .checked_sub(1)
            .map(|extent| (part(extent), part(word & 0xffff)));
        Self { held }
    }
}
