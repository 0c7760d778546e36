//! The RAM image: a shared mapping for each RAM block, and one for all small blocks together.
//!
//! The files are memfds, or named files in a directory of the operator's choice, on hugetlbfs or tmpfs. Byte `o` of a block is
//! byte `o` of its named file, so that a QEMU can map it.

use crate::blocks::{BlockTable, RamBlock};
use crate::budget::Lease;
use crate::store::StoreError;
use crate::store::memory::file_names::file_names;
use crate::store::memory::huge::{self, Fallback, HUGE_1G, HUGE_2M, HugePages};
use crate::store::memory::mapping::Mapping;
use crate::store::memory::ram_dir::{MemoryFile, RamFiles};
use crate::store::memory::slab::with_page_tables;
use crate::store::memory::span::PageSpan;
use crate::units::PageRun;
use crate::units::{BlockId, PAGE_BYTES};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The RAM of a guest. See the module.
pub(crate) struct RamImage {
    table: Arc<BlockTable>,
    mappings: Vec<Mapping>,
    /// In the order of the table.
    places: Vec<BlockPlace>,
    /// What the mappings have of the budget, which is given back after they are freed.
    lease: Lease,
}

/// What blocks of a guest have names in a directory.
#[derive(Clone, Copy)]
pub(crate) struct NamedFiles<'a> {
    pub(crate) files: Option<&'a RamFiles>,
    /// Whether blocks smaller than a huge page of theirs have one, too: a QEMU maps only the guest's main memory.
    pub(crate) are_all_named: bool,
}

impl<'a> NamedFiles<'a> {
    fn of(self, block: &RamBlock) -> Option<&'a RamFiles> {
        let suits = |files: &&RamFiles| self.are_all_named || files.suits(block.used_length);
        self.files.filter(suits)
    }
}

/// Where a block lies.
struct BlockPlace {
    /// Position among the mappings.
    mapping: usize,
    /// Its first byte there.
    offset: u64,
    /// Its named file, if it has one.
    file: Option<PathBuf>,
}

/// Blocks below this size share a mapping where they need no file of their own: a mapping is scarce (`vm.max_map_count`),
/// and they could not be of huge pages anyway.
const SMALL_BYTES: u64 = HUGE_2M;

impl RamImage {
    fn new(table: &Arc<BlockTable>, lease: Lease) -> Self {
        Self {
            table: table.clone(),
            mappings: Vec::new(),
            places: Vec::with_capacity(table.iter().len()),
            lease,
        }
    }

    /// What [`Self::map`] takes of the budget.
    pub(crate) fn charge(table: &BlockTable, named: NamedFiles<'_>) -> u64 {
        let bytes = table.iter().map(|(_, block)| match named.of(block) {
            Some(files) => files.bytes_of(block.used_length),
            None => block.used_length,
        });
        with_page_tables(bytes.fold(0, u64::saturating_add))
    }

