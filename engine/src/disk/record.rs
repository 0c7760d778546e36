//! The record of a disk, `NAME.~record` beside its base: what a later receiver must know of it. Locked by the receiver that serves the disk.
//!
//! | word | content |
//! |---|---|
//! | 0, 8 | magic, version |
//! | 16, 24 | the id of its log, the size of the base |
//! | 32 | checksum of the three words before it |
//! | 64 | state |
//! | 72 | one more than the committed checkpoint, in the record of a session's first disk and without a RAM record |
//! | 80 | the session's number |
//! | 128, 256 | texts behind their lengths: the session's first disk, the RAM directory |
//!
//! The state is stored last of what belongs together. Numbers are words of 64 bits in this host's byte order.

use super::DiskError;
use crate::failpoint;
use crate::store::memory::copy;
use crate::store::memory::mapping::Mapping;
use crate::text::printable;
use crate::units::PAGE_BYTES;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use rand::TryRng;
use rand::rngs::SysRng;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const MAGIC: u64 = u64::from_be_bytes(*b"\x89CLDSK\r\n");
const VERSION: u64 = 2;

mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const LOG: usize = 16;
    pub(super) const SIZE: usize = 24;
    pub(super) const CHECK: usize = 32;
    pub(super) const STATE: usize = 64;
    pub(super) const COMMITTED: usize = 72;
    pub(super) const SESSION: usize = 80;
    pub(super) const LEADER: usize = 128;
    pub(super) const RAM_DIR: usize = 256;
}

/// Bits of the state word.
const COMMITTED: u64 = 1;
const OWN: u64 = 2;
const GIVEN_UP: u64 = 4;

/// Longest text that fits.
const TEXT_MAX: usize = 3800;

/// The extension of records.
pub(crate) const SUFFIX: &str = ".~record";

/// Which checkpoints a disk's log belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ownership {
    pub(crate) session: u64,
    /// The first disk of the session.
    pub(crate) leader: String,
    /// The directory with the commit record of the RAM; none if the first disk's record is that.
    pub(crate) ram_dir: Option<String>,
}

/// See the module.
pub(crate) struct DiskRecord {
    path: PathBuf,
    words: Mapping,
    /// Whether the file stays when this is dropped, or is removed already.
    is_kept_or_removed: AtomicBool,
    _lock: Flock<File>,
}

impl DiskRecord {
    pub(crate) fn path_of(directory: &Path, disk: &str) -> PathBuf {
        directory.join(format!("{disk}{SUFFIX}"))
    }

