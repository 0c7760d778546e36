//! Setting up a ring, and why that fails.

use crate::host::io_uring_disabled;
use io_uring::{Builder, IoUring};
use nix::errno::Errno;
use schemars::JsonSchema;
use serde::Serialize;
use std::io;
use thiserror::Error;

/// Sets of set-up flags, best first. A ring is set up with the first one that the kernel accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SetupLevel {
    /// SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1): completions are processed when the ring's own thread waits.
    DeferTaskrun,
    /// COOP_TASKRUN (Linux 5.19): no interrupt to process a completion.
    CoopTaskrun,
    /// No flags (Linux 5.1).
    Plain,
}

/// The levels in the order in which they are tried.
const LEVELS: [SetupLevel; 3] = [
    SetupLevel::DeferTaskrun,
    SetupLevel::CoopTaskrun,
    SetupLevel::Plain,
];

impl SetupLevel {
    /// The flags by name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeferTaskrun => "SINGLE_ISSUER|DEFER_TASKRUN",
            Self::CoopTaskrun => "COOP_TASKRUN",
            Self::Plain => "none",
        }
    }

    fn builder(self) -> Builder {
        let mut builder = IoUring::builder();
        match self {
            // TASKRUN_FLAG: without it, a poll that does not wait cannot see that completions are due, and takes none.
            Self::DeferTaskrun => builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag(),
            Self::CoopTaskrun => builder.setup_coop_taskrun(),
            Self::Plain => &mut builder,
        };
        builder
    }
}

/// The best ring that this kernel sets up, with `entries` submission entries; `configure` adds to its parameters.
///
/// # Errors
/// Of io_uring_setup(2): see [`RingUnavailable`].
pub(super) fn set_up(entries: u32, configure: impl Fn(&mut Builder)) -> io::Result<(IoUring, SetupLevel)> {
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for level in LEVELS {
        let mut builder = level.builder();
        configure(&mut builder);
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, level)),
            // An unknown flag. Any other error would be the same without it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Sets up a ring with so many submission entries and drops it: whether this process can use io_uring at all.
///
/// # Errors
/// Of io_uring_setup(2).
pub fn try_set_up(entries: u32) -> io::Result<()> {
    set_up(entries, |_| {}).map(drop)
}

/// Why this process cannot use io_uring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Error, JsonSchema)]
#[error("io_uring cannot be used: {reason}; {remedy}")]
pub struct RingUnavailable {
    /// The error of io_uring_setup(2).
    pub errno: i32,
    /// What it means on this host.
    pub reason: String,
    /// The remedy.
    pub remedy: String,
}

impl RingUnavailable {
    /// Explains an error of io_uring_setup(2) on this host.
    pub fn here(error: &io::Error) -> Self {
        Self::explain(error, io_uring_disabled())
    }

    /// Explains an error of io_uring_setup(2). `disabled` is the value of `kernel.io_uring_disabled`, where the
    /// kernel has it (Linux 6.6).
    pub fn explain(error: &io::Error, disabled: Option<u64>) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        let (reason, remedy) = match (Errno::from_raw(errno), disabled) {
            (Errno::ENOSYS, _) => (
                "the kernel lacks it, or a seccomp filter hides it (ENOSYS)".to_owned(),
                "use a kernel with CONFIG_IO_URING, or a container profile that allows io_uring_setup"
                    .to_owned(),
            ),
            (Errno::EPERM, Some(level @ 1..)) => (
                format!("it is disabled by kernel.io_uring_disabled={level} (EPERM)"),
                "sysctl -w kernel.io_uring_disabled=0".to_owned(),
            ),
            (Errno::EPERM | Errno::EACCES, _) => (
                format!("it is forbidden by a seccomp filter or a security module ({error})"),
                "allow io_uring_setup, io_uring_enter and io_uring_register in the container's profile \
                 (docker: --security-opt seccomp=PROFILE)"
                    .to_owned(),
            ),
            (Errno::ENOMEM, _) => (
                "the limit on pinned memory is too small for a ring (ENOMEM)".to_owned(),
                "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service".to_owned(),
            ),
            (Errno::EMFILE | Errno::ENFILE, _) => (
                format!("there are too many open files ({error})"),
                "ulimit -n 65536".to_owned(),
            ),
            _ => (
                format!("io_uring_setup failed: {error}"),
                "see the kernel's log (dmesg)".to_owned(),
            ),
        };
        Self {
            errno,
            reason,
            remedy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_names_its_cause_and_remedy() {
        let explain = |errno: Errno, disabled| {
            RingUnavailable::explain(&io::Error::from_raw_os_error(errno as i32), disabled).to_string()
        };
        assert!(explain(Errno::ENOSYS, None).contains("CONFIG_IO_URING"));
        assert!(explain(Errno::EPERM, Some(2)).contains("kernel.io_uring_disabled=2"));
        assert!(explain(Errno::EPERM, Some(2)).contains("sysctl -w kernel.io_uring_disabled=0"));
        assert!(explain(Errno::EPERM, Some(0)).contains("seccomp"));
        assert!(explain(Errno::EPERM, None).contains("seccomp"));
        assert!(explain(Errno::ENOMEM, None).contains("ulimit -l"));
        assert!(explain(Errno::EMFILE, None).contains("ulimit -n"));
        assert!(
            explain(Errno::EINVAL, None).contains("EINVAL")
                || explain(Errno::EINVAL, None).contains("Invalid")
        );
    }
}
