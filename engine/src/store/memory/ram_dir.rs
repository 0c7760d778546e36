//! Files in the operator's RAM directory, on hugetlbfs or tmpfs: their names, and when they are removed.
//!
//! All files of a guest begin with its **label** and a dot. What follows is the name of a RAM block, or one with a `~` in
//! front, which no block has (`file_names.rs`): those in which a checkpoint outlives its receiver (`record.rs`).

use crate::failpoint;
use crate::files::{self, Readers};
use crate::store::StoreError;
use crate::store::memory::huge::HUGE_2M;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::populate::can_populate;
use crate::units::PAGE_BYTES;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, OFlag, fallocate};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use std::collections::BTreeSet;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What the names of the segments of disks' logs begin with.
pub(crate) const LOG_FILES: &str = "~log-";

/// The operator's directory for RAM images.
pub(crate) struct RamDirectory {
    path: PathBuf,
    /// Page size, if it is a hugetlbfs.
    huge_page: Option<u64>,
}

impl RamDirectory {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let refused = |errno: Errno| StoreError::file(path, errno.into());
        let system = statfs(path).map_err(refused)?;
        let huge_page = match system.filesystem_type() {
            HUGETLBFS_MAGIC => Some(u64::try_from(system.block_size()).map_err(|_| refused(Errno::EINVAL))?),
            TMPFS_MAGIC => None,
            _ => return Err(StoreError::RamDirectory(path.to_owned())),
        };
        // A QEMU that maps a file of it has another working directory.
        let path = path
            .canonicalize()
            .map_err(|error| StoreError::file(path, error))?;
        Ok(Self { path, huge_page })
    }

    /// Whether checkpoints can outlive their receiver here: not where the smallest file takes a gigabyte.
    pub(crate) fn is_fine_grained(&self) -> bool {
        self.huge_page.is_none_or(|page| page <= HUGE_2M)
    }

    /// The labels of the guests that have files here.
    pub(crate) fn labels(&self) -> Result<BTreeSet<String>, StoreError> {
        let names = self.names()?;
        let label = |name: &String| name.split_once('.').map(|(label, _)| label.to_owned());
        Ok(names.iter().filter_map(label).collect())
    }

    /// The names of all files. Those that are not text belong to other programs.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let failed = |error| StoreError::file(&self.path, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }

    /// Bytes that files may still take; none where nothing limits them but the host's memory.
    fn free_bytes(&self) -> Result<Option<u64>, Errno> {
        let system = statfs(&self.path)?;
        let block_bytes = u64::try_from(system.block_size()).map_err(|_| Errno::EINVAL)?;
        let is_limited = system.blocks() > 0;
        Ok(is_limited.then(|| system.blocks_available().saturating_mul(block_bytes)))
    }
}

/// The files of one guest. They are removed when this is dropped, unless they are to be [kept](Self::keep).
pub(crate) struct RamFiles {
    directory: RamDirectory,
    label: String,
    /// In the order in which they were made, and are removed from the end: the first one is the last to go.
    made: Mutex<Vec<PathBuf>>,
    kept: AtomicBool,
    /// Shows other receivers that this process has the guest, until its files are removed.
    lock: OnceLock<Flock<OwnedFd>>,
    /// Why the directory did not say what room it has, the first time that it did not.
    unknown_room: OnceLock<Errno>,
    /// Whether that was taken to be reported.
    is_reported: AtomicBool,
}

