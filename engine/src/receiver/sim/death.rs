//! The receiver's death: at an instant of the seed's choice its RAM directory is copied, as a kill would leave it.

use super::memory::PAGE;
use super::rng::Rng;
use super::tests::scratch;
use crate::failpoint::{self, Point};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use tempfile::TempDir;

/// Kills in a run, at most.
const KILLS: usize = 3;

/// Instants between two kills, at most: some runs die early, others when they have committed several checkpoints.
const INSTANTS: [usize; 3] = [300, 1200, 5000];

/// A directory with the files of another.
fn copy_of(other: &Path) -> TempDir {
    let copy = scratch();
    for entry in std::fs::read_dir(other).expect("a directory") {
        let entry = entry.expect("a file");
        copy_file(&entry.path(), &copy.path().join(entry.file_name())).expect("a copy");
    }
    copy
}

/// Copies a file; pages of zeros, which are most, become holes.
fn copy_file(from: &Path, to: &Path) -> std::io::Result<()> {
    let bytes = std::fs::read(from)?;
    let copy = File::create(to)?;
    copy.set_len(bytes.len() as u64)?;
    for (at, page) in (0u64..).zip(bytes.chunks(PAGE)) {
        if *page != [0; PAGE][..page.len()] {
            copy.write_all_at(page, at * PAGE as u64)?;
        }
    }
    Ok(())
}

/// When the receiver is killed.
struct Schedule {
    rng: Rng,
    kills: usize,
    /// Instants between two kills, at most.
    most: usize,
    /// Instants before the next kill.
    wait: usize,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let most = rng.pick(&INSTANTS);
        Self {
            kills: 0,
            most,
            wait: rng.range(1, most),
            rng,
        }
    }

    /// An instant passes; whether the receiver is killed at it.
    fn pass(&mut self) -> bool {
        self.wait = self.wait.saturating_sub(1);
        if self.wait > 0 || self.kills == KILLS {
            return false;
        }
        self.kills += 1;
        self.wait = self.rng.range(1, self.most);
        true
    }
}

/// See the module.
pub(super) struct Death {
    directory: TempDir,
    killed: Rc<RefCell<Option<TempDir>>>,
    schedule: Rc<RefCell<Schedule>>,
}

impl Death {
    /// Comes to the receiver of this thread.
    pub(super) fn new(seed: u64) -> Self {
        let directory = scratch();
        let killed = Rc::new(RefCell::new(None));
        let schedule = Rc::new(RefCell::new(Schedule::new(seed)));
        let (living, dead, instants) = (directory.path().to_owned(), killed.clone(), schedule.clone());
        failpoint::on_kill(move || {
            if dead.borrow().is_none() && instants.borrow_mut().pass() {
                *dead.borrow_mut() = Some(copy_of(&living));
            }
        });
        Self {
            directory,
            killed,
            schedule,
        }
    }

    /// What a kill must not interrupt halfway begins now. Once in `times` times the receiver is killed within so many
    /// instants: these stages are short, and few kills would come to them by chance.
    pub(super) fn lurk(&self, times: usize, instants: usize) {
        let schedule = &mut *self.schedule.borrow_mut();
        if schedule.rng.one_in(times) {
            schedule.wait = schedule.wait.min(schedule.rng.range(1, instants));
        }
    }

    /// Where the receiver's files are.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The files of a receiver that was killed since the last call.
    pub(super) fn take_files(&mut self) -> Option<TempDir> {
        self.killed.take()
    }
}

impl Drop for Death {
    fn drop(&mut self) {
        failpoint::clear(Point::Kill);
    }
}
