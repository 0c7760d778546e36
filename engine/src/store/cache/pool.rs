//! The pool: slots are taken as pages arrive, the pages of a packet in one piece of an extent, and given
//! back when they are flushed. So the size of the cache follows the checkpoints, not the guest, and what is received lands in
//! memory that was used a moment ago.
//!
//! # Where a page is
//! One word for each page of the guest says where its newest content is, from the page's arrival to its flush: in the image,
//! in an extent, or that it is all zeros. Arrivals exchange the word; the content that it named before is superseded and its
//! slot released. Between a commit and the next CHECKPOINT_REPLY the words are those of
//! the committed checkpoint, which the flush takes one by one; no page may arrive then (`session::Rendezvous`, the gate).

use crate::failpoint;
use crate::store::StoreError;
use crate::store::cache::cursor::Cursor;
use crate::store::cache::extent_refs::{EXTENTS_MAX, ExtentId};
use crate::store::cache::extents::{EXTENT_BYTES, Extents, Slot};
use crate::store::cache::landing::{Landing, Target};
use crate::store::cache::plan::FlushPlan;
use crate::store::memory::copy::{self, CopyMethod};
use crate::store::memory::image::RamImage;
use crate::store::memory::index;
use crate::store::memory::numa::{NodeIndex, NumaNodes};
use crate::store::memory::words::Words;
use crate::sync::{AtomicU64, Ordering};
use crate::units::PageRun;
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex};
use std::ops::Range;

/// Bits of a place's byte offset in its extent.
const OFFSET_BITS: u32 = 21;

const _: () = assert!(EXTENT_BYTES < 1 << OFFSET_BITS);

/// Set in each packed place, behind the offset and one more than the extent's number: memory that was lost names no place.
const PACKED: u64 = 1 << 47;

const _: () = assert!((EXTENTS_MAX as u64) << OFFSET_BITS < PACKED);

/// Where the checksum of a packed place begins, which is of 16 bits.
const CHECK_SHIFT: u32 = 48;

const _: () = assert!(PACKED.trailing_zeros() < CHECK_SHIFT);

/// The checksum of a packed place of a page. Whichever bit of the place is flipped, one of these is, too.
fn check(page: u64, place: u64) -> u64 {
    let of_page = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> CHECK_SHIFT;
    (place ^ place >> 16 ^ place >> 32 ^ of_page) & 0xffff
}

/// Where a page's newest content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the image.
    Image,
    /// It is all zeros.
    Zero,
    /// At a byte of an extent.
    Slot(ExtentId, u64),
}

impl Place {
    fn pack(self, page: u64) -> u64 {
        let place = PACKED
            | match self {
                Self::Image => 0,
                Self::Zero => 1,
                Self::Slot(extent, offset) => (u64::from(extent.0) + 1) << OFFSET_BITS | offset,
            };
        place | check(page, place) << CHECK_SHIFT
    }

    /// From a word that was packed here; one of zero, as a new table has them in memory without a name, is the image.
    fn unpack(word: u64) -> Self {
        Self::of_bits(word & (PACKED - 1)).expect("it was packed here")
    }

    fn of_bits(bits: u64) -> Option<Self> {
        let offset = bits & ((1 << OFFSET_BITS) - 1);
        match (bits >> OFFSET_BITS).checked_sub(1) {
            None if bits == 0 => Some(Self::Image),
            None => (bits == 1).then_some(Self::Zero),
            Some(extent) => u32::try_from(extent)
                .ok()
                .map(|extent| Self::Slot(ExtentId(extent), offset)),
        }
    }

    /// From a word of any value, found in the file of a page's places.
    pub(crate) fn parse(page: u64, word: u64) -> Option<Self> {
        let place = word & ((1 << CHECK_SHIFT) - 1);
        let is_whole = place & PACKED != 0 && word >> CHECK_SHIFT == check(page, place);
        is_whole.then(|| Self::of_bits(place & !PACKED)).flatten()
    }
}

/// Makes the image the place of all pages, in a table that a later process may find.
pub(crate) fn all_in_image(places: &Words) {
    for (page, place) in (0..).zip(places.iter()) {
        place.store(Place::Image.pack(page), Ordering::Relaxed);
    }
}

/// A cursor of a receiving thread, for pages that come one by one. On a cache line of its own.
#[repr(align(64))]
struct ShardCursor(AtomicU64);

