//! How much guest RAM the receiver holds, over all guests.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The limit and what is taken of it, in bytes.
#[derive(Debug)]
pub(super) struct RamBudget {
    limit: u64,
    held: AtomicU64,
}

impl RamBudget {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
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
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Result<RamLease, String> {
        let fits = |held: u64| held.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(RamLease {
                budget: self.clone(),
                bytes,
            }),
            Err(held) => Err(format!(
                "it has {bytes} bytes of RAM and {held} are held for other guests, together more than the {} of \
                 --ram-limit; `colo-ring discard` gives up the checkpoint of an ended session",
                self.limit
            )),
        }
    }
}

/// A guest's part of the budget.
#[derive(Debug)]
pub(super) struct RamLease {
    budget: Arc<RamBudget>,
    bytes: u64,
}

impl Drop for RamLease {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_the_limit() {
        let budget = Arc::new(RamBudget::new(100));
        let first = budget.take(60).unwrap();
        assert!(budget.take(41).unwrap_err().contains("60 are held"));
        assert!(budget.take(u64::MAX).is_err());
        let _second = budget.take(40).unwrap();
        drop(first);
        let _third = budget.take(60).unwrap();
        assert_eq!(budget.held(), 100);
    }
}
