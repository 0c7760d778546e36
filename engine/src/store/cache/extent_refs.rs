//! Reference counts of extents, and the lists of free ones: counters alone, no memory.
//!
//! An extent's count is the number of pages that have their content in it, and one more while a cursor or a buffer holds it.
//! The thread that brings a count to 0 frees the extent. A slab **retires** by keeping its extents back as they become free.

use crate::store::StoreError;
use crate::store::cache::stack::{FreeStack, Link};
use crate::store::memory::index;
use crate::store::memory::numa::NodeIndex;
use crate::store::memory::words::boxed;
use crate::sync::{AtomicU32, AtomicUsize, Ordering, fence};
use std::ops::Range;

/// Number of an extent, over all slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExtentId(pub(crate) u32);

/// How many extents there can be, which is 64 TiB: a packed place (`pool.rs`) has room for the number.
pub(crate) const EXTENTS_MAX: u32 = (1 << 26) - 1;

/// The count of an extent that is kept back because its slab retires.
const PARKED: u32 = u32::MAX;

/// The extents of one node, on a cache line of their own.
#[repr(align(64))]
struct NodeExtents {
    free: FreeStack,
    free_count: AtomicU32,
    parked: AtomicU32,
    /// All of its slabs.
    extents: AtomicU32,
    /// Those that its threads took from other nodes since it last got a slab.
    borrowed: AtomicU32,
}

impl NodeExtents {
    fn new() -> Self {
        Self {
            free: FreeStack::new(),
            free_count: AtomicU32::new(0),
            parked: AtomicU32::new(0),
            extents: AtomicU32::new(0),
            borrowed: AtomicU32::new(0),
        }
    }

    fn pop(&self, links: &[Link]) -> Option<ExtentId> {
        let number = self.free.pop(links)?;
        self.free_count.fetch_sub(1, Ordering::Relaxed);
        Some(ExtentId(number))
    }

    fn extents(&self) -> u32 {
        self.extents.load(Ordering::Relaxed)
    }

    /// How many extents the checkpoints to come should find: as many as are in use now, and a quarter more.
    fn wanted(&self) -> u32 {
        let idle = self.free_count.load(Ordering::Relaxed) + self.parked.load(Ordering::Relaxed);
        let used = self.extents().saturating_sub(idle);
        used + used / 4 + 8 + self.borrowed.load(Ordering::Relaxed)
    }

    fn shortage(&self) -> u32 {
        self.wanted().saturating_sub(self.extents())
    }
}

/// See the module.
pub(crate) struct ExtentRefs {
    count: Box<[AtomicU32]>,
    links: Box<[Link]>,
    slab_extents: u32,
    nodes: Box<[NodeExtents]>,
    /// Of each slab, once it was opened: the node's position.
    slab_nodes: Box<[AtomicUsize]>,
    /// One more than the position of the slab that retires; 0 if none does.
    retiring: AtomicUsize,
}

