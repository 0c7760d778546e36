//! Mapped memory: what maps and unmaps, and gives out pointers into what it mapped.
//!
//! A [`Mapping`] owns a piece of guest memory and lends it as a [`PageSpan`] or a [`ReadSpan`], which are in bounds, for no
//! longer than the mapping lives. `copy.rs` says what may be done with a span. Guest memory may be written by the kernel and by
//! other threads at any time, so there is no reference (`&[u8]`) to it, with one exception: `cache/pool_buffer.rs` lends the
//! bytes that arrived in a receive buffer as a slice, which nothing writes while the buffer holds their extent.
//!
//! Memory is populated before it is used (`populate.rs`): a lack of it is an error when the guest arrives, never a SIGBUS
//! later.
#![expect(unsafe_code, reason = "mmap and what belongs to it")]

use crate::failpoint::{self, Point};
use crate::host::NODES_MAX;
use crate::store::memory::index;
use crate::store::memory::span::{PageSpan, ReadSpan};
use crate::units::{PAGE_BYTES, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::mman::{self, MapFlags, MmapAdvise, ProtFlags};
use std::alloc::Layout;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// How a mapping was made, which decides how it ends.
enum Origin {
    Private,
    Shared,
    HugepageRs(Layout),
}

/// A piece of memory mapped for reading and writing, unmapped when dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    length: usize,
    origin: Origin,
    /// Whether it is of the huge page pool, whose pages are never swapped out.
    huge: bool,
}

/// Which NUMA nodes memory comes from. If a node has none left, memory comes from the others.
pub(crate) enum Policy<'a> {
    /// This one.
    Prefer(usize),
    /// These in turn, page by page.
    Interleave(&'a [usize]),
}

// SAFETY: a Mapping owns its memory, which is not bound to a thread; it lends raw pointers only, and what reads or writes
// through them (`copy.rs`, the kernel) allows other threads to do so at the same time.
unsafe impl Send for Mapping {}
// SAFETY: as above: no method gives out a reference into the memory but to a word, which is atomic.
unsafe impl Sync for Mapping {}

fn pages_only(length: u64) -> NonZeroUsize {
    assert!(length.is_multiple_of(PAGE_BYTES), "mappings are whole pages");
    NonZeroUsize::new(index(length)).expect("mappings are not empty: no RAM block and no slab is")
}

