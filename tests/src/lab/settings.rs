//! The host's settings that decide over times, changed for as long as something is measured.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// One setting of the host, a file of one line, that is set while this lives and is then set back.
#[derive(Debug)]
pub struct HostSetting {
    file: PathBuf,
    before: String,
    now: String,
}

impl HostSetting {
    /// Sets it where that is permitted; otherwise leaves what is there. Either way `Display` says what holds.
    #[must_use]
    pub fn set_if_permitted(file: impl AsRef<Path>, value: &str) -> Self {
        let file = file.as_ref().to_owned();
        let before = read(&file);
        if before != value {
            // A refusal is no failure: the figures are then measured and printed with what the host has.
            let _ = fs::write(&file, value);
        }
        let now = read(&file);
        Self { file, before, now }
    }

    /// The congestion control `cubic`: a paced one (bbr) spreads the bursts of a checkpoint and so decides over the
    /// figures.
    #[must_use]
    pub fn cubic() -> Self {
        Self::set_if_permitted("/proc/sys/net/ipv4/tcp_congestion_control", "cubic")
    }

    /// No slow start after an idle time: each checkpoint follows one.
    #[must_use]
    pub fn no_slow_start_after_idle() -> Self {
        Self::set_if_permitted("/proc/sys/net/ipv4/tcp_slow_start_after_idle", "0")
    }

    /// What comes in on loopback is handled on that core, whoever sends it from wherever.
    #[must_use]
    pub fn loopback_on_core(core: usize) -> Self {
        Self::set_if_permitted("/sys/class/net/lo/queues/rx-0/rps_cpus", &cpu_mask(core))
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The file's name, without its directory.
    #[must_use]
    pub fn name(&self) -> String {
        let name = self.file.file_name();
        name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// What holds now.
    #[must_use]
    pub fn now(&self) -> &str {
        &self.now
    }

    /// Whether it is not what it was.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.before != self.now
    }
}

impl fmt::Display for HostSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.now)?;
        if self.is_changed() {
            write!(f, " (for this run; the host has {})", self.before)?;
        }
        Ok(())
    }
}

impl Drop for HostSetting {
    fn drop(&mut self) {
        if !self.is_changed() {
            return;
        }
        if let Err(error) = fs::write(&self.file, &self.before) {
            let (file, before) = (self.file.display(), &self.before);
            eprintln!("{file} cannot be set back ({error}): write {before} to it");
        }
    }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).map_or_else(
        |error| format!("unknown ({error})"),
        |text| text.trim().to_owned(),
    )
}

/// A mask of one core, as sysfs writes it: hexadecimal, in groups of 32 bits with commas between.
fn cpu_mask(core: usize) -> String {
    let mut mask = format!("{:x}", 1_u32 << (core % 32));
    for _ in 0..core / 32 {
        mask.push_str(",00000000");
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_written_as_sysfs_reads_them() {
        for (core, mask) in [
            (0, "1"),
            (1, "2"),
            (31, "80000000"),
            (32, "1,00000000"),
            (65, "2,00000000,00000000"),
        ] {
            assert_eq!(cpu_mask(core), mask);
        }
    }

    #[test]
    fn a_setting_is_set_back() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("setting");
        fs::write(&file, "bbr\n").unwrap();
        let setting = HostSetting::set_if_permitted(&file, "cubic");
        assert_eq!(setting.to_string(), "cubic (for this run; the host has bbr)");
        assert_eq!(fs::read_to_string(&file).unwrap(), "cubic");
        drop(setting);
        assert_eq!(fs::read_to_string(&file).unwrap(), "bbr");
        assert!(!HostSetting::set_if_permitted(&file, "bbr").is_changed());
    }

    #[test]
    fn what_cannot_be_set_is_reported() {
        let setting = HostSetting::set_if_permitted("/proc/no such file", "1");
        assert!(!setting.is_changed());
        assert!(setting.to_string().starts_with("unknown ("), "{setting}");
    }
}