impl ExtentRefs {
    /// For so many extents, none of which is free yet, and nodes, at least one.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn new(extents: usize, slab_extents: u32, nodes: usize) -> Result<Self, StoreError> {
        let slabs = extents.div_ceil(index(u64::from(slab_extents)));
        Ok(Self {
            count: boxed(extents, |_| AtomicU32::new(0))?,
            links: boxed(extents, |_| Link::new(0))?,
            slab_extents,
            nodes: (0..nodes).map(|_| NodeExtents::new()).collect(),
            slab_nodes: boxed(slabs, |_| AtomicUsize::new(0))?,
            retiring: AtomicUsize::new(0),
        })
    }

    /// Memory that an extent takes here.
    pub(crate) const BYTES_PER_EXTENT: u64 = (size_of::<AtomicU32>() + size_of::<Link>()) as u64;

    /// The extents of a slab are free now, and belong to a node.
    pub(crate) fn open_slab(&self, slab: usize, node: NodeIndex) {
        // Relaxed: a thread that gets one of its extents has popped it after it was pushed.
        self.slab_nodes[slab].store(node.0, Ordering::Relaxed);
        let node = &self.nodes[node.0];
        node.extents.fetch_add(self.slab_extents, Ordering::Relaxed);
        node.borrowed.store(0, Ordering::Relaxed);
        for extent in self.extents_of(slab).rev() {
            self.push_free(ExtentId(extent));
        }
    }

    fn extents_of(&self, slab: usize) -> Range<u32> {
        let first = u32::try_from(slab).expect("few slabs") * self.slab_extents;
        first..first + self.slab_extents
    }

    fn count(&self, extent: ExtentId) -> &AtomicU32 {
        &self.count[index(u64::from(extent.0))]
    }

    fn node_of_slab(&self, slab: usize) -> &NodeExtents {
        match &*self.nodes {
            [only] => only,
            nodes => &nodes[self.slab_nodes[slab].load(Ordering::Relaxed)],
        }
    }

    fn slab_of(&self, extent: ExtentId) -> usize {
        index(u64::from(extent.0 / self.slab_extents))
    }

    fn node_of(&self, extent: ExtentId) -> &NodeExtents {
        self.node_of_slab(self.slab_of(extent))
    }

    /// Whether an extent is of this node.
    pub(crate) fn is_of(&self, extent: ExtentId, node: NodeIndex) -> bool {
        std::ptr::eq(self.node_of(extent), &self.nodes[node.0])
    }

    /// The node that lacks most extents for the checkpoints to come.
    pub(crate) fn shortest_node(&self) -> NodeIndex {
        let shortest = (0..self.nodes.len()).max_by_key(|node| self.nodes[*node].shortage());
        NodeIndex(shortest.expect("there is at least one node"))
    }

    /// Whether a node lacks extents for the checkpoints to come.
    pub(crate) fn is_short(&self) -> bool {
        self.nodes.iter().any(|node| node.shortage() > 0)
    }

    /// Forgets what was borrowed: no slab can be added for it.
    pub(crate) fn reset_borrowed(&self) {
        let nodes = self.nodes.iter();
        nodes.for_each(|node| node.borrowed.store(0, Ordering::Relaxed));
    }

    /// How many extents the node of a slab has beyond what it wants for the checkpoints to come.
    pub(crate) fn spare(&self, slab: usize) -> u32 {
        let node = self.node_of_slab(slab);
        node.extents().saturating_sub(node.wanted())
    }

    /// Takes a free extent, one of `node` where there is one, and holds it.
    pub(crate) fn take(&self, node: NodeIndex) -> Option<ExtentId> {
        let own = &self.nodes[node.0];
        self.take_of(own).or_else(|| {
            let others = self.nodes.iter().filter(|other| !std::ptr::eq(*other, own));
            let borrowed = others.map(|other| self.take_of(other)).find_map(|taken| taken)?;
            own.borrowed.fetch_add(1, Ordering::Relaxed);
            Some(borrowed)
        })
    }

    fn take_of(&self, node: &NodeExtents) -> Option<ExtentId> {
        loop {
            let extent = node.pop(&self.links)?;
            if self.is_retiring(extent) {
                self.park(extent);
                continue;
            }
            self.count(extent).store(1, Ordering::Relaxed);
            return Some(extent);
        }
    }

    /// `pages` pages have their content in a held extent from now on.
    pub(crate) fn add(&self, extent: ExtentId, pages: u32) {
        self.count(extent).fetch_add(pages, Ordering::Relaxed);
    }

    /// Drops `count` references: of pages, or the holder's.
    pub(crate) fn release(&self, extent: ExtentId, count: u32) {
        // Acquire and release: the next holder of the extent writes after all threads have read.
        let before = self.count(extent).fetch_sub(count, Ordering::AcqRel);
        debug_assert!(before >= count, "a reference is released once");
        if before != count {
            return;
        }
        if self.is_retiring(extent) {
            self.park(extent);
        } else {
            self.push_free(extent);
        }
    }

    /// Whether no page has its content in a held extent. Its holder then writes after all threads have read.
    pub(crate) fn is_empty(&self, extent: ExtentId) -> bool {
        self.count(extent).load(Ordering::Acquire) == 1
    }

    fn push_free(&self, extent: ExtentId) {
        let node = self.node_of(extent);
        // Counted first: never fewer than there are.
        node.free_count.fetch_add(1, Ordering::Relaxed);
        node.free.push(extent.0, &self.links);
    }

    /// How many are free.
    pub(crate) fn free(&self) -> u64 {
        let free = |node: &NodeExtents| u64::from(node.free_count.load(Ordering::Acquire));
        self.nodes.iter().map(free).sum()
    }

    /// How many are kept back.
    pub(crate) fn parked(&self) -> u64 {
        let parked = |node: &NodeExtents| u64::from(node.parked.load(Ordering::Relaxed));
        self.nodes.iter().map(parked).sum()
    }

    /// Whether the extent's slab retires.
    pub(crate) fn is_retiring(&self, extent: ExtentId) -> bool {
        self.retiring.load(Ordering::Relaxed) == self.slab_of(extent) + 1
    }

    /// The slab that retires.
    pub(crate) fn retiring_slab(&self) -> Option<usize> {
        self.retiring.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Keeps back a free extent.
    fn park(&self, extent: ExtentId) {
        // Release: a thread that finds all of them parked may free their memory.
        self.count(extent).store(PARKED, Ordering::Release);
        self.node_of(extent).parked.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `end_retiring`: either that finds the extent parked, or this finds that no slab retires.
        fence(Ordering::SeqCst);
        if !self.is_retiring(extent) && self.unpark(extent) {
            self.push_free(extent);
        }
    }

    fn unpark(&self, extent: ExtentId) -> bool {
        let kept = self
            .count(extent)
            .compare_exchange(PARKED, 0, Ordering::AcqRel, Ordering::Relaxed);
        if kept.is_ok() {
            self.node_of(extent).parked.fetch_sub(1, Ordering::Relaxed);
        }
        kept.is_ok()
    }

    /// Whether all extents of the slab that retires are kept back.
    pub(crate) fn are_all_parked(&self) -> bool {
        let parked = |extent| self.count(ExtentId(extent)).load(Ordering::Acquire) == PARKED;
        self.retiring_slab()
            .is_some_and(|slab| self.extents_of(slab).all(parked))
    }

    /// A slab begins to retire: takes out those of its extents that are free; the others come when they are.
    pub(crate) fn retire(&self, slab: usize) {
        self.retiring.store(slab + 1, Ordering::Relaxed);
        let mut others = Vec::new();
        while let Some(extent) = self.node_of_slab(slab).pop(&self.links) {
            match self.is_retiring(extent) {
                true => self.park(extent),
                false => others.push(extent),
            }
        }
        let others = others.into_iter().rev();
        others.for_each(|extent| self.push_free(extent));
    }

    /// The slab that retired is in use again.
    pub(crate) fn revive(&self) {
        self.end_retiring(|extent| self.push_free(extent));
    }

    /// The slab that retired is out of use, and its extents with it.
    pub(crate) fn close_slab(&self) {
        if let Some(slab) = self.retiring_slab() {
            self.end_retiring(|_| {});
            let node = self.node_of_slab(slab);
            node.extents.fetch_sub(self.slab_extents, Ordering::Relaxed);
        }
    }

    /// No slab retires any more; `each` gets the extents that were kept back.
    fn end_retiring(&self, each: impl Fn(ExtentId)) {
        let Some(slab) = self.retiring_slab() else { return };
        self.retiring.store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for extent in self.extents_of(slab).map(ExtentId) {
            if self.unpark(extent) {
                each(extent);
            }
        }
    }
}