impl RamFiles {
    pub(crate) fn new(directory: RamDirectory, label: &str) -> Self {
        Self {
            directory,
            label: label.to_owned(),
            made: Mutex::default(),
            kept: AtomicBool::new(false),
            lock: OnceLock::new(),
            unknown_room: OnceLock::new(),
            is_reported: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_fine_grained(&self) -> bool {
        self.directory.is_fine_grained()
    }

    /// Whether a block of that length is put here in any case. One smaller than a huge page would waste most of it.
    pub(crate) fn suits(&self, length: u64) -> bool {
        self.directory.huge_page.is_none_or(|page| length >= page)
    }

    /// Memory that a file of so many bytes takes: whole pages of what it is made of.
    pub(crate) fn bytes_of(&self, length: u64) -> u64 {
        length
            .checked_next_multiple_of(self.granule())
            .unwrap_or(u64::MAX)
    }

    fn granule(&self) -> u64 {
        self.directory.huge_page.unwrap_or(PAGE_BYTES)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory.path
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path.join(format!("{}.{name}", self.label))
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Vec<PathBuf>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a file for at least `length` bytes.
    pub(crate) fn create(&self, name: &str, length: u64) -> Result<MemoryFile, StoreError> {
        let path = self.path(name);
        let made = files::create_new(&path, Readers::Owner);
        let file = made.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StoreError::RamFileExists(path.clone()),
            _ => StoreError::file(&path, error),
        })?;
        self.made().push(path.clone());
        failpoint::may_be_killed();
        let granule = self.granule();
        // A guest's blocks add up to less than 2^64 bytes, and a mapping of that would fail with an error of its own.
        let length = length.checked_next_multiple_of(granule);
        Ok(MemoryFile {
            path,
            file: file.into(),
            length: length.unwrap_or(u64::MAX - (granule - 1)),
            is_empty: true,
            granule,
            huge: self.directory.huge_page.is_some(),
        })
    }

    /// Bytes that files may still take; none where nothing limits them, and where the directory does not say.
    fn free_bytes(&self) -> Option<u64> {
        self.directory.free_bytes().unwrap_or_else(|errno| {
            // A guest must not end for that: what is allocated without room is an error, too, only a later one.
            self.unknown_room.get_or_init(|| errno);
            None
        })
    }

    /// Why the directory does not say what room it has, and is filled up to its end; once.
    pub(crate) fn take_unknown_room(&self) -> Option<StoreError> {
        let errno = *self.unknown_room.get()?;
        let is_new = !self.is_reported.swap(true, Ordering::Relaxed);
        is_new.then(|| StoreError::file(&self.directory.path, errno.into()))
    }

    /// Whether the directory has room for so many bytes more.
    ///
    /// # Errors
    /// If not: nothing should be allocated, or it would be full for others, too.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<(), StoreError> {
        match self.free_bytes() {
            Some(free) if free < bytes => Err(self.full(bytes, free)),
            _ => Ok(()),
        }
    }

    fn full(&self, needed: u64, free: u64) -> StoreError {
        StoreError::RamDirectoryFull {
            directory: self.directory.path.clone(),
            needed,
            free,
            remedy: match self.directory.huge_page {
                Some(_) => "give the pool of huge pages more (vm.nr_hugepages, or the size of the mount)",
                None => "enlarge it (mount -o remount,size=...)",
            },
        }
    }

    /// Whether it is for a lack of room that memory of `bytes` bytes was refused; then the error that says so. What was
    /// allocated of it was given back, or will be.
    pub(crate) fn lack(&self, bytes: u64, errno: Errno) -> Option<StoreError> {
        let free = self.free_bytes();
        let is_full = match errno {
            Errno::ENOSPC => true,
            // What a file system that is full is to a thread that touches memory.
            Errno::EFAULT | Errno::ENOMEM => free.is_some_and(|free| free < bytes),
            _ => false,
        };
        is_full.then(|| self.full(bytes, free.unwrap_or(0)))
    }

    /// Why memory for a file was refused.
    pub(crate) fn refused(&self, path: &Path, bytes: u64, errno: Errno) -> StoreError {
        let lack = self.lack(bytes, errno);
        lack.unwrap_or_else(|| StoreError::file(path, errno.into()))
    }

