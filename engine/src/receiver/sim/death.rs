//! The receiver's death: at an instant of the seed's choice its RAM directory is copied, as a kill would leave it.

use super::memory::PAGE;
use super::rng::Rng;
use super::tests::scratch;
use crate::killpoint;
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use tempfile::TempDir;

/// Kills in a run, at most.
const KILLS: usize = 3;

/// Instants between two kills, at most.
const INSTANTS: usize = 1200;

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
        if page.iter().any(|byte| *byte != 0) {
            copy.write_all_at(page, at * PAGE as u64)?;
        }
    }
    Ok(())
}

/// See the module.
pub(super) struct Death {
    directory: TempDir,
    killed: Rc<RefCell<Option<TempDir>>>,
}

impl Death {
    /// Comes to the receiver of this thread.
    pub(super) fn new(seed: u64) -> Self {
        let directory = scratch();
        let killed = Rc::new(RefCell::new(None));
        let mut rng = Rng::new(seed);
        let (mut kills, mut wait) = (0, rng.range(1, INSTANTS));
        let (living, dead) = (directory.path().to_owned(), killed.clone());
        killpoint::set(Some(Box::new(move || {
            wait = wait.saturating_sub(1);
            if wait > 0 || kills == KILLS || dead.borrow().is_some() {
                return;
            }
            kills += 1;
            wait = rng.range(1, INSTANTS);
            *dead.borrow_mut() = Some(copy_of(&living));
        })));
        Self { directory, killed }
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
        killpoint::set(None);
    }
}
