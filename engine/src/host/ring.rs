//! io_uring as this process may use it: set up, asked for its opcodes, given a buffer.
#![forbid(unsafe_code)]

use super::{proc, registration};
use io_uring::{IoUring, Probe, opcode};
use nix::errno::Errno;
use serde::Serialize;
use std::io;
use thiserror::Error;

/// The flags of a ring, best first. A ring is set up with the first that the kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SetupLevel {
    /// SINGLE_ISSUER and DEFER_TASKRUN (Linux 6.1): completions are worked off when the ring's own thread asks.
    DeferTaskrun,
    /// COOP_TASKRUN (Linux 5.19): no interrupt to work off a completion.
    CoopTaskrun,
    /// No flags (Linux 5.1).
    Plain,
}

/// The ladder, in the order in which it is tried.
pub const SETUP_LEVELS: [SetupLevel; 3] = [
    SetupLevel::DeferTaskrun,
    SetupLevel::CoopTaskrun,
    SetupLevel::Plain,
];

/// Entries of a ring that is only set up to see whether it can be.
const TRIAL_ENTRIES: u32 = 8;

impl SetupLevel {
    /// The flags by name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeferTaskrun => "SINGLE_ISSUER|DEFER_TASKRUN",
            Self::CoopTaskrun => "COOP_TASKRUN",
            Self::Plain => "none",
        }
    }

    /// A ring with these flags, to be built.
    pub(crate) fn builder(self) -> io_uring::Builder {
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

/// Why there is no io_uring for this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Error)]
#[error("io_uring cannot be used: {reason}; {remedy}")]
pub struct RingUnavailable {
    /// The error of io_uring_setup(2).
    pub errno: i32,
    /// What it means here.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}

impl RingUnavailable {
    /// Explains an error of io_uring_setup(2) on this host.
    pub fn here(error: &io::Error) -> Self {
        Self::explain(error, proc::number("/proc/sys/kernel/io_uring_disabled"))
    }

    /// Explains an error of io_uring_setup(2). `disabled` is the value of `kernel.io_uring_disabled`, where the
    /// kernel has it (Linux 6.6).
    pub fn explain(error: &io::Error, disabled: Option<u64>) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        let (reason, remedy) = match (Errno::from_raw(errno), disabled) {
            (Errno::ENOSYS, _) => (
                "the kernel has none, or a seccomp filter hides it (ENOSYS)".to_owned(),
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
                "look into the kernel's log (dmesg)".to_owned(),
            ),
        };
        Self {
            errno,
            reason,
            remedy,
        }
    }
}

/// One operation that a receiver would use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OpcodeSupport {
    /// Its name.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Whether a ring cannot receive without it; the others have a substitute.
    pub essential: bool,
    /// Whether the kernel has it.
    pub supported: bool,
}

/// The operations that a receiver uses: name, number, purpose, and whether nothing can stand in for it.
pub const OPCODES: [(&str, u8, &str, bool); 4] = [
    (
        "RECVMSG",
        opcode::RecvMsg::CODE,
        "receives into plain slots",
        true,
    ),
    (
        "READ_FIXED",
        opcode::ReadFixed::CODE,
        "receives into one registered extent",
        false,
    ),
    (
        "READV_FIXED",
        opcode::ReadvFixed::CODE,
        "receives into several registered extents",
        false,
    ),
    (
        "POLL_ADD",
        opcode::PollAdd::CODE,
        "waits for wake-ups of other threads",
        true,
    ),
];

/// Registered buffers as this process may use them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RegistrationReport {
    /// Whether a small buffer could be registered; the error otherwise.
    pub small: Result<(), String>,
    /// Whether more than RLIMIT_MEMLOCK could be registered: the limit does not count for this process. None if
    /// that was not tried, because the limit is unlimited or larger than [`Self::TRIAL_BYTES_MAX`].
    pub beyond_limit: Option<bool>,
}

impl RegistrationReport {
    /// Most bytes that are pinned for the trial.
    pub const TRIAL_BYTES_MAX: u64 = 64 << 20;

    const SMALL_BYTES: usize = 16 << 10;

    fn probe(memlock_limit_bytes: Option<u64>) -> Self {
        let small = registration::try_registration(Self::SMALL_BYTES).map_err(|error| error.to_string());
        let beyond = memlock_limit_bytes
            .and_then(|limit| limit.checked_add(1 << 20))
            .filter(|bytes| *bytes <= Self::TRIAL_BYTES_MAX)
            .and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            small,
            beyond_limit: beyond.map(|bytes| registration::try_registration(bytes).is_ok()),
        }
    }
}

/// What a ring offers here.
#[derive(Clone, Debug, Serialize)]
pub struct RingReport {
    /// The best flags that the kernel takes.
    pub setup: SetupLevel,
    /// The operations of [`OPCODES`].
    pub opcodes: Vec<OpcodeSupport>,
    /// Registered buffers.
    pub registration: RegistrationReport,
}

impl RingReport {
    /// Sets up small rings down the ladder, asks the first that works for its opcodes, and registers buffers.
    ///
    /// # Errors
    /// If not even a plain ring can be set up, or it cannot be asked.
    pub fn probe(memlock_limit_bytes: Option<u64>) -> Result<Self, RingUnavailable> {
        let explain = |error| RingUnavailable::here(&error);
        let ladder = SETUP_LEVELS
            .iter()
            .map(|level| level.builder().build(TRIAL_ENTRIES).map(|ring| (*level, ring)));
        let tried = ladder.reduce(Result::or).expect("the ladder is not empty");
        let (setup, ring) = tried.map_err(explain)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(explain)?;
        let opcodes = OPCODES.map(|(name, code, purpose, essential)| OpcodeSupport {
            name,
            purpose,
            essential,
            supported: probe.is_supported(code),
        });
        Ok(Self {
            setup,
            opcodes: opcodes.to_vec(),
            registration: RegistrationReport::probe(memlock_limit_bytes),
        })
    }

    /// Whether an operation of [`OPCODES`] is there.
    pub fn supports(&self, name: &str) -> bool {
        self.opcodes
            .iter()
            .any(|opcode| opcode.name == name && opcode.supported)
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

    #[test]
    fn a_ring_that_can_be_set_up_says_what_it_supports() {
        // Where there is none, the receiver falls back as well: nothing to test but that the reason is given.
        match RingReport::probe(None) {
            Ok(report) => {
                assert_eq!(report.opcodes.len(), OPCODES.len());
                // In every kernel that can be probed at all (5.6).
                assert!(report.supports("RECVMSG") && report.supports("READ_FIXED"));
                assert!(!report.supports("NO_SUCH_OPCODE"));
                assert_eq!(report.registration.beyond_limit, None);
            }
            Err(unavailable) => assert!(!unavailable.reason.is_empty()),
        }
    }
}
