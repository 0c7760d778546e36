//! The secondary's receive side of QEMU COLO: everything between a socket and a committed checkpoint.

pub mod blocks;
pub mod host;
pub mod metrics;
pub mod store;
pub mod units;
pub mod wire;