    /// Takes more of its budget, for what is done with the image for a while.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(crate) fn beside(&self, bytes: u64) -> Result<Lease, StoreError> {
        Ok(self.lease.beside(bytes)?)
    }

    /// How many mappings [`Self::map`] makes at most, with or without files.
    pub(crate) fn mappings_max(table: &BlockTable, has_files: bool) -> usize {
        let blocks = table.iter().len();
        let small = match has_files {
            true => 0,
            false => table.iter().filter(|(_, block)| is_small(block)).count(),
        };
        blocks - small + usize::from(small > 0)
    }

    /// Bytes of the files that [`Self::map`] makes in a directory.
    pub(crate) fn named_bytes(table: &BlockTable, named: NamedFiles<'_>) -> u64 {
        let blocks = table.iter().map(|(_, block)| block);
        let bytes = blocks.filter_map(|block| Some(named.of(block)?.bytes_of(block.used_length)));
        bytes.fold(0, u64::saturating_add)
    }

    /// Maps the blocks of `table`; their memory is not yet populated. `lease` has what they are [charged](Self::charge).
    ///
    /// # Errors
    /// Where a file cannot be made or mapped. Too few huge pages for a memfd are a fallback, noted in `notes`.
    pub(crate) fn map(
        table: Arc<BlockTable>,
        pages: HugePages,
        named: NamedFiles<'_>,
        lease: Lease,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        let mut image = Self::new(&table, lease);
        let mut transparent = pages == HugePages::Thp;
        let shares = |block: &RamBlock| named.of(block).is_none() && is_small(block);
        let all_small = table.iter().filter(|(_, block)| shares(block));
        // At most BLOCKS_MAX times SMALL_BYTES.
        let small_bytes: u64 = all_small.map(|(_, block)| block.used_length).sum();
        let mut small_used = 0;
        if small_bytes > 0 {
            let mapping =
                memfd(small_bytes).map_err(|errno| StoreError::no_small_memory(small_bytes, errno))?;
            image.mappings.push(mapping);
        }
        for ((_, block), name) in table.iter().zip(file_names(table.names(), &[])) {
            if shares(block) {
                image.places.push(BlockPlace {
                    mapping: 0,
                    offset: small_used,
                    file: None,
                });
                small_used += block.used_length;
                continue;
            }
            let no_memory = |errno| StoreError::no_memory(block, block.used_length, errno);
            let (mapping, path) = match named.of(block) {
                Some(files) => {
                    let file = files.create(&name, block.used_length)?;
                    let mapping = file.map().map_err(|errno| {
                        let lack = files.lack(file.length, errno);
                        lack.unwrap_or_else(|| StoreError::no_memory(block, file.length, errno))
                    })?;
                    (mapping, Some(file.path))
                }
                None => match memfd_of_huge_pages(block, pages) {
                    Some(Ok(mapping)) => (mapping, None),
                    Some(Err(lack)) => {
                        transparent = true;
                        notes.push(lack.note(block));
                        (memfd(block.used_length).map_err(no_memory)?, None)
                    }
                    None => (memfd(block.used_length).map_err(no_memory)?, None),
                },
            };
            image.add(mapping, path);
        }
        if transparent {
            image.ask_for_transparent_pages(pages, notes);
        }
        Ok(image)
    }

    /// Maps the blocks of `table` in the files of an earlier receiver, which `lease` has of the budget.
    pub(crate) fn map_existing(
        table: Arc<BlockTable>,
        files: &RamFiles,
        lease: Lease,
    ) -> Result<Self, StoreError> {
        let mut image = Self::new(&table, lease);
        for ((_, block), name) in table.iter().zip(file_names(table.names(), &[])) {
            let path = files.path(&name);
            let file = files.open(&name)?;
            let file = file.ok_or_else(|| StoreError::damaged(&path, "the file does not exist"))?;
            if file.length < block.used_length {
                return Err(StoreError::damaged(&path, "it is shorter than its ram block"));
            }
            let mapping = file.map_owned();
            let mapping = mapping.map_err(|errno| StoreError::file(&path, errno.into()))?;
            image.add(mapping, Some(path));
        }
        Ok(image)
    }

    /// The next block has a mapping of its own.
    fn add(&mut self, mapping: Mapping, file: Option<PathBuf>) {
        self.places.push(BlockPlace {
            mapping: self.mappings.len(),
            offset: 0,
            file,
        });
        self.mappings.push(mapping);
    }

    fn ask_for_transparent_pages(&self, asked: HugePages, notes: &mut Vec<Fallback>) {
        match huge::transparent_shared() {
            // Advice: a mapping that cannot follow it (hugetlb, or too small) is no worse than before.
            None => {
                for mapping in &self.mappings {
                    let _ = mapping.advise_huge();
                }
            }
            Some(note) if asked == HugePages::Thp => notes.push(note),
            // The notes on the huge page pool say "ordinary pages" already.
            Some(_) => {}
        }
    }

    pub(crate) fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    pub(crate) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The named file of a block, for a QEMU to map: absolute.
    pub(crate) fn file(&self, id: BlockId) -> Option<&Path> {
        self.places[usize::from(id.0)].file.as_deref()
    }

    /// The pages of `run`, or the first of them where its block ends before it does.
    pub(crate) fn span(&self, run: PageRun) -> PageSpan<'_> {
        let (id, offset) = self.table.locate(run.first);
        let left = (self.table.block(id).used_length - offset) / PAGE_BYTES;
        let place = &self.places[usize::from(id.0)];
        self.mappings[place.mapping].span(place.offset + offset, run.pages.min(left))
    }
}

fn is_small(block: &RamBlock) -> bool {
    block.used_length < SMALL_BYTES
}

/// Memory without a name, of ordinary pages.
fn memfd(length: u64) -> Result<Mapping, Errno> {
    let file = memfd_create(memfd_name(), MFdFlags::MFD_CLOEXEC)?;
    MemoryFile::unnamed(file, length, false).map()
}

fn memfd_name() -> &'static std::ffi::CStr {
    c"colo-ring-ram"
}

/// Why a block got no huge pages.
struct Lack {
    page: u64,
    errno: Errno,
}

impl Lack {
    fn note(&self, block: &RamBlock) -> Fallback {
        let (page_kib, needed) = (self.page >> 10, block.used_length / self.page);
        Fallback::Image {
            block: block.display_name(),
            needed,
            page_kib,
            got: huge::instead(&huge::transparent_shared()),
            reason: self.errno.desc().to_owned(),
            remedy: huge::pool_remedy(page_kib, needed),
        }
    }
}

/// A memfd of huge pages, or `None` for a block that is no multiple of any: small ones stay on ordinary pages.
fn memfd_of_huge_pages(block: &RamBlock, pages: HugePages) -> Option<Result<Mapping, Lack>> {
    let sizes: &[(u64, MFdFlags)] = match pages {
        HugePages::Huge1G => &[
            (HUGE_1G, MFdFlags::MFD_HUGE_1GB),
            (HUGE_2M, MFdFlags::MFD_HUGE_2MB),
        ],
        HugePages::Huge2M => &[(HUGE_2M, MFdFlags::MFD_HUGE_2MB)],
        HugePages::Thp | HugePages::Off => &[],
    };
    let (page, flag) = *sizes
        .iter()
        .find(|(page, _)| block.used_length.is_multiple_of(*page))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | flag;
    let mapped = memfd_create(memfd_name(), flags)
        .and_then(|file| MemoryFile::unnamed(file, block.used_length, true).map());
    Some(mapped.map_err(|errno| Lack { page, errno }))
}
