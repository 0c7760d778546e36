//! Wakes what drives a connection: a core's loop by an eventfd, a thread by a semaphore.
//!
//! A core is woken for one guest, whose connections it then resumes: what a wake-up costs does not depend on how many other
//! guests it has.

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Wake-ups that can wait for one core: some for each guest of a large host. Where there are more, it resumes all guests.
const WOKEN_MAX: usize = 1024;

/// Wakes one driver for one guest. Clones do the same.
#[derive(Clone, Debug)]
pub enum Waker {
    /// A core's event loop, for this tenant.
    Core(Arc<CoreWake>, u64),
    /// A thread that waits for its turn.
    Thread(Arc<Semaphore>),
}

impl Waker {
    /// Makes the driver resume the guest's connections. It loses no wake-up, but may take several as one.
    pub fn wake(&self) {
        match self {
            Waker::Core(core, tenant) => core.wake_for(*tenant),
            Waker::Thread(semaphore) => semaphore.post(),
        }
    }

    /// Whether both wake the same driver.
    pub fn same(&self, other: &Waker) -> bool {
        match (self, other) {
            (Waker::Core(a, x), Waker::Core(b, y)) => Arc::ptr_eq(a, b) && x == y,
            (Waker::Thread(a), Waker::Thread(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// What a core was woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// This tenant.
    Tenant(u64),
    /// More tenants than there was room for: any of them.
    All,
}

/// An eventfd that a core's loop waits on, and what it is to do then.
///
/// Contract: what is to be done is stored before the eventfd is written, and the core clears the eventfd before it looks at it.
#[derive(Debug)]
pub struct CoreWake {
    event: EventFd,
    /// With a fixed capacity, so that a wake-up allocates nothing.
    tenants: ArrayQueue<u64>,
    all: AtomicBool,
}

thread_local! {
    /// The eventfd of the loop that runs on this thread.
    static OWN: std::cell::Cell<RawFd> = const { std::cell::Cell::new(-1) };
}

impl CoreWake {
    /// A new one. It does not block and is closed on exec.
    ///
    /// # Errors
    /// Of eventfd(2): descriptors or memory are short.
    pub fn new() -> nix::Result<Self> {
        Self::with_capacity(WOKEN_MAX)
    }

    /// With room for so many wake-ups.
    pub fn with_capacity(wakeups: usize) -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            event: EventFd::from_value_and_flags(0, flags)?,
            tenants: ArrayQueue::new(wakeups),
            all: AtomicBool::new(false),
        })
    }

    /// From now on, wake-ups of this one by the calling thread take no system call: its loop looks at what it was woken for
    /// before it waits.
    pub fn adopt(&self) {
        OWN.set(self.event.as_raw_fd());
    }

    /// Takes the count, so that the descriptor is no longer readable. Whether there was one.
    pub fn clear(&self) -> bool {
        // EAGAIN: there is nothing to take.
        self.event.read().is_ok()
    }

    /// The calling thread runs no loop any more.
    #[cfg(all(test, not(loom), not(miri)))]
    pub fn disown() {
        OWN.set(-1);
    }

    /// Whether the loop would be woken now.
    #[cfg(all(test, not(loom), not(miri)))]
    pub fn is_readable(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
    }

    /// Makes its loop resume the connections of a tenant.
    pub fn wake_for(&self, tenant: u64) {
        if self.tenants.push(tenant).is_err() {
            self.all.store(true, Ordering::Release);
        }
        self.wake();
    }

    /// Takes what it was woken for. For the core alone.
    pub fn take(&self) -> Option<Woken> {
        if let Some(tenant) = self.tenants.pop() {
            return Some(Woken::Tenant(tenant));
        }
        self.all.swap(false, Ordering::AcqRel).then_some(Woken::All)
    }

    /// Whether there is something to take.
    pub fn has_some(&self) -> bool {
        !self.tenants.is_empty() || self.all.load(Ordering::Acquire)
    }

    /// Makes its loop look at its inbox, and at what it was woken for.
    pub fn wake(&self) {
        if OWN.get() == self.event.as_raw_fd() {
            return;
        }
        // It fails only if the counter would overflow, and then the loop is woken already.
        let _ = self.event.write(1);
    }
}

impl AsFd for CoreWake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A counting semaphore.
#[derive(Debug, Default)]
pub struct Semaphore {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Semaphore {
    /// Adds one.
    pub fn post(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_one();
    }

    /// Waits until there is one, and takes it.
    pub fn wait(&self) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = self
            .changed
            .wait_while(count, |count| *count == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn no_wakeup_is_lost_where_there_is_no_room_for_it() {
        let wake = CoreWake::with_capacity(2).unwrap();
        assert!(!wake.has_some() && !wake.is_readable());
        for tenant in [5, 6, 7] {
            wake.wake_for(tenant);
        }
        assert!(wake.has_some() && wake.clear());
        let woken = std::iter::from_fn(|| wake.take()).collect::<Vec<_>>();
        assert_eq!(woken, [Woken::Tenant(5), Woken::Tenant(6), Woken::All]);
        assert!(!wake.has_some());
    }
}
