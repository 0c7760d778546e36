//! The RAM image: one shared mapping per RAM block, in a file that a QEMU can map.
//!
//! Byte `o` of a block is byte `o` of its file. The files are memfds, or named files in a directory of the
//! operator's choice, on hugetlbfs or tmpfs.

use crate::blocks::{BlockTable, RamBlock};
use crate::store::StoreError;
use crate::store::memory::file_names::file_names;
use crate::store::memory::huge::{self, Fallback, HUGE_1G, HUGE_2M, HugePages};
use crate::store::memory::mapping::Mapping;
use crate::store::memory::ram_dir::{MemoryFile, RamFiles};
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
    /// In the order of the table.
    blocks: Vec<Mapping>,
    /// The named file of each block that has one.
    files: Vec<Option<PathBuf>>,
}

impl RamImage {
    /// Maps the blocks of `table`; their memory is not yet populated. With `files` they are named files, but for blocks
    /// smaller than a huge page of theirs, unless `all_named` is set: a QEMU maps only the guest's main memory.
    ///
    /// # Errors
    /// Where a file cannot be made or mapped. Too few huge pages for a memfd are a fallback, noted in `notes`.
    pub(crate) fn map(
        table: Arc<BlockTable>,
        pages: HugePages,
        files: Option<&RamFiles>,
        all_named: bool,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        let mut image = Self {
            table: table.clone(),
            blocks: Vec::with_capacity(table.iter().len()),
            files: Vec::new(),
        };
        let mut transparent = pages == HugePages::Thp;
        for ((_, block), name) in table.iter().zip(file_names(&table, &[])) {
            let files = files.filter(|files| all_named || files.suits(block.used_length));
            let mapping = match files {
                Some(files) => {
                    let file = files.create(&name, block.used_length)?;
                    image.files.push(Some(file.path.clone()));
                    map(&file, block)?
                }
                None => match memfd_of_huge_pages(block, pages) {
                    Some(Ok(mapping)) => mapping,
                    Some(Err(lack)) => {
                        transparent = true;
                        notes.push(lack.note(block));
                        memfd(block)?
                    }
                    None => memfd(block)?,
                },
            };
            image.files.resize(image.blocks.len() + 1, None);
            image.blocks.push(mapping);
        }
        if transparent {
            image.ask_for_transparent_pages(pages, notes);
        }
        Ok(image)
    }

    /// Maps the blocks of `table` in the files of an earlier receiver.
    pub(crate) fn map_existing(table: Arc<BlockTable>, files: &RamFiles) -> Result<Self, StoreError> {
        let mut image = Self {
            table: table.clone(),
            blocks: Vec::with_capacity(table.iter().len()),
            files: Vec::new(),
        };
        for ((_, block), name) in table.iter().zip(file_names(&table, &[])) {
            let path = files.path(&name);
            let file = files.open(&name)?;
            let file = file.ok_or_else(|| StoreError::damaged(&path, "the file does not exist"))?;
            if file.length < block.used_length {
                return Err(StoreError::damaged(&path, "it is shorter than its ram block"));
            }
            let mapping = file.map_owned();
            image
                .blocks
                .push(mapping.map_err(|errno| StoreError::file(&path, errno.into()))?);
            image.files.push(Some(path));
        }
        Ok(image)
    }

    fn ask_for_transparent_pages(&self, asked: HugePages, notes: &mut Vec<Fallback>) {
        match huge::transparent_shared() {
            // Advice: a mapping that cannot follow it (hugetlb, or too small) is no worse than before.
            None => {
                for block in &self.blocks {
                    let _ = block.advise_huge();
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
        &self.blocks
    }

    /// The named file of a block, for a QEMU to map: absolute.
    pub(crate) fn file(&self, id: BlockId) -> Option<&Path> {
        self.files[usize::from(id.0)].as_deref()
    }

    /// The pages of `run`, or the first of them where its block ends before it does.
    pub(crate) fn span(&self, run: PageRun) -> PageSpan<'_> {
        let (id, offset) = self.table.locate(run.first);
        let left = (self.table.block(id).used_length - offset) / PAGE_BYTES;
        self.blocks[usize::from(id.0)].span(offset, run.pages.min(left))
    }
}

/// Maps the file of a block.
fn map(file: &MemoryFile, block: &RamBlock) -> Result<Mapping, StoreError> {
    file.map()
        .map_err(|errno| StoreError::no_memory(block, file.length, errno))
}

fn memfd(block: &RamBlock) -> Result<Mapping, StoreError> {
    let length = block.used_length;
    let refused = |errno| StoreError::no_memory(block, length, errno);
    let file = memfd_create(memfd_name(), MFdFlags::MFD_CLOEXEC).map_err(refused)?;
    map(&MemoryFile::unnamed(file, length, false), block)
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
            block: block.display_name().into_owned(),
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
