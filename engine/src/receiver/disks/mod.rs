//! Guests' disks in the receiver: the NBD server, which disk belongs to which session, and what a session does with its disks.

mod attribution;
mod connection;
mod registry;
mod reserve;
mod server;
mod session_disks;

pub use registry::UnboundDisk;
pub(super) use registry::{DiskMemory, DiskRegistry};
pub(super) use server::{DiskServer, ServerParts};
pub(super) use session_disks::SessionDisks;
pub use session_disks::{DiskState, DiskStatus, RestoredDisk};
