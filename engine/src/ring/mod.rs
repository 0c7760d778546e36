//! The data plane: moves bytes from sockets to the places that connections name. It does not know what the bytes mean.
//!
//! A `Connection` is one socket. One thread at a time drives it, in a fixed cycle: the backend asks for a
//! `ReceivePlan`, receives into it, reports how many bytes came, and so on. A connection without a plan is *parked* until
//! its `Waker` is woken.
//!
//! A `Tenant` is one guest's presence on one core: the memory that the core's ring registers as buffers for all
//! connections of that guest, and the guest's background work. Tenants are admitted before the connections that belong to
//! them, on every core that may drive one.
//!
//! Three backends drive connections:
//!
//! | backend | a thread per | receives by |
//! |---|---|---|
//! | `uring` | core | one io_uring per core: registered-buffer reads, or RECVMSG |
//! | `epoll` | core | readiness and recvmsg, for hosts without io_uring |
//! | `threads` | connection | blocking recvmsg, as QEMU does it: the baseline of comparisons |

mod backend;
mod connection;
mod core;
mod epoll;
mod inbox;
#[cfg(all(test, not(loom), not(miri)))]
mod parked;
mod plan;
mod plane;
mod receive;
mod registrations;
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) mod sim;
mod slots;
mod stream_buffer;
mod style;
mod tenants;
mod threads;
mod uring;
mod wake;

// The data plane itself is private to the crate: no type can check what its contracts demand of a connection, above all of
// its memory.
pub(crate) use connection::{Connection, Loss, Move};
pub(crate) use plan::{PlanCursor, ReceivePlan};
pub use plane::{BackendKind, PlaneError};
pub(crate) use plane::{Driver, Plane, PlaneOptions};
pub(crate) use stream_buffer::StreamBuffer;
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) use style::OffloadThreshold;
pub(crate) use style::ReceiveStyle;
pub(crate) use tenants::{Region, Tenant};
pub use uring::{
    OpcodeSupport, RegistrationReport, RingFeatures, RingReport, RingUnavailable, SetupLevel, try_set_up,
};
pub(crate) use wake::{Semaphore, Waker};
