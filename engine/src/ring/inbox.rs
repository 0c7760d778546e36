//! What other threads hold of a core: its inbox, for connections and tenants, and how to wake it.
//!
//! Contract: what is pushed is either taken by the core or closed, exactly once. A core that ends closes its inbox: it sets
//! the flag and then closes what has arrived. A thread that pushes looks at the flag afterwards, and closes in its turn
//! what it finds. Between the two steps of each side is a fence, so at least one of them sees the other's first step.

use super::wake::CoreWake;
use super::{Connection, Loss, Tenant};
use crossbeam_queue::ArrayQueue;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Connections and tenants that can wait for their core at the same time: all of a large host.
const INBOX_MAX: usize = 4096;

/// What comes to a core.
pub(super) enum Arrival {
    Tenant(Box<dyn Tenant>),
    Connection(Box<dyn Connection>),
}

impl Arrival {
    /// Ends what no core will drive. A panic does not keep others from their end.
    fn close(self, error: io::Error) {
        let _ = match self {
            Arrival::Tenant(tenant) => guarded(|| drop(tenant)),
            Arrival::Connection(mut connection) => {
                let _ = guarded(|| connection.lost(Loss::Error(error)));
                guarded(|| drop(connection))
            }
        };
    }
}

/// Why an arrival was not taken.
pub(super) enum Refused {
    /// There is no room now.
    Full(Arrival),
    /// The core has ended.
    Closed(Arrival),
    /// The core has ended meanwhile, and the arrival was closed.
    ClosedMeanwhile,
}

impl Refused {
    /// For the caller that wanted to attach it.
    pub(super) fn error(&self) -> io::Error {
        match self {
            Refused::Full(_) => io::Error::other("too many connections wait for its core"),
            Refused::Closed(_) | Refused::ClosedMeanwhile => core_ended(),
        }
    }
}

fn core_ended() -> io::Error {
    io::Error::other("its core receives no more")
}

/// See the module.
pub(super) struct Inbox {
    /// With a fixed capacity, so that a hand-over allocates nothing.
    arrivals: ArrayQueue<Arrival>,
    closed: AtomicBool,
    stop: AtomicBool,
}

impl Inbox {
    fn with_capacity(arrivals: usize) -> Self {
        Self {
            arrivals: ArrayQueue::new(arrivals),
            closed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }

    fn push(&self, arrival: Arrival) -> Result<(), Refused> {
        if self.is_closed() {
            return Err(Refused::Closed(arrival));
        }
        self.push_unchecked(arrival)
    }

    /// Pushes into an inbox that was not closed a moment ago.
    fn push_unchecked(&self, arrival: Arrival) -> Result<(), Refused> {
        self.arrivals.push(arrival).map_err(Refused::Full)?;
        // With the fence of `close`.
        fence(Ordering::SeqCst);
        if self.is_closed() {
            self.close_arrivals(core_ended);
            return Err(Refused::ClosedMeanwhile);
        }
        Ok(())
    }

    /// Takes the next arrival. For the core alone.
    pub(super) fn pop(&self) -> Option<Arrival> {
        self.arrivals.pop()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// The core drives nothing any more.
    pub(super) fn close(&self, error: impl Fn() -> io::Error) {
        self.closed.store(true, Ordering::Release);
        // With the fence of `push`.
        fence(Ordering::SeqCst);
        self.close_arrivals(error);
    }

    fn close_arrivals(&self, error: impl Fn() -> io::Error) {
        while let Some(arrival) = self.arrivals.pop() {
            arrival.close(error());
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether the core is to end when nothing is left on it.
    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// A core as other threads see it.
#[derive(Clone)]
pub(super) struct CoreHandle {
    pub(super) inbox: Arc<Inbox>,
    pub(super) wake: Arc<CoreWake>,
}

impl CoreHandle {
    pub(super) fn new() -> io::Result<Self> {
        Self::with_capacity(INBOX_MAX)
    }

    /// With room for so many arrivals.
    pub(super) fn with_capacity(arrivals: usize) -> io::Result<Self> {
        Ok(Self {
            inbox: Arc::new(Inbox::with_capacity(arrivals)),
            wake: Arc::new(CoreWake::new()?),
        })
    }

    /// Hands something over to the core.
    pub(super) fn push(&self, arrival: Arrival) -> Result<(), Refused> {
        self.inbox.push(arrival)?;
        self.wake.wake();
        Ok(())
    }

    /// Ends the core once nothing is left on it.
    pub(super) fn stop(&self) {
        self.inbox.stop.store(true, Ordering::Release);
        self.wake.wake();
    }
}

/// Calls something that may panic, where more must be done after it.
pub(super) fn guarded(call: impl FnOnce()) -> io::Result<()> {
    let done = catch_unwind(AssertUnwindSafe(call));
    done.map_err(|_| io::Error::other("a receiving thread panicked repeatedly"))
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests;
