//! The guest's RAM blocks: which there are, how long they are, and where an address in one lies among all
//! pages of the guest.
//!
//! Every address of the wire passes through [`BlockTable::page`], so a [`PageIndex`] is always inside the guest.

use crate::text;
use crate::units::{BlockId, PAGE_BYTES, PageIndex};
use thiserror::Error;

/// Most RAM blocks a guest may have (spec §21). A PC with many devices has some dozens; with a DIMM in each of QEMU's 256 slots
/// and a ROM in each PCI slot it has fewer than this.
pub const BLOCKS_MAX: usize = 512;

/// Longest name of a block: a `str8` (spec §4).
pub const BLOCK_NAME_MAX: usize = 255;

/// One RAM block, as the primary named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name, for example `pc.ram`: bytes, since nothing on the wire promises UTF-8.
    pub name: Box<[u8]>,
    /// Bytes in use, a multiple of the page size.
    pub used_length: u64,
    /// Its first page among all pages of the guest.
    pub first_page: PageIndex,
}

impl RamBlock {
    /// Pages in use.
    pub fn pages(&self) -> u64 {
        self.used_length / PAGE_BYTES
    }

    #[cold]
    fn refuse(&self, offset: u64) -> NotAPage {
        let name = self.display_name();
        NotAPage {
            name,
            offset,
            used_length: self.used_length,
        }
    }

    /// The name for people, as part of a line.
    pub fn display_name(&self) -> String {
        text::printable_bytes(&self.name)
    }

    /// The name for programs: as the primary gave it, if that is UTF-8.
    pub fn name_text(&self) -> String {
        text::from_bytes(&self.name)
    }
}

/// Why a block list was refused (spec §7.2, §21).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BlockListError {
    /// More than [`BLOCKS_MAX`] blocks.
    #[error("the block list has more than {BLOCKS_MAX} blocks")]
    TooMany,
    /// The name is empty.
    #[error("block {0} of the block list has an empty name")]
    EmptyName(usize),
    /// The name is longer than [`BLOCK_NAME_MAX`].
    #[error("block {0} of the block list has a name of more than {BLOCK_NAME_MAX} bytes")]
    LongName(usize),
    /// The same name twice.
    #[error("block {name} occurs twice in the block list")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A length of zero, or not a multiple of the page size.
    #[error("block {name} is {used_length} bytes long, which is not a positive multiple of {PAGE_BYTES}")]
    Length {
        /// The block's name.
        name: String,
        /// Its length as announced.
        used_length: u64,
    },
    /// The lengths do not add up to the announced total.
    #[error("the lengths of the block list add up to {sum} bytes, but {total} were announced")]
    Sum {
        /// Sum of the lengths, saturated.
        sum: u64,
        /// The announced total.
        total: u64,
    },
}

/// An address that is not a page of its block.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("offset {offset:#x} is not a page of block {name}, which is {used_length:#x} bytes long")]
pub struct NotAPage {
    /// The block's name.
    pub name: String,
    /// The offset as received.
    pub offset: u64,
    /// The block's length.
    pub used_length: u64,
}

/// All RAM blocks of a guest, in the order of the primary's list. Immutable once made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<RamBlock>,
    /// Their positions, sorted by name: a search compares at most 10 names, whatever a peer has chosen, where a hash would
    /// need a secret and read the whole name.
    sorted: Box<[u16]>,
    total_bytes: u64,
}

