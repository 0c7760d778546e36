//! A session's last committed checkpoint, which outlives the session: what dump, failover, discard and status work on.
//!
//! A session makes it with its first commit and commits to its image until it ends. A session of an earlier receiver is
//! recovered as a kept checkpoint alone.

use super::disks::SessionDisks;
use super::guest::GuestIdentity;
use super::guest_memory::MemoryLeases;
use super::promotion::Promotion;
use crate::session::GuestDescription;
use crate::store::CommittedImage;
use crate::units::CheckpointId;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// See the module.
pub(super) struct KeptCheckpoint {
    /// Its session's number.
    pub(super) session: u32,
    pub(super) guest: Arc<GuestIdentity>,
    pub(super) image: Arc<CommittedImage>,
    pub(super) disks: Arc<SessionDisks>,
    pub(super) description: Arc<GuestDescription>,
    promotion: Mutex<Promotion>,
    /// Nanoseconds from the receiver's start to the last commit; negative for an earlier receiver's.
    committed_at_ns: AtomicI64,
    /// How often the image itself was given to a QEMU, which changes it as soon as its guest runs.
    times_shared: AtomicU64,
    _leases: Arc<MemoryLeases>,
}

impl KeptCheckpoint {
    /// The checkpoint of `image`, in a receiver that started so long ago.
    pub(super) fn new(
        session: u32,
        guest: Arc<GuestIdentity>,
        image: Arc<CommittedImage>,
        disks: Arc<SessionDisks>,
        description: Arc<GuestDescription>,
        leases: Arc<MemoryLeases>,
        uptime: Duration,
    ) -> Self {
        let kept = Self {
            session,
            guest,
            image,
            disks,
            description,
            promotion: Mutex::default(),
            committed_at_ns: AtomicI64::new(0),
            times_shared: AtomicU64::new(0),
            _leases: leases,
        };
        kept.committed_at(uptime, Duration::ZERO);
        kept
    }

    /// It was committed `age` ago.
    pub(super) fn committed_at(&self, uptime: Duration, age: Duration) {
        let at = nanoseconds(uptime).saturating_sub(nanoseconds(age));
        self.committed_at_ns.store(at, Ordering::Relaxed);
    }

    /// How long ago it was committed.
    pub(super) fn age(&self, uptime: Duration) -> Duration {
        let at = self.committed_at_ns.load(Ordering::Relaxed);
        let age = nanoseconds(uptime).saturating_sub(at);
        Duration::from_nanos(u64::try_from(age).unwrap_or(0))
    }

    /// The checkpoint's number; none if there is no whole one: before the first commit has returned, or after one that
    /// panicked.
    pub(super) fn number(&self) -> Option<CheckpointId> {
        self.image.checkpoint()
    }

    /// Whether both are of machines of one type, with the same RAM.
    pub(super) fn is_of_same_machine(&self, other: &Self) -> bool {
        self.description.machine_type == other.description.machine_type
            && self.image.table() == other.image.table()
    }

    /// Its image itself is given to a QEMU from now on.
    pub(super) fn share(&self) {
        self.times_shared.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was done: what was read of the image before and after the same number is the checkpoint's.
    pub(super) fn times_shared(&self) -> u64 {
        self.times_shared.load(Ordering::SeqCst)
    }

    /// The state of its promotion, locked.
    pub(super) fn promotion(&self) -> MutexGuard<'_, Promotion> {
        self.promotion.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
