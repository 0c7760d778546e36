//! The secondary's receive side of QEMU COLO: everything between a socket and a committed checkpoint.
//!
//! The way of a page: [`session`]'s channel reads the header of its packet, [`store`] gives the place of each page, [`ring`] receives the
//! pages there, and [`store`] commits them once [`session`] has seen the whole checkpoint. [`receiver`] joins them.

pub mod blocks;
pub mod budget;
mod canary;
mod disk;
pub mod failover;
mod failpoint;
pub mod files;
pub mod host;
pub mod link;
pub mod metrics;
pub mod nbd;
pub mod net;
mod opaque;
pub mod rate_limit;
pub mod receiver;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod store;
mod sync;
pub mod text;
pub mod threads;
pub mod tls;
pub mod units;
pub mod wire;
