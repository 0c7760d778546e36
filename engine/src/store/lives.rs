//! Which extents are free, held and lived in: counters alone, no memory.
//!
//! An extent's counter is the number of pages that live in it, and one more while somebody holds it. Whoever takes it to
//! 0 frees it. A slab **retires** by keeping its extents back as they become free.
#![deny(unsafe_code)]

use super::homes::HomeId;
use super::map::index;
use super::stack::{FreeStack, Link};
use crate::sync::{AtomicU32, AtomicUsize, Ordering, fence};
use std::ops::Range;

/// Number of an extent, over all slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExtentId(pub(super) u32);

/// The counter of an extent that is kept back because its slab retires.
const PARKED: u32 = u32::MAX;

/// The extents of one home, on a cache line of their own.
#[repr(align(64))]
struct Home {
    free: FreeStack,
    free_count: AtomicU32,
    parked: AtomicU32,
    /// All of its slabs.
    extents: AtomicU32,
    /// Those that its threads took from other homes since it last got a slab.
    borrowed: AtomicU32,
}

impl Home {
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
pub(super) struct Lives {
    live: Box<[AtomicU32]>,
    links: Box<[Link]>,
    slab_extents: u32,
    homes: Box<[Home]>,
    /// Of each slab, once it was opened: the home's position.
    slab_homes: Box<[AtomicUsize]>,
    /// One more than the position of the slab that retires; 0 if none does.
    retiring: AtomicUsize,
}

impl Lives {
    /// For so many extents, none of which is free yet, and homes, at least one.
    pub(super) fn new(extents: usize, slab_extents: u32, homes: usize) -> Self {
        let slabs = extents.div_ceil(index(u64::from(slab_extents)));
        let counters = || (0..extents).map(|_| AtomicU32::new(0)).collect();
        Self {
            live: counters(),
            links: counters(),
            slab_extents,
            homes: (0..homes).map(|_| Home::new()).collect(),
            slab_homes: (0..slabs).map(|_| AtomicUsize::new(0)).collect(),
            retiring: AtomicUsize::new(0),
        }
    }

    /// The extents of a slab are free now, and a home's.
    pub(super) fn open_slab(&self, slab: usize, home: HomeId) {
        // Relaxed: who gets one of its extents has popped it after it was pushed.
        self.slab_homes[slab].store(home.0, Ordering::Relaxed);
        let home = &self.homes[home.0];
        home.extents.fetch_add(self.slab_extents, Ordering::Relaxed);
        home.borrowed.store(0, Ordering::Relaxed);
        for extent in self.extents_of(slab).rev() {
            self.push_free(ExtentId(extent));
        }
    }

    fn extents_of(&self, slab: usize) -> Range<u32> {
        let first = u32::try_from(slab).expect("few slabs") * self.slab_extents;
        first..first + self.slab_extents
    }

    fn live(&self, extent: ExtentId) -> &AtomicU32 {
        &self.live[index(u64::from(extent.0))]
    }

    fn home_of_slab(&self, slab: usize) -> &Home {
        match &*self.homes {
            [only] => only,
            homes => &homes[self.slab_homes[slab].load(Ordering::Relaxed)],
        }
    }

    fn slab_of(&self, extent: ExtentId) -> usize {
        index(u64::from(extent.0 / self.slab_extents))
    }

    fn home_of(&self, extent: ExtentId) -> &Home {
        self.home_of_slab(self.slab_of(extent))
    }

    /// Whether an extent is of this home.
    pub(super) fn is_of(&self, extent: ExtentId, home: HomeId) -> bool {
        std::ptr::eq(self.home_of(extent), &self.homes[home.0])
    }

    /// The home that lacks most extents for the checkpoints to come.
    pub(super) fn shortest_home(&self) -> HomeId {
        let shortest = (0..self.homes.len()).max_by_key(|home| self.homes[*home].shortage());
        HomeId(shortest.expect("there is at least one home"))
    }

