//! `colo-ring guard` as a process.

use crate::HANG_LIMIT;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::receiver::document;
use super::{Address, Lab, LabError, Qemu, Receiver, command_under_test, wait_for};

/// A running guard, killed when dropped.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    control: PathBuf,
    log: PathBuf,
}

impl Guard {
    /// Starts a guard of that primary, with further arguments.
    ///
    /// # Errors
    /// When there is no command.
    pub fn start(lab: &Lab, primary: &Qemu, to: &Address, extra: &[&str]) -> Result<Self, LabError> {
        Self::start_at(lab, primary.free_monitor(), to, extra)
    }

    /// The same of a primary whose monitor is there.
    ///
    /// # Errors
    /// As of [`Guard::start`].
    pub fn start_at(lab: &Lab, monitor: &Path, to: &Address, extra: &[&str]) -> Result<Self, LabError> {
        let command = command_under_test()?;
        let control = lab.fresh_file("guard", "sock");
        let log = lab.fresh_file("guard", "log");
        let stderr = File::create(&log).map_err(LabError::io(format!("create {}", log.display())))?;
        let process = Command::new(&command)
            .arg("guard")
            .arg("--qmp")
            .arg(monitor)
            .args(["--to", &to.to_string(), "--channels", "2", "--name", "guest"])
            .args(["--control", &format!("unix:{}", control.display())])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .process_group(0)
            .spawn();
        let process = process.map_err(LabError::io(format!("start {}", command.display())))?;
        Ok(Self {
            process,
            control,
            log,
        })
    }

    /// Resumes a session's guest in a QEMU that waits, by a failover that becomes its guard, whether its result can be written or not.
    ///
    /// # Errors
    /// When there is no command.
    pub fn by_failover(
        lab: &Lab,
        receiver: &Receiver,
        session: u64,
        waits: &Qemu,
        to: &Address,
    ) -> Result<Self, LabError> {
        let control = lab.fresh_file("guard", "sock");
        let log = lab.fresh_file("guard", "log");
        let stderr = File::create(&log).map_err(LabError::io(format!("create {}", log.display())))?;
        let options = format!(
            "--to {to} --channels 2 --name guest --control unix:{}",
            control.display()
        );
        let full = File::options().write(true).open("/dev/full");
        let process = receiver
            .command("failover")
            .args([
                "--session",
                &session.to_string(),
                "--then-guard",
                &options,
                "--qmp",
            ])
            .arg(waits.free_monitor())
            .stdout(full.map_err(LabError::io("open /dev/full"))?)
            .stderr(stderr)
            .process_group(0)
            .spawn();
        Ok(Self {
            process: process.map_err(LabError::io("run colo-ring failover"))?,
            control,
            log,
        })
    }

    /// Its control socket.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its state, as its control socket gives it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Value, LabError> {
        let mut text = String::new();
        UnixStream::connect(&self.control)
            .and_then(|mut socket| socket.read_to_string(&mut text))
            .map_err(LabError::io("ask the guard"))?;
        document("the guard's answer", text.as_bytes())
    }

    /// Waits until its guest is in this state.
    ///
    /// # Errors
    /// [`LabError::Timeout`], and [`LabError::Ended`] when the guard has ended.
    pub fn wait_state(&mut self, state: &str) -> Result<Value, LabError> {
        wait_for(&format!("the guest to be {state}"), HANG_LIMIT, || {
            if let Ok(Some(status)) = self.process.try_wait() {
                return Err(LabError::Ended {
                    what: format!("the guard ({status})"),
                    detail: self.log(),
                });
            }
            // It makes its socket first.
            Ok(self.status().ok().filter(|status| status["state"] == state))
        })
    }

    /// What it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it by a signal, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(&mut self, signal: Signal) -> Result<ExitStatus, LabError> {
        let supervisor = self.supervisor();
        // It may have ended. A kill is one of all its processes, as that of a service is.
        let _ = match signal {
            Signal::SIGKILL => killpg(supervisor, signal),
            _ => kill(supervisor, signal),
        };
        self.wait_end()
    }

    /// Kills its supervisor, and not its worker.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill_supervisor(&mut self) -> Result<(), LabError> {
        let killed = kill(self.supervisor(), Signal::SIGKILL);
        killed.map_err(|errno| LabError::io("kill the guard's supervisor")(errno.into()))?;
        self.wait_end().map(drop)
    }

    /// Kills its worker alone, or stops it for ever.
    ///
    /// # Errors
    /// When it has none.
    pub fn lose_worker(&self, signal: Signal) -> Result<(), LabError> {
        let worker = self.worker()?;
        kill(worker, signal).map_err(|errno| LabError::io("kill the guard's worker")(errno.into()))
    }

    /// The process id of its worker.
    ///
    /// # Errors
    /// When it has none.
    pub fn worker(&self) -> Result<Pid, LabError> {
        let supervisor = self.supervisor();
        let path = format!("/proc/{supervisor}/task/{supervisor}/children");
        let children = fs::read_to_string(&path).map_err(LabError::io(format!("read {path}")))?;
        let worker = children
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok());
        let worker = worker.ok_or_else(|| LabError::Malformed {
            what: "the guard's children".into(),
            detail: children.clone(),
        })?;
        Ok(Pid::from_raw(worker))
    }

    fn supervisor(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process.id()).expect("process ids are below 2^22 on Linux"))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait_end(&mut self) -> Result<ExitStatus, LabError> {
        wait_for("the guard to end", HANG_LIMIT, || {
            self.process
                .try_wait()
                .map_err(LabError::io("wait for the guard"))
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = killpg(self.supervisor(), Signal::SIGKILL);
        let _ = self.process.wait();
    }
}