impl BlockTable {
    /// Checks a received list: `entries` are names and used lengths, `total` what the list announced (spec §7.2).
    ///
    /// # Errors
    /// See [`BlockListError`]; each names the block.
    pub fn new(entries: Vec<(Box<[u8]>, u64)>, total: u64) -> Result<Self, BlockListError> {
        if entries.len() > BLOCKS_MAX {
            return Err(BlockListError::TooMany);
        }
        let mut blocks = Vec::with_capacity(entries.len());
        let mut sum = 0u64;
        for (position, (name, used_length)) in entries.into_iter().enumerate() {
            if name.is_empty() {
                return Err(BlockListError::EmptyName(position));
            }
            if name.len() > BLOCK_NAME_MAX {
                return Err(BlockListError::LongName(position));
            }
            if used_length == 0 || used_length % PAGE_BYTES != 0 {
                let name = text::printable_bytes(&name);
                return Err(BlockListError::Length { name, used_length });
            }
            let first_page = PageIndex::new(sum / PAGE_BYTES);
            let too_long = BlockListError::Sum { sum: u64::MAX, total };
            sum = sum.checked_add(used_length).ok_or(too_long)?;
            blocks.push(RamBlock {
                name,
                used_length,
                first_page,
            });
        }
        let sorted = sorted_by_name(&blocks)?;
        if sum != total || blocks.is_empty() {
            return Err(BlockListError::Sum { sum, total });
        }
        Ok(Self {
            blocks,
            sorted,
            total_bytes: sum,
        })
    }

    /// Bytes of RAM over all blocks.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Pages over all blocks: every [`PageIndex`] is smaller.
    pub fn total_pages(&self) -> u64 {
        self.total_bytes / PAGE_BYTES
    }

    /// The blocks with their ids, in list order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockId, &RamBlock)> {
        let id = |position: usize| BlockId(u16::try_from(position).unwrap_or(u16::MAX));
        self.blocks
            .iter()
            .enumerate()
            .map(move |(position, block)| (id(position), block))
    }

    /// Their names, as the primary gave them, in list order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.blocks.iter().map(|block| &*block.name)
    }

    /// One block.
    ///
    /// # Panics
    /// With an id that is not of this table.
    pub fn block(&self, id: BlockId) -> &RamBlock {
        &self.blocks[usize::from(id.0)]
    }

    /// The block of that name.
    pub fn by_name(&self, name: &[u8]) -> Option<BlockId> {
        let of = |position: &u16| (*self.blocks[usize::from(*position)].name).cmp(name);
        let found = self.sorted.binary_search_by(of).ok()?;
        Some(BlockId(self.sorted[found]))
    }

    /// The page at byte `offset` of block `id`.
    ///
    /// # Errors
    /// If the offset is not page-aligned or the page does not lie whole in the block.
    #[inline]
    pub fn page(&self, id: BlockId, offset: u64) -> Result<PageIndex, NotAPage> {
        let block = self.block(id);
        // used_length is a positive multiple of the page size, so an aligned offset below it has its whole page.
        if offset.is_multiple_of(PAGE_BYTES) && offset < block.used_length {
            return Ok(PageIndex::new(block.first_page.get() + offset / PAGE_BYTES));
        }
        Err(block.refuse(offset))
    }

    /// The block a page lies in, and its byte offset there.
    pub fn locate(&self, page: PageIndex) -> (BlockId, u64) {
        let position = self.blocks.partition_point(|block| block.first_page <= page) - 1;
        let offset = (page.get() - self.blocks[position].first_page.get()) * PAGE_BYTES;
        (BlockId(u16::try_from(position).unwrap_or(u16::MAX)), offset)
    }
}

