//! Directories for RAM images, on a tmpfs or of huge pages.

use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

use super::{HostSetting, LabError};

/// The host's pool of huge pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// A directory on a tmpfs, or a hugetlbfs of its own; removed when dropped.
#[derive(Debug)]
pub struct SharedDirectory {
    directory: TempDir,
    /// The pool of a hugetlbfs: as it was when this is gone.
    pool: Option<HostSetting>,
}

impl SharedDirectory {
    /// A new one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self, LabError> {
        let directory = tempfile::Builder::new()
            .prefix("colo-ring-")
            .tempdir_in("/dev/shm");
        Ok(Self {
            directory: directory.map_err(LabError::io("create a directory in /dev/shm".to_owned()))?,
            pool: None,
        })
    }

    /// A hugetlbfs of 2 MiB pages, of which the host gets that many more. It needs root.
    ///
    /// # Errors
    /// When they cannot be allocated, or nothing can be mounted.
    pub fn of_huge_pages(pages: u64) -> Result<Self, LabError> {
        let wanted = huge_pages()? + pages;
        let pool = HostSetting::set_if_permitted(POOL, &wanted.to_string());
        if huge_pages()? < wanted {
            return Err(LabError::Ended {
                what: format!("this test needs {pages} more huge pages of 2 MiB"),
                detail: format!(
                    "{} are all that {POOL} gives as root: free memory, or sysctl vm.compact_memory=1",
                    pool.now()
                ),
            });
        }
        let mut directory = Self::new()?;
        let mounting = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
            .arg(directory.path())
            .output();
        let mounted = mounting.map_err(LabError::io("run mount"))?;
        if !mounted.status.success() {
            return Err(LabError::Ended {
                what: "a hugetlbfs cannot be mounted".into(),
                detail: String::from_utf8_lossy(&mounted.stderr).into_owned(),
            });
        }
        directory.pool = Some(pool);
        Ok(directory)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Number of files in it.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn files(&self) -> usize {
        fs::read_dir(self.path()).expect("its directory").count()
    }
}

impl Drop for SharedDirectory {
    fn drop(&mut self) {
        if self.pool.is_some() {
            // At the latest when the last one has closed its files.
            let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                eprintln!("{} stays mounted: umount it", self.path().display());
                self.directory.disable_cleanup(true);
            }
        }
    }
}

/// Huge pages of 2 MiB that the host's pool has, used or not.
///
/// # Errors
/// When the kernel has none of that size.
pub fn huge_pages() -> Result<u64, LabError> {
    let text = fs::read_to_string(POOL).map_err(LabError::io(format!("read {POOL}")))?;
    text.trim().parse().map_err(|_| LabError::Malformed {
        what: POOL.into(),
        detail: text,
    })
}
