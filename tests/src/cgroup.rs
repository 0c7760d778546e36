//! Control groups of a test's own that limit the number of processes and threads, or memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Removed when dropped, if its processes have ended.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    is_first_version: bool,
}

impl Group {
    /// A new one.
    ///
    /// # Errors
    /// If this machine has no such controller, or this user may not make groups.
    fn new(controller: &str, name: &str) -> io::Result<Self> {
        let second = Path::new("/sys/fs/cgroup");
        let first = second.join(controller);
        let is_first_version = first.is_dir();
        let root = match is_first_version {
            true => first,
            false => {
                fs::write(second.join("cgroup.subtree_control"), format!("+{controller}"))?;
                second.to_owned()
            }
        };
        let path = root.join(format!("colo-ring-{name}-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self {
            path,
            is_first_version,
        })
    }

    fn wrap(&self) -> [String; 4] {
        let procs = self.path.join("cgroup.procs");
        let script = format!("echo $$ > {} && exec \"$@\"", procs.display());
        ["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()]
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel takes a moment to see that its processes have gone; what is left is empty and harms nobody.
        let _ = Command::new("rmdir").arg(&self.path).status();
    }
}

/// A group that limits the number of processes and threads.
#[derive(Debug)]
pub struct PidsGroup(Group);

impl PidsGroup {
    /// A new one without a limit.
    ///
    /// # Errors
    /// If this machine has no controller `pids`, or this user may not make groups.
    pub fn new(name: &str) -> io::Result<Self> {
        let group = Self(Group::new("pids", name)?);
        group.set_max("max")?;
        Ok(group)
    }

    /// The words that run the command behind them in this group.
    #[must_use]
    pub fn wrap(&self) -> [String; 4] {
        self.0.wrap()
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
        self.0.set("pids.max", max)
    }
}

/// A group whose processes are killed when they have more memory than its limit.
#[derive(Debug)]
pub struct MemoryGroup(Group);

impl MemoryGroup {
    /// A new one with this limit.
    ///
    /// # Errors
    /// If this machine has no controller `memory`, or this user may not make groups.
    pub fn new(name: &str, max_bytes: u64) -> io::Result<Self> {
        let group = Group::new("memory", name)?;
        let max = max_bytes.to_string();
        match group.is_first_version {
            true => group.set("memory.limit_in_bytes", &max)?,
            false => group.set("memory.max", &max)?,
        }
        // Nothing is swapped out in place of that. A kernel without swap may have no such file.
        let _ = match group.is_first_version {
            true => group.set("memory.swappiness", "0"),
            false => group.set("memory.swap.max", "0"),
        };
        Ok(Self(group))
    }

    /// The words that run the command behind them in this group.
    #[must_use]
    pub fn wrap(&self) -> [String; 4] {
        self.0.wrap()
    }
}
