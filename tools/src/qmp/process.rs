//! The process behind a monitor's socket.

use super::Qmp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use thiserror::Error;

/// Why QEMU's process cannot be ended.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The kernel does not say whose the socket is.
    #[error("the process behind {socket} is unknown: {source}")]
    Unknown {
        /// The monitor's socket.
        socket: String,
        /// The error of the system.
        source: io::Error,
    },
    /// Something else has made the socket, and given it to QEMU.
    #[error(
        "the monitor's socket {socket} was made by process {process} ({name}), which is no QEMU: which process to end is not known"
    )]
    NoQemu {
        /// The monitor's socket.
        socket: String,
        /// Its process id.
        process: i32,
        /// Its name.
        name: String,
    },
    /// It is another user's.
    #[error("QEMU (process {process}) cannot be ended: {source}")]
    NotOurs {
        /// Its process id.
        process: i32,
        /// The error of the system.
        source: io::Error,
    },
}

/// A QEMU as a process, which cannot be mistaken for another one, also when it has ended.
#[derive(Debug)]
pub struct QemuProcess {
    process: i32,
    descriptor: OwnedFd,
}

impl Qmp {
    /// QEMU's process, if this one may end it.
    ///
    /// # Errors
    /// If it is not known, or may not be ended.
    pub fn process(&self) -> Result<QemuProcess, ProcessError> {
        let socket = self.path.display().to_string();
        let unknown = |source: io::Error| ProcessError::Unknown {
            socket: socket.clone(),
            source,
        };
        let owner = getsockopt(&self.lock().writer, sockopt::PeerCredentials);
        let owner = owner.map_err(|errno| unknown(errno.into()))?;
        let process = owner.pid();
        let pid = Pid::from_raw(process).ok_or_else(|| unknown(io::ErrorKind::NotFound.into()))?;
        // Held before it is looked at: its id is nobody else's from then on.
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| unknown(errno.into()))?;
        if !is_qemu(process) {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            return Err(ProcessError::NoQemu {
                socket,
                process,
                name: name.trim().to_owned(),
            });
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), None).map_err(|errno| {
            ProcessError::NotOurs {
                process,
                source: errno.into(),
            }
        })?;
        Ok(QemuProcess { process, descriptor })
    }
}

impl QemuProcess {
    /// Kills it, and waits until it has ended.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn end(&self) -> Result<(), ProcessError> {
        let failed = |source: io::Error| ProcessError::NotOurs {
            process: self.process,
            source,
        };
        match pidfd_send_signal(&self.descriptor, Signal::KILL) {
            // It has ended.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        loop {
            match poll(
                &mut [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)],
                PollTimeout::NONE,
            ) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }
}

/// By its program, or by the one that the dynamic loader was told to run.
fn is_qemu(process: i32) -> bool {
    let is_name = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("qemu-system-") || name == "qemu-kvm"
    };
    let program = fs::read_link(format!("/proc/{process}/exe"));
    let words = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let is_loader = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("ld-linux") || name.starts_with("ld-2.")
    };
    program.is_ok_and(|path| {
        is_name(&path)
            || is_loader(&path)
                && words
                    .split(|byte| *byte == 0)
                    .any(|word| is_name(Path::new(&*String::from_utf8_lossy(word))))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Responder, monitor};
    use super::*;
    use serde_json::json;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn what_is_no_qemu_is_not_ended() {
        let respond: Responder = Box::new(|_, _| Ok(json!({})));
        let path = monitor((11, 1, 3), respond);
        let qmp = Qmp::connect(&path.0, Duration::from_secs(5)).unwrap();
        // The monitor is a thread of this process.
        let refused = qmp.process().unwrap_err();
        assert!(matches!(refused, ProcessError::NoQemu { .. }), "{refused}");
    }

    #[test]
    fn a_process_is_ended_when_that_returns() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = i32::try_from(child.id()).unwrap();
        let descriptor = pidfd_open(Pid::from_raw(process).unwrap(), PidfdFlags::empty()).unwrap();
        let qemu = QemuProcess { process, descriptor };
        qemu.end().unwrap();
        assert!(child.try_wait().unwrap().is_some());
        // Also one that has ended.
        qemu.end().unwrap();
    }
}
