//! The errors of guest memory.

use crate::blocks::RamBlock;
use nix::errno::Errno;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a store could not be created, received into, recovered or dumped.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No memory for a RAM block.
    #[error(
        "no memory for ram block {block} of {mib} MiB: {source}; free some, raise the memory limit of this process's \
         cgroup, or (for a --ram-dir on hugetlbfs) give the pool more pages"
    )]
    NoImageMemory {
        /// The block's name.
        block: String,
        /// What was to be mapped, rounded up.
        mib: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// No memory for the RAM blocks that share a mapping.
    #[error(
        "no memory for the small ram blocks, {bytes} bytes: {source}; free some, or raise the memory limit of this process's \
         cgroup"
    )]
    NoSmallMemory {
        /// What they take together.
        bytes: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// No address space for the cache.
    #[error(
        "no memory for a cache of {bytes} bytes: {source}; free some, raise the memory limit of this process's cgroup, or (for \
         a --ram-dir on hugetlbfs) give the pool more pages"
    )]
    NoCacheMemory {
        /// What the guest's pages take.
        bytes: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// All slots of the cache are in use.
    #[error(
        "the pages that are waiting for their commit take {mib} MiB of cache, twice the guest's RAM: its primary sends \
         the same pages repeatedly"
    )]
    PoolFull {
        /// What the cache has.
        mib: u64,
    },
    /// Options that exclude each other.
    #[error(
        "a guest that runs on the ram image needs the cache mirror and the commit mode sync: the pages that it \
         changes are restored from the cache, before the primary goes on"
    )]
    RunningGuest,
    /// Mapped, but the memory cannot be allocated.
    #[error(
        "no memory for a guest of {bytes} bytes and the cache that it takes beside its ram image: {source}; free some, \
         or raise the memory limit of this process's cgroup"
    )]
    NoMemory {
        /// What the guest's pages take.
        bytes: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The directory for RAM images is on a disk.
    #[error(
        "{} is neither on tmpfs nor on hugetlbfs, so a ram image there would be written to a disk continuously; \
         use a directory below /dev/shm, or mount one of the two", .0.display()
    )]
    RamDirectory(PathBuf),
    /// The file of a RAM image exists already.
    #[error(
        "{} exists already: a ram image of an earlier session, which a virtual machine may still use; \
         remove it if nothing does", .0.display()
    )]
    RamFileExists(PathBuf),
    /// A file of an earlier receiver, or of another program, that cannot be used.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file could not be created or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A dump before the first commit.
    #[error("there is no committed checkpoint to dump yet: the guest is still in precopy")]
    NothingCommitted,
    /// A dump did not catch up with the guest.
    #[error(
        "the guest changes faster than the dump's disk writes, {passes} times over; dump to a faster disk or a tmpfs"
    )]
    DumpTooSlow {
        /// Passes over what had changed.
        passes: u32,
    },
}

impl StoreError {
    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        Self::File { path, source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        let (path, what) = (path.to_owned(), what.into());
        Self::Damaged { path, what }
    }

    pub(crate) fn no_small_memory(bytes: u64, errno: Errno) -> Self {
        let source = errno.into();
        Self::NoSmallMemory { bytes, source }
    }

    pub(crate) fn no_memory(block: &RamBlock, bytes: u64, errno: Errno) -> Self {
        Self::NoImageMemory {
            block: block.display_name(),
            mib: bytes.div_ceil(1 << 20),
            source: errno.into(),
        }
    }
}
