//! A channel's socket, as all threads of its session use it.

use crate::ring::Waker;
use crate::tls::Outgoing;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The socket of a channel, and what wakes its driver.
///
/// Any thread may shut it down. Its connection alone closes it, when it is dropped: a socket that is shut down and not closed
/// keeps what has arrived, and a peer whose window is shut by that waits in its write for as long.
pub(in crate::receiver) struct ChannelSocket {
    /// None once the connection is dropped.
    pub(super) socket: Mutex<Option<OwnedFd>>,
    pub(super) fd: RawFd,
    /// What makes records of what is sent to the primary, with TLS: of the main channel alone.
    pub(super) outgoing: Option<Arc<Outgoing>>,
    pub(in crate::receiver) waker: Waker,
    pub(super) received: Received,
}

/// What has come on a channel. Only its driver changes it; on a cache line of its own, as drivers are on different cores.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Received {
    pub(super) bytes: AtomicU64,
    /// When, in the current checkpoint: nanoseconds since the receiver's start.
    pub(super) first_ns: AtomicU64,
    pub(super) last_ns: AtomicU64,
    pub(super) sync_ns: AtomicU64,
}

/// When something came on a channel in the current checkpoint, in nanoseconds since the receiver's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct ChannelTimes {
    pub(in crate::receiver) channel: u8,
    pub(in crate::receiver) first_ns: u64,
    pub(in crate::receiver) last_ns: u64,
    pub(in crate::receiver) sync_ns: u64,
}

impl ChannelSocket {
    pub(in crate::receiver) fn new(socket: OwnedFd, outgoing: Option<Arc<Outgoing>>, waker: Waker) -> Self {
        Self {
            fd: socket.as_raw_fd(),
            outgoing,
            socket: Mutex::new(Some(socket)),
            waker,
            received: Received::default(),
        }
    }

    pub(super) fn socket(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn shut_down(&self, how: Shutdown) {
        if let Some(socket) = &*self.socket() {
            // It fails only where the peer has closed already.
            let _ = shutdown(socket.as_raw_fd(), how);
        }
    }

    /// Whether there is something to read: bytes, or the connection's end.
    pub(super) fn is_readable(&self) -> bool {
        let socket = self.socket();
        let Some(socket) = &*socket else {
            return true;
        };
        let mut waits = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        // Where that cannot be asked, nothing says that it is silent.
        poll(&mut waits, PollTimeout::ZERO).map_or(true, |ready| ready > 0)
    }

    pub(super) fn close(&self) {
        let socket = self.socket().take();
        drop(socket);
    }

    #[cfg(all(test, not(loom), not(miri)))]
    pub(super) fn is_closed(&self) -> bool {
        self.socket().is_none()
    }

    pub(super) fn add_received(&self, bytes: usize) {
        let received = &self.received.bytes;
        received.store(received.load(Ordering::Relaxed) + bytes as u64, Ordering::Relaxed);
    }
}
