//! Files in the operator's RAM directory, on hugetlbfs or tmpfs: their names, and when they are removed.
//!
//! All files of a guest begin with its **label** and a dot. What follows is the name of a RAM block, or one with a `~` in
//! front, which no block has (`file_names.rs`): those in which a checkpoint outlives its receiver (`record.rs`).

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
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

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

    /// The labels of the guests that have files here. Names that are not text belong to other programs.
    pub(crate) fn labels(&self) -> Result<BTreeSet<String>, StoreError> {
        let failed = |error| StoreError::file(&self.path, error);
        let mut labels = BTreeSet::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some((label, _)) = name.to_str().and_then(|name| name.split_once('.')) {
                labels.insert(label.to_owned());
            }
        }
        Ok(labels)
    }
}

/// The files of one guest. They are removed when this is dropped, unless they are to be [kept](Self::keep).
pub(crate) struct RamFiles {
    directory: RamDirectory,
    label: String,
    made: Mutex<Vec<PathBuf>>,
    kept: AtomicBool,
    /// Shows other receivers that this process has the guest, until its files are removed.
    lock: OnceLock<Flock<OwnedFd>>,
}

impl RamFiles {
    pub(crate) fn new(directory: RamDirectory, label: &str) -> Self {
        Self {
            directory,
            label: label.to_owned(),
            made: Mutex::default(),
            kept: AtomicBool::new(false),
            lock: OnceLock::new(),
        }
    }

    pub(crate) fn is_fine_grained(&self) -> bool {
        self.directory.is_fine_grained()
    }

    /// Whether a block of that length is put here in any case. One smaller than a huge page would waste most of it.
    pub(crate) fn suits(&self, length: u64) -> bool {
        self.directory.huge_page.is_none_or(|page| length >= page)
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
        let granule = self.directory.huge_page.unwrap_or(PAGE_BYTES);
        // A guest's blocks add up to less than 2^64 bytes, and a mapping of that would fail with an error of its own.
        let length = length.checked_next_multiple_of(granule);
        Ok(MemoryFile {
            path,
            file: file.into(),
            length: length.unwrap_or(u64::MAX - (granule - 1)),
            granule,
            huge: self.directory.huge_page.is_some(),
        })
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
        if !about.is_file() || about.uid() != nix::unistd::geteuid().as_raw() {
            return Err(StoreError::damaged(&path, "it is not a file of this user"));
        }
        self.made().push(path.clone());
        let granule = self.directory.huge_page.unwrap_or(PAGE_BYTES);
        Ok(Some(MemoryFile {
            path,
            file: file.into(),
            length: about.len() / granule * granule,
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

    /// Owns every file of this label, so that they are removed with this.
    pub(crate) fn own_all(&self) -> Result<(), StoreError> {
        let failed = |error| StoreError::file(&self.directory.path, error);
        let prefix = format!("{}.", self.label);
        for entry in std::fs::read_dir(&self.directory.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix))
            {
                self.made().push(entry.path());
            }
        }
        Ok(())
    }

    /// Removes the files whose names begin so. They stay mapped where they are.
    pub(crate) fn remove(&self, prefix: &str) {
        let start = self.path(prefix);
        let start = start.as_os_str().as_encoded_bytes();
        self.made().retain(|path| {
            let goes = path.as_os_str().as_encoded_bytes().starts_with(start);
            if goes {
                // It fails if the file or the directory is gone, which is what is wanted.
                drop(std::fs::remove_file(path));
            }
            !goes
        });
    }

    /// Removes the files' names; what is mapped of them stays.
    pub(crate) fn remove_all(&self) {
        for path in self.made().drain(..) {
            // It fails if the file or the directory is gone, which is what is wanted.
            drop(std::fs::remove_file(path));
        }
    }

    /// Whether the files stay when this is dropped.
    pub(crate) fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::Relaxed);
    }
}

impl Drop for RamFiles {
    fn drop(&mut self) {
        // A receiver that panics must not remove a checkpoint.
        if !self.kept.load(Ordering::Relaxed) && !std::thread::panicking() {
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

    /// Makes it long enough for `bytes`, with room for more.
    pub(crate) fn grow_for(&mut self, bytes: u64) -> Result<Mapping, Errno> {
        let wanted = bytes.checked_next_power_of_two().ok_or(Errno::EFBIG)?;
        self.length = wanted
            .checked_next_multiple_of(self.granule)
            .ok_or(Errno::EFBIG)?;
        self.map_owned()
    }

    fn set_length(&self) -> Result<i64, Errno> {
        let signed = i64::try_from(self.length).map_err(|_| Errno::EFBIG)?;
        nix::unistd::ftruncate(&self.file, signed)?;
        Ok(signed)
    }
}
