//! The backend `uring`. Only this folder knows io_uring: here it is driven, `setup` sets it up, `report` probes it.
//!
//! Contract: a posted receive belongs to the kernel until its completion is reaped; `user_data` is the slot's
//! number, and a slot has one receive at a time, so no completion can be taken for another's. Every submission has
//! exactly one completion: no multishot, no link, no skipped success. When the ring is dropped, receives may still be
//! posted (the core has failed): the kernel cancels them at a time of its own, so `core` leaks the memory they write to.
//!
//! What the kernel offers is tried, never guessed from its version:
//!
//! | feature | since | else |
//! |---|---|---|
//! | SINGLE_ISSUER + DEFER_TASKRUN: completions run when we wait, not at any time | 6.1 | COOP_TASKRUN (5.19), then none |
//! | EXT_ARG: a wait with a timeout | 5.11 | while bytes gather in a socket, its core polls |
//! | sparse buffer table | 5.19 | no registered buffers |
//! | READV_FIXED: a scattered packet in one registered read | 6.15 | READ_FIXED for one run, RECVMSG for several |
//! | restrictions: no filter of system calls sees what a ring does, so it is confined to what is used here | 5.10 | a warning |
#![expect(
    unsafe_code,
    reason = "submission entries carry addresses that the kernel uses later"
)]

mod report;
mod setup;
#[cfg(all(test, not(loom), not(miri)))]
mod tests;

pub use report::{OpcodeSupport, RegistrationReport, RingReport};
pub use setup::{RingUnavailable, SetupLevel, try_set_up};

use super::backend::{Backend, COALESCE_DELAY, Completion, Wait};
use super::wake::CoreWake;
use super::{ReceivePlan, Region, receive};
use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, Probe, cqueue, opcode, squeue, types};
use report::OPCODES;
use setup::set_up;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

const WAKE: u64 = u64::MAX;

/// Submission entries. A core posts one receive a connection and submits whenever it waits, so this bounds a burst.
const SUBMISSIONS: u32 = 256;

/// Completion entries: more than one for every connection a core is likely to have. The kernel keeps what overflows.
const COMPLETIONS: u32 = 4096;

/// The number of the kernel's IORING_REGISTER_BUFFERS_UPDATE, by which slabs come and go.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// Registered buffers of one ring, the kernel's own limit: 8 TiB of slabs of 512 MiB.
const BUFFERS: u16 = 16384;

/// What the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFeatures {
    /// Names of the set-up flags in force.
    pub setup: &'static str,
    /// Receives can go to registered buffers.
    pub registered: bool,
    /// Scattered receives, too.
    pub readv_fixed: bool,
    /// A wait can have a timeout.
    pub timed: bool,
    /// The ring can do nothing but receive and wait.
    pub restricted: bool,
}

impl std::fmt::Display for RingFeatures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let buffers = match (self.registered, self.readv_fixed) {
            (true, true) => "registered buffers by READV_FIXED",
            (true, false) => "registered buffers by READ_FIXED where pages are adjacent",
            (false, _) => "no registered buffers",
        };
        write!(f, "{}; {buffers}", self.setup)
    }
}

pub(super) struct UringBackend {
    ring: IoUring,
    wake: Arc<CoreWake>,
    features: RingFeatures,
    /// Which buffer indices are reserved.
    buffers: Vec<bool>,
    wake_armed: bool,
    /// Receives that could not be submitted.
    refused: Vec<Completion>,
}