/// The simulation lets mappings fail.
fn may_map() -> Result<(), Errno> {
    match failpoint::fails(Point::Mapping) {
        true => Err(Errno::ENOMEM),
        false => Ok(()),
    }
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Mapping {
    /// The first `length` bytes of `file`, shared with other processes that map it. Reserves what a hugetlb file needs. `huge`
    /// is whether it is one.
    pub(crate) fn shared(file: impl AsFd, length: u64, huge: bool) -> Result<Self, Errno> {
        let size = pages_only(length);
        may_map()?;
        // SAFETY: the kernel chooses the place, so that no memory in use is mapped over.
        let base = unsafe { mman::mmap(None, size, READ_WRITE, MapFlags::MAP_SHARED, file, 0)? };
        let made = Self {
            base: base.cast(),
            length: size.get(),
            origin: Origin::Shared,
            huge,
        };
        made.keep_from_cores()
    }

    /// Private memory of ordinary pages.
    pub(crate) fn anonymous(length: u64) -> Result<Self, Errno> {
        let size = pages_only(length);
        may_map()?;
        // SAFETY: the kernel chooses the place, so that no memory in use is mapped over.
        let base = unsafe { mman::mmap_anonymous(None, size, READ_WRITE, MapFlags::MAP_PRIVATE)? };
        let made = Self {
            base: base.cast(),
            length: size.get(),
            origin: Origin::Private,
            huge: false,
        };
        made.keep_from_cores()
    }

    /// Private memory of this host's default huge pages, reserved.
    ///
    /// The caller has made sure that the kernel has huge pages at all: `hugepage-rs` panics where
    /// `/proc/meminfo` does not say their size.
    pub(crate) fn huge(length: u64) -> Result<Self, Errno> {
        let size = pages_only(length);
        let layout = Layout::from_size_align(size.get(), PAGE_SIZE).map_err(|_| Errno::ENOMEM)?;
        // SAFETY: the layout's size is not zero (`pages_only`).
        let base = unsafe { hugepage_rs::alloc(layout) };
        // Null stands for a failed mmap, whose errno is still there.
        let base = NonNull::new(base).ok_or_else(Errno::last)?;
        let made = Self {
            base,
            length: size.get(),
            origin: Origin::HugepageRs(layout),
            huge: true,
        };
        made.keep_from_cores()
    }

    /// Keeps the memory out of core dumps: it has a guest's secrets.
    fn keep_from_cores(self) -> Result<Self, Errno> {
        // Miri has no such advice, and makes no core dumps.
        if !cfg!(miri) {
            self.advise(0, self.length, MmapAdvise::MADV_DONTDUMP)?;
        }
        Ok(self)
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The pointer to `length` bytes at `offset`, which need not be pages.
    ///
    /// # Panics
    /// Unless they lie inside the mapping.
    pub(crate) fn bytes(&self, offset: usize, length: usize) -> *mut u8 {
        let end = offset.checked_add(length);
        assert!(
            end.is_some_and(|end| end <= self.length),
            "{length} bytes at {offset:#x}"
        );
        self.base.as_ptr().wrapping_add(offset)
    }

    /// Asks for transparent huge pages, where the kernel has them.
    pub(crate) fn advise_huge(&self) -> Result<(), Errno> {
        self.advise(0, self.length, MmapAdvise::MADV_HUGEPAGE)
    }

    /// Keeps the memory out of forked children: it is pinned by the ring, and a copy of it would be costly.
    pub(crate) fn keep_from_children(&self) -> Result<(), Errno> {
        self.advise(0, self.length, MmapAdvise::MADV_DONTFORK)
    }

    /// Binds the memory to NUMA nodes. To be called before it is populated; in a shared mapping the binding stays with the file.
    pub(crate) fn place_on(&self, policy: Policy<'_>) -> Result<(), Errno> {
        const WORD_BITS: usize = u64::BITS as usize;
        let (mode, nodes) = match &policy {
            Policy::Prefer(node) => (libc::MPOL_PREFERRED, std::slice::from_ref(node)),
            Policy::Interleave(nodes) => (libc::MPOL_INTERLEAVE, *nodes),
        };
        let mut mask = [0u64; NODES_MAX / WORD_BITS];
        for node in nodes {
            *mask.get_mut(node / WORD_BITS).ok_or(Errno::EINVAL)? |= 1 << (node % WORD_BITS);
        }
        // The kernel reads one bit less than this number.
        let bits = NODES_MAX + 1;
        // SAFETY: the range is this mapping, whose content no policy changes; the kernel reads NODES_MAX bits, all of the mask.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.length,
                libc::c_long::from(mode),
                mask.as_ptr(),
                bits,
                0 as libc::c_long,
            )
        };
        Errno::result(done).map(drop)
    }

    /// Keeps the memory, which is populated, from being swapped out. Pages of the pool never are.
    pub(crate) fn lock(&self) -> Result<(), Errno> {
        if self.huge {
            return Ok(());
        }
        // SAFETY: the range is this mapping, whose content locking does not change.
        unsafe { mman::mlock(self.base.cast(), self.length) }
    }

    /// Returns the memory to the host, also that of a file; it reads as zeros from then on. Private huge pages are returned
    /// from Linux 5.18 on; before that they stay until the mapping ends.
    pub(crate) fn give_back(&self) -> Result<(), Errno> {
        let advice = match self.origin {
            Origin::Private | Origin::HugepageRs(_) => MmapAdvise::MADV_DONTNEED,
            Origin::Shared => MmapAdvise::MADV_REMOVE,
        };
        // Locked memory is not returned.
        // SAFETY: the range is this mapping, whose content unlocking does not change.
        unsafe { mman::munlock(self.base.cast(), self.length)? };
        self.advise(0, self.length, advice)
    }

    /// Whether it is a file's.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.origin, Origin::Shared)
    }

    /// The word at byte `offset`, aligned, for atomic access by all threads and processes that map it.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(size_of::<u64>()), "words are aligned");
        let word = self.bytes(offset, size_of::<u64>()).cast::<u64>();
        // SAFETY: aligned and inside the mapping (`bytes` checked it), valid for as long as the borrow of it, and only
        // accessed atomically while it lives: memory of words is used for nothing else.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// `pages` pages from byte `offset` on.
    ///
    /// # Panics
    /// Unless they are whole pages inside the mapping, and at least one.
    pub(crate) fn span(&self, offset: u64, pages: u64) -> PageSpan<'_> {
        assert!(
            offset.is_multiple_of(PAGE_BYTES),
            "{offset:#x} is not the beginning of a page"
        );
        let start = self.pages_from(offset, pages);
        // SAFETY: inside the mapping, which is readable and writable while it is borrowed; its base is aligned to a page, as
        // the kernel maps nothing else, and so is the offset.
        unsafe { PageSpan::new(start, pages) }
    }

    /// `pages` times the bytes of a page from byte `offset` on, of any alignment: only to be read.
    ///
    /// # Panics
    /// Unless they lie inside the mapping, and are at least those of one page.
    pub(crate) fn read_span(&self, offset: u64, pages: u64) -> ReadSpan<'_> {
        let start = self.pages_from(offset, pages);
        // SAFETY: inside the mapping, which is readable while it is borrowed.
        unsafe { ReadSpan::new(start, pages) }
    }

    /// The pointer to that many pages' bytes, which lie inside the mapping.
    fn pages_from(&self, offset: u64, pages: u64) -> *mut u8 {
        assert!(pages > 0, "a span is not empty");
        let length = pages
            .checked_mul(PAGE_BYTES)
            .expect("more bytes than there are addresses");
        self.bytes(index(offset), index(length))
    }

    pub(super) fn advise(&self, offset: usize, length: usize, advice: MmapAdvise) -> Result<(), Errno> {
        let start = NonNull::new(self.bytes(offset, length)).ok_or(Errno::EFAULT)?;
        // SAFETY: the range lies in this mapping (`bytes` checked it). None of the advices used in this file unmaps
        // it; DONTNEED changes its content, which no reference of Rust's looks at.
        unsafe { mman::madvise(start.cast(), length, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: exactly what `mmap` gave; spans borrow the mapping, so none is left. Operations of a ring, which
            // have addresses, have ended before: the contract of `Store` demands it.
            Origin::Private | Origin::Shared => unsafe {
                let gone = mman::munmap(self.base.cast(), self.length);
                debug_assert_eq!(gone, Ok(()));
            },
            // SAFETY: as above, with the layout it was allocated with.
            Origin::HugepageRs(layout) => unsafe { hugepage_rs::dealloc(self.base.as_ptr(), layout) },
        }
    }
}