/// See the module.
pub(crate) struct Pool {
    extents: Extents,
    nodes: NumaNodes,
    places: Words,
    cursors: Box<[ShardCursor]>,
}

impl Pool {
    /// `places` has a word for each page of the guest: zero, or as [`all_in_image`] leaves it.
    pub(crate) fn new(extents: Extents, nodes: NumaNodes, places: Words, shards: usize) -> Self {
        Self {
            extents,
            nodes,
            places,
            cursors: (0..shards).map(|_| ShardCursor(AtomicU64::new(0))).collect(),
        }
    }

    fn place_of(&self, page: PageIndex) -> Place {
        Place::unpack(self.places[index(page.get())].load(Ordering::Acquire))
    }

    /// Makes `place` that of the page's newest content, and releases the one before.
    fn supersede(&self, page: PageIndex, place: Place) {
        // Release: a thread that finds the place sees the content.
        let before = self.places[index(page.get())].swap(place.pack(page.get()), Ordering::AcqRel);
        if let Place::Slot(extent, _) = Place::unpack(before) {
            self.extents.refs().release(extent, 1);
        }
    }

    /// The pages from `page` on, at most `pages`, whose content lies in one piece from `first` on.
    fn piece(&self, page: PageIndex, first: (ExtentId, u64), pages: u64) -> u64 {
        let (extent, offset) = first;
        let follows = |at: &u64| {
            let next = PageIndex::new(page.get() + at);
            self.place_of(next) == Place::Slot(extent, offset + at * PAGE_BYTES)
        };
        (1..pages).find(|at| !follows(at)).unwrap_or(pages)
    }

    /// Copies the beginning of a run to the image: as many pages as lie in one piece.
    fn copy_piece(&self, run: PageRun, image: &RamImage, method: CopyMethod) -> u64 {
        let target = image.span(run);
        match self.place_of(run.first) {
            Place::Image => 1,
            Place::Zero => {
                copy::zero(target.first(1));
                1
            }
            Place::Slot(extent, offset) => {
                let pages = self.piece(run.first, (extent, offset), target.pages());
                copy::copy(
                    target.first(pages),
                    self.extents.content(extent, offset, pages),
                    method,
                );
                pages
            }
        }
    }

    pub(crate) fn place(
        &self,
        shard: usize,
        pages: &[PageIndex],
        landing: &mut Landing,
    ) -> Result<(), StoreError> {
        let count = u32::try_from(pages.len()).expect("a packet's pages");
        let slot = landing
            .cursor
            .reserve(&self.extents, self.nodes.of_shard(shard), count + 1)?;
        let (id, slab, begin) = self.extents.locate(slot.extent);
        let first = begin + u64::from(slot.number) * PAGE_BYTES;
        landing.set_target(Target::Pool(slot));
        let place = (count > 0).then(|| slab.memory().span(first, u64::from(count)));
        landing.push_all(pages, id, place);
        // The slot behind the pages: the next packet's own pages may go there, once its header was read out.
        landing.set_header(id, first + u64::from(count) * PAGE_BYTES, slab);
        Ok(())
    }

    /// The pages of `landing` have arrived, in the slots from `first` on.
    pub(crate) fn landed(&self, landing: &mut Landing, first: Slot) {
        let count = u32::try_from(landing.pages().len()).expect("a packet's pages");
        landing.cursor.advance(&self.extents, first, count);
        for (at, page) in (u64::from(first.number)..).zip(landing.pages()) {
            self.supersede(*page, Place::Slot(first.extent, at * PAGE_BYTES));
        }
    }

    pub(crate) fn zero(&self, page: PageIndex) {
        self.supersede(page, Place::Zero);
    }

    pub(crate) fn write_all(
        &self,
        shard: usize,
        pages: &[PageIndex],
        contents: &[[u8; PAGE_SIZE]],
    ) -> Result<(), StoreError> {
        // A shard belongs to one thread, and so does its cursor.
        let word = &self.cursors[shard].0;
        let mut cursor = Cursor::unpack(word.load(Ordering::Relaxed));
        let (mut pages, mut contents) = (pages, contents);
        let mut written = Ok(());
        while !pages.is_empty() && written.is_ok() {
            let count = pages.len().min(index(cursor.room().into()));
            let (now, later) = pages.split_at(count);
            let (bytes, later_bytes) = contents.split_at(count);
            written = self.fill(shard, &mut cursor, now, bytes);
            (pages, contents) = (later, later_bytes);
        }
        word.store(cursor.pack(), Ordering::Relaxed);
        written
    }

