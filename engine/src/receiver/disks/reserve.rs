//! What a disk must have of the memory that all guests share: taken when it is bound to its session, so that no other guest's need
//! fails its writes.

use crate::disk::{INDEX_BYTES_MAX, RamShare};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The indexes of four segments, whatever is written to them: an open epoch, and committed ones that are not applied yet.
const RESERVE_BYTES: u64 = 4 * INDEX_BYTES_MAX;

/// One disk's.
struct Left {
    bytes: AtomicU64,
    #[expect(dead_code, reason = "given back when the last part of it is dropped")]
    share: Box<dyn Send + Sync>,
}

/// The reserve first, and what is shared when that is used up.
pub(super) struct Reserve {
    left: Arc<Left>,
    shared: Arc<dyn RamShare>,
}

impl Reserve {
    /// Takes it; none if there is no room.
    pub(super) fn take(shared: Arc<dyn RamShare>) -> Option<Self> {
        let left = Arc::new(Left {
            bytes: AtomicU64::new(RESERVE_BYTES),
            share: shared.take(RESERVE_BYTES)?,
        });
        Some(Self { left, shared })
    }
}

/// A part of the reserve that is in use.
struct Part {
    of: Arc<Left>,
    bytes: u64,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.of.bytes.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

impl RamShare for Reserve {
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
        let less = |left: u64| left.checked_sub(bytes);
        let left = &self.left.bytes;
        match left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => Some(Box::new(Part {
                of: self.left.clone(),
                bytes,
            })),
            Err(_) => self.shared.take(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many bytes.
    struct Host(Arc<AtomicU64>);

    struct Taken(Arc<AtomicU64>, u64);

    impl Drop for Taken {
        fn drop(&mut self) {
            self.0.fetch_add(self.1, Ordering::Relaxed);
        }
    }

    impl RamShare for Host {
        fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
            let left = self.0.load(Ordering::Relaxed).checked_sub(bytes)?;
            self.0.store(left, Ordering::Relaxed);
            Some(Box::new(Taken(self.0.clone(), bytes)))
        }
    }

    #[test]
    fn a_full_host_takes_nothing_of_a_disk_that_is_bound() {
        let host = Arc::new(AtomicU64::new(RESERVE_BYTES + 10));
        let reserve = Reserve::take(Arc::new(Host(host.clone()))).expect("room for it");
        assert!(Reserve::take(Arc::new(Host(host.clone()))).is_none());
        let others = Host(host.clone()).take(10);
        assert!(others.is_some());
        let parts: Vec<_> = (0..4).map(|_| reserve.take(INDEX_BYTES_MAX)).collect();
        assert!(parts.iter().all(Option::is_some));
        assert!(reserve.take(1).is_none());
        drop(others);
        assert!(reserve.take(10).is_some());
        drop(parts);
        let part = reserve.take(RESERVE_BYTES);
        assert!(part.is_some());
        drop(reserve);
        assert_eq!(host.load(Ordering::Relaxed), 10);
        drop(part);
        assert_eq!(host.load(Ordering::Relaxed), RESERVE_BYTES + 10);
    }
}