    /// Whether a home lacks extents for the checkpoints to come.
    pub(super) fn is_short(&self) -> bool {
        self.homes.iter().any(|home| home.shortage() > 0)
    }

    /// What was borrowed tells nothing any more: no slab can be had for it.
    pub(super) fn forget_borrowed(&self) {
        let homes = self.homes.iter();
        homes.for_each(|home| home.borrowed.store(0, Ordering::Relaxed));
    }

    /// How many extents the home of a slab has beyond what it wants for the checkpoints to come.
    pub(super) fn spare(&self, slab: usize) -> u32 {
        let home = self.home_of_slab(slab);
        home.extents().saturating_sub(home.wanted())
    }

    /// Takes a free extent, one of `home` where there is one, and holds it.
    pub(super) fn take(&self, home: HomeId) -> Option<ExtentId> {
        let own = &self.homes[home.0];
        self.take_of(own).or_else(|| {
            let others = self.homes.iter().filter(|other| !std::ptr::eq(*other, own));
            let borrowed = others.map(|other| self.take_of(other)).find_map(|taken| taken)?;
            own.borrowed.fetch_add(1, Ordering::Relaxed);
            Some(borrowed)
        })
    }

    fn take_of(&self, home: &Home) -> Option<ExtentId> {
        loop {
            let extent = home.pop(&self.links)?;
            if self.is_retiring(extent) {
                self.park(extent);
                continue;
            }
            self.live(extent).store(1, Ordering::Relaxed);
            return Some(extent);
        }
    }

    /// `pages` pages live in a held extent from now on.
    pub(super) fn add(&self, extent: ExtentId, pages: u32) {
        self.live(extent).fetch_add(pages, Ordering::Relaxed);
    }

    /// As many pages as `count` are gone, or the holder.
    pub(super) fn release(&self, extent: ExtentId, count: u32) {
        // Acquire and release: who takes the extent next writes after everybody has read.
        let before = self.live(extent).fetch_sub(count, Ordering::AcqRel);
        debug_assert!(before >= count, "nothing is released twice");
        if before != count {
            return;
        }
        if self.is_retiring(extent) {
            self.park(extent);
        } else {
            self.push_free(extent);
        }
    }

    /// Whether nothing lives in a held extent. Whoever holds it then writes after everybody has read.
    pub(super) fn is_empty(&self, extent: ExtentId) -> bool {
        self.live(extent).load(Ordering::Acquire) == 1
    }

    fn push_free(&self, extent: ExtentId) {
        let home = self.home_of(extent);
        // Counted first: never fewer than there are.
        home.free_count.fetch_add(1, Ordering::Relaxed);
        home.free.push(extent.0, &self.links);
    }

    /// How many are free.
    pub(super) fn free(&self) -> u64 {
        let free = |home: &Home| u64::from(home.free_count.load(Ordering::Acquire));
        self.homes.iter().map(free).sum()
    }

    /// How many are kept back.
    pub(super) fn parked(&self) -> u64 {
        let parked = |home: &Home| u64::from(home.parked.load(Ordering::Relaxed));
        self.homes.iter().map(parked).sum()
    }

    /// Whether the extent's slab retires.
    pub(super) fn is_retiring(&self, extent: ExtentId) -> bool {
        self.retiring.load(Ordering::Relaxed) == self.slab_of(extent) + 1
    }

