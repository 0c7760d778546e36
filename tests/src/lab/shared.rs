//! Directories for RAM images.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::LabError;

/// A directory on a tmpfs, removed when dropped.
#[derive(Debug)]
pub struct SharedDirectory(PathBuf);

impl SharedDirectory {
    /// A new one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/dev/shm/colo-ring-{}-{number}", std::process::id());
        fs::create_dir(&path).map_err(LabError::io(format!("create {path}")))?;
        Ok(Self(path.into()))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Number of files in it.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn files(&self) -> usize {
        fs::read_dir(&self.0).expect("its directory").count()
    }
}

impl Drop for SharedDirectory {
    fn drop(&mut self) {
        // What is left takes memory until this machine's next start, and harms nobody else.
        let _ = fs::remove_dir_all(&self.0);
    }
}
