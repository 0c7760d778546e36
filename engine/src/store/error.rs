//! The errors of guest memory.

use crate::blocks::RamBlock;
use crate::budget::BudgetError;
use crate::text::mebibytes;
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
        "no memory for the small ram blocks, {}: {source}; free some, or raise the memory limit of this process's \
         cgroup", mebibytes(*bytes)
    )]
    NoSmallMemory {
        /// What they take together.
        bytes: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// No address space for the cache.
    #[error(
        "no memory for a cache of {}: {source}; free some, raise the memory limit of this process's cgroup, or (for \
         a --ram-dir on hugetlbfs) give the pool more pages", mebibytes(*bytes)
    )]
    NoCacheMemory {
        /// What the guest's pages take.
        bytes: u64,
        /// The error of the kernel.
        source: io::Error,
    },
    /// What it would take exceeds what guests may take together.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// No memory for what is counted page by page.
    #[error(
        "no memory for a table of {}; free some, or raise the limit of this process's address space (ulimit -v)",
        mebibytes(*bytes as u64)
    )]
    NoTables {
        /// What was to be allocated.
        bytes: usize,
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
        "no memory for a guest of {} and the cache that it takes beside its ram image: {source}; free some, \
         or raise the memory limit of this process's cgroup", mebibytes(*bytes)
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
    /// The directory for RAM images is not there.
    #[error(
        "{shown}, the --ram-dir, does not exist{}: make it with `install -d -m 0700 {shown}`, or give --create-ram-dir",
        after_reboot(directory), shown = directory.display()
    )]
    RamDirectoryMissing {
        /// Which.
        directory: PathBuf,
    },
    /// The directory for RAM images cannot be used by this user.
    #[error(
        "{shown}, the --ram-dir, cannot be used by this user (uid {user}): {source}; `chown {user} {shown}` as root, or give \
         another directory", shown = directory.display(), user = nix::unistd::geteuid()
    )]
    RamDirectoryDenied {
        /// Which.
        directory: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A directory for RAM images that is full, or would be.
    #[error(
        "{}, the --ram-dir, has no room: {} MiB more are needed, and {} MiB are free; {remedy}, or discard checkpoints that are \
         not needed", directory.display(), needed.div_ceil(1 << 20), free >> 20
    )]
    RamDirectoryFull {
        /// Which.
        directory: PathBuf,
        /// Bytes that were to be allocated.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// What to do, by the kind of the file system.
        remedy: &'static str,
    },
    /// A directory for RAM images that another receiver has.
    #[error(
        "{}, the --ram-dir, is used by {by}: give each receiver a directory of its own, or end that one", directory.display()
    )]
    RamDirectoryInUse {
        /// Which.
        directory: PathBuf,
        /// The other process.
        by: String,
    },
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
    /// A file of a dump was not written.
    #[error("the dump of {what}: {source}")]
    Dump {
        /// What was to be written: a block by its name, or the device state.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
    /// A dump to other blocks than the guest has.
    #[error("a dump of {blocks} ram blocks cannot go to {files} files")]
    DumpTargets {
        /// Files that it was to go to.
        files: usize,
        /// Blocks of the guest.
        blocks: usize,
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

/// What is in a tmpfs of the system is gone after each reboot.
fn after_reboot(path: &Path) -> &'static str {
    match path.starts_with("/dev/shm") || path.starts_with("/run") {
        true => " (nothing there outlives a reboot)",
        false => "",
    }
}

impl StoreError {
    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        Self::File { path, source }
    }

    pub(crate) fn dump(what: &str, source: io::Error) -> Self {
        let what = what.to_owned();
        Self::Dump { what, source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        let (path, what) = (path.to_owned(), what.into());
        Self::Damaged { path, what }
    }

    /// There is no memory for so many values.
    pub(crate) fn no_tables<T>(count: usize) -> Self {
        let bytes = count.saturating_mul(size_of::<T>());
        Self::NoTables { bytes }
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
