//! A child process that is ended by its owner.

use colo_ring_tests::lab::{LabError, command_under_test, wait_for};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitStatus, Stdio};
use std::time::Duration;

const LISTEN_LIMIT: Duration = Duration::from_secs(20);

/// A `colo-ring`, killed when dropped.
#[derive(Debug)]
pub struct Child {
    process: process::Child,
    what: String,
    log: PathBuf,
}

impl Child {
    /// Starts `colo-ring` with its standard error in a file and nothing to read from it.
    ///
    /// # Errors
    /// When there is no such command, the file cannot be made, or it cannot be started.
    pub fn start<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>, log: &Path) -> Result<Self, LabError> {
        let command = command_under_test()?;
        let stderr = File::create(log).map_err(LabError::io(format!("create {}", log.display())))?;
        let mut line = Command::new(&command);
        line.args(args);
        let what = format!("{line:?}");
        let process = line
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(LabError::io(format!("start {what}")))?;
        Ok(Self {
            process,
            what,
            log: log.to_owned(),
        })
    }

    /// Waits until it says where it listens.
    ///
    /// # Errors
    /// When it ends before, with its own words, or says nothing.
    pub fn wait_listening(&mut self) -> Result<(), LabError> {
        wait_for(&format!("{} to listen", self.what), LISTEN_LIMIT, || {
            let listens = self.log().contains("listening on ");
            match self.try_wait()? {
                Some(status) => Err(self.ended(status)),
                None => Ok(listens.then_some(())),
            }
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it has written to its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end, which must be a success.
    ///
    /// # Errors
    /// When it does not end in time or fails, with its own words.
    pub fn wait(mut self, limit: Duration) -> Result<(), LabError> {
        let status = wait_for(&format!("{} to end", self.what), limit, || self.try_wait())?;
        if status.success() {
            Ok(())
        } else {
            Err(self.ended(status))
        }
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>, LabError> {
        let status = self.process.try_wait();
        status.map_err(LabError::io(format!("wait for {}", self.what)))
    }

    fn ended(&self, status: ExitStatus) -> LabError {
        LabError::Ended {
            what: format!("{} ({status})", self.what),
            detail: self.log(),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
