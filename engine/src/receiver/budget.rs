//! How much the receiver holds for all guests together: of RAM, and of device state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// A limit over all guests is reached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{wanted} more bytes exceed {name}: {used} of its {limit} bytes are in use; `colo-ring discard` releases the \
     checkpoint of an ended session"
)]
pub struct BudgetError {
    wanted: u64,
    used: u64,
    limit: u64,
    name: &'static str,
}

/// The limit and what is taken of it, in bytes.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    name: &'static str,
    used: AtomicU64,
}

impl Budget {
    /// `name` is the operator's name of the limit.
    pub(super) fn new(limit: u64, name: &'static str) -> Self {
        Self {
            limit,
            name,
            used: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `bytes` until the lease is dropped.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Result<Lease, BudgetError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Lease {
                budget: self.clone(),
                bytes: AtomicU64::new(bytes),
            }),
            Err(used) => Err(BudgetError {
                wanted: bytes,
                used,
                limit: self.limit,
                name: self.name,
            }),
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
    /// Another part of the same budget, which ends by itself.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn beside(&self, bytes: u64) -> Result<Self, BudgetError> {
        self.budget.take(bytes)
    }

    /// Takes `more` bytes in addition.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn grow(&self, more: u64) -> Result<(), BudgetError> {
        // The larger lease ends as one: the part that is merged into it returns nothing.
        let part = self.budget.take(more)?;
        self.bytes
            .fetch_add(part.bytes.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget
            .used
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
        assert_eq!(budget.take(41).unwrap_err().used, 60);
        assert!(budget.take(u64::MAX).is_err());
        let _second = budget.take(40).unwrap();
        drop(first);
        let third = budget.take(50).unwrap();
        assert!(third.grow(11).is_err());
        third.grow(10).unwrap();
        assert_eq!(budget.used(), 100);
    }
}
