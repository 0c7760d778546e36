//! The recorder between primary and secondary: `colo-ring capture` as a process.

use crate::HANG_LIMIT;
use crate::capture::Capture;
use crate::model::Model;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::receiver::document;
use super::{Address, Lab, LabError, command_under_test, wait_for};

/// A running `colo-ring capture`, killed when dropped.
#[derive(Debug)]
pub struct Recorder {
    process: Child,
    log: PathBuf,
    report: PathBuf,
    capture: PathBuf,
}

impl Recorder {
    /// Starts a recorder that passes on to `to`, and waits until it listens.
    ///
    /// # Errors
    /// When there is no command, or it does not come to listen.
    pub fn start(lab: &Lab, listen: &Address, to: &Address) -> Result<Self, LabError> {
        let command = command_under_test()?;
        let capture = lab.fresh_file("session", "cap");
        let (log, report) = (
            lab.fresh_file("recorder", "log"),
            lab.fresh_file("recorder", "json"),
        );
        let create =
            |path: &Path| File::create(path).map_err(LabError::io(format!("create {}", path.display())));
        let process = Command::new(&command)
            .args([
                "capture",
                "--json",
                "--listen",
                &listen.to_string(),
                "--to",
                &to.to_string(),
            ])
            .arg("--out")
            .arg(&capture)
            .stdin(Stdio::null())
            .stdout(create(&report)?)
            .stderr(create(&log)?)
            .spawn()
            .map_err(LabError::io(format!("start {}", command.display())))?;
        let recorder = Self {
            process,
            log,
            report,
            capture,
        };
        wait_for("colo-ring capture to listen", HANG_LIMIT, || {
            Ok(recorder.log().contains("listening on ").then_some(()))
        })?;
        Ok(recorder)
    }

    /// The capture file.
    #[must_use]
    pub fn capture(&self) -> &Path {
        &self.capture
    }

    /// Waits until it has ended by itself, and returns its report.
    ///
    /// # Errors
    /// If it does not end, or not well.
    pub fn wait_report(&mut self) -> Result<Value, LabError> {
        let status = wait_for("colo-ring capture to end", HANG_LIMIT, || {
            self.process
                .try_wait()
                .map_err(LabError::io("wait for colo-ring capture"))
        })?;
        if !status.success() {
            return Err(LabError::Ended {
                what: format!("colo-ring capture ({status})"),
                detail: self.log(),
            });
        }
        let text = fs::read(&self.report).map_err(LabError::io("read the report of colo-ring capture"))?;
        document("colo-ring capture --json", &text)
    }

    /// What a naive reading makes of the recorded session up to a checkpoint, once the recorder has ended.
    ///
    /// # Panics
    /// When the session cannot be read so.
    #[must_use]
    pub fn model_at(&self, checkpoint: u64) -> Model {
        Model::at(&Capture::load(&self.capture), checkpoint)
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
