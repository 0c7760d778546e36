//! Pieces of mapped memory, as raw pointers with a bound and a lifetime.
//!
//! What a copy may assume of its operands is in their types: a [`PageSpan`] is aligned, not empty, and may be written; a
//! [`ReadSpan`] is not empty, may begin at any address, and may only be read.
#![expect(unsafe_code, reason = "addresses within a mapping")]

use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::units::PAGE_BYTES;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

/// At least one whole page inside a [`Mapping`], aligned to the page size: readable and writable for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct PageSpan<'a> {
    start: *mut u8,
    pages: u64,
    mapping: PhantomData<&'a Mapping>,
}

/// The bytes of at least one page inside a [`Mapping`], at any address: readable for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct ReadSpan<'a> {
    start: *const u8,
    pages: u64,
    mapping: PhantomData<&'a Mapping>,
}

impl PageSpan<'_> {
    /// # Safety
    /// `start` is aligned to a page; from there on `pages` pages, at least one, are mapped for reading and writing during the
    /// lifetime.
    pub(super) unsafe fn new(start: *mut u8, pages: u64) -> Self {
        Self {
            start,
            pages,
            mapping: PhantomData,
        }
    }

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
    ///
    /// # Panics
    /// Unless they are at least one, and no more than it has.
    pub(crate) fn first(self, pages: u64) -> Self {
        assert!(
            (1..=self.pages).contains(&pages),
            "{pages} pages are not a part of {}",
            self.pages
        );
        Self { pages, ..self }
    }

    /// Writes the pages to `file` at `offset`. Only the kernel reads them, so other threads may write them meanwhile; the file then
    /// gets a mix.
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

impl ReadSpan<'_> {
    /// # Safety
    /// From `start` on the bytes of `pages` pages, at least one, are mapped for reading during the lifetime.
    pub(super) unsafe fn new(start: *const u8, pages: u64) -> Self {
        Self {
            start,
            pages,
            mapping: PhantomData,
        }
    }

    pub(crate) fn start(self) -> *const u8 {
        self.start
    }

    pub(crate) fn pages(self) -> u64 {
        self.pages
    }
}

impl<'a> From<PageSpan<'a>> for ReadSpan<'a> {
    fn from(span: PageSpan<'a>) -> Self {
        Self {
            start: span.start,
            pages: span.pages,
            mapping: PhantomData,
        }
    }
}

/// Where the kernel puts bytes of a packet: address and length of an I/O vector.
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

/// Has the kernel fill `runs` with `bytes`, as a ring does, but from a file.
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) fn fill_by_kernel(runs: &[LandingRun], bytes: &[u8]) {
    use std::io::Write;
    let name = c"colo-ring-test";
    let mut file =
        File::from(nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).unwrap());
    file.write_all(bytes).unwrap();
    let vector = |run: &LandingRun| libc::iovec {
        iov_base: run.address.cast(),
        iov_len: run.length,
    };
    let vectors: Vec<_> = runs.iter().map(vector).collect();
    let count = i32::try_from(vectors.len()).unwrap();
    // SAFETY: the runs are memory of a store that the calling test keeps alive, and are as long as they say.
    let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, 0) };
    assert_eq!(usize::try_from(read), Ok(bytes.len()));
}