impl UringBackend {
    /// Must be called on the thread that will drive the ring.
    pub(super) fn new(wake: Arc<CoreWake>, registered: bool) -> io::Result<Self> {
        let configure = |builder: &mut Builder| {
            builder.setup_cqsize(COMPLETIONS).setup_clamp().dontfork();
        };
        let disabled = set_up(SUBMISSIONS, |builder| {
            configure(builder);
            builder.setup_r_disabled();
        });
        let ((ring, level), restricted) = match disabled {
            Ok(ring) => (ring, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (set_up(SUBMISSIONS, configure)?, false)
            }
            Err(error) => return Err(error),
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let is_lacking = |opcode: &&report::Opcode| opcode.essential && !probe.is_supported(opcode.code);
        if let Some(opcode) = OPCODES.iter().find(is_lacking) {
            let message = format!("this kernel's io_uring lacks the operation {}", opcode.name);
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let registered = registered
            && probe.is_supported(opcode::ReadFixed::CODE)
            && ring
                .submitter()
                .register_buffers_sparse(u32::from(BUFFERS))
                .is_ok();
        let readv_fixed = registered && probe.is_supported(opcode::ReadvFixed::CODE);
        if restricted {
            restrict(&ring, &probe)?;
        }
        let features = RingFeatures {
            setup: level.name(),
            registered,
            readv_fixed,
            timed: ring.params().is_feature_ext_arg(),
            restricted,
        };
        let buffers = vec![false; if registered { usize::from(BUFFERS) } else { 0 }];
        Ok(Self {
            ring,
            wake,
            features,
            buffers,
            wake_armed: false,
            refused: Vec::new(),
        })
    }

    pub(super) fn features(&self) -> RingFeatures {
        self.features
    }

    fn entry(&self, fd: RawFd, plan: &mut ReceivePlan) -> squeue::Entry {
        let fd = types::Fd(fd);
        if let Some(index) = plan.registered {
            let pieces = plan.pieces();
            if let [piece] = pieces {
                let length = u32::try_from(piece.iov_len).unwrap_or(u32::MAX);
                return opcode::ReadFixed::new(fd, piece.iov_base.cast(), length, index).build();
            }
            if self.features.readv_fixed {
                let count = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
                return opcode::ReadvFixed::new(fd, pieces.as_ptr(), count, index).build();
            }
        }
        let flags = if plan.wait_all {
            libc::MSG_WAITALL.cast_unsigned()
        } else {
            0
        };
        opcode::RecvMsg::new(fd, plan.message()).flags(flags).build()
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: what the entry points at stays valid until its completion: a plan by the contract of `core`, and
        // POLL_ADD points at nothing.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    fn arm_wake(&mut self) -> io::Result<()> {
        if !self.wake_armed {
            let fd = types::Fd(self.wake.as_fd().as_raw_fd());
            let events = u32::from(libc::POLLIN.cast_unsigned());
            self.push(&opcode::PollAdd::new(fd, events).build().user_data(WAKE))?;
            self.wake_armed = true;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) -> bool {
        let mut woken = false;
        for entry in self.ring.completion() {
            match classify(&entry) {
                Reaped::Wake => woken = true,
                Reaped::Receive(completion) => done.push(completion),
            }
        }
        if woken {
            self.wake_armed = false;
            self.wake.clear();
        }
        woken
    }
}

/// Confines a ring that is not enabled yet to the operations that are used here, and enables it.
fn restrict(ring: &IoUring, probe: &Probe) -> io::Result<()> {
    let known = OPCODES.iter().filter(|opcode| probe.is_supported(opcode.code));
    let mut restrictions: Vec<_> = known.map(|opcode| Restriction::sqe_op(opcode.code)).collect();
    restrictions.push(Restriction::register_op(REGISTER_BUFFERS_UPDATE));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

enum Reaped {
    Wake,
    Receive(Completion),
}

fn classify(entry: &cqueue::Entry) -> Reaped {
    if entry.user_data() == WAKE {
        return Reaped::Wake;
    }
    let slot = usize::try_from(entry.user_data()).expect("the user data of a receive is a slot number");
    // Negative is an errno.
    let result = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
    Reaped::Receive(Completion { slot, result })
}

impl Backend for UringBackend {
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan) {
        let user_data = u64::try_from(slot).unwrap_or(WAKE);
        let entry = self.entry(fd, plan).user_data(user_data);
        if let Err(error) = self.push(&entry) {
            let result = Err(error);
            self.refused.push(Completion { slot, result });
        }
    }

    fn wait(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool> {
        self.arm_wake()?;
        let submitted = match wait {
            Wait::Block if self.refused.is_empty() => self.ring.submit_and_wait(1),
            Wait::Coalesce if self.features.timed && self.refused.is_empty() => {
                let timespec = types::Timespec::from(COALESCE_DELAY);
                let arguments = types::SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
            _ => self.ring.submit(),
        };
        match submitted {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
            // Interrupted, or completions must be taken first: reaping them and coming back resolves both.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) => {}
            Err(error) => return Err(error),
        }
        done.append(&mut self.refused);
        Ok(self.reap(done))
    }

    fn queued(&self, fd: RawFd) -> u64 {
        receive::queued(fd)
    }

    fn forget(&mut self, _slot: usize, _fd: RawFd) {}

    fn buffers(&self) -> usize {
        self.buffers.len()
    }

    fn reserve_buffers(&mut self, count: u16) -> Option<u16> {
        let count = usize::from(count);
        let free = self
            .buffers
            .windows(count.max(1))
            .position(|window| window.iter().all(|taken| !taken))?;
        self.buffers[free..free + count].fill(true);
        u16::try_from(free).ok()
    }

    fn register(&mut self, index: u16, region: &dyn Region) -> io::Result<()> {
        let buffer = libc::iovec {
            iov_base: region.base().cast(),
            iov_len: region.bytes(),
        };
        // SAFETY: the region stays mapped as long as its tenant lives, and the core unregisters it before it drops the
        // tenant, or has failed and posts nothing more (contract of `tenants`).
        unsafe {
            self.ring
                .submitter()
                .register_buffers_update(u32::from(index), &[buffer], None)
        }
    }

    fn unregister(&mut self, index: u16) {
        let nothing = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        // SAFETY: an empty buffer refers to no memory; no receive into the old one is posted any more.
        let result = unsafe {
            self.ring
                .submitter()
                .register_buffers_update(u32::from(index), &[nothing], None)
        };
        debug_assert!(result.is_ok(), "clearing a slot of the buffer table: {result:?}");
    }

    fn release_buffers(&mut self, first: u16, count: u16) {
        self.buffers[usize::from(first)..usize::from(first + count)].fill(false);
    }
}
