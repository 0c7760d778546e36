//! Logs of earlier runs with the same prefix: a new run sets them aside as `PREFIX.run-<n>.<phase>.hlog`, and removes the oldest
//! beyond a fixed number. A prefix that a running program writes to is refused.

use super::files::with_suffix;
use super::{MetricsError, Phase};
use nix::fcntl::{Flock, FlockArg};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Runs whose logs are kept beside those of the running one; parts of one long run count as runs.
pub const RUNS_KEPT: usize = 16;

/// How long another start in the same directory is waited for. It takes some milliseconds.
const STARTS_WITHIN: Duration = Duration::from_secs(5);

/// Keeps others from beginning files in a directory.
pub(super) type Beginning = Flock<File>;

/// Takes the directory of a prefix for as long as files of that prefix are begun: between the look at what is there and the lock of what is
/// made, another start with the same prefix would find nothing in use, and replace what is being made.
///
/// # Errors
/// If the directory cannot be read, or another program holds it for long.
pub(super) fn begin(prefix: &Path) -> Result<Beginning, MetricsError> {
    let give_up = Instant::now() + STARTS_WITHIN;
    loop {
        match try_begin(prefix)? {
            Some(beginning) => return Ok(beginning),
            None if Instant::now() > give_up => return Err(MetricsError::InUse(directory_of(prefix))),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The same without a wait; none if another program holds it.
pub(super) fn try_begin(prefix: &Path) -> Result<Option<Beginning>, MetricsError> {
    let path = directory_of(prefix);
    let lock = || {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(&path)?;
        try_lock(directory, FlockArg::LockExclusiveNonblock)
    };
    lock().map_err(|source| MetricsError::Create {
        path: prefix.to_owned(),
        source,
    })
}

fn directory_of(prefix: &Path) -> PathBuf {
    match prefix.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether a run may have this prefix.
///
/// # Errors
/// If another program writes to its files, or it is a directory.
pub(super) fn check(prefix: &Path) -> Result<(), MetricsError> {
    if prefix.as_os_str().as_bytes().ends_with(b"/") {
        return Err(MetricsError::Directory(prefix.to_owned()));
    }
    check_files(prefix, &suffixes().collect::<Vec<_>>())
}

fn check_files(prefix: &Path, suffixes: &[String]) -> Result<(), MetricsError> {
    for suffix in suffixes {
        let path = with_suffix(prefix, suffix);
        match is_in_use(&path) {
            Ok(false) => {}
            Ok(true) => return Err(MetricsError::InUse(path)),
            Err(source) => return Err(MetricsError::SetAside { path, source }),
        }
    }
    Ok(())
}

/// Sets the files of the last run aside, and removes those of runs beyond the newest [`RUNS_KEPT`].
///
/// # Errors
/// If they cannot be renamed.
pub(super) fn set_aside(prefix: &Path) -> Result<(), MetricsError> {
    set_aside_files(prefix, &suffixes().collect::<Vec<_>>())
}

/// The same for logs of these phases, of a program that is not a receiver. Until what is returned is dropped, no other program begins
/// files there.
///
/// # Errors
/// If another program writes to them, or they cannot be renamed.
pub fn set_aside_logs(prefix: &Path, phases: &[&str]) -> Result<impl Sized + use<>, MetricsError> {
    let suffixes: Vec<_> = phases.iter().map(|phase| format!(".{phase}.hlog")).collect();
    let beginning = begin(prefix)?;
    check_files(prefix, &suffixes)?;
    set_aside_files(prefix, &suffixes)?;
    Ok(beginning)
}

fn set_aside_files(prefix: &Path, suffixes: &[String]) -> Result<(), MetricsError> {
    let failed = |path: &Path, source| MetricsError::SetAside {
        path: path.to_owned(),
        source,
    };
    // Starts that fail would push all measurements out.
    let mut logs = suffixes.iter().filter(|suffix| suffix.ends_with(".hlog"));
    if !logs.any(|suffix| has_intervals(&with_suffix(prefix, suffix))) {
        return Ok(());
    }
    let runs = runs(prefix, suffixes).map_err(|source| failed(prefix, source))?;
    let next = runs.last().map_or(1, |last| last + 1);
    for suffix in suffixes {
        let path = with_suffix(prefix, suffix);
        if is_file(&path) {
            let aside = with_suffix(prefix, &format!(".run-{next}{suffix}"));
            fs::rename(&path, aside).map_err(|source| failed(&path, source))?;
        }
    }
    let too_many = (runs.len() + 1).saturating_sub(RUNS_KEPT);
    for run in &runs[..too_many.min(runs.len())] {
        for suffix in suffixes {
            // One that is not there, or cannot be removed, costs room alone.
            let _ = fs::remove_file(with_suffix(prefix, &format!(".run-{run}{suffix}")));
        }
    }
    Ok(())
}

/// Locks a log against other programs until the lock is dropped. A device or a FIFO has none.
///
/// # Errors
/// If another program holds it.
pub(super) fn hold(path: &Path, file: &File) -> Result<Option<Flock<File>>, MetricsError> {
    let lock = || match file.metadata()?.is_file() {
        true => try_lock(file.try_clone()?, FlockArg::LockExclusiveNonblock).map(Some),
        false => Ok(None),
    };
    match lock() {
        Ok(Some(None)) => Err(MetricsError::InUse(path.to_owned())),
        Ok(lock) => Ok(lock.flatten()),
        Err(source) => Err(MetricsError::Create {
            path: path.to_owned(),
            source,
        }),
    }
}

fn suffixes() -> impl Iterator<Item = String> {
    let logs = Phase::ALL.into_iter().map(|phase| format!(".{phase}.hlog"));
    logs.chain([".json".to_owned()])
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.is_file())
}

/// Whether a log has more than its head.
fn has_intervals(path: &Path) -> bool {
    let is_interval =
        |line: io::Result<Vec<u8>>| line.is_ok_and(|line| !matches!(line.first(), Some(b'#' | b'"') | None));
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    is_file(path) && file.is_ok_and(|file| BufReader::new(file).split(b'\n').any(is_interval))
}

fn is_in_use(path: &Path) -> io::Result<bool> {
    if !is_file(path) {
        return Ok(false);
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    Ok(try_lock(file, FlockArg::LockSharedNonblock)?.is_none())
}

/// None if another open file has it locked.
fn try_lock(file: File, kind: FlockArg) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(file, kind) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// Numbers of the runs that were set aside, in their order. A guard may have the same prefix as a receiver, and runs of its own.
fn runs(prefix: &Path, suffixes: &[String]) -> io::Result<Vec<u64>> {
    let mut begin = OsString::from(prefix.file_name().unwrap_or_default());
    begin.push(".run-");
    let mut runs = Vec::new();
    for entry in fs::read_dir(directory_of(prefix))? {
        runs.extend(number(&entry?.file_name(), &begin, suffixes));
    }
    runs.sort_unstable();
    runs.dedup();
    Ok(runs)
}

fn number(name: &OsStr, begin: &OsStr, suffixes: &[String]) -> Option<u64> {
    let rest = name.as_bytes().strip_prefix(begin.as_bytes())?;
    let mut own = suffixes.iter();
    let digits = own.find_map(|suffix| rest.strip_suffix(suffix.as_bytes()))?;
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    /// They have one prefix, as the documentation says.
    #[test]
    fn runs_of_a_guard_cost_a_receiver_none_of_its_own() {
        const GUARD: [&str; 2] = ["stopped", "held"];
        let directory = tempfile::tempdir().unwrap();
        let prefix = directory.path().join("run");
        let file = |suffix: &str| with_suffix(&prefix, suffix);
        for _ in 0..RUNS_KEPT + 3 {
            fs::write(file(".stopped.hlog"), "an interval\n").unwrap();
            drop(set_aside_logs(&prefix, &GUARD).unwrap());
        }
        let kept = (1..=RUNS_KEPT + 3).filter(|run| file(&format!(".run-{run}.stopped.hlog")).exists());
        assert_eq!(kept.count(), RUNS_KEPT);
        for _ in 0..2 {
            fs::write(file(".pause.hlog"), "an interval\n").unwrap();
            set_aside(&prefix).unwrap();
        }
        assert!(file(".run-1.pause.hlog").exists() && file(".run-2.pause.hlog").exists());
        // A guard that runs.
        fs::write(file(".held.hlog"), "an interval\n").unwrap();
        let log = File::open(file(".held.hlog")).unwrap();
        let lock = hold(&file(".held.hlog"), &log).unwrap();
        let refused = set_aside_logs(&prefix, &GUARD);
        assert!(matches!(refused.err(), Some(MetricsError::InUse(_))));
        drop(lock);
        drop(set_aside_logs(&prefix, &GUARD).unwrap());
    }
}
