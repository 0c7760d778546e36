//! Keeping guest memory in RAM: a page that was swapped out would be read back within a pause.

use crate::host::has_swap;
use crate::store::memory::huge::Fallback;
use crate::store::memory::mapping::Mapping;

/// Locks memory that is populated. Returns a note if the limit forbids it and the host has swap.
pub(crate) fn lock<'a>(mappings: impl Iterator<Item = &'a Mapping>) -> Option<Fallback> {
    let mut unlocked_bytes = 0;
    let mut reason = None;
    for mapping in mappings {
        if let Err(errno) = mapping.lock() {
            unlocked_bytes += mapping.len();
            reason.get_or_insert(errno);
        }
    }
    let reason = reason.filter(|_| has_swap())?;
    Some(Fallback::Unlocked {
        mib: unlocked_bytes >> 20,
        reason: reason.desc().to_owned(),
    })
}
