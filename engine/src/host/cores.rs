//! Cores: which exist, which this process may use, and lists of them as on the command line and in sysfs.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use thiserror::Error;

/// Highest core number in a list: the limit of the kernel (`CONFIG_NR_CPUS` of x86).
const CORE_MAX: usize = 8191;

/// Why a list of cores was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CoreListError {
    /// A part that is neither a number nor a range.
    #[error("'{0}' is neither a core nor a range of cores; write it like 2-5,8")]
    Syntax(String),
    /// A range that ends before it starts.
    #[error("the range {0} ends before it starts; write it like 2-5,8")]
    Backwards(String),
    /// A core number above the kernel's limit.
    #[error("there is no core {0}: the highest number is {CORE_MAX}")]
    TooHigh(usize),
    /// The same core twice.
    #[error("core {0} is in the list twice")]
    Twice(usize),
}

/// Reads a list like `2-5,8`, in the order in which it is written. An empty list is empty.
///
/// # Errors
/// See [`CoreListError`].
pub fn parse_core_list(list: &str) -> Result<Vec<usize>, CoreListError> {
    let mut cores = Vec::new();
    for part in list.trim().split(',').filter(|_| !list.trim().is_empty()) {
        let syntax = || CoreListError::Syntax(part.to_owned());
        let number = |text: &str| match text.trim() {
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().map_err(|_| syntax()),
            _ => Err(syntax()),
        };
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if last > CORE_MAX {
            return Err(CoreListError::TooHigh(last));
        }
        if first > last {
            return Err(CoreListError::Backwards(part.trim().to_owned()));
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(CoreListError::Twice(core));
            }
            cores.push(core);
        }
    }
    Ok(cores)
}

/// Restricts the calling thread, and those that it starts from now on, to these cores.
///
/// # Errors
/// Of `sched_setaffinity`: there is no such core, or it is not allowed.
pub fn pin(cores: &[usize]) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// The cores that this process may run on (its affinity, which a container's cpuset has already narrowed).
///
/// # Errors
/// Of `sched_getaffinity`.
pub fn allowed_cores() -> std::io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let allowed = (0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false));
    Ok(allowed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_in_their_order() {
        assert_eq!(parse_core_list("0"), Ok(vec![0]));
        assert_eq!(parse_core_list("8,2-5"), Ok(vec![8, 2, 3, 4, 5]));
        assert_eq!(parse_core_list(" 0-1, 3 \n"), Ok(vec![0, 1, 3]));
        assert_eq!(parse_core_list(""), Ok(vec![]));
    }

    #[test]
    fn bad_lists_are_refused() {
        use CoreListError as E;
        for part in ["a", "1-", "-1", "1-2-3", "+1", "0x1"] {
            assert_eq!(parse_core_list(part), Err(E::Syntax(part.to_owned())));
        }
        assert_eq!(parse_core_list("1,,2"), Err(E::Syntax(String::new())));
        assert_eq!(parse_core_list("5-2"), Err(E::Backwards("5-2".to_owned())));
        assert_eq!(parse_core_list("1-3,2"), Err(E::Twice(2)));
        assert_eq!(parse_core_list("0-4000000000"), Err(E::TooHigh(4_000_000_000)));
    }
}