    /// Makes a file long enough for `bytes`, with room for more, and maps it again.
    ///
    /// # Errors
    /// If there is no room. It is as it was then.
    pub(crate) fn grow(&self, file: &mut MemoryFile, bytes: u64) -> Result<Mapping, StoreError> {
        let before = file.length;
        let too_long = || StoreError::file(&file.path, Errno::EFBIG.into());
        let wanted = bytes.checked_next_power_of_two();
        let wanted = wanted.and_then(|wanted| wanted.checked_next_multiple_of(file.granule));
        let wanted = wanted.ok_or_else(too_long)?;
        self.check_room(wanted - before)?;
        file.length = wanted;
        file.map_owned().map_err(|errno| {
            file.length = before;
            // What was allocated goes; if even that fails, with the file.
            let _ = file.set_length();
            self.refused(&file.path, wanted - before, errno)
        })
    }

    /// Bytes of a file that may not exist.
    pub(crate) fn length_of(&self, name: &str) -> u64 {
        std::fs::symlink_metadata(self.path(name)).map_or(0, |about| about.len())
    }

    /// Whether there are other files of the guest than that one.
    pub(crate) fn are_others(&self, name: &str) -> Result<bool, StoreError> {
        let prefix = format!("{}.", self.label);
        let names = self.directory.names()?;
        let mut own = names.iter().filter_map(|found| found.strip_prefix(&prefix));
        Ok(own.any(|found| found != name))
    }

    /// Opens a file of an earlier receiver, if it exists, with all of its length.
    ///
    /// # Errors
    /// If it is not a file of this user's.
    pub(crate) fn open(&self, name: &str) -> Result<Option<MemoryFile>, StoreError> {
        let path = self.path(name);
        let opened = File::options()
            .read(true)
            .write(true)
            // Never through a link: other users may write to the directory.
            .custom_flags(OFlag::O_NOFOLLOW.bits() | OFlag::O_NONBLOCK.bits())
            .open(&path);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| StoreError::file(&path, error))?,
        };
        let about = file.metadata().map_err(|error| StoreError::file(&path, error))?;
        if !is_own_file(&about) {
            return Err(StoreError::damaged(&path, "it is not a file of this user"));
        }
        self.made().push(path.clone());
        let granule = self.granule();
        Ok(Some(MemoryFile {
            path,
            file: file.into(),
            length: about.len() / granule * granule,
            is_empty: about.len() == 0,
            granule,
            huge: self.directory.huge_page.is_some(),
        }))
    }

    /// Locks the guest by one of its files; false if another process has it.
    pub(crate) fn lock(&self, file: &MemoryFile) -> Result<bool, StoreError> {
        let failed = |error| StoreError::file(&file.path, error);
        let own = file.file.try_clone().map_err(failed)?;
        match Flock::lock(own, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(self.lock.set(lock).is_ok()),
            Err((_, Errno::EWOULDBLOCK)) => Ok(false),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// Owns the files that `is_own` names, so that they are removed with this. What is not a file of this user is left alone.
    pub(crate) fn own(&self, is_own: impl Fn(&str) -> bool) -> Result<(), StoreError> {
        let prefix = format!("{}.", self.label);
        for name in self.directory.names()? {
            if !name.strip_prefix(&prefix).is_some_and(&is_own) {
                continue;
            }
            let path = self.directory.path.join(&name);
            let about = std::fs::symlink_metadata(&path);
            let is_file = about.is_ok_and(|about| is_own_file(&about));
            let mut made = self.made();
            if is_file && !made.contains(&path) {
                made.push(path);
            }
        }
        Ok(())
    }

    /// Removes the files whose names begin so. They stay mapped where they are.
    pub(crate) fn remove(&self, prefix: &str) {
        let start = self.path(prefix);
        let start = start.as_os_str().as_encoded_bytes();
        self.remove_if(|path| path.as_os_str().as_encoded_bytes().starts_with(start));
    }

    /// Removes one file.
    pub(crate) fn remove_one(&self, name: &str) {
        let gone = self.path(name);
        self.remove_if(|path| path == gone);
    }

    fn remove_if(&self, goes: impl Fn(&Path) -> bool) {
        self.made().retain(|path| {
            let goes = goes(path);
            if goes {
                remove(path);
            }
            !goes
        });
    }

    /// Removes the files' names; what is mapped of them stays.
    pub(crate) fn remove_all(&self) {
        self.made().drain(..).rev().for_each(|path| remove(&path));
    }

    /// Whether the files stay when this is dropped.
    pub(crate) fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::Relaxed);
    }

    /// Whether the files are removed when this is dropped.
    pub(crate) fn go_with_this(&self) -> bool {
        // A receiver that panics must not remove a checkpoint.
        !self.kept.load(Ordering::Relaxed) && !std::thread::panicking()
    }

    /// Whether the file that the guest is locked by still has a name.
    pub(crate) fn are_there(&self) -> bool {
        let about = self.lock.get().map(|lock| nix::sys::stat::fstat(&**lock));
        about.is_some_and(|about| about.is_ok_and(|about| about.st_nlink > 0))
    }
}

