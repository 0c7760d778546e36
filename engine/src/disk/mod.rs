//! Guests' disks: bases, and the redo logs of epochs that are committed with the RAM.
//!
//! ```text
//!           bind (checkpoint 0)          cut n                  commit n
//!  Copying ────────────────────► Open ──────────► Cut(n) ──────────────────► Open
//!  writes go to the base         to the log      (no writes)   the log waits to be applied
//!                                  └──────────────── end: the open epoch is dropped ──► Over
//! ```
//!
//! `base.rs` is a raw file or device; `segment.rs`, `pool.rs`, `epoch.rs` and `index.rs` are the log; `record.rs` is what a later receiver must know of
//! a disk; `guest_disk.rs` puts them together; `apply.rs` brings logs to the base; `recovery.rs` does that for a receiver that was killed;
//! `copy.rs` keeps a base for another failover.
//!
//! # What decides what is committed
//! Every segment names the checkpoint with which its epoch commits. With a RAM directory, the commit record of the RAM
//! (`store/durable/record.rs`) says which checkpoint that is, so one word commits RAM, device state and disks. Without one the record of
//! the session's first disk has that word, for its disks alone. An epoch's segments are complete before the word is stored, and are freed in
//! order, each epoch's before the next one's is applied to its end, so what is replayed after a kill leads to the same base.

mod apply;
mod base;
mod copy;
mod epoch;
mod error;
mod guest_disk;
mod index;
mod io;
mod pool;
mod record;
mod recovery;
mod segment;
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) mod tests;

pub(crate) use apply::run as apply_all;
#[cfg(all(test, not(loom), not(miri)))]
pub(crate) use apply::step as apply_step;
pub(crate) use base::{Base, is_name, names_in, path_of};
pub(crate) use copy::copy_base;
pub use error::DiskError;
pub(crate) use guest_disk::{
    Binding, Disk, DiskOptions, Link, OnBaseFull, Piece, RequestFailure, Source, Wanted, WriteTarget,
};
pub(crate) use io::receive;
pub(crate) use pool::RamPlace;
pub(crate) use pool::RamShare;
pub(crate) use record::Ownership;
pub(crate) use recovery::{OrphanOutcome, StoredDisk, recover, recover_orphans};
pub(crate) use segment::SEGMENT_BYTES;

/// What the index needs of the memory for all that a segment can hold.
pub(crate) const INDEX_BYTES_MAX: u64 = epoch::index_bytes_max(SEGMENT_BYTES);
