//! What a core needs from the kernel.

use super::{ReceivePlan, Region};
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// The end of a posted receive. Ok(0) is the end of the stream.
pub(super) struct Completion {
    pub slot: usize,
    pub result: io::Result<usize>,
}

/// Whether to wait for something to happen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Until a completion or a wake-up.
    Block,
    /// The same, but not much longer than [`COALESCE_DELAY`].
    Coalesce,
    /// Take what is there.
    Poll,
}

/// How long bytes gather in a socket that a bulk receive has emptied. The kernel wakes a waiting core for the first packet,
/// and a core that is as fast as its sender is then woken for each: that costs more, the sender too, than copying the
/// bytes. At 4 GB/s this is 200 KiB; it is also what it can add to a checkpoint of some MiB.
pub(super) const COALESCE_DELAY: Duration = Duration::from_micros(50);

/// See the module's documentation.
pub(super) trait Backend {
    /// Posts a receive. The plan stays where it is until its completion is reported.
    fn post(&mut self, slot: usize, fd: RawFd, plan: &mut ReceivePlan);

    /// Appends completions to `done`. True if the core was woken.
    fn wait(&mut self, wait: Wait, done: &mut Vec<Completion>) -> io::Result<bool>;

    /// Bytes that wait in the socket.
    fn queued(&self, fd: RawFd) -> u64;

    /// Whether bytes that gather since then have gathered long enough.
    fn has_coalesced(&self, since: Instant) -> bool {
        since.elapsed() >= COALESCE_DELAY
    }

    /// A connection leaves the core; nothing is posted on it.
    fn forget(&mut self, slot: usize, fd: RawFd);

    /// How many buffer indices it has; none where it has no registered buffers.
    fn buffers(&self) -> usize;

    /// Reserves `count` consecutive buffer indices. None if so many are not free.
    fn reserve_buffers(&mut self, count: u16) -> Option<u16>;

    /// Registers a region under an index. The region outlives every receive into it, and its registration.
    fn register(&mut self, index: u16, region: &dyn Region) -> io::Result<()>;

    /// Unregisters the region under an index. No receive that uses it is posted.
    fn unregister(&mut self, index: u16);

    /// Gives `count` indices back, under which no region is registered.
    fn release_buffers(&mut self, first: u16, count: u16);
}
