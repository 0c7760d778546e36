//! What io_uring offers to this process, found out by trying.
#![expect(unsafe_code, reason = "the probe registers a buffer by address")]

use super::setup::{RingUnavailable, SetupLevel, set_up};
use crate::host::OsError;
use io_uring::{Probe, opcode};
use schemars::JsonSchema;
use serde::Serialize;
use std::io;

/// Entries of a ring that is only set up for the probe.
const TRIAL_ENTRIES: u32 = 8;

/// An operation of io_uring that the receiver uses.
#[derive(Clone, Copy)]
pub(super) struct Opcode {
    pub(super) name: &'static str,
    pub(super) code: u8,
    purpose: &'static str,
    pub(super) essential: bool,
}

/// The operations that the receiver uses.
pub(super) const OPCODES: [Opcode; 4] = [
    Opcode {
        name: "RECVMSG",
        code: opcode::RecvMsg::CODE,
        purpose: "receives into plain slots",
        essential: true,
    },
    Opcode {
        name: "READ_FIXED",
        code: opcode::ReadFixed::CODE,
        purpose: "receives into one registered extent",
        essential: false,
    },
    Opcode {
        name: "READV_FIXED",
        code: opcode::ReadvFixed::CODE,
        purpose: "receives into several registered extents",
        essential: false,
    },
    Opcode {
        name: "POLL_ADD",
        code: opcode::PollAdd::CODE,
        purpose: "waits for wake-ups of other threads",
        essential: true,
    },
];

/// One operation that the receiver uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
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

/// Registered buffers as this process may use them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RegistrationReport {
    /// Whether a small buffer could be registered.
    #[schemars(with = "Result<(), String>")]
    pub small: Result<(), OsError>,
    /// Whether more than RLIMIT_MEMLOCK could be registered: the limit does not count for this process. None if
    /// that was not tried, because the limit is unlimited or larger than [`Self::TRIAL_BYTES_MAX`].
    pub beyond_limit: Option<bool>,
}

impl RegistrationReport {
    /// Most bytes that are pinned for the trial.
    pub const TRIAL_BYTES_MAX: u64 = 64 << 20;

    const SMALL_BYTES: usize = 16 << 10;

    fn probe(memlock_limit_bytes: Option<u64>) -> Self {
        let beyond = memlock_limit_bytes
            .and_then(|limit| limit.checked_add(1 << 20))
            .filter(|bytes| *bytes <= Self::TRIAL_BYTES_MAX)
            .and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            small: try_registration(Self::SMALL_BYTES).map_err(|error| OsError::from(&error)),
            beyond_limit: beyond.map(|bytes| try_registration(bytes).is_ok()),
        }
    }
}

/// What a ring offers to this process.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RingReport {
    /// The best flags that the kernel accepts.
    pub setup: SetupLevel,
    /// The operations that the receiver uses.
    pub opcodes: Vec<OpcodeSupport>,
    /// Registered buffers.
    pub registration: RegistrationReport,
}

impl RingReport {
    /// Sets up a small ring, asks it for its operations, and registers buffers. Pins at most
    /// [`RegistrationReport::TRIAL_BYTES_MAX`] of memory meanwhile.
    ///
    /// # Errors
    /// If no ring can be set up, or it cannot be asked.
    pub fn probe(memlock_limit_bytes: Option<u64>) -> Result<Self, RingUnavailable> {
        let explain = |error| RingUnavailable::here(&error);
        let (ring, setup) = set_up(TRIAL_ENTRIES, |_| {}).map_err(explain)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(explain)?;
        let opcodes = OPCODES.map(|opcode| OpcodeSupport {
            name: opcode.name,
            purpose: opcode.purpose,
            essential: opcode.essential,
            supported: probe.is_supported(opcode.code),
        });
        Ok(Self {
            setup,
            opcodes: opcodes.to_vec(),
            registration: RegistrationReport::probe(memlock_limit_bytes),
        })
    }
}

/// Registers a buffer of `bytes` with a ring made for it, and undoes it.
///
/// # Errors
/// The kernel's; ENOMEM means that the limit on pinned memory is too small.
fn try_registration(bytes: usize) -> io::Result<()> {
    // Declared before the ring, so it is dropped after it on every path.
    let mut buffer = vec![0u8; bytes];
    let (ring, _) = set_up(1, |_| {})?;
    let extent = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the extent is the whole of `buffer`, which this function owns, keeps in place and drops only after
    // the ring; no operation is ever submitted, so the kernel neither reads nor writes it.
    unsafe { ring.submitter().register_buffers(&[extent]) }?;
    ring.submitter().unregister_buffers()
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_can_be_set_up_reports_its_operations() {
        let report = match RingReport::probe(None) {
            Ok(report) => report,
            Err(unavailable) => {
                assert!(!unavailable.reason.is_empty() && !unavailable.remedy.is_empty());
                let name = "a_ring_that_can_be_set_up_reports_its_operations";
                return colo_ring_skip::skip(name, &unavailable.to_string());
            }
        };
        let supported = |name| {
            report
                .opcodes
                .iter()
                .any(|opcode| opcode.name == name && opcode.supported)
        };
        assert_eq!(report.opcodes.len(), OPCODES.len());
        // In every kernel that can be probed at all (5.6).
        assert!(supported("RECVMSG") && supported("READ_FIXED") && supported("POLL_ADD"));
        assert_eq!(report.registration.beyond_limit, None);
    }
}
