//! What all guests together may take, of memory and of memory mappings.
//!
//! Memory is taken before it is allocated, and given back after it was freed: so all that is allocated is within the limit at any time.
//! What a guest cannot do without is taken when it arrives; what it needs later may be refused, and ends its session alone.

use crate::canary::{self, Canary};
use crate::text::mebibytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Bytes,
    Mappings,
}

impl Unit {
    fn amount(self, amount: u64) -> String {
        match self {
            Self::Bytes => mebibytes(amount),
            Self::Mappings => format!("{amount} memory mappings"),
        }
    }
}

/// A limit over all guests is reached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{} more exceed {name}: {} of its {} are in use; `colo-ring discard` releases the checkpoint of an ended session, \
     `colo-ring end` a session that runs", .unit.amount(*.wanted), .unit.amount(*.used), .unit.amount(*.limit)
)]
pub struct BudgetError {
    wanted: u64,
    used: u64,
    limit: u64,
    name: Arc<str>,
    unit: Unit,
}

impl BudgetError {
    /// Whether there would be room if others gave back what they have.
    pub(crate) fn could_fit(&self) -> bool {
        self.wanted <= self.limit
    }

    /// What others had to give back for it.
    pub(crate) fn missing(&self) -> u64 {
        self.wanted.saturating_sub(self.limit.saturating_sub(self.used))
    }

    /// Whether it is memory that is missing, and not mappings.
    pub(crate) fn is_of_bytes(&self) -> bool {
        self.unit == Unit::Bytes
    }
}

/// The limit and what is taken of it.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    name: Arc<str>,
    unit: Unit,
    used: AtomicU64,
}

impl Budget {
    /// Bytes; `name` is the operator's name of the limit.
    pub(crate) fn new(limit: u64, name: &str) -> Self {
        Self::of(limit, name, Unit::Bytes)
    }

    /// Memory mappings, where the kernel allows a process so many. A quarter stays for what is not a guest's: stacks of
    /// threads, the allocator, rings, logs of disks. Without mappings the allocator fails, and with it the process.
    pub(crate) fn of_mappings(kernel_max: u64) -> Self {
        let name = "what sysctl vm.max_map_count leaves for guests";
        Self::of(kernel_max - kernel_max / 4, name, Unit::Mappings)
    }

    /// Bytes without a limit.
    pub fn unlimited() -> Arc<Self> {
        Arc::new(Self::new(u64::MAX, "all memory"))
    }

    fn of(limit: u64, name: &str, unit: Unit) -> Self {
        Self {
            limit,
            name: name.into(),
            unit,
            used: AtomicU64::new(0),
        }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `amount` until the lease is dropped.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(crate) fn take(self: &Arc<Self>, amount: u64) -> Result<Lease, BudgetError> {
        self.add(amount)?;
        Ok(Lease {
            budget: self.clone(),
            amount: AtomicU64::new(amount),
        })
    }

    fn add(&self, amount: u64) -> Result<(), BudgetError> {
        let has_room = |sum: &u64| *sum <= self.limit || canary::is_set(Canary::Overdraft);
        let fits = |used: u64| used.checked_add(amount).filter(has_room);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(()),
            Err(used) => Err(BudgetError {
                wanted: amount,
                used,
                limit: self.limit,
                name: self.name.clone(),
                unit: self.unit,
            }),
        }
    }

    fn subtract(&self, amount: u64) {
        self.used.fetch_sub(amount, Ordering::Relaxed);
    }
}

/// A guest's part of a budget.
#[derive(Debug)]
pub(crate) struct Lease {
    budget: Arc<Budget>,
    amount: AtomicU64,
}

