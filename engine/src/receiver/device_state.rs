//! What device states have of the budget: taken before their memory is allocated, by what arrives, never by what is announced. At the
//! first commit a reserve is taken for what grows later: a protected guest must not end because others have taken the rest.

use super::live_session::LiveSession;
use crate::budget::{BudgetError, Lease};
use crate::store::DEVICE_FILE_BYTES;

/// What a byte of device state takes while it is received: in the buffer, and in the one before it while that grows.
const RECEIVED: u64 = 2;

/// What it takes as long as a checkpoint is kept: in the committed state, in the vmdesc that came with the first one, and in a copy
/// while it is dumped or given to a QEMU.
const KEPT: u64 = 3;

/// Files that outlive the process, which are all made for the largest of them: two device states and the vmdesc.
const FILES: u64 = 3;

/// A file grows to twice what is in it at most.
const FILE_GROWTH: u64 = 2;

/// Least that is reserved at the first commit. Ordinary guests have some hundred KB.
const RESERVE_MIN: u64 = 2 << 20;

/// The reserve at the first commit, as a multiple of what that takes: devices that were idle say more when they are used.
const RESERVE_GROWTH: u64 = 2;

/// What a checkpoint with a device state of so many bytes keeps. What its files have at first was taken with the guest's other
/// files.
pub(super) fn kept(bytes: u64, is_durable: bool) -> u64 {
    let in_files = match is_durable && bytes > DEVICE_FILE_BYTES {
        true => bytes.saturating_mul(FILE_GROWTH) - DEVICE_FILE_BYTES,
        false => 0,
    };
    bytes
        .saturating_mul(KEPT)
        .saturating_add(in_files.saturating_mul(FILES))
}

/// What is reserved when the first one took so many bytes, and none may have more than `most`.
fn reserve_for(first: u64, most: u64) -> u64 {
    let wanted = first.saturating_mul(RESERVE_GROWTH).max(RESERVE_MIN);
    wanted.min(most).max(first)
}

/// The part of a main channel, which grows with the largest device state that it has received.
#[derive(Default)]
pub(super) struct DeviceStateLease {
    bytes: u64,
    received: Option<Lease>,
}

impl DeviceStateLease {
    /// Makes it enough for a buffer of `bytes`, and for what is kept of it.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn reserve(&mut self, session: &LiveSession, bytes: u64) -> Result<(), BudgetError> {
        // Without memory nothing of it has come.
        let Some(memory) = session.memory().filter(|_| bytes > self.bytes) else {
            return Ok(());
        };
        let (more, leases) = (bytes - self.bytes, &memory.leases);
        let received = more.saturating_mul(RECEIVED);
        match &self.received {
            Some(lease) => lease.grow(received)?,
            None => self.received = Some(leases.beside(received)?),
        }
        let is_durable = memory.store.committed().durable().is_some();
        leases.keep_device_state(kept(bytes, is_durable) - kept(self.bytes, is_durable))?;
        self.bytes = bytes;
        Ok(())
    }

    /// Takes ahead what later device states will need, of which none has more than `most`: to be called at the first commit.
    ///
    /// # Errors
    /// If the limit does not allow it.
    pub(super) fn reserve_ahead(&mut self, session: &LiveSession, most: u64) -> Result<(), BudgetError> {
        self.reserve(session, reserve_for(self.bytes, most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_reserve_is_twice_the_first_within_its_bounds() {
        assert_eq!(reserve_for(64 << 10, 64 * MIB), 2 * MIB);
        assert_eq!(reserve_for(3 * MIB, 64 * MIB), 6 * MIB);
        assert_eq!(reserve_for(40 * MIB, 64 * MIB), 64 * MIB);
        assert_eq!(reserve_for(64 << 10, MIB), MIB);
        // What was taken is never given back by it.
        assert_eq!(reserve_for(3 * MIB, MIB), 3 * MIB);
        assert_eq!(reserve_for(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn files_take_more_only_beyond_what_they_have_at_first() {
        assert_eq!(kept(DEVICE_FILE_BYTES, true), kept(DEVICE_FILE_BYTES, false));
        let bytes = 5 * MIB;
        let files = FILES * (bytes.next_power_of_two() - DEVICE_FILE_BYTES);
        assert!(kept(bytes, true) >= kept(bytes, false) + files);
        assert!(kept(u64::MAX, true) >= kept(u64::MAX, false));
    }
}
