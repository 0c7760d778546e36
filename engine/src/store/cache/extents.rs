//! Extents: contiguous runs of slots in the slabs of a [`crate::store::cache::pool::Pool`], taken whole and freed whole.
//!
//! A cursor or a receive buffer **holds** an extent and fills it from its beginning: with the packets of a channel, or the stream
//! of the main channel. Pages that have arrived in it keep a reference to it until they are flushed, superseded or dropped. An
//! extent with neither holder nor references is free, and the one freed last is taken first, because its memory is still in a
//! processor's cache. When the last page of a held extent is gone, its holder starts again at its beginning.
//!
//! Every NUMA node of the receiving threads (`numa.rs`) has slabs and a free list of its own. An extent stays with its node. A
//! thread that finds the list of its node empty borrows from another's, and the node is then the next to get a slab.

use crate::store::StoreError;
use crate::store::cache::extent_refs::{EXTENTS_MAX, ExtentId, ExtentRefs};
use crate::store::cache::pool_layout::PoolLayout;
use crate::store::memory::huge::Fallback;
use crate::store::memory::index;
use crate::store::memory::mlock;
use crate::store::memory::numa::NodeIndex;
use crate::store::memory::populate::populate;
use crate::store::memory::slab::{Slab, SlabId, SlabMemory, slab_id};
use crate::store::memory::span::{PageSpan, ReadSpan};
use crate::store::memory::words::boxed;
use crate::sync::{AtomicU32, AtomicUsize, Ordering};
use crate::units::{PACKET_PAGES, PAGE_BYTES};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Slots of an extent: two whole packets, and one slot into which the header of the packet that follows may be read.
pub(crate) const EXTENT_SLOTS: u32 = 2 * 128 + 1;

const _: () = assert!(PACKET_PAGES == 128, "an extent is made for two whole packets");

/// Bytes of an extent.
pub(crate) const EXTENT_BYTES: u64 = EXTENT_SLOTS as u64 * PAGE_BYTES;

/// How much of the pool is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Bytes of slabs.
    pub bytes: u64,
    /// Extents that are free, of `extents`.
    pub free_extents: u64,
    /// Extents that there are.
    pub extents: u64,
    /// Slabs that were added while pages waited for them.
    pub inline_growth: u64,
}

impl PoolUse {
    /// Bytes of it that have pages, or are handed out for some.
    pub fn used_bytes(&self) -> u64 {
        self.extents.saturating_sub(self.free_extents) * EXTENT_BYTES
    }
}

/// What is to be done for a pool before the next checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolTask {
    /// Nothing.
    Nothing,
    /// Add a slab: [`crate::store::Store::grow`].
    Grow,
    /// Take a slab out of the rings that have it registered: it is not [wanted](Slab::is_wanted) any more.
    Unregister,
    /// Free a slab, which is not used any more: [`crate::store::Store::shrink`].
    Shrink,
}

/// Consecutive checkpoints that would have needed a slab less, after which one is freed.
const SHRINK_AFTER: u32 = 64;

/// A slot of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) extent: ExtentId,
    pub(crate) number: u32,
}

/// See the module.
///
/// # Retiring
/// The last slab **retires** when checkpoints have become smaller: its extents are kept back as they become free. When it
/// has all of them, rings unregister it; then its memory returns to the host. If slots run short before that, it is used
/// again.
pub(crate) struct Extents {
    layout: PoolLayout,
    slabs: Box<[OnceLock<Slab>]>,
    /// Slabs in use: the first so many.
    grown: AtomicUsize,
    refs: ExtentRefs,
    inline_growth: AtomicU32,
    /// Consecutive checkpoints that would have needed a slab less.
    spare: AtomicU32,
    /// Last: the slabs are freed before their part of the budget is given back.
    growing: Mutex<SlabMemory>,
}

