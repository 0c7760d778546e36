//! The data plane: moves bytes from sockets to the places that endpoints name. It knows nothing of what the bytes
//! mean.
//!
//! An `Endpoint` is one connection. It is driven by one thread at a time, in a fixed cycle: asked for a
//! `ReceivePlan`, the backend receives into it, the endpoint is told how many bytes came, and so on. An endpoint
//! without a plan is *parked* until somebody wakes its `Waker`.
//!
//! Three backends drive endpoints:
//!
//! | backend | a thread per | receives by |
//! |---|---|---|
//! | `uring` | core | one io_uring per core: registered-buffer reads, or RECVMSG |
//! | `epoll` | core | readiness and recvmsg, for hosts without io_uring |
//! | `threads` | connection | blocking recvmsg: how QEMU does it, as the baseline to compare with |

mod core;
mod epoll;
mod plan;
mod plane;
mod receive;
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) mod sim;
mod slots;
mod staging;
mod threads;
mod uring;
mod wake;

// The data plane itself is the crate's alone: what its contracts demand of an endpoint, its memory above all, no type
// can check.
pub(crate) use plan::ReceivePlan;
pub use plane::{BackendKind, PlaneError};
pub(crate) use plane::{Driver, Plane, PlaneOptions};
pub use receive::quick_ack;
pub(crate) use staging::Staging;
pub use uring::RingFeatures;
pub(crate) use wake::{Semaphore, Waker};

use crate::store::{Slab, SlabId};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;

/// Why a connection gives no more bytes.
#[derive(Debug)]
pub(crate) enum Loss {
    /// The peer closed its side.
    Eof,
    /// A reset, a timeout, or an error of this host.
    Error(io::Error),
}

/// One connection, as the data plane sees it.
///
/// `Break` means that the endpoint has reported its end to whom it concerns and wants to be dropped.
pub(crate) trait Endpoint: Send {
    /// The socket. It stays the same and open for the endpoint's life.
    fn fd(&self) -> RawFd;

    /// The guest this connection belongs to: a number that names it among all guests of the process.
    fn guest(&self) -> u64;

    /// What to receive next; None parks the endpoint. Asked only while no receive is posted. The plan must not be
    /// changed or dropped before [`Self::received`] or [`Self::lost`].
    fn plan(&mut self) -> Option<&mut ReceivePlan>;

    /// The posted receive has put `bytes` bytes, at least one, into the plan's places.
    fn received(&mut self, bytes: usize) -> ControlFlow<()>;

    /// The connection has ended. The endpoint is dropped next.
    fn lost(&mut self, loss: Loss);

    /// Its waker was woken. A receive may be posted.
    fn resume(&mut self) -> ControlFlow<()>;

    /// From now on it is driven by this core (a position among the plane's), whose ring has these buffers for it. Called
    /// when nothing is posted; not by the backend `threads`.
    fn attached(&mut self, core: usize, buffers: Buffers);

    /// Most cache slabs that the guest can ever have; 0 as long as it has no memory.
    fn slab_limit(&self) -> usize;

    /// One of them, once it is there, for registration as a buffer.
    fn slab(&self, position: usize) -> Option<&Slab>;

    /// The ring that drives it has these buffers for it now.
    fn use_buffers(&mut self, buffers: Buffers);

    /// The core that shall drive it from now on, if it is another one. Asked when nothing is posted. `queued` says how many
    /// bytes wait in its socket, which costs a system call.
    fn moves_to(&self, queued: &dyn Fn() -> u64) -> Option<usize> {
        let _ = queued;
        None
    }

    /// Does a little of the work that can wait, when the core has nothing to receive. False if there is none.
    fn background(&mut self) -> bool {
        false
    }
}

/// The guest's slabs among a ring's registered buffers: slab `n` is buffer `first + n`, for the first `count` slabs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Buffers {
    pub first: u16,
    pub count: u16,
}

impl Buffers {
    /// The buffer that this slab is.
    pub fn index(self, slab: SlabId) -> Option<u16> {
        (slab.0 < self.count).then(|| self.first + slab.0)
    }
}

/// How an endpoint shapes its plans: what the backend is good at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReceiveStyle {
    /// A packet's header in two reads, as QEMU does it.
    pub split_header: bool,
    /// The next packet's header in one receive with the payload.
    pub chain_header: bool,
    /// Adjacent pages as one piece.
    pub coalesce: bool,
    /// The main channel reads on while it waits at a marker.
    pub read_ahead: bool,
    /// The main channel is woken by each channel that arrives at a sync, not by the last one alone.
    pub wake_each: bool,
    /// When a channel goes to a core of its own.
    pub spread: Spread,
    /// Pages of one round from which on receives are [bulk](ReceivePlan::bulk).
    pub bulk_from_pages: u64,
}

/// When one core is too little for a guest's channels: both must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    /// Pages of one round that the channel has carried.
    pub from_pages: u64,
    /// Bytes that wait in its socket.
    pub from_queued: u64,
}

impl Spread {
    /// A core that keeps up with its senders finds little in its sockets, and a second one then only takes the pages out of
    /// its cache: on two cores that made checkpoints of 30 MiB a third slower. One that falls behind finds what the
    /// kernel lets wait, some MiB. Fewer pages are over before another core is awake.
    const WHEN_BEHIND: Self = Self {
        from_pages: 128,
        from_queued: 1 << 20,
    };

    /// Each has a thread of its own anyway.
    const NEVER: Self = Self {
        from_pages: u64::MAX,
        from_queued: u64::MAX,
    };
}

impl ReceiveStyle {
    /// For the rings and epoll: as few operations as possible.
    pub const RING: Self = Self {
        split_header: false,
        chain_header: true,
        coalesce: true,
        read_ahead: true,
        wake_each: false,
        spread: Spread::WHEN_BEHIND,
        bulk_from_pages: 64,
    };

    /// For a thread per channel: what QEMU's receiver does.
    pub const THREADS: Self = Self {
        split_header: true,
        chain_header: false,
        coalesce: false,
        read_ahead: false,
        wake_each: true,
        spread: Spread::NEVER,
        bulk_from_pages: u64::MAX,
    };
}
