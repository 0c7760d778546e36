//! What a failover has started, and what a signal may still take back of it.

use super::waiting::RunDirectory;
use crate::output::tell;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io, thread};

/// What a signal that ends this command finds. It never ends a guest that has run: that one has changed the checkpoint's
/// memory, or a disk.
#[derive(Clone, Default)]
pub(super) struct Started(Arc<Mutex<Stage>>);

enum Stage {
    /// No guest has run, and none will when the QEMU that was started here ends.
    Revocable {
        qemu: Option<Pid>,
        directory: Option<PathBuf>,
        /// Files that are not complete.
        parts: Vec<PathBuf>,
    },
    /// The QEMU that was started here was ended by a signal: no other is started, and no guest will run.
    Interrupted,
    /// One runs, or is about to.
    Decided,
}

/// How long the receiver may take to hear that no guest runs, before this process ends all the same.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);

impl Default for Stage {
    fn default() -> Self {
        Self::Revocable {
            qemu: None,
            directory: None,
            parts: Vec::new(),
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

    /// These files go with this command, unless they are complete by then.
    pub(super) fn begins(&self, files: Vec<PathBuf>) {
        if let Stage::Revocable { parts, .. } = &mut *self.stage() {
            parts.extend(files);
        }
    }

    /// Starts a QEMU. From its first instant on a signal handler finds it.
    ///
    /// # Errors
    /// If it cannot be started, or a signal has ended another one.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let mut stage = self.stage();
        if matches!(*stage, Stage::Interrupted) {
            return Err(io::ErrorKind::Interrupted.into());
        }
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

    /// From here on no signal takes anything back. False if one has already.
    #[must_use]
    pub(super) fn decide(&self) -> bool {
        let mut stage = self.stage();
        match *stage {
            Stage::Interrupted => false,
            Stage::Revocable { .. } | Stage::Decided => {
                *stage = Stage::Decided;
                true
            }
        }
    }

    /// Ends this process, and what it has started, unless it is too late for that. Where a QEMU was started, its end is the failover's: who
    /// waits for it finds it, and gives the claim up, so that the receiver knows that no guest has run. Returns whether it ends.
    pub(super) fn end_process(&self) -> bool {
        // Held to the end, so that nothing is decided meanwhile.
        let mut stage = self.stage();
        let Stage::Revocable {
            qemu,
            directory,
            parts,
        } = &*stage
        else {
            return false;
        };
        tell("interrupted: `colo-ring status` shows the state of the checkpoint");
        if let Some(pid) = qemu {
            // It may have ended by itself; it is not reaped yet, so that its id is its own.
            let _ = kill(*pid, Signal::SIGKILL);
            // With its end it has no memory of the checkpoint any more. It is left to be reaped by whoever has started it.
            let _ = waitid(Id::Pid(*pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        }
        if let Some(directory) = directory {
            let _ = fs::remove_dir_all(directory);
        }
        for part in parts {
            // One that is complete has another name.
            let _ = fs::remove_file(part);
        }
        if qemu.is_none() {
            std::process::exit(1);
        }
        *stage = Stage::Interrupted;
        // The signals' thread is needed for another signal.
        let late = thread::Builder::new().spawn(|| {
            thread::sleep(RELEASE_WITHIN);
            std::process::exit(1);
        });
        if late.is_err() {
            std::process::exit(1);
        }
        true
    }
}
