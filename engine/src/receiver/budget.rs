//! How much the receiver holds for all guests together: of RAM, and of device state.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The limit and what is taken of it, in bytes.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    name: &'static str,
    held: AtomicU64,
}

impl Budget {
    /// `name` is what an operator knows the limit by.
    pub(super) fn new(limit: u64, name: &'static str) -> Self {
        Self {
            limit,
            name,
            held: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Takes `bytes` until the lease is dropped, or says why not.
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Result<Lease, String> {
        let fits = |held: u64| held.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Lease {
                budget: self.clone(),
                bytes: AtomicU64::new(bytes),
            }),
            Err(held) => Err(format!(
                "it takes {bytes} bytes and {held} are held for it and other guests, together more than the {} of {}; \
                 `colo-ring discard` gives up the checkpoint of an ended session",
                self.limit, self.name
            )),
        }
    }
}

/// A guest's part of a budget.
#[derive(Debug)]
pub(super) struct Lease {
    budget: Arc<Budget>,
    bytes: AtomicU64,
}

impl Lease {
    /// Takes `more` bytes besides, or says why not.
    pub(super) fn grow(&self, more: u64) -> Result<(), String> {
        // The larger lease ends as one: this part of it does not give anything back.
        let part = self.budget.take(more)?;
        self.bytes
            .fetch_add(part.bytes.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget
            .held
            .fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_the_limit() {
        let budget = Arc::new(Budget::new(100, "--ram-limit"));
        let first = budget.take(60).unwrap();
        assert!(budget.take(41).unwrap_err().contains("60 are held"));
        assert!(budget.take(u64::MAX).is_err());
        let _second = budget.take(40).unwrap();
        drop(first);
        let third = budget.take(50).unwrap();
        assert!(third.grow(11).is_err());
        third.grow(10).unwrap();
        assert_eq!(budget.held(), 100);
    }
}
