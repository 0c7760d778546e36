//! A connection, as the data plane sees it.

use super::ReceivePlan;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;

/// Why a connection gives no more bytes.
#[derive(Debug)]
pub(crate) enum Loss {
    /// The peer closed its side.
    Eof,
    /// A reset, a timeout, or an error of this host.
    Error(io::Error),
}

/// Another core that should drive a connection: a position among the plane's cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub core: usize,
    /// Only if at least so many bytes wait in the socket; 0 is always.
    pub from_queued: u64,
}

/// One connection.
///
/// `Break` means that the connection has reported its end and is to be dropped.
pub(crate) trait Connection: Send {
    /// The socket. It stays the same and open for the connection's life.
    fn fd(&self) -> RawFd;

    /// The tenant that it belongs to: see [`super::Tenant::id`].
    fn tenant(&self) -> u64;

    /// What to receive next; None parks the connection. Called only while no receive is posted. The plan must not be changed
    /// or dropped before [`Self::received`] or [`Self::lost`].
    fn plan(&mut self) -> Option<&mut ReceivePlan>;

    /// The posted receive has put `bytes` bytes, at least one, into the plan's places.
    fn received(&mut self, bytes: usize) -> ControlFlow<()>;

    /// The connection has ended. A receive may still be posted: the plan and its memory stay untouched until the connection is
    /// dropped, which comes once that receive has completed.
    fn lost(&mut self, loss: Loss);

    /// The core has failed while a receive was posted: the connection is never dropped, because the kernel may still write to its
    /// memory. Nobody has to wait for its end any more.
    fn leaked(&mut self) {}

    /// Its waker was woken. A receive may be posted.
    fn resume(&mut self) -> ControlFlow<()>;

    /// Whether it has stopped in the middle of what has arrived, to let other connections go on: it is resumed at the next turn of
    /// its core, and has no plan until then.
    fn has_more(&self) -> bool {
        false
    }

    /// From now on this core drives it: a position among the plane's cores. Called when nothing is posted; the backend
    /// `threads` does not call it.
    fn attached(&mut self, core: usize);

    /// The core that should drive it from now on. Called when nothing is posted.
    fn moves_to(&self) -> Option<Move> {
        None
    }
}
