//! The guest's memory: what it holds, which pages are dirty, which are zero.

use super::shape::round;
use super::{Content, Distribution, Pattern, SynthOptions, content};
use colo_ring::blocks::BlockTable;
use colo_ring::units::{PAGE_BYTES, PAGE_SIZE};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use std::ops::Deref;
use std::sync::RwLockReadGuard;

/// Bytes of a page that a write changes where deltas are sent.
const PART_BYTES: usize = 256;

/// Blocks of a small PC beside its RAM, with their lengths in bytes.
const SMALL_BLOCKS: [(&str, u64); 5] = [
    ("/rom@etc/acpi/tables", 0x2_0000),
    ("pc.bios", 0x4_0000),
    ("pc.rom", 0x2_0000),
    ("/rom@etc/table-loader", 0x1000),
    ("/rom@etc/acpi/rsdp", 0x1000),
];

/// A page as the wire names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// Position of its block in the block list.
    pub(super) block: usize,
    /// Byte offset in the block.
    pub(super) offset: u64,
    /// Whether it is all zero.
    pub(super) zero: bool,
}

/// One bit per page of the guest.
struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    fn empty(pages: u64) -> Self {
        let words = vec![0; index(pages.div_ceil(64))];
        Self { words, pages }
    }

    fn full(pages: u64) -> Self {
        let words = vec![u64::MAX; index(pages.div_ceil(64))];
        Self { words, pages }
    }

    fn set(&mut self, page: u64, value: bool) {
        let mask = 1 << (page % 64);
        let word = &mut self.words[index(page / 64)];
        *word = if value { *word | mask } else { *word & !mask };
    }

    fn contains(&self, page: u64) -> bool {
        self.words[index(page / 64)] & 1 << (page % 64) != 0
    }

    fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let bits = |(word, bits): (u64, &u64)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                let bit = u64::from(bits.trailing_zeros());
                (bits != 0).then(|| {
                    bits &= bits - 1;
                    word * 64 + bit
                })
            })
        };
        (0u64..).zip(&self.words).flat_map(bits)
    }
}

/// The pages that [`Pattern::HotSet`] prefers, at equal distances all over the guest; none with other patterns.
struct HotSet {
    hot: u64,
    /// Pages of the guest.
    pages: u64,
    /// Hot pages that are not dirty yet.
    clean: u64,
}

impl HotSet {
    fn of(pattern: Pattern, pages: u64) -> Self {
        let hot = match pattern {
            Pattern::HotSet { pages: share, .. } => round(share * pages as f64).clamp(1, pages),
            Pattern::Random | Pattern::Sequential | Pattern::Runs(_) => 0,
        };
        let clean = hot;
        Self { hot, pages, clean }
    }

    /// The hot page of that number.
    fn page(&self, number: u64) -> u64 {
        // No overflow: a guest has at most 2^32 pages.
        number * self.pages / self.hot
    }

    /// A clean hot page in the share `writes` of cases, as long as there is one; otherwise any page.
    fn choose(&self, rng: &mut Xoshiro256PlusPlus, writes: f64, dirty: &PageSet) -> u64 {
        if !rng.random_bool(writes) || self.clean == 0 {
            return rng.random_range(0..self.pages);
        }
        let mut number = rng.random_range(0..self.hot);
        while dirty.contains(self.page(number)) {
            number = (number + 1) % self.hot;
        }
        self.page(number)
    }

    fn dirtied(&mut self, page: u64) {
        if self.clean > 0 && self.page((page * self.hot).div_ceil(self.pages)) == page {
            self.clean -= 1;
        }
    }
}

/// An offset within memory that exists.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("what is in memory fits an address")
}

/// The guest's RAM and the generator of its work.
pub(super) struct GuestRam {
    table: BlockTable,
    /// Each block's first page among all pages, from 0 on.
    first_pages: Vec<u64>,
    blocks: Vec<Vec<u8>>,
    zero: PageSet,
    content: Content,
    /// Whether a write changes only a part of a page that has content.
    writes_parts: bool,
    versions: u64,
    rng: Xoshiro256PlusPlus,
    /// Where [`Pattern::Sequential`] goes on.
    next_page: u64,
}

