//! What a failover has started, and what a signal may still take back of it.

use super::waiting::RunDirectory;
use crate::output::tell;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a signal that ends this command finds. It never ends a guest that has run: that one has changed the checkpoint's
/// memory, or a disk.
#[derive(Clone, Default)]
pub(super) struct Started(Arc<Mutex<Stage>>);

enum Stage {
    /// No guest has run, and none will when the QEMU that was started here ends.
    Revocable {
        qemu: Option<Pid>,
        directory: Option<PathBuf>,
    },
    /// One runs, or is about to.
    Decided,
}

impl Default for Stage {
    fn default() -> Self {
        Self::Revocable {
            qemu: None,
            directory: None,
        }
    }
}

impl Started {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory goes with this command, unless it is to stay.
    pub(super) fn uses(&self, used: &RunDirectory) {
        if let Stage::Revocable { directory, .. } = &mut *self.stage() {
            *directory = used.passing();
        }
    }

    /// Starts a QEMU. From its first instant on a signal handler finds it.
    pub(super) fn spawn(&self, command: &mut Command) -> std::io::Result<Child> {
        let mut stage = self.stage();
        let child = command.spawn()?;
        if let Stage::Revocable { qemu, .. } = &mut *stage {
            *qemu = i32::try_from(child.id()).ok().map(Pid::from_raw);
        }
        Ok(child)
    }

    /// That QEMU has ended, or its id may be reused.
    pub(super) fn forget(&self) {
        if let Stage::Revocable { qemu, .. } = &mut *self.stage() {
            *qemu = None;
        }
    }

    /// From here on no signal takes anything back.
    pub(super) fn decide(&self) {
        *self.stage() = Stage::Decided;
    }

    /// Ends this process, and what it has started, unless it is too late for that.
    pub(super) fn end_process(&self) {
        // Held to the end, so that nothing is decided meanwhile.
        let stage = self.stage();
        let Stage::Revocable { qemu, directory } = &*stage else {
            return;
        };
        if let Some(pid) = qemu {
            // It may have ended by itself; it is not reaped yet, so that its id is its own.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        if let Some(directory) = directory {
            let _ = fs::remove_dir_all(directory);
        }
        tell("interrupted: `colo-ring status` shows the state of the checkpoint");
        std::process::exit(1);
    }
}
