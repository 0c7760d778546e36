//! Starts a backend on its cores, and hands connections and tenants to it.

use super::core::{Core, Warn};
use super::epoll::EpollBackend;
use super::inbox::{Arrival, CoreHandle};
use super::uring::{RingFeatures, RingUnavailable, UringBackend};
use super::wake::{CoreWake, Semaphore, Waker};
use super::{Connection, ReceiveStyle, Tenant, threads};
use crate::host::{pin, thread_times};
use crate::sandbox::ThreadKind;
use crate::threads::Threads;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use thiserror::Error;

/// How bytes are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// One io_uring per core
    Uring,
    /// One epoll per core, for hosts without io_uring
    Epoll,
    /// A thread per channel, as QEMU does it: the baseline to compare with
    Threads,
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl BackendKind {
    /// Every backend.
    pub const ALL: [Self; 3] = [Self::Uring, Self::Epoll, Self::Threads];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Uring => "uring",
            BackendKind::Epoll => "epoll",
            BackendKind::Threads => "threads",
        }
    }

    /// How connections shape their plans for it.
    pub(crate) fn style(self) -> ReceiveStyle {
        match self {
            BackendKind::Uring | BackendKind::Epoll => ReceiveStyle::RING,
            BackendKind::Threads => ReceiveStyle::THREADS,
        }
    }
}

/// What to start.
#[derive(Clone)]
pub struct PlaneOptions {
    /// The backend.
    pub backend: BackendKind,
    /// Cores to run on, at least one; each gets one ring. `threads` runs on them all as the scheduler likes.
    pub cores: Vec<usize>,
    /// Whether `uring` may use registered buffers.
    pub registered: bool,
    /// Starts and confines its threads.
    pub threads: Threads,
}

