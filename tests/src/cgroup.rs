//! A control group of a test's own that limits the number of processes and threads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Removed when dropped, if its processes have ended.
#[derive(Debug)]
pub struct PidsGroup(PathBuf);

impl PidsGroup {
    /// A new one without a limit.
    ///
    /// # Errors
    /// If this machine has no controller `pids`, or this user may not make groups.
    pub fn new(name: &str) -> io::Result<Self> {
        let first = Path::new("/sys/fs/cgroup/pids");
        let second = Path::new("/sys/fs/cgroup");
        let root = match first.is_dir() {
            true => first,
            false => {
                fs::write(second.join("cgroup.subtree_control"), "+pids")?;
                second
            }
        };
        let group = root.join(format!("colo-ring-{name}-{}", std::process::id()));
        fs::create_dir(&group)?;
        let group = Self(group);
        group.set_max("max")?;
        Ok(group)
    }

    /// The words that run the command behind them in this group.
    #[must_use]
    pub fn wrap(&self) -> [String; 4] {
        let procs = self.0.join("cgroup.procs");
        let script = format!("echo $$ > {} && exec \"$@\"", procs.display());
        ["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()]
    }

    /// From now on no thread and no process can be started in it.
    ///
    /// # Panics
    /// If the limit cannot be set.
    pub fn close(&self) {
        self.set_max("1").expect("a limit below what there is");
    }

    /// Lifts that.
    ///
    /// # Panics
    /// If the limit cannot be set.
    pub fn open(&self) {
        self.set_max("max").expect("no limit");
    }

    fn set_max(&self, max: &str) -> io::Result<()> {
        fs::write(self.0.join("pids.max"), max)
    }
}

impl Drop for PidsGroup {
    fn drop(&mut self) {
        // The kernel takes a moment to see that its processes have gone; what is left is empty and harms nobody.
        let _ = Command::new("rmdir").arg(&self.0).status();
    }
}
