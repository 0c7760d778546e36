//! The RAM image: one shared mapping per RAM block, in a file that a QEMU can map.
//!
//! Byte `o` of a block is byte `o` of its file. The files are memfds, or named files in a directory of the
//! operator's choice, on hugetlbfs or tmpfs. Named files are removed when the image is dropped.
#![forbid(unsafe_code)]

use super::StoreError;
use super::huge::{self, Fallback, HUGE_1G, HUGE_2M, HugePages};
use super::map::{Mapping, Span, can_populate};
use super::names::file_names;
use super::plan::PageRun;
use crate::blocks::{BlockTable, RamBlock};
use crate::units::{BlockId, PAGE_BYTES};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The RAM of a guest. See the module.
pub(super) struct RamImage {
    table: Arc<BlockTable>,
    /// In the order of the table.
    blocks: Vec<Mapping>,
    /// The named file of each block that has one, removed at the end.
    files: Vec<Option<PathBuf>>,
}

/// A block's file, not yet mapped, and how long the mapping is to be.
struct BlockFile {
    file: OwnedFd,
    length: u64,
    huge: bool,
}

impl RamImage {
    /// Maps the blocks of `table`; their memory is not yet populated.
    ///
    /// # Errors
    /// Where a file cannot be made or mapped. Too few huge pages for a memfd are a fallback, noted in `notes`.
    pub(super) fn map(
        table: Arc<BlockTable>,
        label: &str,
        pages: HugePages,
        directory: Option<&Path>,
        notes: &mut Vec<Fallback>,
    ) -> Result<Self, StoreError> {
        let mut image = Self {
            table: table.clone(),
            blocks: Vec::with_capacity(table.iter().len()),
            files: Vec::new(),
        };
        let directory = directory.map(RamDirectory::open).transpose()?;
        let mut transparent = pages == HugePages::Thp;
        for ((_, block), name) in table.iter().zip(file_names(&table, &[])) {
            let directory = directory.as_ref().filter(|directory| directory.holds(block));
            let mapping = match directory {
                Some(directory) => {
                    let (path, file) = directory.create(&format!("{label}.{name}"), block)?;
                    image.files.push(Some(path));
                    file.map(block)?
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

    fn ask_for_transparent_pages(&self, asked: HugePages, notes: &mut Vec<Fallback>) {
        match huge::transparent_shared() {
            // Advice: a mapping that cannot follow it (hugetlb, or too small) is no worse than before.
            None => {
                for block in &self.blocks {
                    let _ = block.advise_huge();
                }
            }
            Some(note) if asked == HugePages::Thp => notes.push(note),
            // The notes on the pool have said "ordinary pages" already.
            Some(_) => {}
        }
    }

    pub(super) fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    pub(super) fn mappings(&self) -> &[Mapping] {
        &self.blocks
    }

    /// The named file of a block, for a QEMU to map: absolute.
    pub(super) fn file(&self, id: BlockId) -> Option<&Path> {
        self.files[usize::from(id.0)].as_deref()
    }

    /// The pages of `run`, or the first of them where its block ends before it does.
    pub(super) fn span(&self, run: PageRun) -> Span<'_> {
        let (id, offset) = self.table.locate(run.first);
        let left = (self.table.block(id).used_length - offset) / PAGE_BYTES;
        self.blocks[usize::from(id.0)].span(offset, run.pages.min(left))
    }
}

impl Drop for RamImage {
    fn drop(&mut self) {
        for path in self.files.iter().flatten() {
            // Gone already, or the directory is: either way there is nobody left to tell.
            drop(std::fs::remove_file(path));
        }
    }
}

impl BlockFile {
    fn map(self, block: &RamBlock) -> Result<Mapping, StoreError> {
        self.try_map()
            .map_err(|errno| StoreError::no_memory(block, self.length, errno))
    }

    fn try_map(&self) -> Result<Mapping, Errno> {
        let signed = i64::try_from(self.length).map_err(|_| Errno::EFBIG)?;
        nix::unistd::ftruncate(&self.file, signed)?;
        if !self.huge && !can_populate() {
            // The file must own its memory before it is touched, or a lack of it is a SIGBUS then.
            fallocate(&self.file, FallocateFlags::empty(), 0, signed)?;
        }
        Mapping::shared(&self.file, self.length, self.huge)
    }
}

fn memfd(block: &RamBlock) -> Result<Mapping, StoreError> {
    let length = block.used_length;
    let refused = |errno| StoreError::no_memory(block, length, errno);
    let file = memfd_create(memfd_name(), MFdFlags::MFD_CLOEXEC).map_err(refused)?;
    BlockFile {
        file,
        length,
        huge: false,
    }
    .map(block)
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
    let mapped = memfd_create(memfd_name(), flags).and_then(|file| {
        let length = block.used_length;
        BlockFile {
            file,
            length,
            huge: true,
        }
        .try_map()
    });
    Some(mapped.map_err(|errno| Lack { page, errno }))
}

/// The operator's directory for RAM images.
struct RamDirectory {
    path: PathBuf,
    /// Page size, if it is a hugetlbfs.
    huge_page: Option<u64>,
}

impl RamDirectory {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let refused = |errno: Errno| StoreError::file(path, errno.into());
        let system = statfs(path).map_err(refused)?;
        let huge_page = match system.filesystem_type() {
            HUGETLBFS_MAGIC => Some(u64::try_from(system.block_size()).map_err(|_| refused(Errno::EINVAL))?),
            TMPFS_MAGIC => None,
            _ => return Err(StoreError::RamDirectory(path.to_owned())),
        };
        // A QEMU that is to map a file of it runs elsewhere.
        let path = path
            .canonicalize()
            .map_err(|error| StoreError::file(path, error))?;
        Ok(Self { path, huge_page })
    }

    /// Whether the block is put here. One smaller than a huge page would waste most of it, and gets a memfd: only
    /// the guest's main memory is ever mapped by a QEMU.
    fn holds(&self, block: &RamBlock) -> bool {
        self.huge_page.is_none_or(|page| block.used_length >= page)
    }

    fn create(&self, name: &str, block: &RamBlock) -> Result<(PathBuf, BlockFile), StoreError> {
        let path = self.path.join(name);
        let made = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            // The owner's alone: it holds a guest's secrets.
            .mode(0o600)
            .open(&path);
        let file = made.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => StoreError::RamFileExists(path.clone()),
            _ => StoreError::file(&path, error),
        })?;
        let granule = self.huge_page.unwrap_or(PAGE_BYTES);
        // A guest's blocks add up to less than 2^64 bytes, and a mapping of that would fail with an error of its own.
        let length = block.used_length.checked_next_multiple_of(granule);
        let length = length.unwrap_or(u64::MAX - (granule - 1));
        let file = BlockFile {
            file: file.into(),
            length,
            huge: self.huge_page.is_some(),
        };
        Ok((path, file))
    }
}