/// Why a backend did not start.
#[derive(Debug, Error)]
pub enum PlaneError {
    /// A core cannot be used.
    #[error(
        "receiving on core {core} is not possible: {source}; `taskset -cp $$` shows the cores allowed here"
    )]
    Pin {
        /// The core.
        core: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// The backend is not available.
    #[error("the backend {} is not available: {reason}", .backend.name())]
    Backend {
        /// The backend.
        backend: BackendKind,
        /// The reason, with the remedy where there is one.
        reason: String,
    },
    /// A thread could not be started.
    #[error("a receiving thread could not be started: {0}")]
    Thread(#[from] io::Error),
}

/// What drives a connection: one of the plane's cores, or, with the backend `threads`, a thread to be started for it.
pub struct Driver {
    woken_by: WokenBy,
    core: usize,
    /// With `threads`: the tenant that the connection's thread will work for.
    tenant: Cell<Option<Box<dyn Tenant>>>,
}

enum WokenBy {
    Core(Arc<CoreWake>),
    Thread(Arc<Semaphore>),
}

impl Driver {
    /// Wakes it for this tenant.
    pub fn waker(&self, tenant: u64) -> Waker {
        match &self.woken_by {
            WokenBy::Core(core) => Waker::Core(core.clone(), tenant),
            WokenBy::Thread(turn) => Waker::Thread(turn.clone()),
        }
    }

    /// Position of its core among the plane's.
    pub fn core(&self) -> usize {
        self.core
    }
}

struct CoreThread {
    handle: CoreHandle,
    thread: JoinHandle<()>,
}

/// The running data plane.
pub struct Plane {
    options: PlaneOptions,
    features: Option<RingFeatures>,
    cores: Vec<CoreThread>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Plane {
    /// Starts the backend. `warn` takes messages for the operator while it runs.
    ///
    /// # Errors
    /// See [`PlaneError`]; nothing is left running then.
    pub fn start(
        options: PlaneOptions,
        warn: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<Self, PlaneError> {
        let warn: Warn = Arc::new(warn);
        let mut plane = Self {
            options,
            features: None,
            cores: Vec::new(),
            threads: Mutex::default(),
        };
        if plane.options.backend == BackendKind::Threads {
            plane
                .options
                .cores
                .iter()
                .try_for_each(|core| check_core(*core))?;
            return Ok(plane);
        }
        let handles = plane.options.cores.iter().map(|_| CoreHandle::new());
        let handles: Arc<[CoreHandle]> = handles.collect::<Result<_, _>>()?;
        for position in 0..handles.len() {
            match start_core(&plane.options, &handles, position, warn.clone()) {
                Ok((core, features)) => {
                    plane.features = features.or(plane.features);
                    plane.cores.push(core);
                }
                Err(error) => {
                    plane.stop();
                    return Err(error);
                }
            }
        }
        Ok(plane)
    }

    /// What was asked for.
    pub fn options(&self) -> &PlaneOptions {
        &self.options
    }

    /// What the kernel's io_uring offers, with that backend.
    pub fn features(&self) -> Option<RingFeatures> {
        self.features
    }

    /// How many cores drive connections: none with the backend `threads`.
    pub fn driving_cores(&self) -> usize {
        self.cores.len()
    }

    /// A driver for one connection: the `n`-th core, counted around.
    pub fn driver(&self, n: usize) -> Driver {
        let core = n % self.options.cores.len();
        let woken_by = match self.cores.get(core) {
            Some(core) => WokenBy::Core(core.handle.wake.clone()),
            None => WokenBy::Thread(Arc::default()),
        };
        Driver {
            woken_by,
            core,
            tenant: Cell::new(None),
        }
    }

    /// A guest is present at a driver of this plane from now on. To be called for every core that may drive one of its
    /// connections, before any of them is attached.
    ///
    /// # Errors
    /// If its core has failed, or its inbox is full.
    pub fn admit(&self, driver: &Driver, tenant: Box<dyn Tenant>) -> io::Result<()> {
        match &driver.woken_by {
            WokenBy::Core(_) => self.push(driver, Arrival::Tenant(tenant)),
            WokenBy::Thread(_) => {
                driver.tenant.set(Some(tenant));
                Ok(())
            }
        }
    }

    /// Hands a connection to a driver of this plane, which drives it to its end.
    ///
    /// # Errors
    /// If a thread of its own was needed and could not be started, its core has failed, or its inbox is full.
    pub fn attach(&self, driver: &Driver, connection: Box<dyn Connection>) -> io::Result<()> {
        let turn = match &driver.woken_by {
            WokenBy::Core(_) => return self.push(driver, Arrival::Connection(connection)),
            WokenBy::Thread(turn) => turn.clone(),
        };
        let (cores, tenant) = (self.options.cores.clone(), driver.tenant.take());
        let work = move || {
            // The cores were tried at the start; if one has gone since, the scheduler decides.
            let _ = pin(&cores);
            threads::run(connection, tenant, &turn);
        };
        let starter = &self.options.threads;
        let thread = starter.start(ThreadKind::Channel, "colo-channel", work)?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    fn push(&self, driver: &Driver, arrival: Arrival) -> io::Result<()> {
        let pushed = self.cores[driver.core].handle.push(arrival);
        pushed.map_err(|refused| refused.error())
    }

    /// Waits until all connections have ended (their sockets must have been shut down), and ends the threads.
    pub fn stop(self) {
        for core in &self.cores {
            core.handle.stop();
        }
        let threads = self.threads.into_inner().unwrap_or_else(PoisonError::into_inner);
        for thread in self.cores.into_iter().map(|core| core.thread).chain(threads) {
            // The panic hook has reported a thread that panicked.
            let _ = thread.join();
        }
    }
}

fn start_core(
    options: &PlaneOptions,
    handles: &Arc<[CoreHandle]>,
    position: usize,
    warn: Warn,
) -> Result<(CoreThread, Option<RingFeatures>), PlaneError> {
    let core = options.cores[position];
    let (backend, registered) = (options.backend, options.registered);
    let confinement = options.threads.clone();
    let (started, report) = mpsc::channel();
    let thread = {
        let handles = handles.clone();
        let wake = handles[position].wake.clone();
        thread::Builder::new()
            .name(format!("colo-core-{core}"))
            .spawn(move || {
                if let Err(source) = pin(&[core]) {
                    let _ = started.send(Err(PlaneError::Pin { core, source }));
                    return;
                }
                // The kernel may add 50 us to a timed wait otherwise, as long as the wait itself.
                let _ = nix::sys::prctl::set_timerslack(1);
                if let Err(error) = thread_times::open()
                    && position == 0
                {
                    warn(format!(
                        "whose time a slow checkpoint was is not recorded: the kernel does not say when a thread ran ({error})"
                    ));
                }
                let failed = |error: io::Error| PlaneError::Backend {
                    backend,
                    reason: explain(&error),
                };
                let ended = if backend == BackendKind::Uring {
                    match UringBackend::new(wake, registered) {
                        Err(error) => return drop(started.send(Err(failed(error)))),
                        Ok(ring) => {
                            confinement.enter(ThreadKind::Core);
                            let _ = started.send(Ok(Some(ring.features())));
                            Core::new(ring, handles, position, warn.clone()).run()
                        }
                    }
                } else {
                    match EpollBackend::new(wake) {
                        Err(error) => return drop(started.send(Err(failed(error)))),
                        Ok(epoll) => {
                            confinement.enter(ThreadKind::Core);
                            let _ = started.send(Ok(None));
                            Core::new(epoll, handles, position, warn.clone()).run()
                        }
                    }
                };
                if let Err(error) = ended {
                    warn(format!(
                        "core {core} has stopped receiving, and its sessions with it: {error}"
                    ));
                }
            })?
    };
    match report.recv() {
        Ok(Ok(features)) => {
            let handle = handles[position].clone();
            Ok((CoreThread { handle, thread }, features))
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(PlaneError::Backend {
            backend,
            reason: "its thread ended at once".into(),
        }),
    }
}

/// Tries a core on a thread of its own, so that the caller's affinity stays as it is.
fn check_core(core: usize) -> Result<(), PlaneError> {
    let failed = |source| PlaneError::Pin { core, source };
    let thread = thread::Builder::new()
        .spawn(move || pin(&[core]))
        .map_err(failed)?;
    let panicked = |_| Err(io::Error::other("the thread that tried it panicked"));
    thread.join().unwrap_or_else(panicked).map_err(failed)
}

fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        // Our own: a ring that lacks an operation.
        None => error.to_string(),
        Some(_) => RingUnavailable::here(error).to_string(),
    }
}