impl Extents {
    /// With the first slabs mapped; their memory is not yet populated.
    ///
    /// # Errors
    /// If there is not even address space. Too few huge pages are a fallback, noted in `notes`.
    pub(crate) fn map(
        mut layout: PoolLayout,
        memory: SlabMemory,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        let nodes = memory.nodes().count();
        layout.first = layout.first.max(nodes.min(layout.keep));
        let extents = layout.limit * index(u64::from(layout.slab_extents));
        assert!(
            extents <= index(EXTENTS_MAX.into()),
            "a place has room for their numbers"
        );
        let pool = Self {
            layout,
            slabs: boxed(layout.limit, |_| OnceLock::new())?,
            grown: AtomicUsize::new(0),
            refs: ExtentRefs::new(extents, layout.slab_extents, nodes)?,
            inline_growth: AtomicU32::new(0),
            spare: AtomicU32::new(0),
            growing: Mutex::new(memory),
        };
        let mut memory = pool.growing.lock().unwrap_or_else(PoisonError::into_inner);
        for position in 0..layout.first {
            pool.add_slab(&mut memory, NodeIndex(position % nodes))?;
        }
        notes.extend(memory.notes(layout.first));
        drop(memory);
        Ok(pool)
    }

    /// Maps the next slab for `node`, and frees its extents. One that was in use before is mapped already, for its former node.
    fn add_slab(&self, memory: &mut SlabMemory, node: NodeIndex) -> Result<(), StoreError> {
        let slab = self.next_slab(memory, node)?;
        // A lack of memory for a file is a signal when the file is touched, and an error here.
        if slab.memory().is_shared() {
            self.populate(memory, slab)?;
        }
        self.open_slab(slab);
        Ok(())
    }

    /// Allocates the memory of a slab that is to be used next. Where there is none, what was allocated of it is given back,
    /// with its part of the budget.
    fn populate(&self, memory: &mut SlabMemory, slab: &Slab) -> Result<(), StoreError> {
        let bytes = self.layout.slab_bytes();
        let room = memory.check_room(bytes);
        let populated =
            room.and_then(|()| populate(&[slab.memory()]).map_err(|errno| memory.refused(bytes, errno)));
        populated.inspect_err(|_| memory.give_back(slab))
    }

    /// The slab after those in use, mapped. One thread at a time has `memory`.
    fn next_slab(&self, memory: &mut SlabMemory, node: NodeIndex) -> Result<&Slab, StoreError> {
        let place = &self.slabs[self.grown.load(Ordering::Relaxed)];
        if let Some(slab) = place.get() {
            memory.use_again(slab)?;
            return Ok(slab);
        }
        let slab = Slab::of_slots(memory, self.layout.slab_bytes(), node)?;
        Ok(place.get_or_init(|| slab))
    }

    /// Frees the extents of the slab after those in use.
    fn open_slab(&self, slab: &Slab) {
        let position = self.grown.load(Ordering::Relaxed);
        slab.want(true);
        self.grown.store(position + 1, Ordering::Release);
        self.refs.open_slab(position, slab.node());
    }

    pub(crate) fn slab_limit(&self) -> usize {
        self.layout.limit
    }

    pub(crate) fn slab(&self, position: usize) -> Option<&Slab> {
        self.slabs.get(position)?.get()
    }

    /// The slabs in use.
    pub(crate) fn slabs(&self) -> impl Iterator<Item = &Slab> {
        let grown = self.grown.load(Ordering::Acquire);
        self.slabs[..grown].iter().filter_map(OnceLock::get)
    }

    /// The slab of an extent, and where the extent begins in it.
    pub(crate) fn locate(&self, extent: ExtentId) -> (SlabId, &Slab, u64) {
        let id = slab_id(index(u64::from(extent.0 / self.layout.slab_extents)));
        let begin = u64::from(extent.0 % self.layout.slab_extents) * EXTENT_BYTES;
        (id, self.existing(id), begin)
    }

    /// A slab that was added.
    pub(crate) fn existing(&self, id: SlabId) -> &Slab {
        let slab = self.slab(usize::from(id.0));
        slab.expect("extents and ids are of slabs that were added, and these stay")
    }

