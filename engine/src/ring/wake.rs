//! Wakes what drives a connection: a core's loop by an eventfd, a thread by a semaphore.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Wakes one driver. Clones wake the same one.
#[derive(Clone, Debug)]
pub enum Waker {
    /// A core's event loop.
    Core(Arc<CoreWake>),
    /// A thread that waits for its turn.
    Thread(Arc<Semaphore>),
}

impl Waker {
    /// Makes the driver resume its connections. It loses no wake-up, but may take several as one.
    pub fn wake(&self) {
        match self {
            Waker::Core(core) => core.wake(),
            Waker::Thread(semaphore) => semaphore.post(),
        }
    }

    /// Whether both wake the same driver.
    pub fn same(&self, other: &Waker) -> bool {
        match (self, other) {
            (Waker::Core(a), Waker::Core(b)) => Arc::ptr_eq(a, b),
            (Waker::Thread(a), Waker::Thread(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// An eventfd that a core's loop waits on.
#[derive(Debug)]
pub struct CoreWake {
    event: EventFd,
}

thread_local! {
    /// The eventfd of the loop that runs on this thread, and whether the thread has woken itself.
    static OWN: std::cell::Cell<(RawFd, bool)> = const { std::cell::Cell::new((-1, false)) };
}

impl CoreWake {
    /// A new one. It does not block and is closed on exec.
    ///
    /// # Errors
    /// Of eventfd(2): descriptors or memory are short.
    pub fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            event: EventFd::from_value_and_flags(0, flags)?,
        })
    }

    /// From now on, wake-ups of this one by the calling thread take no system call.
    pub fn adopt(&self) {
        OWN.set((self.event.as_raw_fd(), false));
    }

    /// Whether the adopting thread has woken itself since the last call.
    pub fn take_own(&self) -> bool {
        let (fd, woken) = OWN.get();
        OWN.set((fd, false));
        woken
    }

    /// Takes the count, so that the descriptor is no longer readable. Whether there was one.
    pub fn clear(&self) -> bool {
        // EAGAIN: there is nothing to take.
        self.event.read().is_ok()
    }

    /// The calling thread runs no loop any more.
    #[cfg(all(test, not(loom), not(miri)))]
    pub fn disown() {
        OWN.set((-1, false));
    }

    /// Whether the loop would be woken now.
    #[cfg(all(test, not(loom), not(miri)))]
    pub fn is_readable(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
    }

    /// Makes its loop look at its inbox and resume its connections.
    pub fn wake(&self) {
        let (fd, _) = OWN.get();
        if fd == self.event.as_raw_fd() {
            OWN.set((fd, true));
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
