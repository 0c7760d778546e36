//! A guest's memory and its share of the receiver's limits.

use crate::budget::{Budget, BudgetError, Lease};
use crate::store::{Store, StoreError};
use crate::tls;
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

/// What a session takes beside its guest's memory: the buffer of its main channel, its list of RAM blocks, what a status has of it.
const SESSION_BYTES: u64 = 1 << 20;

/// What each of its connections takes: plans of receives, lists of the pages of packets.
const CONNECTION_BYTES: u64 = 32 << 10;

/// What a session with so many multifd channels takes until it is over.
pub(super) fn session_bytes(channels: u8, has_tls: bool) -> u64 {
    let connection_bytes = match has_tls {
        true => CONNECTION_BYTES + tls::CONNECTION_BYTES,
        false => CONNECTION_BYTES,
    };
    SESSION_BYTES + (u64::from(channels) + 1) * connection_bytes
}

/// The limits over all guests.
#[derive(Clone)]
pub(super) struct Budgets {
    pub(super) memory: Arc<Budget>,
    pub(super) mappings: Arc<Budget>,
}

/// A guest's parts of the limits, beside what its store has of them: held as long as its session or its checkpoint exists.
pub(super) struct MemoryLeases {
    device_state: Lease,
    mappings: Lease,
}

impl Budgets {
    /// Each of them.
    #[cfg(test)]
    pub(super) fn all(&self) -> [&Arc<Budget>; 2] {
        [&self.memory, &self.mappings]
    }

    /// Takes the parts of a guest with so many memory mappings.
    ///
    /// # Errors
    /// If that limit does not allow it.
    pub(super) fn take(&self, mappings: u64) -> Result<Arc<MemoryLeases>, BudgetError> {
        Ok(Arc::new(MemoryLeases {
            device_state: self.memory.take(0)?,
            mappings: self.mappings.take(mappings)?,
        }))
    }
}

impl MemoryLeases {
    /// Memory mappings that it has a right to.
    pub(super) fn mappings(&self) -> u64 {
        self.mappings.held()
    }

    /// Takes `bytes` of the memory for something that ends with the session.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn beside(&self, bytes: u64) -> Result<Lease, BudgetError> {
        self.device_state.beside(bytes)
    }

    /// Takes more for the device state that is kept.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn keep_device_state(&self, bytes: u64) -> Result<(), BudgetError> {
        self.device_state.grow(bytes)
    }
}
