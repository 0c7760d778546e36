//! The secondary's receive side of QEMU COLO: everything between a socket and a committed checkpoint.

pub mod blocks;
pub mod session;
pub mod store;
mod sync;
pub mod units;
pub mod wire;
