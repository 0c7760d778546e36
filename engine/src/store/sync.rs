//! The primitives of the store's hand-overs between threads: `std`'s, or `loom`'s under `cfg(loom)`, whose
//! model checker then runs the same code through every interleaving.

#[cfg(not(loom))]
pub(super) use std::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, Ordering},
};

#[cfg(loom)]
pub(super) use loom::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, Ordering},
};

/// `count` words of zero. The operating system gives the memory on first touch, so words that are never
/// written cost address space only.
#[cfg(not(loom))]
pub(super) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    super::map::zeroed_words(count)
}

/// `count` words of zero that loom watches.
#[cfg(loom)]
pub(super) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}
