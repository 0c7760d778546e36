//! The lock by which one receiver at a time has a RAM directory. It is on the directory itself, so that nothing is left of it,
//! and goes with its process, however that ends.

use crate::store::StoreError;
use crate::store::memory::ram_dir::RamDirectory;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{fstat, major, minor};
use nix::unistd::{AccessFlags, access};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for another process to end: one that was killed has its locks until its memory is unmapped.
const WAIT: Duration = Duration::from_secs(5);

/// See the module.
pub struct RamDirectoryLock(#[expect(dead_code, reason = "held until it is dropped")] Flock<File>);

impl RamDirectoryLock {
    /// Locks a RAM directory for this process.
    ///
    /// # Errors
    /// If it is none, is not writable, or another process has it.
    pub fn take(path: &Path) -> Result<Self, StoreError> {
        Self::take_within(path, WAIT)
    }

    fn take_within(path: &Path, wait: Duration) -> Result<Self, StoreError> {
        let failed = |error| StoreError::file(path, error);
        let rights = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
        access(path, rights).map_err(|errno| match errno {
            Errno::ENOENT => StoreError::RamDirectoryMissing {
                directory: path.to_owned(),
            },
            Errno::EACCES | Errno::EROFS | Errno::EPERM => StoreError::RamDirectoryDenied {
                directory: path.to_owned(),
                source: errno.into(),
            },
            other => failed(other.into()),
        })?;
        RamDirectory::open(path)?;
        let mut directory = File::open(path).map_err(failed)?;
        let began = Instant::now();
        loop {
            directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self(lock)),
                Err((directory, Errno::EWOULDBLOCK)) if began.elapsed() < wait => directory,
                Err((directory, Errno::EWOULDBLOCK)) => {
                    return Err(StoreError::RamDirectoryInUse {
                        directory: path.to_owned(),
                        by: owner(&directory),
                    });
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The process that has locked a file.
fn owner(file: &File) -> String {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let about = fstat(file).ok();
    let pid = about.and_then(|about| owner_in(&locks, about.st_dev, about.st_ino));
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("another process, {pid}"),
    )
}

/// The process that has locked a file, of those of `/proc/locks`; none if it is in another namespace.
fn owner_in(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let place = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let is_owner = |fields: &&[&str]| fields.len() > 5 && fields[1] == "FLOCK" && fields[5] == place;
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        Some(&fields[..]).filter(is_owner)?[4]
            .parse()
            .ok()
            .filter(|pid| *pid > 0)
    })
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn one_process_has_a_directory_and_is_named() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let lock = RamDirectoryLock::take(directory.path()).unwrap();
        let refused = RamDirectoryLock::take_within(directory.path(), Duration::ZERO);
        let refused = refused.err().unwrap().to_string();
        let named = format!("is used by another process, {}:", std::process::id());
        assert!(refused.contains(&named), "{refused}");
        drop(lock);
        assert!(RamDirectoryLock::take_within(directory.path(), Duration::ZERO).is_ok());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_is_not_there_is_offered() {
        for (path, hint) in [
            ("/dev/shm/colo ring/none", "reboot"),
            ("/var/none", "does not exist: make"),
        ] {
            let error = RamDirectoryLock::take(Path::new(path)).err().unwrap().to_string();
            assert!(
                error.contains(hint) && error.contains("install -d -m 0700"),
                "{error}"
            );
        }
    }

    #[test]
    fn who_waits_for_a_lock_is_not_its_owner() {
        let device = nix::sys::stat::makedev(0, 0x1a);
        let locks = "1: POSIX  ADVISORY  WRITE 10 00:1a:7 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 11 00:1a:8 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 12 00:1a:7 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 13 00:1a:7 0 EOF\n";
        assert_eq!(owner_in(locks, device, 7), Some(13));
        let elsewhere = "4: FLOCK  ADVISORY  WRITE 0 00:1a:7 0 EOF\n";
        assert_eq!(owner_in(elsewhere, device, 7), None);
        assert_eq!(owner_in("nonsense", device, 7), None);
    }
}