/// Positions of these blocks in the order of their names.
fn sorted_by_name(blocks: &[RamBlock]) -> Result<Box<[u16]>, BlockListError> {
    let name = |position: u16| &*blocks[usize::from(position)].name;
    let positions = 0..u16::try_from(blocks.len()).map_err(|_| BlockListError::TooMany)?;
    let mut sorted: Box<[u16]> = positions.collect();
    sorted.sort_unstable_by_key(|position| name(*position));
    match sorted.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        None => Ok(sorted),
        Some(pair) => Err(BlockListError::Duplicate {
            name: text::printable_bytes(name(pair[0])),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, pages: u64) -> (Box<[u8]>, u64) {
        (name.as_bytes().into(), pages * PAGE_BYTES)
    }

    #[test]
    fn pages_are_counted_over_all_blocks() {
        let table = BlockTable::new(vec![entry("pc.ram", 4), entry("pc.bios", 2)], 6 * PAGE_BYTES).unwrap();
        let bios = table.by_name(b"pc.bios").unwrap();
        assert_eq!(table.page(bios, PAGE_BYTES).unwrap().get(), 5);
        for index in 0..table.total_pages() {
            let (id, offset) = table.locate(PageIndex::new(index));
            assert_eq!(table.page(id, offset).unwrap().get(), index);
        }
        assert_eq!(table.by_name(b"pc.bio"), None);
        assert_eq!(table.by_name(b""), None);
    }

    /// The least time of some tries, in which nothing else ran.
    fn shortest(mut work: impl FnMut()) -> std::time::Duration {
        let time = |_| {
            let since = std::time::Instant::now();
            work();
            since.elapsed()
        };
        (0..20).map(time).min().unwrap()
    }

    /// A peer chooses how many blocks there are and what they are called, and sends a name with every page.
    #[test]
    fn long_lists_of_similar_names_are_searched_as_fast_as_short_ones() {
        let names =
            |count: usize| (0..count).map(|number| format!("{number:0>width$}", width = BLOCK_NAME_MAX));
        let search = |count: usize| {
            let entries: Vec<_> = names(count).map(|name| entry(&name, 1)).collect();
            let table = BlockTable::new(entries, count as u64 * PAGE_BYTES).unwrap();
            let last = names(count).next_back().unwrap();
            let id = BlockId(u16::try_from(count - 1).unwrap());
            shortest(|| (0..1000).for_each(|_| assert_eq!(table.by_name(last.as_bytes()), Some(id))))
        };
        let (few, many) = (search(8), search(BLOCKS_MAX));
        // 3 and 9 comparisons; a search from the beginning makes 8 and 512.
        assert!(many < 20 * few, "{many:?} instead of {few:?}");
    }

    #[test]
    fn addresses_outside_are_refused() {
        let table = BlockTable::new(vec![entry("a", 2), entry("b", 1)], 3 * PAGE_BYTES).unwrap();
        let a = BlockId(0);
        for offset in [
            1,
            4095,
            4097,
            2 * PAGE_BYTES,
            2 * PAGE_BYTES - 1,
            u64::MAX,
            u64::MAX - 4095,
        ] {
            assert!(table.page(a, offset).is_err(), "{offset:#x}");
        }
    }

    #[test]
    fn bad_lists_are_refused() {
        use BlockListError as E;
        let list = |entries: &[(&str, u64)], total| {
            BlockTable::new(
                entries.iter().map(|(n, l)| (n.as_bytes().into(), *l)).collect(),
                total,
            )
            .unwrap_err()
        };
        assert_eq!(list(&[], 0), E::Sum { sum: 0, total: 0 });
        assert_eq!(list(&[("", 4096)], 4096), E::EmptyName(0));
        assert!(matches!(list(&[("a", 0)], 0), E::Length { .. }));
        assert!(matches!(list(&[("a", 4095)], 4095), E::Length { .. }));
        assert!(matches!(
            list(&[("a", 4096), ("a", 4096)], 8192),
            E::Duplicate { .. }
        ));
        assert_eq!(
            list(&[("a", 4096)], 8192),
            E::Sum {
                sum: 4096,
                total: 8192
            }
        );
        let huge = u64::MAX - 4095;
        assert!(matches!(list(&[("a", huge), ("b", 8192)], 4096), E::Sum { .. }));
        let many: Vec<_> = (0..=BLOCKS_MAX)
            .map(|i| (i.to_string().into_bytes().into(), 4096))
            .collect();
        assert_eq!(BlockTable::new(many, 0), Err(E::TooMany));
    }
}
