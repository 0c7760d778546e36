//! Files: Landlock.

use super::SandboxError;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The newest version of Landlock whose rights are known here. What an older kernel lacks of them stays allowed.
const KNOWN: ABI = ABI::V9;

/// Why the access to files was not confined.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The set of rules.
    #[error("{0}")]
    Ruleset(#[from] RulesetError),
    /// The rule for one path.
    #[error("{}: {source}", path.display())]
    Rule {
        /// The path.
        path: PathBuf,
        /// What Landlock says.
        source: RulesetError,
    },
}

/// What may be done with what is at and below a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileAccess {
    /// Files are read.
    Read,
    /// Files are made, read, written, listed and removed.
    Own,
    /// What is there is read and written.
    Change,
    /// What is there is removed.
    Remove,
}

impl FileAccess {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Own => {
                AccessFs::ReadFile
                    | AccessFs::ReadDir
                    | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::MakeReg
                    | AccessFs::RemoveFile
            }
            Self::Change => AccessFs::ReadFile | AccessFs::WriteFile,
            Self::Remove => AccessFs::RemoveFile.into(),
        }
    }
}

/// What is allowed at and below a path, which exists when the receiver starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRule {
    /// The path.
    pub path: PathBuf,
    /// What is allowed.
    pub access: FileAccess,
}

impl FileRule {
    /// A rule.
    pub fn new(path: impl Into<PathBuf>, access: FileAccess) -> Self {
        let path = path.into();
        Self { path, access }
    }
}

/// What is read of the host: its processors, memory, huge pages, NUMA nodes, settings of the kernel, limits of the control group,
/// who has locked the directory of guests' memory, which is locked by a receiver that is confined, and when its threads ran.
const HOST: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/locks",
    "/proc/meminfo",
    "/proc/self/cgroup",
    "/proc/self/task",
    "/proc/sys",
    "/sys/devices/system",
    "/sys/fs/cgroup",
    "/sys/kernel/mm",
];

/// The directories that a receiver works with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Directories<'a> {
    /// Of guests' memory.
    pub ram: Option<&'a Path>,
    /// Of disks.
    pub disks: Option<&'a Path>,
    /// Where the files of measurements are, whose paths begin so.
    pub measurements: Option<&'a Path>,
    /// Of the configuration, which is read again while the receiver runs.
    pub configuration: Option<&'a Path>,
}

impl Directories<'_> {
    /// The files that a receiver needs, beside those that are open when it is confined.
    pub fn rules(self) -> Vec<FileRule> {
        let mut rules: Vec<_> = HOST.map(|path| FileRule::new(path, FileAccess::Read)).into();
        rules.extend(
            self.configuration
                .map(|path| FileRule::new(path, FileAccess::Read)),
        );
        let own = self.ram.iter().chain(&self.disks);
        rules.extend(own.map(|directory| FileRule::new(*directory, FileAccess::Own)));
        if let Some(prefix) = self.measurements {
            let directory = prefix.parent().filter(|parent| !parent.as_os_str().is_empty());
            rules.push(FileRule::new(
                directory.unwrap_or(Path::new(".")),
                FileAccess::Own,
            ));
        }
        if let Some(disks) = self.disks {
            rules.extend(linked(disks).map(|device| FileRule::new(device, FileAccess::Change)));
            // Links that are made later are for a user who may not open everything: root must be started again.
            if !rustix::process::geteuid().is_root() {
                rules.push(FileRule::new("/dev", FileAccess::Change));
            }
        }
        rules
    }
}

/// What the links in a directory lead to.
fn linked(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let links = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    links.filter_map(|entry| entry.path().canonicalize().ok())
}

pub(super) fn confine(rules: &[FileRule]) -> Result<Option<String>, SandboxError> {
    Ok(lack(&restrict(rules)?))
}

fn restrict(rules: &[FileRule]) -> Result<RestrictionStatus, FilesError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)?;
    for rule in rules {
        // What is not there is not allowed either; whoever needs it reports that it is missing.
        let Ok(path) = PathFd::new(&rule.path) else {
            continue;
        };
        let rights = match is_directory(&rule.path) {
            true => rule.access.rights(),
            false => rule.access.rights() & AccessFs::from_file(KNOWN),
        };
        ruleset = ruleset
            .add_rule(PathBeneath::new(path, rights))
            .map_err(|source| FilesError::Rule {
                path: rule.path.clone(),
                source,
            })?;
    }
    Ok(ruleset.restrict_self()?)
}

fn is_directory(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.is_dir())
}

/// What the kernel lacks.
fn lack(status: &RestrictionStatus) -> Option<String> {
    let missing = match &status.landlock {
        LandlockStatus::NotImplemented => {
            "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK): the receiver's access to files and to TCP is not confined"
        }
        LandlockStatus::NotEnabled => {
            "Landlock is not enabled (add landlock to lsm= on the kernel's command line): the receiver's access to files and to TCP is \
             not confined"
        }
        _ if status.ruleset == RulesetStatus::NotEnforced => {
            "Landlock is not in force: the receiver's access to files and to TCP is not confined"
        }
        LandlockStatus::Available { effective_abi, .. } => match effective_abi {
            ABI::V1 | ABI::V2 => {
                "this kernel's Landlock confines no truncation of files (Linux 6.2) and no TCP (6.7)"
            }
            ABI::V3 => "this kernel's Landlock confines no TCP (Linux 6.7)",
            // What comes later covers what system calls of a receiver cannot do anyway.
            _ => return None,
        },
    };
    Some(missing.to_owned())
}
