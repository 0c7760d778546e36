//! The secondary's receive side of QEMU COLO: everything between a socket and a committed checkpoint.
//!
//! The way of a page: [`ring`] receives it to where [`store`] placed it, as [`receiver`]'s page channel learnt from
//! [`wire`]; [`session`] says when a checkpoint is complete; [`store`] commits it.

pub mod blocks;
mod canary;
mod disk;
pub mod failover;
pub mod host;
mod killpoint;
pub mod link;
pub mod metrics;
pub mod nbd;
pub mod net;
pub mod receiver;
pub mod ring;
pub mod session;
pub mod store;
mod sync;
pub mod units;
pub mod wire;
