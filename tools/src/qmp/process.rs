//! The process behind a monitor's socket.

use super::Qmp;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{major, minor};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use thiserror::Error;

/// How long QEMU may take to answer whether its guest runs, before it is killed.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How long the monitor may take to be closed after its process has ended: the kernel frees what an io_uring has later.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

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
        "the monitor's socket {socket} was made by process {process} ({name}), which is no QEMU: which process that is, is not known"
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
    /// The receiver has given the guard up, and let the guest run.
    #[error("QEMU (process {0}) was not ended: its guest runs again")]
    Runs(i32),
    /// QEMU may be gone, or hang.
    #[error("QEMU (process {process}) was not ended: {source}")]
    Silent {
        /// Its process id.
        process: i32,
        /// Why it is not known whether the guest runs.
        source: super::QmpError,
    },
    /// The process had made the monitor's socket, and given it to another one.
    #[error(
        "process {0} was ended, but another process serves QEMU's monitor: the guest's QEMU was started by it, and is still there"
    )]
    Other(i32),
}

/// A QEMU as a process, which cannot be mistaken for another one, also when it has ended.
#[derive(Debug)]
pub struct QemuProcess {
    process: i32,
    descriptor: OwnedFd,
    monitor: Qmp,
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
        let (process, descriptor) = peer(&self.conversation.writer()).map_err(unknown)?;
        let (name, is_qemu) = (name_of(process), is_qemu(process));
        // Its id was its own all the time if it is its own now.
        if has_ended(&descriptor, PollTimeout::ZERO).map_err(unknown)? {
            return Err(unknown(io::Error::other("it has ended")));
        }
        if !is_qemu {
            return Err(ProcessError::NoQemu {
                socket,
                process,
                name,
            });
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(process), None).map_err(|errno| {
            ProcessError::NotOurs {
                process,
                source: errno.into(),
            }
        })?;
        Ok(QemuProcess {
            process,
            descriptor,
            monitor: self.clone(),
        })
    }

    /// Whether QEMU has a shared mapping of that very file, which may have no name any more.
    ///
    /// # Errors
    /// If its process is not known, or is not this user's.
    pub fn has_mapped(&self, file: &Metadata) -> Result<bool, ProcessError> {
        let socket = || self.path.display().to_string();
        let unknown = |source| ProcessError::Unknown {
            socket: socket(),
            source,
        };
        let (process, descriptor) = peer(&self.conversation.writer()).map_err(unknown)?;
        let maps = fs::read(format!("/proc/{process}/maps")).map_err(unknown)?;
        let (name, is_qemu) = (name_of(process), is_qemu(process));
        // Its id was its own all the time if it is its own now.
        if has_ended(&descriptor, PollTimeout::ZERO).map_err(unknown)? {
            return Err(unknown(io::Error::other("it has ended")));
        }
        let maps = String::from_utf8_lossy(&maps);
        match has_shared_mapping(&maps, file.dev(), file.ino()) {
            false if !is_qemu => Err(ProcessError::NoQemu {
                socket: socket(),
                process,
                name,
            }),
            is_mapped => Ok(is_mapped),
        }
    }

    /// What QEMU's standard error is, opened again, where that is a file that this user may read.
    #[must_use]
    pub fn standard_error(&self) -> Option<File> {
        let (process, _) = peer(&self.conversation.writer()).ok()?;
        let path = format!("/proc/{process}/fd/2");
        // Opening a terminal or a FIFO could take something from who reads it, or wait.
        let is_file = fs::metadata(&path).is_ok_and(|about| about.is_file());
        is_file.then(|| File::open(&path).ok()).flatten()
    }
}

/// Whether the text of a process's `maps` has a shared mapping of the file with that device and inode.
fn has_shared_mapping(maps: &str, device: u64, inode: u64) -> bool {
    let device = format!("{:02x}:{:02x}", major(device), minor(device));
    maps.lines().any(|line| {
        // Addresses, rights, offset, device, inode, path.
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (rights, of_device, of_inode) = (fields.next(), fields.nth(1), fields.next());
        rights.is_some_and(|rights| rights.ends_with('s'))
            && of_device == Some(&device)
            && of_inode.and_then(|text| text.parse().ok()) == Some(inode)
    })
}

/// The process that listens at the other end of a socket.
fn peer(socket: &UnixStream) -> io::Result<(i32, OwnedFd)> {
    let process = getsockopt(socket, sockopt::PeerCredentials)?.pid();
    let pid = Pid::from_raw(process).ok_or(io::ErrorKind::NotFound)?;
    let descriptor = match getsockopt(socket, sockopt::PeerPidfd) {
        Ok(descriptor) => descriptor,
        // Linux before 6.5. The id may be another process's by now, which what follows looks at.
        Err(Errno::ENOPROTOOPT) => pidfd_open(pid, PidfdFlags::empty())?,
        Err(errno) => return Err(errno.into()),
    };
    Ok((process, descriptor))
}