    /// `count` slots of an extent, from `first` on.
    pub(crate) fn slots(&self, first: Slot, count: u32) -> PageSpan<'_> {
        let (_, slab, begin) = self.locate(first.extent);
        slab.memory()
            .span(begin + u64::from(first.number) * PAGE_BYTES, count.into())
    }

    /// The bytes of `pages` pages at byte `offset` of an extent.
    pub(crate) fn content(&self, extent: ExtentId, offset: u64, pages: u64) -> ReadSpan<'_> {
        let (_, slab, begin) = self.locate(extent);
        slab.memory().read_span(begin + offset, pages)
    }

    /// Takes a free extent, of `node` if it has one, and holds it. Where no node has one, adds a slab, which is slow and counted.
    ///
    /// # Errors
    /// If there is no memory for more, or pages take twice what the guest has.
    pub(crate) fn take(&self, node: NodeIndex) -> Result<ExtentId, StoreError> {
        loop {
            if let Some(extent) = self.refs.take(node) {
                return Ok(extent);
            }
            self.grow_inline(node)?;
        }
    }

    /// The reference counts of the extents.
    pub(crate) fn refs(&self) -> &ExtentRefs {
        &self.refs
    }

    /// How many extents are in use.
    fn in_use(&self) -> u64 {
        let idle = self.refs.free() + self.refs.parked();
        self.total().saturating_sub(idle)
    }

    fn total(&self) -> u64 {
        u64::try_from(self.grown.load(Ordering::Relaxed)).unwrap_or(u64::MAX)
            * u64::from(self.layout.slab_extents)
    }

    /// What is to be done before the next checkpoints, asked after one has arrived whole: they shall find room for as many pages
    /// as this one has, and a quarter more.
    pub(crate) fn task(&self) -> PoolTask {
        let grown = self.grown.load(Ordering::Relaxed);
        if self.refs.is_short() {
            if grown < self.layout.keep {
                return PoolTask::Grow;
            }
            self.refs.reset_borrowed();
        }
        if self.refs.retiring_slab().is_some() {
            return self.retirement();
        }
        let slab = self.layout.slab_extents;
        if grown <= self.layout.first || self.refs.spare(grown - 1) < slab + slab / 2 {
            self.spare.store(0, Ordering::Relaxed);
        } else if self.spare.fetch_add(1, Ordering::Relaxed) >= SHRINK_AFTER {
            self.spare.store(0, Ordering::Relaxed);
            self.refs.retire(grown - 1);
        }
        PoolTask::Nothing
    }

    /// What is to be done for the slab that retires.
    fn retirement(&self) -> PoolTask {
        let parked = self.refs.retiring_slab().filter(|_| self.refs.are_all_parked());
        let Some(slab) = parked.and_then(|slab| self.slab(slab)) else {
            return PoolTask::Nothing;
        };
        slab.want(false);
        match slab.is_registered() {
            true => PoolTask::Unregister,
            false => PoolTask::Shrink,
        }
    }

    /// Returns the memory of the slab that has retired to the host.
    pub(crate) fn shrink(&self) {
        let mut growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.retirement() != PoolTask::Shrink {
            return;
        }
        let last = self.grown.load(Ordering::Relaxed) - 1;
        self.grown.store(last, Ordering::Release);
        self.refs.close_slab();
        if let Some(slab) = self.slab(last) {
            growing.give_back(slab);
        }
    }

    /// Uses the slab that retires again. Returns whether there was one.
    fn revive(&self) -> bool {
        let Some(slab) = self.refs.retiring_slab() else {
            return false;
        };
        if let Some(slab) = self.slab(slab) {
            slab.want(true);
        }
        self.refs.revive();
        true
    }

    /// Adds a slab, populated, for the node that lacks most extents.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn grow(&self) -> Result<(), StoreError> {
        let mut growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.revive() || self.grown.load(Ordering::Relaxed) >= self.layout.keep {
            return Ok(());
        }
        let slab = self.next_slab(&mut growing, self.refs.shortest_node())?;
        self.populate(&mut growing, slab)?;
        // A note on memory that cannot be locked was given for the first slabs.
        drop(mlock::lock(std::iter::once(slab.memory())));
        self.open_slab(slab);
        Ok(())
    }

    /// Adds a slab for pages that are waiting in a socket: the kernel allocates its memory while it receives.
    fn grow_inline(&self, node: NodeIndex) -> Result<(), StoreError> {
        let mut growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread was faster, or there is a slab that was to be freed.
        if self.refs.free() > 0 || self.revive() {
            return Ok(());
        }
        if self.grown.load(Ordering::Relaxed) == self.layout.limit {
            return Err(StoreError::PoolFull {
                mib: self.used().bytes >> 20,
            });
        }
        self.add_slab(&mut growing, node)?;
        self.inline_growth.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn used(&self) -> PoolUse {
        let extents = self.total();
        PoolUse {
            bytes: u64::try_from(self.grown.load(Ordering::Relaxed)).unwrap_or(u64::MAX)
                * self.layout.slab_bytes(),
            free_extents: extents - self.in_use(),
            extents,
            inline_growth: u64::from(self.inline_growth.load(Ordering::Relaxed)),
        }
    }
}