impl GuestRam {
    /// The guest before it has run: each page zero or with content, as `zero_share` has it.
    pub(super) fn new(options: &SynthOptions) -> Self {
        let ram: (Box<[u8]>, u64) = (b"pc.ram".as_slice().into(), options.ram_bytes);
        let small = SMALL_BLOCKS.map(|(name, length)| (name.as_bytes().into(), length));
        let entries: Vec<_> = [ram].into_iter().chain(small).collect();
        let total = entries.iter().map(|(_, length)| length).sum();
        let table =
            BlockTable::new(entries, total).expect("distinct names, positive multiples of the page size");
        let blocks = table.iter().map(|(_, block)| vec![0; index(block.used_length)]);
        let first_pages = table.iter().map(|(_, block)| block.first_page.get());
        let mut guest = Self {
            first_pages: first_pages.collect(),
            blocks: blocks.collect(),
            zero: PageSet::full(table.total_pages()),
            content: options.content,
            writes_parts: options.xbzrle,
            versions: 0,
            rng: Xoshiro256PlusPlus::seed_from_u64(options.seed),
            next_page: 0,
            table,
        };
        for page in 0..guest.table.total_pages() {
            guest.write(page, options.zero_share);
        }
        guest
    }

    pub(super) fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Content of a page.
    pub(super) fn page(&self, block: usize, offset: u64) -> &[u8; PAGE_SIZE] {
        self.blocks[block][index(offset)..]
            .first_chunk()
            .expect("a whole page")
    }

    /// All pages, in the order of the blocks.
    pub(super) fn all_pages(&self) -> Vec<Page> {
        (0..self.table.total_pages())
            .map(|page| self.locate(page))
            .collect()
    }

    /// Lets the guest dirty distinct pages, of its main RAM's number at most, and returns them in the order of their addresses.
    pub(super) fn run(&mut self, count: Distribution, pattern: Pattern, zero_share: f64) -> Vec<Page> {
        let (_, main_ram) = self.table.iter().next().expect("a guest has RAM");
        let count = count.draw(&mut self.rng, main_ram.pages());
        let mut dirty = PageSet::empty(self.table.total_pages());
        let mut hot = HotSet::of(pattern, dirty.pages);
        let mut left = count;
        while left > 0 {
            let (first, length) = match pattern {
                Pattern::Random => (self.rng.random_range(0..dirty.pages), 1),
                Pattern::Runs(length) => (self.rng.random_range(0..dirty.pages), length.min(left)),
                Pattern::Sequential => (self.next_page, left),
                Pattern::HotSet { writes, .. } => (hot.choose(&mut self.rng, writes, &dirty), 1),
            };
            let mut page = first;
            for _ in 0..length {
                // Where a page is dirty already, the next clean one takes its place, so that the count is met.
                while dirty.contains(page) {
                    page = (page + 1) % dirty.pages;
                }
                dirty.set(page, true);
                hot.dirtied(page);
                self.write(page, zero_share);
            }
            left -= length;
            self.next_page = (page + 1) % dirty.pages;
        }
        dirty.iter().map(|page| self.locate(page)).collect()
    }

    /// Gives a page new content, which is zero in that share of cases.
    fn write(&mut self, page: u64, zero_share: f64) {
        let zero = self.rng.random_bool(zero_share);
        let in_part = self.writes_parts && !self.zero.contains(page);
        self.zero.set(page, zero);
        self.versions += 1;
        let (stamp, kind, version) = (self.rng.random(), self.content, self.versions);
        let Page { block, offset, .. } = self.locate(page);
        let bytes: &mut [u8; PAGE_SIZE] = self.blocks[block][index(offset)..]
            .first_chunk_mut()
            .expect("a whole page");
        if zero {
            bytes.fill(0);
        } else if in_part {
            let mut other = [0; PAGE_SIZE];
            content::fill(&mut other, kind, stamp, page, version);
            let parts = bytes
                .chunks_exact_mut(PART_BYTES)
                .zip(other.chunks_exact(PART_BYTES));
            let number = index(version) % (PAGE_SIZE / PART_BYTES);
            parts
                .skip(number)
                .take(1)
                .for_each(|(part, other)| part.copy_from_slice(other));
        } else {
            content::fill(bytes, kind, stamp, page, version);
        }
    }

    fn locate(&self, page: u64) -> Page {
        let block = self.first_pages.partition_point(|&first| first <= page) - 1;
        Page {
            block,
            offset: (page - self.first_pages[block]) * PAGE_BYTES,
            zero: self.zero.contains(page),
        }
    }
}

/// One block's content, as the guest has it.
pub struct Image<'a> {
    guest: RwLockReadGuard<'a, GuestRam>,
    block: usize,
}

impl<'a> Image<'a> {
    pub(super) fn new(guest: RwLockReadGuard<'a, GuestRam>, block: usize) -> Self {
        Self { guest, block }
    }
}

impl Deref for Image<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.guest.blocks[self.block]
    }
}