    /// Opens and locks a record, which is created if there is none.
    fn open(path: &Path, create: bool) -> Result<(Self, bool), DiskError> {
        let failed = |source| DiskError::File {
            path: path.to_owned(),
            source,
        };
        loop {
            let mut options = File::options();
            options.read(true).write(true).mode(0o600);
            options.custom_flags(OFlag::O_NOFOLLOW.bits() | OFlag::O_NONBLOCK.bits());
            let file = options.create(create).open(path).map_err(failed)?;
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EWOULDBLOCK)) => return Err(DiskError::OtherReceiver(path.to_owned())),
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            let about = lock.metadata().map_err(failed)?;
            if about.nlink() == 0 {
                // Its owner has removed it meanwhile.
                continue;
            }
            if !about.is_file() || about.uid() != nix::unistd::geteuid().as_raw() {
                return Err(failed(io::Error::other("it is not a file of this user")));
            }
            let is_new = about.len() == 0;
            if !is_new && about.len() < PAGE_BYTES {
                return Err(DiskError::Damaged {
                    path: path.to_owned(),
                    what: format!(
                        "it has {} bytes, and a record has {PAGE_BYTES}: remove it if no checkpoint of this disk is needed",
                        about.len()
                    ),
                });
            }
            if is_new {
                lock.set_len(PAGE_BYTES).map_err(failed)?;
            }
            let length = i64::try_from(PAGE_BYTES).unwrap_or(0);
            nix::fcntl::fallocate(&*lock, nix::fcntl::FallocateFlags::empty(), 0, length)
                .map_err(|errno| failed(errno.into()))?;
            let words = Mapping::shared(&*lock, PAGE_BYTES, false).map_err(|errno| failed(errno.into()))?;
            let record = Self {
                path: path.to_owned(),
                words,
                is_kept_or_removed: AtomicBool::new(false),
                _lock: lock,
            };
            return Ok((record, is_new));
        }
    }

    /// Creates the record of a disk of `size` bytes for a connection, in place of one that is not needed any more.
    ///
    /// # Errors
    /// If another receiver serves the disk, or a checkpoint may need it.
    pub(crate) fn create(directory: &Path, disk: &str, size: u64) -> Result<Self, DiskError> {
        let (record, is_new) = Self::open(&Self::path_of(directory, disk), true)?;
        if !is_new && record.is_needed() {
            // Whatever is wrong with it: it stays, as long as a checkpoint may need it.
            record.keep();
            if record.get(at::MAGIC) == MAGIC && record.get(at::VERSION) != VERSION {
                return Err(record.damaged(
                    "another version of colo-ring has left it: let that one fail over or discard the checkpoint, or remove the file",
                ));
            }
            if !record.is_valid() {
                return Err(record.damaged(
                    "wrong magic or checksum, and a checkpoint may need it: remove it if none of this disk is needed",
                ));
            }
            let Ownership { session, ram_dir, .. } = record.ownership()?;
            let ram_dir = ram_dir.unwrap_or_else(|| "no RAM directory".to_owned());
            return Err(DiskError::Orphan {
                record: record.path.clone(),
                owner: format!("session {session} in {}", printable(&ram_dir)),
            });
        }
        let log = SysRng.try_next_u64().map_err(|error| DiskError::File {
            path: record.path.clone(),
            source: io::Error::other(error),
        })?;
        record.put(at::STATE, 0);
        record.put(at::MAGIC, 0);
        record.put(at::COMMITTED, 0);
        record.put(at::VERSION, VERSION);
        record.put(at::LOG, log);
        record.put(at::SIZE, size);
        record.put(at::CHECK, record.check());
        record.put(at::MAGIC, MAGIC);
        Ok(record)
    }

    /// Opens the record that an earlier receiver has left.
    ///
    /// # Errors
    /// If there is none, or it is in use or damaged.
    pub(crate) fn find(directory: &Path, disk: &str) -> Result<Self, DiskError> {
        let (record, _) = Self::open(&Self::path_of(directory, disk), false)?;
        match record.is_valid() || record.get(at::STATE) & COMMITTED == 0 {
            true => Ok(record),
            false => Err(record.keep().damaged("wrong magic, version or checksum")),
        }
    }

    fn damaged(&self, what: &str) -> DiskError {
        DiskError::Damaged {
            path: self.path.clone(),
            what: what.to_owned(),
        }
    }

    fn get(&self, at: usize) -> u64 {
        self.words.word(at).load(Ordering::Acquire)
    }

    fn put(&self, at: usize, value: u64) {
        copy::fence();
        self.words.word(at).store(value, Ordering::Release);
        failpoint::may_be_killed();
    }

    fn check(&self) -> u64 {
        let words = [at::VERSION, at::LOG, at::SIZE].map(|at| self.get(at).to_le_bytes());
        u64::from(crc32c::crc32c(words.as_flattened()))
    }

    fn is_valid(&self) -> bool {
        self.get(at::MAGIC) == MAGIC
            && self.get(at::VERSION) == VERSION
            && self.get(at::CHECK) == self.check()
    }

    pub(crate) fn log(&self) -> u64 {
        self.get(at::LOG)
    }

    fn put_text(&self, at: usize, text: &str, most: usize) {
        let text = &text.as_bytes()[..text.len().min(most)];
        copy::write_bytes(&self.words, at + 8, text);
        self.put(at, u64::try_from(text.len()).unwrap_or(0));
    }

    fn text(&self, at: usize, most: usize) -> Result<String, DiskError> {
        let length = usize::try_from(self.get(at)).unwrap_or(usize::MAX);
        if length > most {
            return Err(self.damaged("a text in it is too long"));
        }
        let mut bytes = vec![0; length];
        copy::read_bytes(&self.words, at + 8, &mut bytes);
        String::from_utf8(bytes).map_err(|_| self.damaged("a text in it is not UTF-8"))
    }

    /// Writes down which session's the disk is.
    pub(crate) fn bind(&self, owner: &Ownership) {
        self.put(at::SESSION, owner.session);
        self.put_text(at::LEADER, &owner.leader, at::RAM_DIR - at::LEADER - 8);
        self.put_text(at::RAM_DIR, owner.ram_dir.as_deref().unwrap_or(""), TEXT_MAX);
        self.put(at::STATE, if owner.ram_dir.is_none() { OWN } else { 0 });
    }

    pub(crate) fn ownership(&self) -> Result<Ownership, DiskError> {
        let ram_dir = self.text(at::RAM_DIR, TEXT_MAX)?;
        Ok(Ownership {
            session: self.get(at::SESSION),
            leader: self.text(at::LEADER, at::RAM_DIR - at::LEADER - 8)?,
            ram_dir: (self.get(at::STATE) & OWN == 0).then_some(ram_dir),
        })
    }

    /// A checkpoint needs the disk from now on.
    pub(crate) fn set_needed(&self) {
        self.put(at::STATE, (self.get(at::STATE) | COMMITTED) & !GIVEN_UP);
    }

    /// The checkpoint that needs the disk is about to be removed. A receiver that finds it all the same recovers it with the disk; one that
    /// does not needs the disk for nothing.
    pub(crate) fn give_up(&self) {
        self.put(at::STATE, self.get(at::STATE) | GIVEN_UP);
    }

    /// Whether its checkpoint was about to be removed.
    pub(crate) fn is_given_up(&self) -> bool {
        self.get(at::STATE) & GIVEN_UP != 0
    }

    /// Whether a checkpoint needs the disk.
    pub(crate) fn is_needed(&self) -> bool {
        self.get(at::STATE) & COMMITTED != 0
    }

    /// Commits a checkpoint of all disks of a session whose RAM has no record.
    pub(crate) fn commit(&self, checkpoint: u64) {
        self.put(at::COMMITTED, checkpoint + 1);
    }

    /// The checkpoint that [`commit`](Self::commit) has committed.
    pub(crate) fn committed(&self) -> Option<u64> {
        self.get(at::COMMITTED).checked_sub(1)
    }

    /// Leaves the file where it is.
    pub(crate) fn keep(&self) -> &Self {
        self.is_kept_or_removed.store(true, Ordering::Relaxed);
        self
    }

    /// Removes the file: no checkpoint needs the disk.
    pub(crate) fn remove(&self) {
        self.is_kept_or_removed.store(true, Ordering::Relaxed);
        // It fails if the file is gone, which is what is wanted.
        drop(std::fs::remove_file(&self.path));
    }
}

impl Drop for DiskRecord {
    fn drop(&mut self) {
        if !self.is_kept_or_removed.load(Ordering::Relaxed) && !std::thread::panicking() {
            self.remove();
        }
    }
}