    /// Copies pages to slots that follow each other.
    fn fill(
        &self,
        shard: usize,
        cursor: &mut Cursor,
        pages: &[PageIndex],
        contents: &[[u8; PAGE_SIZE]],
    ) -> Result<(), StoreError> {
        let count = u32::try_from(pages.len()).expect("no more than an extent has");
        let first = cursor.reserve(&self.extents, self.nodes.of_shard(shard), count)?;
        // All copies before the first atomic operation: each of those waits for the stores before it.
        copy::fill_all(self.extents.slots(first, count), contents);
        copy::fence();
        cursor.advance(&self.extents, first, count);
        for (at, page) in (u64::from(first.number)..).zip(pages) {
            self.supersede(*page, Place::Slot(first.extent, at * PAGE_BYTES));
        }
        Ok(())
    }

    /// The page at this byte of a held extent is the newest content.
    pub(crate) fn adopt(&self, page: PageIndex, extent: ExtentId, offset: u64) {
        self.extents.refs().add(extent, 1);
        self.supersede(page, Place::Slot(extent, offset));
    }

    pub(crate) fn read(&self, page: PageIndex, out: &mut [u8; PAGE_SIZE]) -> bool {
        match self.place_of(page) {
            Place::Image => return false,
            Place::Zero => out.fill(0),
            Place::Slot(extent, offset) => copy::read(self.extents.content(extent, offset, 1), out),
        }
        true
    }

    pub(crate) fn flush(
        &self,
        plan: &FlushPlan,
        words: Range<usize>,
        image: &RamImage,
        method: CopyMethod,
    ) -> u64 {
        let mut pieces = 0;
        for mut run in plan.runs(words.clone()) {
            while run.pages > 0 {
                let pages = self.copy_piece(run, image, method);
                run = run.skip(pages);
                pieces += 1;
                failpoint::may_be_killed();
            }
        }
        // All threads see the image written before a place says so and a slot is used again.
        copy::fence();
        self.drop_pages(plan, words);
        pieces
    }

    pub(crate) fn drop_pages(&self, plan: &FlushPlan, words: Range<usize>) {
        for run in plan.runs(words) {
            for page in run.first.get()..run.end() {
                self.supersede(PageIndex::new(page), Place::Image);
                failpoint::may_be_killed();
            }
        }
    }

    pub(crate) fn release_cursors(&self) {
        for cursor in &self.cursors {
            Cursor::unpack(cursor.0.swap(0, Ordering::Relaxed)).release(&self.extents);
        }
    }

    /// A channel will not use its landing for some time.
    pub(crate) fn idle_landing(&self, landing: &mut Landing) {
        landing.cursor.idle(&self.extents);
    }

    /// A channel will not use its landing any more.
    pub(crate) fn release_landing(&self, landing: &mut Landing) {
        landing.cursor.release(&self.extents);
    }

    pub(crate) fn extents(&self) -> &Extents {
        &self.extents
    }

    /// The node of a shard, whose extents are near to it.
    pub(crate) fn node_of_shard(&self, shard: usize) -> NodeIndex {
        self.nodes.of_shard(shard)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_place_with_any_bit_flipped_is_none() {
        let last = ExtentId(EXTENTS_MAX - 1);
        let slots = [(ExtentId(0), 0), (last, EXTENT_BYTES - PAGE_BYTES)];
        let slots = slots.map(|(extent, offset)| Place::Slot(extent, offset));
        for place in [Place::Image, Place::Zero].iter().chain(&slots) {
            for page in [0, 1, 4711, u64::MAX / PAGE_BYTES] {
                let word = place.pack(page);
                assert_eq!(Place::unpack(word), *place);
                assert_eq!(Place::parse(page, word), Some(*place));
                assert_eq!(Place::parse(page + 1, word), None, "it is of another page");
                for bit in 0..64 {
                    assert_eq!(Place::parse(page, word ^ 1 << bit), None, "bit {bit}");
                }
            }
        }
        assert_eq!(Place::unpack(0), Place::Image);
        assert_eq!(Place::parse(0, 0), None);
    }
}
