//! Populating: allocating the memory of mappings before it is used.
#![expect(unsafe_code, reason = "madvise on mapped memory")]

use crate::store::memory::mapping::Mapping;
use crate::units::PAGE_SIZE;
use nix::errno::Errno;
use nix::sys::mman::{self, MmapAdvise};
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How much one thread populates at a time.
const POPULATE_CHUNK: usize = 64 << 20;

/// Most threads that populate at once: the kernel's zeroing is bound by memory bandwidth beyond that.
const POPULATE_THREADS_MAX: usize = 8;

impl Mapping {
    /// Allocates the memory of `length` bytes at `offset` now.
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
}

/// For an address that is aligned as a page, and means nothing.
#[repr(align(4096))]
struct PageAligned;

/// Whether this kernel has `MADV_POPULATE_WRITE` (Linux 5.14), which reports a lack of memory.
pub(crate) fn can_populate() -> bool {
    // Of zero bytes: the kernel checks the advice and does nothing.
    // SAFETY: the range is empty.
    unsafe {
        mman::madvise(
            NonNull::<PageAligned>::dangling().cast(),
            0,
            MmapAdvise::MADV_POPULATE_WRITE,
        ) != Err(Errno::EINVAL)
    }
}

/// Allocates the memory of all `mappings`, with several threads where the process may use several cores.
///
/// # Errors
/// `ENOMEM` or `EFAULT` where there is not enough of it.
pub(crate) fn populate(mappings: &[&Mapping]) -> Result<(), Errno> {
    let chunks_of = |mapping: &Mapping| mapping.len().div_ceil(POPULATE_CHUNK);
    let mut chunks: Vec<(&Mapping, usize)> = Vec::new();
    let count = mappings.iter().map(|mapping| chunks_of(mapping)).sum();
    chunks.try_reserve_exact(count).map_err(|_| Errno::ENOMEM)?;
    chunks.extend(
        mappings
            .iter()
            .flat_map(|mapping| (0..chunks_of(mapping)).map(|chunk| (*mapping, chunk * POPULATE_CHUNK))),
    );
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
