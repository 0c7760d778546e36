//! The position in an extent from which its owner fills it: that of a channel's landing, or of a receiving thread.

use crate::store::StoreError;
use crate::store::cache::extent_refs::ExtentId;
use crate::store::cache::extents::{EXTENT_SLOTS, Extents, Slot};
use crate::store::memory::numa::NodeIndex;

/// The next free slot of an extent, and a reference to that extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    next: Option<Slot>,
}

impl Cursor {
    /// Reserves `slots` slots in an extent, and returns the first of them. The owner may fill them until [`Self::advance`]
    /// records that pages have arrived in them, or the next call. `node` is where the owner is now.
    ///
    /// # Errors
    /// See [`Extents::take`].
    pub(crate) fn reserve(
        &mut self,
        extents: &Extents,
        node: NodeIndex,
        slots: u32,
    ) -> Result<Slot, StoreError> {
        debug_assert!(slots <= EXTENT_SLOTS, "a packet and a header");
        if let Some(Slot { extent, number }) = self.next {
            let is_empty = extents.refs().is_empty(extent);
            let number = if is_empty { 0 } else { number };
            // At its beginning a cursor can as well move to another extent.
            let should_move =
                is_empty && (extents.refs().is_retiring(extent) || !extents.refs().is_of(extent, node));
            if number + slots <= EXTENT_SLOTS && !should_move {
                return Ok(self.go_to(Slot { extent, number }));
            }
            self.next = None;
            extents.refs().release(extent, 1);
        }
        let extent = extents.take(node)?;
        Ok(self.go_to(Slot { extent, number: 0 }))
    }

    /// How many slots can be reserved without leaving some of an extent unused: at least one.
    pub(crate) fn room(&self) -> u32 {
        match self.next {
            Some(Slot { number, .. }) if number < EXTENT_SLOTS => EXTENT_SLOTS - number,
            _ => EXTENT_SLOTS,
        }
    }

    fn go_to(&mut self, slot: Slot) -> Slot {
        self.next = Some(slot);
        slot
    }

    /// Pages have arrived in the first `pages` slots that were reserved last, from `first` on.
    pub(crate) fn advance(&mut self, extents: &Extents, first: Slot, pages: u32) {
        debug_assert_eq!(self.next, Some(first), "reserved last");
        extents.refs().add(first.extent, pages);
        self.next = Some(Slot {
            number: first.number + pages,
            ..first
        });
    }

    /// Releases the extent if nothing is in it and its slab retires: its owner may have nothing to fill for a long time.
    pub(crate) fn idle(&mut self, extents: &Extents) {
        let refs = extents.refs();
        if self
            .next
            .is_some_and(|Slot { extent, .. }| refs.is_retiring(extent) && refs.is_empty(extent))
        {
            self.release(extents);
        }
    }

    /// Releases the extent.
    pub(crate) fn release(&mut self, extents: &Extents) {
        if let Some(Slot { extent, .. }) = self.next.take() {
            extents.refs().release(extent, 1);
        }
    }

    /// As one word, for a cursor behind a shared reference that only one thread uses.
    pub(crate) fn pack(self) -> u64 {
        self.next.map_or(0, |Slot { extent, number }| {
            (u64::from(extent.0) + 1) << 16 | u64::from(number)
        })
    }

    /// The opposite of [`Self::pack`].
    pub(crate) fn unpack(word: u64) -> Self {
        let part = |value: u64| u32::try_from(value).expect("packed from 32 bits");
        let next = (word >> 16).checked_sub(1).map(|extent| Slot {
            extent: ExtentId(part(extent)),
            number: part(word & 0xffff),
        });
        Self { next }
    }
}
