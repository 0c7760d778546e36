//! Starts the threads that come and go while a receiver runs.
//!
//! Where threads are confined ([`crate::sandbox`]), one thread starts them for all others: what a thread may do its children may, so a core that
//! started a thread which opens files would have to be allowed to open files itself. This one may do what any of them may, and does nothing else
//! than to wait for what it is to start. Without a sandbox each thread starts its own.

use crate::sandbox::{Sandbox, ThreadKind};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

type Work = Box<dyn FnOnce() + Send>;

/// A thread to start.
struct Order {
    kind: ThreadKind,
    name: String,
    work: Work,
    started: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Takes a message for the operator.
type Warn = Arc<dyn Fn(String) + Send + Sync>;

/// See the module. Clones share the thread that starts others, which ends with the last one.
#[derive(Clone)]
pub struct Threads {
    confinement: Confinement,
    starter: Option<Sender<Order>>,
}

/// What each thread enters.
#[derive(Clone)]
struct Confinement {
    sandbox: Sandbox,
    warn: Warn,
}

impl Confinement {
    fn enter(&self, kind: ThreadKind) {
        if let Err(error) = self.sandbox.enter(kind) {
            (self.warn)(format!("a thread is confined less than it should be: {error}"));
        }
    }
}

impl Threads {
    /// Threads that are not confined.
    pub fn free() -> Self {
        Self::start_each(Sandbox::off(), Arc::new(drop))
    }

    fn start_each(sandbox: Sandbox, warn: Warn) -> Self {
        Self {
            confinement: Confinement { sandbox, warn },
            starter: None,
        }
    }

    /// Threads that are confined by `sandbox`, if that is on. `warn` takes a message for the operator, should one not be confined.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(crate) fn confined(
        sandbox: Sandbox,
        warn: impl Fn(String) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut threads = Self::start_each(sandbox, Arc::new(warn));
        if threads.confinement.sandbox.is_on() {
            let (starter, orders) = channel();
            let own = threads.confinement.clone();
            let work = move || start_ordered(&own, orders);
            Builder::new().name("colo-starter".into()).spawn(work)?;
            threads.starter = Some(starter);
        }
        Ok(threads)
    }

    /// Confines the calling thread, which has what it works with, to what a thread of this kind may do.
    pub(crate) fn enter(&self, kind: ThreadKind) {
        self.confinement.enter(kind);
    }

    /// Starts a thread of this kind.
    ///
    /// # Errors
    /// If the host gives none; what `work` owns is dropped then.
    pub(crate) fn start(
        &self,
        kind: ThreadKind,
        name: impl Into<String>,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let name = name.into();
        let Some(starter) = &self.starter else {
            return Builder::new().name(name).spawn(work);
        };
        let (started, is_started) = sync_channel(1);
        let order = Order {
            kind,
            name,
            work: Box::new(work),
            started,
        };
        let ended = || io::Error::other("the thread that starts others has ended");
        starter.send(order).map_err(|_| ended())?;
        is_started.recv().map_err(|_| ended())?
    }
}

fn start_ordered(confinement: &Confinement, orders: Receiver<Order>) {
    confinement.enter(ThreadKind::Starter);
    for order in orders {
        let own = confinement.clone();
        let thread = Builder::new().name(order.name).spawn(move || {
            own.enter(order.kind);
            (order.work)();
        });
        // The thread that has ordered it waits for it.
        let _ = order.started.send(thread);
    }
}
