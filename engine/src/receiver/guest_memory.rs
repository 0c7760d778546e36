//! A guest's memory and its share of the receiver's limits.

use super::budget::{Budget, BudgetError, Lease};
use crate::store::{Store, StoreError};
use std::sync::Arc;
use thiserror::Error;

/// Why a guest has no memory, or not enough.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A limit over all guests is reached.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The host does not provide it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no thread to make it on.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// Making it failed unexpectedly.
    #[error("the thread that made it panicked")]
    Panicked,
    /// Something to be stored came before the block list, which says how much memory the guest has.
    #[error("a page came before the list of RAM blocks")]
    NoBlockList,
}

/// A guest's memory.
pub(super) struct GuestMemory {
    pub(super) store: Arc<Store>,
    pub(super) leases: Arc<MemoryLeases>,
    /// Steps down from what was asked for: each says what and why.
    pub(super) fallbacks: Vec<String>,
}

/// The limits over all guests.
#[derive(Clone)]
pub(super) struct Budgets {
    pub(super) ram: Arc<Budget>,
    pub(super) device_states: Arc<Budget>,
    pub(super) mappings: Arc<Budget>,
}

/// What a guest needs of the limits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GuestNeeds {
    pub(super) ram_bytes: u64,
    pub(super) device_state_bytes: u64,
    pub(super) mappings: u64,
}

/// A guest's parts of the limits, held as long as its session or its checkpoint exists.
pub(super) struct MemoryLeases {
    ram: Lease,
    device_state: Lease,
    _mappings: Lease,
}

impl Budgets {
    /// Takes a guest's parts.
    ///
    /// # Errors
    /// If one of the limits does not allow it.
    pub(super) fn take(&self, needs: GuestNeeds) -> Result<Arc<MemoryLeases>, BudgetError> {
        Ok(Arc::new(MemoryLeases {
            ram: self.ram.take(needs.ram_bytes)?,
            device_state: self.device_states.take(needs.device_state_bytes)?,
            _mappings: self.mappings.take(needs.mappings)?,
        }))
    }
}

impl MemoryLeases {
    /// Takes `bytes` of the RAM's budget for something that ends with the session.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn beside_ram(&self, bytes: u64) -> Result<Lease, BudgetError> {
        self.ram.beside(bytes)
    }

    /// Takes more for the device state.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn grow_device_state(&self, bytes: u64) -> Result<(), BudgetError> {
        self.device_state.grow(bytes)
    }
}
