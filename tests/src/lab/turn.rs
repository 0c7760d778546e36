//! Whose turn it is in the laboratory: a few experiments side by side, or one that measures alone.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::LabError;

/// A guest under TCG keeps about one processor busy, and those that run this have two or more.
const PLACES: usize = 2;
const POLL: Duration = Duration::from_millis(50);

/// Whether other experiments may run at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// They may.
    Others,
    /// They may not: it measures times, or changes settings of the host.
    Nobody,
}

/// Places in the laboratory, of all processes together; given back when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _places: Vec<Flock<File>>,
}

impl Turn {
    /// Waits for its turn. The places are files beside `stem`.
    pub(super) fn take(stem: &Path, company: Company) -> Result<Self, LabError> {
        let failed = || format!("lock {}", stem.display());
        if let Some(dir) = stem.parent() {
            fs::create_dir_all(dir).map_err(LabError::io(failed()))?;
        }
        let all = 0..PLACES;
        let places = match company {
            // The first place first: two that want all of them do not wait for each other.
            Company::Nobody => all
                .map(|place| lock(stem, place, FlockArg::LockExclusive))
                .collect(),
            Company::Others => loop {
                let tried = all
                    .clone()
                    .map(|place| lock(stem, place, FlockArg::LockExclusiveNonblock));
                match tried
                    .into_iter()
                    .find(|got| !matches!(got, Err(Errno::EWOULDBLOCK)))
                {
                    Some(got) => break got.map(|place| vec![place]),
                    None => std::thread::sleep(POLL),
                }
            },
        };
        let places = places.map_err(|errno: Errno| LabError::io(failed())(errno.into()))?;
        Ok(Self { _places: places })
    }
}

fn lock(stem: &Path, place: usize, how: FlockArg) -> Result<Flock<File>, Errno> {
    let file = File::create(stem.with_extension(format!("turn{place}")));
    let file = file.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
    Flock::lock(file, how).map_err(|(_, errno)| errno)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    /// One that measures never meets another; the others meet, up to the number of places.
    #[test]
    fn who_measures_is_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let stem = dir.path().join("lab");
        let (present, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (stem, present, most) = (&stem, &present, &most);
                scope.spawn(move || {
                    let company = if number % 3 == 0 {
                        Company::Nobody
                    } else {
                        Company::Others
                    };
                    let _turn = Turn::take(stem, company).expect("a turn");
                    let here = present.fetch_add(1, SeqCst) + 1;
                    most.fetch_max(here, SeqCst);
                    std::thread::sleep(Duration::from_millis(20));
                    if company == Company::Nobody {
                        assert_eq!((here, present.load(SeqCst)), (1, 1));
                    }
                    present.fetch_sub(1, SeqCst);
                });
            }
        });
        assert!(most.load(SeqCst) <= PLACES, "{most:?}");
    }
}