impl Lease {
    /// Takes `more` in addition.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(crate) fn grow(&self, more: u64) -> Result<(), BudgetError> {
        self.budget.add(more)?;
        self.amount.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    /// Another part of the same budget, which ends by itself.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(crate) fn beside(&self, amount: u64) -> Result<Self, BudgetError> {
        self.budget.take(amount)
    }

    /// Makes `amount` of it a lease of its own; all of it, if that is less.
    pub(crate) fn split(&mut self, amount: u64) -> Self {
        let own = self.amount.get_mut();
        let amount = amount.min(*own);
        *own -= amount;
        Self {
            budget: self.budget.clone(),
            amount: AtomicU64::new(amount),
        }
    }

    /// What it is of now.
    pub(crate) fn held(&self) -> u64 {
        self.amount.load(Ordering::Relaxed)
    }

    fn amount(&mut self) -> u64 {
        *self.amount.get_mut()
    }

    fn shrink(&mut self, by: u64) {
        *self.amount.get_mut() -= by;
        self.budget.subtract(by);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if canary::is_set(Canary::LostLease) {
            return;
        }
        self.budget.subtract(*self.amount.get_mut());
    }
}

/// Memory that grows and shrinks, of which a part is taken ahead: up to that it cannot be refused.
#[derive(Debug)]
pub(crate) struct Account {
    /// What is used, and at least what is reserved.
    lease: Lease,
    reserved: u64,
    used: u64,
}

impl Account {
    /// Nothing is used yet of what `lease` reserves.
    pub(crate) fn of(mut lease: Lease) -> Self {
        Self {
            reserved: lease.amount(),
            lease,
            used: 0,
        }
    }

    /// # Errors
    /// If the limit does not allow what is more than the reserve.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<(), BudgetError> {
        let used = self.used.saturating_add(bytes);
        let held = self.lease.amount();
        self.lease.grow(used.saturating_sub(held))?;
        self.used = used;
        Ok(())
    }

    /// Gives back what was taken. More than that is a fault of the caller, by which nothing is given that others have.
    pub(crate) fn give_back(&mut self, bytes: u64) {
        debug_assert!(
            bytes <= self.used,
            "{bytes} bytes are given back, and {} were taken",
            self.used
        );
        self.used = self.used.saturating_sub(bytes);
        let held = self.lease.amount();
        self.lease.shrink(held - held.min(self.used.max(self.reserved)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_the_limit() {
        let budget = Arc::new(Budget::new(100, "--ram-limit"));
        let first = budget.take(60).unwrap();
        let refused = budget.take(41).unwrap_err();
        assert!(refused.used == 60 && refused.could_fit());
        assert_eq!((refused.missing(), refused.is_of_bytes()), (1, true));
        assert!(!budget.take(u64::MAX).unwrap_err().could_fit());
        let _second = budget.take(40).unwrap();
        drop(first);
        let third = budget.take(50).unwrap();
        assert!(third.grow(11).is_err());
        third.grow(10).unwrap();
        assert_eq!(budget.used(), 100);
    }

    #[test]
    fn a_part_ends_by_itself() {
        let budget = Arc::new(Budget::new(100, "--ram-limit"));
        let mut whole = budget.take(90).unwrap();
        let part = whole.split(30);
        let all = whole.split(1000);
        drop(whole);
        assert_eq!(budget.used(), 90);
        drop(all);
        assert_eq!(budget.used(), 30);
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_reserved_cannot_be_refused() {
        let budget = Arc::new(Budget::new(100, "--ram-limit"));
        let mut account = Account::of(budget.take(40).unwrap());
        let other = budget.take(60).unwrap();
        account.take(30).unwrap();
        account.take(10).unwrap();
        assert!(account.take(1).is_err());
        drop(other);
        account.take(25).unwrap();
        assert_eq!(budget.used(), 65);
        account.give_back(20);
        assert_eq!(budget.used(), 45);
        account.give_back(45);
        assert_eq!(budget.used(), 40);
        account.take(40).unwrap();
        assert_eq!(budget.used(), 40);
        drop(account);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn mappings_leave_a_reserve_and_say_what_to_raise() {
        let budget = Arc::new(Budget::of_mappings(65_530));
        let all = budget.take(49_148).unwrap();
        let refused = budget.take(1).unwrap_err().to_string();
        assert!(
            refused.contains("vm.max_map_count")
                && refused.contains("49148 memory mappings of its 49148 memory mappings"),
            "{refused}"
        );
        drop(all);
        assert_eq!(budget.used(), 0);
    }
}
