//! How much the receiver holds for all guests together: of RAM, of device state, and of memory mappings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// A limit over all guests is reached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{wanted} more {unit} exceed {name}: {used} of its {limit} {unit} are in use; `colo-ring discard` releases the \
     checkpoint of an ended session, `colo-ring end` a session that runs"
)]
pub struct BudgetError {
    wanted: u64,
    used: u64,
    limit: u64,
    name: &'static str,
    unit: &'static str,
}

/// The limit and what is taken of it.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    name: &'static str,
    unit: &'static str,
    used: AtomicU64,
}

impl Budget {
    /// Bytes; `name` is the operator's name of the limit.
    pub(super) fn new(limit: u64, name: &'static str) -> Self {
        Self::of(limit, name, "bytes")
    }

    /// Memory mappings, where the kernel allows a process so many. A quarter stays for what is not a guest's: stacks of
    /// threads, the allocator, rings, logs of disks. Without mappings the allocator fails, and with it the process.
    pub(super) fn of_mappings(kernel_max: u64) -> Self {
        let name = "what sysctl vm.max_map_count leaves for guests";
        Self::of(kernel_max - kernel_max / 4, name, "memory mappings")
    }

    fn of(limit: u64, name: &'static str, unit: &'static str) -> Self {
        Self {
            limit,
            name,
            unit,
            used: AtomicU64::new(0),
        }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `amount` until the lease is dropped.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn take(self: &Arc<Self>, amount: u64) -> Result<Lease, BudgetError> {
        let fits = |used: u64| used.checked_add(amount).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Lease {
                budget: self.clone(),
                amount: AtomicU64::new(amount),
            }),
            Err(used) => Err(BudgetError {
                wanted: amount,
                used,
                limit: self.limit,
                name: self.name,
                unit: self.unit,
            }),
        }
    }
}

/// A guest's part of a budget.
#[derive(Debug)]
pub(super) struct Lease {
    budget: Arc<Budget>,
    amount: AtomicU64,
}

impl Lease {
    /// Another part of the same budget, which ends by itself.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn beside(&self, amount: u64) -> Result<Self, BudgetError> {
        self.budget.take(amount)
    }

    /// Takes `more` in addition.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn grow(&self, more: u64) -> Result<(), BudgetError> {
        // The larger lease ends as one: the part that is merged into it returns nothing.
        let part = self.budget.take(more)?;
        self.amount
            .fetch_add(part.amount.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget
            .used
            .fetch_sub(*self.amount.get_mut(), Ordering::Relaxed);
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

    #[test]
    fn mappings_leave_a_reserve_and_say_what_to_raise() {
        let budget = Arc::new(Budget::of_mappings(65_530));
        let all = budget.take(49_148).unwrap();
        let refused = budget.take(1).unwrap_err().to_string();
        assert!(
            refused.contains("vm.max_map_count") && refused.contains("49148 of its 49148 memory mappings"),
            "{refused}"
        );
        drop(all);
        assert_eq!(budget.used(), 0);
    }
}
