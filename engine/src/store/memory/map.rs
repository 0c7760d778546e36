//! Mapped memory: the one file of the store that maps and unmaps, and hands out pointers into what it mapped.
//!
//! It owns every byte of guest memory through [`Mapping`] and lends it as [`Span`]: whole pages, in bounds, for no
//! longer than the mapping lives. What may be done with a span is in `copy.rs`. No reference (`&[u8]`) to
//! guest memory exists anywhere: the kernel and other threads may write it at any time.
//!
//! Memory is **populated** before it is used ([`populate`]): a lack of it is an error when the guest arrives, never
//! a SIGBUS later.

use crate::host::NODES_MAX;
use crate::units::{PAGE_BYTES, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::mman::{self, MapFlags, MmapAdvise, ProtFlags};
use std::alloc::Layout;
use std::fs::File;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How much one thread populates at a time.
const POPULATE_CHUNK: usize = 64 << 20;

/// Most threads that populate at once: the kernel's zeroing is bound by memory bandwidth beyond that.
const POPULATE_THREADS_MAX: usize = 8;

/// A position in memory as `usize`. The store addresses guest memory, which only a 64-bit host can hold.
pub(crate) fn index(position: u64) -> usize {
    usize::try_from(position).expect("positions in mapped memory fit the address space")
}

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

/// Which NUMA nodes memory comes from. What a node has not left comes from the others: less near is better than none.
pub(crate) enum Policy<'a> {
    /// This one.
    Prefer(usize),
    /// These in turn, page by page.
    Interleave(&'a [usize]),
}

// SAFETY: a Mapping owns its memory, which is not bound to a thread; it lends raw pointers only, and those
// who read or write through them (`copy.rs`, the kernel) do it in ways that allow others to do so too.
unsafe impl Send for Mapping {}
// SAFETY: as above: no method gives out a reference into the memory.
unsafe impl Sync for Mapping {}

fn pages_only(length: u64) -> NonZeroUsize {
    assert!(length.is_multiple_of(PAGE_BYTES), "mappings are whole pages");
    NonZeroUsize::new(index(length)).expect("mappings are not empty: no RAM block and no slab is")
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Mapping {
    /// The first `length` bytes of `file`, shared with whoever maps it too. Reserves what a hugetlb file needs.
    /// `huge` says whether it is one.
    pub(crate) fn shared(file: impl AsFd, length: u64, huge: bool) -> Result<Self, Errno> {
        let size = pages_only(length);
        // SAFETY: the kernel chooses the place, so that no memory in use is mapped over.
        let base = unsafe { mman::mmap(None, size, READ_WRITE, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self {
            base: base.cast(),
            length: size.get(),
            origin: Origin::Shared,
            huge,
        })
    }

    /// Private memory of ordinary pages.
    pub(crate) fn anonymous(length: u64) -> Result<Self, Errno> {
        let size = pages_only(length);
        // SAFETY: the kernel chooses the place, so that no memory in use is mapped over.
        let base = unsafe { mman::mmap_anonymous(None, size, READ_WRITE, MapFlags::MAP_PRIVATE)? };
        Ok(Self {
            base: base.cast(),
            length: size.get(),
            origin: Origin::Private,
            huge: false,
        })
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
        Ok(Self {
            base,
            length: size.get(),
            origin: Origin::HugepageRs(layout),
            huge: true,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// `pages` pages from byte `offset` on.
    ///
    /// # Panics
    /// Unless they are whole pages inside the mapping.
    pub(crate) fn span(&self, offset: u64, pages: u64) -> Span<'_> {
        let length = pages.checked_mul(PAGE_BYTES);
        let end = length.and_then(|length| offset.checked_add(length));
        let inside = end.is_some_and(|end| end <= self.length_u64()) && offset.is_multiple_of(PAGE_BYTES);
        assert!(
            inside,
            "{pages} pages at {offset:#x} do not lie in {:#x} bytes",
            self.length
        );
        Span {
            start: self.base.as_ptr().wrapping_add(index(offset)),
            pages,
            life: PhantomData,
        }
    }

    /// `pages` times a page's bytes from byte `offset` on, which may be any: only to be read from.
    ///
    /// # Panics
    /// Unless they lie inside the mapping.
    pub(crate) fn loose_span(&self, offset: u64, pages: u64) -> Span<'_> {
        Span {
            start: self.bytes(index(offset), index(pages * PAGE_BYTES)),
            pages,
            life: PhantomData,
        }
    }

    fn length_u64(&self) -> u64 {
        u64::try_from(self.length).unwrap_or(u64::MAX)
    }

    /// Copies bytes at `offset` out that nobody writes now; they need not be pages.
    ///
    /// # Panics
    /// Unless they lie inside the mapping.
    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) {
        let from = self.bytes(offset, out.len());
        // SAFETY: `bytes` has checked that they lie inside the mapping, which is readable; `out` is the caller's own. Who
        // asks knows that the kernel's read to there has completed and that no other is posted.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
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

    /// Has the memory come from NUMA nodes of the caller's choice. To be called before it is populated; in a shared mapping
    /// the choice stays with the file.
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
        // The kernel reads one bit less than it is told.
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

    /// Gives the memory back to the host, that of a file too; it reads as zeros from then on. Private huge pages go back
    /// from Linux 5.18 on, before that they stay until the mapping ends.
    pub(crate) fn give_back(&self) -> Result<(), Errno> {
        let advice = match self.origin {
            Origin::Private | Origin::HugepageRs(_) => MmapAdvise::MADV_DONTNEED,
            Origin::Shared => MmapAdvise::MADV_REMOVE,
        };
        // What is locked is not given back.
        // SAFETY: the range is this mapping, whose content unlocking does not change.
        unsafe { mman::munlock(self.base.cast(), self.length)? };
        self.advise(0, self.length, advice)
    }

    /// Whether it is a file's.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.origin, Origin::Shared)
    }

    /// Copies bytes to `offset` that nobody else reads or writes now; they need not be pages.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.bytes(offset, bytes.len());
        // SAFETY: `bytes` has checked that they lie inside the mapping, which is writable; no reference into it exists. Who
        // asks knows that no other thread uses them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// The word at byte `offset`, aligned, for atomic access by everybody who maps it.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(size_of::<u64>()), "words are aligned");
        let word = self.bytes(offset, size_of::<u64>()).cast::<u64>();
        // SAFETY: aligned and inside the mapping (`bytes` checked it), valid for as long as the borrow of it, and only
        // accessed atomically while it lives: memory of words is used for nothing else.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Gives `length` bytes at `offset` their memory now.
    fn populate(&self, offset: usize, length: usize) -> Result<(), Errno> {
        loop {
            match self.advise(offset, length, MmapAdvise::MADV_POPULATE_WRITE) {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                // Before Linux 5.14. `image.rs` has then reserved a file's memory; private memory has no SIGBUS to fear.
                Err(Errno::EINVAL) => return self.touch(offset, length),
                done => return done,
            }
        }
    }

    fn touch(&self, offset: usize, length: usize) -> Result<(), Errno> {
        for page in (offset..offset + length).step_by(PAGE_SIZE) {
            let word = self.bytes(page, size_of::<u64>()).cast::<u64>();
            // SAFETY: aligned and inside the mapping (`bytes` checked it), and only accessed atomically or outside
            // of Rust's memory model while it lives (`copy.rs`).
            unsafe { AtomicU64::from_ptr(word) }.fetch_or(0, Ordering::Relaxed);
        }
        Ok(())
    }

    fn advise(&self, offset: usize, length: usize, advice: MmapAdvise) -> Result<(), Errno> {
        let start = NonNull::new(self.bytes(offset, length)).ok_or(Errno::EFAULT)?;
        // SAFETY: the range lies in this mapping (`bytes` checked it). None of the advices used in this file unmaps
        // it; DONTNEED changes its content, which no reference of Rust's looks at.
        unsafe { mman::madvise(start.cast(), length, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: exactly what `mmap` gave; spans borrow the mapping, so none is left. Those who hold bare
            // addresses (operations of a ring) have ended before, which the contract of `Store` demands.
            Origin::Private | Origin::Shared => unsafe {
                let gone = mman::munmap(self.base.cast(), self.length);
                debug_assert_eq!(gone, Ok(()));
            },
            // SAFETY: as above, with the layout it was allocated with.
            Origin::HugepageRs(layout) => unsafe { hugepage_rs::dealloc(self.base.as_ptr(), layout) },
        }
    }
}

/// For an address that is aligned as a page, and means nothing.
#[repr(align(4096))]
struct PageAligned;

/// Whether this kernel has `MADV_POPULATE_WRITE` (Linux 5.14), which reports a lack of memory.
pub(crate) fn can_populate() -> bool {
    // Of zero bytes: the kernel looks at the advice and does nothing.
    // SAFETY: as no byte is meant, there is none that could be harmed.
    unsafe {
        mman::madvise(
            NonNull::<PageAligned>::dangling().cast(),
            0,
            MmapAdvise::MADV_POPULATE_WRITE,
        ) != Err(Errno::EINVAL)
    }
}

/// Gives all of `mappings` their memory, with several threads where the process may use several cores.
///
/// # Errors
/// `ENOMEM` or `EFAULT` where there is not enough of it.
pub(crate) fn populate(mappings: &[&Mapping]) -> Result<(), Errno> {
    let chunks_of = |mapping: &Mapping| mapping.len().div_ceil(POPULATE_CHUNK);
    let chunks: Vec<(&Mapping, usize)> = mappings
        .iter()
        .flat_map(|mapping| (0..chunks_of(mapping)).map(|chunk| (*mapping, chunk * POPULATE_CHUNK)))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((mapping, offset)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            mapping.populate(*offset, POPULATE_CHUNK.min(mapping.len() - offset))?;
        }
        Ok(())
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let helpers = cores
        .min(POPULATE_THREADS_MAX)
        .min(chunks.len())
        .saturating_sub(1);
    std::thread::scope(|scope| {
        // Without a thread to help, the work is done here.
        let help = || std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let helpers: Vec<_> = (0..helpers).map_while(|_| help()).collect();
        let mine = work();
        let join = |helper: std::thread::ScopedJoinHandle<'_, _>| helper.join().unwrap_or(Err(Errno::EIO));
        helpers.into_iter().map(join).fold(mine, Result::and)
    })
}

/// Whole pages inside a [`Mapping`]: readable, writable, valid for `'a`, and aligned to the page size unless they are
/// from [`Mapping::loose_span`].
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    start: *mut u8,
    pages: u64,
    life: PhantomData<&'a Mapping>,
}

impl Span<'_> {
    pub(crate) fn start(self) -> *mut u8 {
        self.start
    }

    pub(crate) fn pages(self) -> u64 {
        self.pages
    }

    pub(crate) fn bytes(self) -> usize {
        index(self.pages * PAGE_BYTES)
    }

    /// The first `pages` of it.
    pub(crate) fn first(self, pages: u64) -> Self {
        assert!(pages <= self.pages, "a part is not longer than the whole");
        Self { pages, ..self }
    }

    /// Writes it to `file` at `offset`. The kernel alone reads the pages, so others may write them meanwhile;
    /// what then reaches the file is a mix.
    pub(crate) fn write_to(self, file: &File, offset: u64) -> std::io::Result<()> {
        let mut done = 0;
        while done < self.bytes() {
            let at = i64::try_from(offset + u64::try_from(done).unwrap_or(u64::MAX));
            let at = at.map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
            let start = self.start.wrapping_add(done);
            // SAFETY: `bytes() - done` bytes from there on are inside the span, readable for as long as `self`.
            let wrote = unsafe { libc::pwrite(file.as_raw_fd(), start.cast(), self.bytes() - done, at) };
            match usize::try_from(wrote) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(wrote) => done += wrote,
                Err(_) => match std::io::Error::last_os_error() {
                    error if error.kind() == std::io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

/// Where a kernel is to put bytes of a packet: the address and length of an I/O vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LandingRun {
    /// First byte. It lies in memory of the [`crate::store::Store`] that filled the [`crate::store::Landing`], and is valid
    /// for as long as that store lives.
    pub address: *mut u8,
    /// Bytes from there on: whole pages.
    pub length: usize,
}

// SAFETY: an address alone; using it is unsafe anyway, and the memory behind it is not bound to a thread.
unsafe impl Send for LandingRun {}
// SAFETY: as above.
unsafe impl Sync for LandingRun {}

/// Words of zero that loom watches.
#[cfg(loom)]
pub(crate) fn zeroed_words(count: usize) -> Box<[crate::sync::AtomicU64]> {
    (0..count).map(|_| crate::sync::AtomicU64::new(0)).collect()
}

/// `count` words of zero. The operating system gives the memory on first touch, so words that are never written
/// cost address space only.
#[cfg(not(loom))]
pub(crate) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    const { assert!(align_of::<AtomicU64>() == align_of::<u64>()) }
    let words = vec![0u64; count].into_boxed_slice();
    // SAFETY: AtomicU64 has the size, the validity (documented by std) and the alignment (asserted above) of u64, and
    // the box is handed over whole.
    unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
}

/// A table of words, in memory of its own or in a mapping. Both are read in the same way.
pub(crate) struct Words {
    first: NonNull<crate::sync::AtomicU64>,
    count: usize,
    /// What the words lie in; without one they are a box.
    mapping: Option<Mapping>,
}

// SAFETY: the words are owned, by the box or the mapping, and atomics may be used by any thread.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// `count` words of zero in memory of their own.
    pub(crate) fn zeroed(count: usize) -> Self {
        let words = Box::into_raw(zeroed_words(count));
        Self {
            first: NonNull::new(words.cast()).expect("a box is somewhere"),
            count,
            mapping: None,
        }
    }
}

#[cfg(not(loom))]
impl Words {
    /// The first `count` words of a mapping, which is used for nothing else.
    pub(crate) fn mapped(mapping: Mapping, count: usize) -> Self {
        let first = mapping.bytes(0, count * size_of::<AtomicU64>());
        Self {
            // A mapping begins at a page.
            first: NonNull::new(first.cast()).expect("a mapping is somewhere"),
            count,
            mapping: Some(mapping),
        }
    }
}

#[cfg(loom)]
impl Words {
    /// What loom watches is no memory that could be mapped; its tests map none.
    pub(crate) fn mapped(_: Mapping, _: usize) -> Self {
        unreachable!("loom tests map nothing")
    }
}

impl std::ops::Deref for Words {
    type Target = [crate::sync::AtomicU64];

    fn deref(&self) -> &Self::Target {
        // SAFETY: `count` atomics from there on, in a box or a mapping (`bytes` checked the length) that this owns and that
        // goes with it; they are only accessed atomically.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.mapping.is_none() {
            // SAFETY: made by `Box::into_raw` of a box of that many words, and given back once.
            drop(unsafe {
                Box::from_raw(std::ptr::slice_from_raw_parts_mut(
                    self.first.as_ptr(),
                    self.count,
                ))
            });
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
impl crate::store::Landing {
    /// Lets the kernel fill the runs with `bytes`, as a ring does, but from a file.
    pub(crate) fn fill_by_kernel(&self, bytes: &[u8]) {
        use std::io::Write;
        let name = c"colo-ring-test";
        let mut file =
            File::from(nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).unwrap());
        file.write_all(bytes).unwrap();
        let vector = |run: &LandingRun| libc::iovec {
            iov_base: run.address.cast(),
            iov_len: run.length,
        };
        let vectors: Vec<_> = self.runs().iter().map(vector).collect();
        let count = i32::try_from(vectors.len()).unwrap();
        // SAFETY: the runs are memory of a store that the calling test keeps alive, and are as long as they say.
        let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, 0) };
        assert_eq!(usize::try_from(read), Ok(bytes.len()));
    }
}