fn remove(path: &Path) {
    // It fails if the file or the directory is gone, which is what is wanted.
    drop(std::fs::remove_file(path));
    failpoint::may_be_killed();
}

fn is_own_file(about: &Metadata) -> bool {
    about.is_file() && about.uid() == nix::unistd::geteuid().as_raw()
}

impl Drop for RamFiles {
    fn drop(&mut self) {
        if self.go_with_this() {
            self.remove_all();
        }
    }
}

/// A file to map.
pub(crate) struct MemoryFile {
    pub(crate) path: PathBuf,
    file: OwnedFd,
    /// Bytes to map: whole pages of what it is made of.
    pub(crate) length: u64,
    /// Whether it had no byte when it was opened.
    pub(crate) is_empty: bool,
    granule: u64,
    huge: bool,
}

impl MemoryFile {
    /// A file in memory without a name.
    pub(crate) fn unnamed(file: OwnedFd, length: u64, huge: bool) -> Self {
        Self {
            path: PathBuf::new(),
            file,
            length,
            is_empty: true,
            granule: PAGE_BYTES,
            huge,
        }
    }

    /// Maps it, whose memory is not yet populated.
    pub(crate) fn map(&self) -> Result<Mapping, Errno> {
        let signed = self.set_length()?;
        if !self.huge && !can_populate() {
            // The file must own its memory before it is touched, or a lack of it is a SIGBUS then.
            fallocate(&self.file, FallocateFlags::empty(), 0, signed)?;
        }
        Mapping::shared(&self.file, self.length, self.huge)
    }

    /// Allocates its memory, and maps it: touching it later cannot fail.
    pub(crate) fn map_owned(&self) -> Result<Mapping, Errno> {
        let signed = self.set_length()?;
        fallocate(&self.file, FallocateFlags::empty(), 0, signed)?;
        Mapping::shared(&self.file, self.length, self.huge)
    }

    fn set_length(&self) -> Result<i64, Errno> {
        let signed = i64::try_from(self.length).map_err(|_| Errno::EFBIG)?;
        nix::unistd::ftruncate(&self.file, signed)?;
        Ok(signed)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn room_that_is_not_known_is_reported_once() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("ram");
        std::fs::create_dir(&path).unwrap();
        let files = RamFiles::new(RamDirectory::open(&path).unwrap(), "test");
        files.check_room(1).unwrap();
        assert!(files.take_unknown_room().is_none());
        std::fs::remove_dir(&path).unwrap();
        for _ in 0..2 {
            files.check_room(u64::MAX).unwrap();
        }
        let reported = files.take_unknown_room().unwrap().to_string();
        assert!(reported.contains("No such file"), "{reported}");
        files.check_room(1).unwrap();
        assert!(files.take_unknown_room().is_none());
    }
}