/// Whether a process has ended, or ends in that time.
fn has_ended(descriptor: &OwnedFd, timeout: PollTimeout) -> io::Result<bool> {
    loop {
        match poll(&mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl QemuProcess {
    /// Kills it, if its guest is stopped, and waits until it has ended.
    ///
    /// # Errors
    /// If its guest runs, if it cannot be killed, or if it was not the one that serves the monitor.
    pub fn end(self) -> Result<(), ProcessError> {
        self.end_and_wait(CLOSE_LIMIT)
    }

    fn end_and_wait(mut self, close_limit: Duration) -> Result<(), ProcessError> {
        let process = self.process;
        let status = self
            .monitor
            .execute_within("query-status", &json!({}), ANSWER_LIMIT);
        match status {
            Ok(status) if status["running"] == false => {}
            Ok(_) => return Err(ProcessError::Runs(process)),
            Err(source) => return Err(ProcessError::Silent { process, source }),
        }
        let failed = |source: io::Error| ProcessError::NotOurs { process, source };
        match pidfd_send_signal(&self.descriptor, Signal::KILL) {
            // It has ended.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        has_ended(&self.descriptor, PollTimeout::NONE).map_err(failed)?;
        match self.monitor.wait_closed(close_limit) {
            true => Ok(()),
            false => Err(ProcessError::Other(process)),
        }
    }
}

fn name_of(process: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    name.trim().to_owned()
}

/// By its program, or by the one that the dynamic loader runs.
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
    use nix::sys::stat::makedev;
    use serde_json::json;
    use std::process::{Child, Command};
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

    /// A monitor of this process, and a process that is taken for its QEMU.
    fn taken_for_qemu(is_running: bool) -> (Child, QemuProcess, impl Sized) {
        let respond: Responder = Box::new(move |_, _| Ok(json!({"running": is_running})));
        let path = monitor((11, 1, 3), respond);
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = i32::try_from(child.id()).unwrap();
        let descriptor = pidfd_open(Pid::from_raw(process).unwrap(), PidfdFlags::empty()).unwrap();
        let qemu = QemuProcess {
            process,
            descriptor,
            monitor: Qmp::connect(&path.0, Duration::from_secs(5)).unwrap(),
        };
        (child, qemu, path)
    }

    /// A receiver that has given the guard up lets the guest run.
    #[test]
    fn a_guest_that_runs_is_not_ended() {
        let (mut child, qemu, _path) = taken_for_qemu(true);
        assert!(matches!(qemu.end(), Err(ProcessError::Runs(_))));
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_was_not_qemu_is_found() {
        let (mut child, qemu, _path) = taken_for_qemu(false);
        let error = qemu.end_and_wait(Duration::from_millis(200)).unwrap_err();
        assert!(matches!(error, ProcessError::Other(_)), "{error}");
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn a_mapping_is_of_one_file_whatever_its_name_is() {
        let maps = "7f00a0000000-7f00c0000000 rw-s 00000000 00:1a 77                         /dev/shm/colo/session-1.pc.ram (deleted)\n\
                    7f00c0000000-7f00c0001000 rw-p 00000000 00:1a 78                         /dev/shm/private\n\
                    7f00d0000000-7f00d0001000 rw-s 00000000 00:2b 79                         /dev/hugepages/x\n\
                    7f00e0000000-7f00e0001000 rw-p 00000000 00:00 0 \n";
        let is_mapped = |minor, inode| has_shared_mapping(maps, makedev(0, minor), inode);
        assert!(is_mapped(0x1a, 77) && is_mapped(0x2b, 79));
        assert!(!is_mapped(0x1a, 78), "it is private");
        assert!(!is_mapped(0x1a, 79), "it is on another file system");
        assert!(!is_mapped(0, 0));
        assert!(!has_shared_mapping("nonsense\n\n1 s", makedev(0, 0x1a), 77));
    }

    /// As libvirt does: it makes the socket, and gives it to QEMU.
    #[test]
    fn what_another_process_has_mapped_is_not_taken_for_qemu_s() {
        let respond: Responder = Box::new(|_, _| Ok(json!({})));
        let path = monitor((11, 1, 3), respond);
        let qmp = Qmp::connect(&path.0, Duration::from_secs(5)).unwrap();
        let file = tempfile::tempfile().unwrap().metadata().unwrap();
        let refused = qmp.has_mapped(&file).unwrap_err();
        assert!(matches!(refused, ProcessError::NoQemu { .. }), "{refused}");
    }

    #[test]
    fn the_process_behind_a_socket_is_known() {
        let respond: Responder = Box::new(|_, _| Ok(json!({})));
        let path = monitor((11, 1, 3), respond);
        let socket = UnixStream::connect(&path.0).unwrap();
        let (process, descriptor) = peer(&socket).unwrap();
        assert_eq!(u32::try_from(process).unwrap(), std::process::id());
        assert!(!has_ended(&descriptor, PollTimeout::ZERO).unwrap());
    }
}
