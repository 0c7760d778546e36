//! What decoding takes of the budget, for all channels of a session at once: a channel whose first payload comes in a
//! later checkpoint does not reach the limit then.

use super::queue::PACKETS;
use crate::budget::{BudgetError, Lease};
use crate::receiver::guest_memory::MemoryLeases;
use crate::wire::codec::{self, Method, PAYLOAD_MAX};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A session's way to its [`DecodeMemory`], which its first channel with a compressed payload makes.
#[derive(Default)]
pub(in crate::receiver) struct SharedDecodeMemory(Mutex<Weak<DecodeMemory>>);

/// A session's part of the budget, as long as one of its channels has it.
pub(super) struct DecodeMemory {
    channels: u64,
    lease: Lease,
    /// What is charged for the stream of each channel: that of the most demanding one so far.
    stream_bytes: Mutex<u64>,
}

impl SharedDecodeMemory {
    /// For a channel's first compressed payload.
    ///
    /// # Errors
    /// If it is the session's first one, and the limit does not allow what `channels` channels take.
    pub(super) fn open(
        &self,
        method: Method,
        channels: usize,
        leases: &MemoryLeases,
    ) -> Result<Arc<DecodeMemory>, BudgetError> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = shared.upgrade() {
            return Ok(memory);
        }
        let channels = channels as u64;
        let payloads = u64::from(PACKETS) * u64::from(PAYLOAD_MAX);
        let memory = Arc::new(DecodeMemory {
            channels,
            lease: leases.beside(channels * (payloads + codec::fixed_bytes(method)))?,
            stream_bytes: Mutex::new(0),
        });
        *shared = Arc::downgrade(&memory);
        Ok(memory)
    }
}

impl DecodeMemory {
    /// A channel's stream takes `bytes` in addition. All channels of a primary have the same level, so the others are charged
    /// with as much.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn begin_stream(&self, bytes: u64) -> Result<(), BudgetError> {
        let mut charged = self.stream_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(more) = bytes.checked_sub(*charged) {
            self.lease.grow(self.channels * more)?;
            *charged = bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::receiver::guest_memory::Budgets;

    fn budgets(limit: u64) -> Budgets {
        Budgets {
            memory: Arc::new(Budget::new(limit, "--ram-limit")),
            mappings: Arc::new(Budget::of_mappings(0)),
        }
    }

    #[test]
    fn all_channels_are_charged_with_the_first_payload() {
        let budgets = budgets(1 << 30);
        let (memory, leases) = (budgets.memory.clone(), budgets.take(0).unwrap());
        let shared = SharedDecodeMemory::default();
        let first = shared.open(Method::Zstd, 4, &leases).unwrap();
        let opened = memory.used();
        assert_eq!(opened, 4 * ((4 << 20) + codec::fixed_bytes(Method::Zstd)));
        first.begin_stream(100).unwrap();
        let second = shared.open(Method::Zstd, 4, &leases).unwrap();
        second.begin_stream(100).unwrap();
        second.begin_stream(90).unwrap();
        assert_eq!(memory.used(), opened + 400);
        second.begin_stream(101).unwrap();
        assert_eq!(memory.used(), opened + 404);
        assert!(second.begin_stream(1 << 30).is_err());
        assert_eq!(memory.used(), opened + 404);
        drop(first);
        assert_eq!(memory.used(), opened + 404);
        drop(second);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn channels_that_together_exceed_the_limit_are_refused_with_the_first() {
        let one = (4 << 20) + codec::fixed_bytes(Method::Zlib);
        let leases = budgets(3 * one).take(0).unwrap();
        let shared = SharedDecodeMemory::default();
        assert!(shared.open(Method::Zlib, 4, &leases).is_err());
        assert!(shared.open(Method::Zlib, 3, &leases).is_ok());
    }
}