    /// The slab that retires.
    pub(super) fn retiring_slab(&self) -> Option<usize> {
        self.retiring.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Keeps back a free extent.
    fn park(&self, extent: ExtentId) {
        // Release: whoever finds all of them here may take their memory away.
        self.live(extent).store(PARKED, Ordering::Release);
        self.home_of(extent).parked.fetch_add(1, Ordering::Relaxed);
        // With its twin in `end_retiring`: either that finds it parked, or this finds that nothing retires any more.
        fence(Ordering::SeqCst);
        if !self.is_retiring(extent) && self.unpark(extent) {
            self.push_free(extent);
        }
    }

    fn unpark(&self, extent: ExtentId) -> bool {
        let kept = self
            .live(extent)
            .compare_exchange(PARKED, 0, Ordering::AcqRel, Ordering::Relaxed);
        if kept.is_ok() {
            self.home_of(extent).parked.fetch_sub(1, Ordering::Relaxed);
        }
        kept.is_ok()
    }

    /// Whether all extents of the slab that retires are kept back.
    pub(super) fn are_all_parked(&self) -> bool {
        let parked = |extent| self.live(ExtentId(extent)).load(Ordering::Acquire) == PARKED;
        self.retiring_slab()
            .is_some_and(|slab| self.extents_of(slab).all(parked))
    }

    /// A slab begins to retire: takes out those of its extents that are free; the others come when they are.
    pub(super) fn retire(&self, slab: usize) {
        self.retiring.store(slab + 1, Ordering::Relaxed);
        let mut others = Vec::new();
        while let Some(extent) = self.home_of_slab(slab).pop(&self.links) {
            match self.is_retiring(extent) {
                true => self.park(extent),
                false => others.push(extent),
            }
        }
        let others = others.into_iter().rev();
        others.for_each(|extent| self.push_free(extent));
    }

    /// The slab that retired is in use again.
    pub(super) fn revive(&self) {
        self.end_retiring(|extent| self.push_free(extent));
    }

    /// The slab that retired is out of use: its extents are nobody's.
    pub(super) fn close_slab(&self) {
        if let Some(slab) = self.retiring_slab() {
            self.end_retiring(|_| {});
            let home = self.home_of_slab(slab);
            home.extents.fetch_sub(self.slab_extents, Ordering::Relaxed);
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

    /// An extent with a page that a flush reads and lets go of on another thread.
    fn flushed_elsewhere() -> (Arc<Lives>, Arc<Memory>, ExtentId, thread::JoinHandle<()>) {
        let lives = Arc::new(Lives::new(1, 1, 1));
        let memory = Arc::new(Memory(UnsafeCell::new(7)));
        lives.open_slab(0, HomeId(0));
        let extent = lives.take(HomeId(0)).unwrap();
        lives.add(extent, 1);
        let flush = {
            let (lives, memory) = (lives.clone(), memory.clone());
            thread::spawn(move || {
                memory.0.with(|page| page.addr());
                lives.release(extent, 1);
            })
        };
        (lives, memory, extent, flush)
    }

    /// A holder begins again in its extent only when the flush has read the page that lived there.
    #[test]
    fn loom_a_slot_is_not_overwritten_while_it_is_read() {
        loom::model(|| {
            let (lives, memory, extent, flush) = flushed_elsewhere();
            if lives.is_empty(extent) {
                memory.0.with_mut(|page| page.addr());
            }
            flush.join().unwrap();
            lives.release(extent, 1);
            assert_eq!(lives.take(HomeId(0)), Some(extent));
        });
    }

    /// A slab that is taken back into use while one of its extents becomes free loses none.
    #[test]
    fn loom_an_extent_that_is_parked_too_late_is_not_lost() {
        loom::model(|| {
            let (lives, _, extent, flush) = flushed_elsewhere();
            lives.retire(0);
            lives.release(extent, 1);
            lives.revive();
            flush.join().unwrap();
            assert_eq!(lives.take(HomeId(0)), Some(extent));
        });
    }

    /// Two that let go of an extent's last pages at the same time free it once; who takes it has it alone.
    #[test]
    fn loom_an_extent_is_freed_once() {
        loom::model(|| {
            let (lives, memory, extent, flush) = flushed_elsewhere();
            lives.release(extent, 1);
            if lives.take(HomeId(0)).is_some() {
                memory.0.with_mut(|page| page.addr());
                assert_eq!(lives.take(HomeId(0)), None);
            }
            flush.join().unwrap();
        });
    }
}