/// Run with `scripts/test loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    /// The memory of an extent: loom panics if a write to it can run beside a read.
    struct Memory(UnsafeCell<u64>);

    // SAFETY: loom checks every access.
    #[expect(unsafe_code, reason = "loom's cell is checked, not trusted")]
    unsafe impl Sync for Memory {}

    /// An extent with a page that a flush reads and releases on another thread.
    fn flushed_elsewhere() -> (Arc<ExtentRefs>, Arc<Memory>, ExtentId, thread::JoinHandle<()>) {
        let refs = Arc::new(ExtentRefs::new(1, 1, 1).unwrap());
        let memory = Arc::new(Memory(UnsafeCell::new(7)));
        refs.open_slab(0, NodeIndex(0));
        let extent = refs.take(NodeIndex(0)).unwrap();
        refs.add(extent, 1);
        let flush = {
            let (refs, memory) = (refs.clone(), memory.clone());
            thread::spawn(move || {
                memory.0.with(|page| page.addr());
                refs.release(extent, 1);
            })
        };
        (refs, memory, extent, flush)
    }

    /// A holder begins again in its extent only after the flush has read the page that was there.
    #[test]
    fn loom_a_slot_is_not_overwritten_while_it_is_read() {
        loom::model(|| {
            let (refs, memory, extent, flush) = flushed_elsewhere();
            if refs.is_empty(extent) {
                memory.0.with_mut(|page| page.addr());
            }
            flush.join().unwrap();
            refs.release(extent, 1);
            assert_eq!(refs.take(NodeIndex(0)), Some(extent));
        });
    }

    /// A slab that is taken back into use while one of its extents becomes free loses none.
    #[test]
    fn loom_an_extent_that_is_parked_too_late_is_not_lost() {
        loom::model(|| {
            let (refs, _, extent, flush) = flushed_elsewhere();
            refs.retire(0);
            refs.release(extent, 1);
            refs.revive();
            flush.join().unwrap();
            assert_eq!(refs.take(NodeIndex(0)), Some(extent));
        });
    }

    /// Two threads that release the last references of an extent at the same time free it once, and it is taken once.
    #[test]
    fn loom_an_extent_is_freed_once() {
        loom::model(|| {
            let (refs, memory, extent, flush) = flushed_elsewhere();
            refs.release(extent, 1);
            if refs.take(NodeIndex(0)).is_some() {
                memory.0.with_mut(|page| page.addr());
                assert_eq!(refs.take(NodeIndex(0)), None);
            }
            flush.join().unwrap();
        });
    }
}
