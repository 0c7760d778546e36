//! A file as a block device.

use nix::unistd::Uid;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device, until it is dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Makes one of a file.
    ///
    /// # Errors
    /// Why there is none: only root may, and the kernel must have them.
    pub fn of(file: &Path) -> Result<Self, String> {
        if !Uid::effective().is_root() {
            return Err("a loop device needs root".to_owned());
        }
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .map_err(|error| format!("losetup: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match made.status.success() {
            true => Ok(Self(text(&made.stdout).into())),
            false => Err(text(&made.stderr)),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A device that cannot be detached is one of eight that the machine lacks from then on: it must not be silent.
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} is still attached", self.0.display());
        }
    }
}
