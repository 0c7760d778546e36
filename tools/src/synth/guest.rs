//! The guest's memory: what it holds, which pages are dirty, which are zero.
//!
//! A page that is not zero carries its number, a version and stamps in each eighth of it, so that a page which is
//! missing, old, in the wrong place or made of two versions does not compare equal.

use super::rng::Rng;
use super::{Pattern, SynthOptions};
use colo_ring::blocks::BlockTable;
use colo_ring::units::{PAGE_BYTES, PAGE_SIZE};
use std::ops::Deref;
use std::sync::RwLockReadGuard;

/// Blocks of a small PC beside its RAM, with their lengths in bytes.
const SMALL_BLOCKS: [(&str, u64); 5] = [
    ("/rom@etc/acpi/tables", 0x2_0000),
    ("pc.bios", 0x4_0000),
    ("pc.rom", 0x2_0000),
    ("/rom@etc/table-loader", 0x1000),
    ("/rom@etc/acpi/rsdp", 0x1000),
];

/// Distance of the stamps in a page.
const STAMP_BYTES: usize = PAGE_SIZE / 8;

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
    /// Content of a page that is not zero, before its stamps.
    template: [u8; PAGE_SIZE],
    versions: u64,
    rng: Rng,
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
        let mut rng = Rng::new(options.seed);
        let mut template = [0; PAGE_SIZE];
        for word in template.as_chunks_mut().0 {
            *word = rng.next().to_le_bytes();
        }
        let blocks = table.iter().map(|(_, block)| vec![0; index(block.used_length)]);
        let first_pages = table.iter().map(|(_, block)| block.first_page.get());
        let mut guest = Self {
            first_pages: first_pages.collect(),
            blocks: blocks.collect(),
            zero: PageSet::full(table.total_pages()),
            template,
            versions: 0,
            rng,
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

    /// Lets the guest dirty `count` distinct pages and returns them in the order of their addresses.
    pub(super) fn run(&mut self, count: u64, pattern: Pattern, zero_share: f64) -> Vec<Page> {
        let mut dirty = PageSet::empty(self.table.total_pages());
        let mut left = count;
        while left > 0 {
            let (first, length) = match pattern {
                Pattern::Random => (self.rng.below(dirty.pages), 1),
                Pattern::Runs(length) => (self.rng.below(dirty.pages), length.min(left)),
                Pattern::Sequential => (self.next_page, left),
            };
            let mut page = first;
            for _ in 0..length {
                // Where a page is dirty already, the next clean one takes its place, so that the count is met.
                while dirty.contains(page) {
                    page = (page + 1) % dirty.pages;
                }
                dirty.set(page, true);
                self.write(page, zero_share);
            }
            left -= length;
            self.next_page = (page + 1) % dirty.pages;
        }
        dirty.iter().map(|page| self.locate(page)).collect()
    }

    /// Gives a page new content, which is zero in that share of cases.
    fn write(&mut self, page: u64, zero_share: f64) {
        let zero = self.rng.chance(zero_share);
        let was_zero = self.zero.contains(page);
        self.zero.set(page, zero);
        self.versions += 1;
        let (stamp, number) = (self.rng.next(), page.to_le_bytes());
        let version = self.versions.to_le_bytes();
        let Page { block, offset, .. } = self.locate(page);
        let content: &mut [u8; PAGE_SIZE] = self.blocks[block][index(offset)..]
            .first_chunk_mut()
            .expect("a whole page");
        if zero {
            content.fill(0);
            return;
        }
        if was_zero {
            content.copy_from_slice(&self.template);
        }
        for part in content.as_chunks_mut::<STAMP_BYTES>().0 {
            part[..8].copy_from_slice(&stamp.to_le_bytes());
        }
        content[8..16].copy_from_slice(&number);
        content[16..24].copy_from_slice(&version);
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
