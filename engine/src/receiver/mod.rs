//! The receiver: listeners, sessions, their cores and their memory.
//!
//! ```text
//!  control thread (tokio)                                         data plane (a thread per core, or per connection)
//!  ┌────────────────────────────────────────────────┐             ┌──────────────────────────────────────────┐
//!  │ accept ─► identify ─► assemble ─► begin session ├── sockets ──►  MainChannel: session ─► store.commit     │
//!  │ status, dump, histograms, deadlines             ◄─ samples ────┤  PageChannel: packet ─► slots ─► dirty   │
//!  └────────────────────────────────────────────────┘             └──────────────────────────────────────────┘
//! ```

mod admission;
mod assemble;
mod attach;
mod background;
mod checkpoints;
mod connected;
mod control;
mod decode;
mod device_state;
mod disks;
mod dump;
mod dump_files;
mod end;
mod flight;
#[doc(hidden)]
pub mod fuzz;
mod guest;
mod guest_memory;
mod guest_rules;
mod handshakes;
mod identify;
mod kept_checkpoint;
mod links;
mod live_session;
mod main_buffer;
mod main_channel;
mod names;
mod options;
mod outlet;
mod page_channel;
mod pool_policy;
mod promotion;
mod ram_limit;
mod recovery;
mod refusals;
mod remark;
mod restore;
mod services;
mod session_codec;
mod silence;
#[cfg(all(test, not(loom), not(miri)))]
mod sim;
mod start;
mod status;
mod tenant;
mod timeline;
mod uuid;

pub use crate::budget::BudgetError;
pub use crate::disk::DiskError;
pub use control::{ClaimedCheckpoint, Request, RequestError, Response};
pub use disks::{DiskState, DiskStatus, RestoredDisk, UnboundDisk};
pub use dump::{CopiedDisk, DumpContents, DumpError, DumpedCheckpoint};
pub use dump_files::{DUMP_SCHEMA, DUMP_VERSION, DumpFileError, DumpFiles, Dumped, DumpedBlock, DumpedDisk};
pub use end::{ChannelError, SessionEnd};
pub use flight::{CopiedFlight, FlightCopyError};
pub use guest::SessionTitle;
pub use guest_memory::MemoryError;
pub use guest_rules::{GuestRule, GuestRules, NotAllowed};
pub use links::GuardStatus;
pub use names::{GUEST_NAME_MAX, GuestName, GuestUuid, Marks, NameError, NameRule, PeerNetwork};
pub use options::{DiskServing, Limits, ReceiverOptions};
pub use promotion::PromotionError;
pub use ram_limit::RamLimit;
pub use remark::Remark;
pub use restore::{KeepRequest, RestoreError, RestoreReport, RestoreRequest};
pub use status::{
    GuestBlock, STATUS_SCHEMA, STATUS_VERSION, SessionState, SessionStatus, StatusReport, TlsStatus,
};

use crate::host::{Placement, Topology};
use crate::metrics::{MetricsError, Report};
pub use crate::net::{AddressError, ListenAddress, ListenError};
use crate::net::{Clients, Listener, PassedSockets, SocketFile, bind_unix};
use crate::ring::PlaneError;
use crate::sandbox::{Directories, FileAccess, FileRule, SandboxError};
use crate::store::{FlusherError, StoreError};
use control::{ClientEvent, ControlInputs, PendingRequest};
use start::make_context;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::{Notify, mpsc};

/// What happens in a receiver, for its operator.
#[derive(Debug)]
pub enum Event {
    /// Something is not as requested, or a connection was refused.
    Warning(Remark),
    /// Something worth knowing.
    Note(Remark),
    /// A session has all of its connections.
    Began {
        /// Its number, and its guest's name if that is known already.
        session: SessionTitle,
        /// Where it comes from.
        peer: String,
        /// The address that it came to.
        listener: String,
    },
    /// A session has its first checkpoint.
    Protected {
        /// The session.
        session: SessionTitle,
        /// How long that took since it began.
        after: Duration,
    },
    /// A session makes no progress, or makes some again.
    Stall(Box<Stall>),
    /// A kept checkpoint is here no more, as an operator has asked for.
    GivenUp {
        /// Its session.
        session: SessionTitle,
        /// Whether a failover has promoted it: its guest runs elsewhere.
        is_promoted: bool,
    },
    /// A guest's new session has its first checkpoint, so that the one that was kept of it before is given up.
    Replaced {
        /// The session that was kept.
        old: SessionTitle,
        /// The new one.
        new: u32,
    },
    /// The receiver ends with the session that ends next, as with `once`: what it does not have in files ends, too.
    Ending,
    /// A session is over; the status says how.
    Ended(Box<SessionStatus>),
}

impl Event {
    fn warning(remark: impl Into<Remark>) -> Self {
        Self::Warning(remark.into())
    }

    fn note(remark: impl Into<Remark>) -> Self {
        Self::Note(remark.into())
    }
}

/// A session that makes no progress, or makes some again.
#[derive(Debug)]
pub struct Stall {
    /// The session.
    pub status: SessionStatus,
    /// How long next to nothing has come, or had come.
    pub silent: Duration,
    /// What it stands in, in words; none if it goes on again.
    pub during: Option<&'static str>,
}

/// Takes events, on any thread.
pub(crate) type Events = dyn Fn(Event) + Send + Sync;

/// Why a receiver did not start or had to end.
#[derive(Debug, Error)]
pub enum ReceiverError {
    /// No address was given.
    #[error("no address to listen on: give --listen tcp:HOST:PORT or unix:PATH")]
    NoAddress,
    /// No core was given.
    #[error("no core to receive on: give --cores")]
    NoCore,
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The data plane did not start.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// The helpers of the flush did not start.
    #[error(transparent)]
    Flusher(#[from] FlusherError),
    /// The directory for RAM images cannot be used.
    #[error(transparent)]
    RamDirectory(StoreError),
    /// Guests' disks cannot be served.
    #[error("--disks: {0}")]
    Disks(#[from] DiskError),
    /// Measurements cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The control socket.
    #[error("the control socket {path}: {source}")]
    Control {
        /// Its path.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// It cannot be confined.
    #[error("--sandbox: {0}")]
    Sandbox(#[from] SandboxError),
    /// A thread that every receiver has.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The control thread's end.
    #[error("the control thread panicked")]
    Panicked,
}

/// The result of a receiver that has ended.
#[derive(Debug)]
pub struct Outcome {
    /// All sessions it had (of very many, the last ones), in their order.
    pub sessions: Vec<SessionStatus>,
    /// Those of them whose last checkpoint is in the RAM directory, for the next receiver.
    pub kept: Vec<u32>,
    /// The measurements.
    pub report: Report,
    /// Whether the last of them could be written to the files of `--hist`.
    pub written: Result<(), MetricsError>,
}

/// A running receiver.
pub struct Receiver {
    addresses: Vec<ListenAddress>,
    disk_addresses: Vec<ListenAddress>,
    placement: Placement,
    stop: Arc<Notify>,
    ask: mpsc::Sender<ClientEvent>,
    thread: JoinHandle<Result<Outcome, ReceiverError>>,
}

/// Asks a receiver for its status from another thread.
#[derive(Clone, Debug)]
pub struct StatusHandle(mpsc::Sender<ClientEvent>);

impl StatusHandle {
    /// The status.
    ///
    /// # Errors
    /// If the receiver has ended.
    pub async fn status(&self) -> Result<Box<StatusReport>, RequestError> {
        let (pending, response) = PendingRequest::new(Request::Status, Vec::new());
        let asked = self.0.send(ClientEvent::Request(pending)).await;
        asked.map_err(|_| RequestError::Ended)?;
        match response.await.map_err(|_| RequestError::Ended)?? {
            Response::Status(status) => Ok(status),
            _ => Err(RequestError::Ended),
        }
    }
}

/// Ends a receiver from another thread.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<Notify>);

impl StopHandle {
    /// Sockets are closed, histograms written; then [`Receiver::wait`] returns.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

impl Receiver {
    /// Starts listening. `events` is called on several threads.
    ///
    /// # Errors
    /// See [`ReceiverError`]; nothing is left running then.
    pub fn start(
        options: ReceiverOptions,
        events: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, ReceiverError> {
        if options.listen.is_empty() {
            return Err(ReceiverError::NoAddress);
        }
        if options.cores.is_empty() {
            return Err(ReceiverError::NoCore);
        }
        let events: Arc<Events> = Arc::new(events);
        let listeners: Vec<Listener> = options
            .listen
            .iter()
            .map(|address| Ok(Listener::obtain(address, &options.passed)?.watching(options.host_watch)))
            .collect::<Result<_, ListenError>>()?;
        let addresses = listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let disk_listeners: Vec<Listener> = (options.disks.iter().flat_map(|disks| &disks.listen))
            .map(|address| Ok(Listener::obtain(address, &options.passed)?.watching(options.host_watch)))
            .collect::<Result<_, ListenError>>()?;
        let disk_addresses = disk_listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let control = options.control.as_deref();
        let control = control
            .map(|path| bind_control(path, &options.passed))
            .transpose()?;
        let directories = Directories {
            ram: options.store.ram_dir.as_deref(),
            disks: options.disks.as_ref().map(|disks| &*disks.directory),
            measurements: options.hist.as_deref(),
            configuration: options.configuration.as_deref(),
        };
        let mut rules = directories.rules();
        rules.extend(socket_rules(&options));
        let certificates = options.tls.iter().flat_map(|tls| tls.directories());
        rules.extend(certificates.map(|directory| FileRule::new(directory, FileAccess::Read)));
        let lack = options.sandbox.confine_files(&rules)?;
        if let Some(lack) = lack {
            events(Event::warning(lack));
        }
        let changed = Arc::new(Notify::new());
        let placement = Topology::read().place(&options.cores);
        let context = make_context(options, placement.clone(), events, &changed, disk_listeners)?;
        let stop = Arc::new(Notify::new());
        let (ask, asked) = mpsc::channel(64);
        let inputs = ControlInputs {
            client_events: asked,
            changed,
            stop: stop.clone(),
        };
        let control_ask = ask.clone();
        let thread = std::thread::Builder::new().name("colo-control".into());
        let thread = thread.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(ReceiverError::Thread)?;
            let main = async move {
                let mut control_file = None;
                if let Some((listener, file, path)) = control {
                    control_file = file;
                    let failed = |source| ReceiverError::Control { path, source };
                    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
                    tokio::task::spawn_local(control::serve(listener, control_ask));
                }
                let listeners = listeners.into_iter().map(Rc::new).collect();
                let outcome = control::run(context, listeners, inputs).await;
                drop(control_file);
                outcome
            };
            tokio::task::LocalSet::new().block_on(&runtime, main)
        });
        Ok(Self {
            addresses,
            disk_addresses,
            placement,
            stop,
            ask,
            thread: thread.map_err(ReceiverError::Thread)?,
        })
    }

    /// Addresses with their real ports, in the order of the options.
    pub fn addresses(&self) -> &[ListenAddress] {
        &self.addresses
    }

    /// Addresses of the NBD server with their real ports, in the order of the options.
    pub fn disk_addresses(&self) -> &[ListenAddress] {
        &self.disk_addresses
    }

    /// On which NUMA nodes its cores are, and guests' memory is to lie.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// To end it from a signal handler's thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.stop.clone())
    }

    /// To ask for its status from another thread.
    pub fn status_handle(&self) -> StatusHandle {
        StatusHandle(self.ask.clone())
    }

    /// Sends a request, as a client of the control socket does. Not to be called from an asynchronous task.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn ask(&self, request: Request) -> Result<Response, RequestError> {
        self.ask_with(request, Vec::new())
    }

    /// The same with open files for what is to be written.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn ask_with(&self, request: Request, files: Vec<OwnedFd>) -> Result<Response, RequestError> {
        let (pending, response) = PendingRequest::new(request, files);
        self.ask
            .blocking_send(ClientEvent::Request(pending))
            .map_err(|_| RequestError::Ended)?;
        response.blocking_recv().map_err(|_| RequestError::Ended)?
    }

    /// Changes the limits, also of what runs. Not to be called from an asynchronous task.
    pub fn set_limits(&self, limits: Limits) {
        // A receiver that has ended needs none.
        let _ = self.ask.blocking_send(ClientEvent::Limits(limits));
    }

    /// Changes the rules for guests: names and identities for sessions that begin from now on, the rest also for what runs. Not to be called
    /// from an asynchronous task.
    pub fn set_guests(&self, rules: GuestRules) {
        // As above.
        let _ = self.ask.blocking_send(ClientEvent::Guests(rules));
    }

    /// Whether [`Self::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end: a stop, or with `once` the end of the first session.
    ///
    /// # Errors
    /// If it could not go on.
    pub fn wait(self) -> Result<Outcome, ReceiverError> {
        let panicked = |_| Err(ReceiverError::Panicked);
        self.thread.join().unwrap_or_else(panicked)
    }
}

/// The control socket, with its file if this process is to remove it.
type ControlSocket = (UnixListener, Option<SocketFile>, PathBuf);

fn bind_control(path: &Path, passed: &PassedSockets) -> Result<ControlSocket, ReceiverError> {
    let failed = |source| ReceiverError::Control {
        path: path.to_owned(),
        source,
    };
    let address = ListenAddress::Unix(path.to_owned());
    let (listener, file): (UnixListener, _) = match passed.take(&address).map_err(failed)? {
        Some(socket) => (socket.into(), None),
        None => {
            let (listener, file) = bind_unix(path, Clients::Owner)?.into_parts();
            match passed.keep(&address, listener.as_fd()) {
                true => {
                    file.leave();
                    (listener, None)
                }
                false => (listener, Some(file)),
            }
        }
    };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((listener, file, path.to_owned()))
}

/// UNIX sockets are removed at the end.
fn socket_rules(options: &ReceiverOptions) -> Vec<FileRule> {
    let paths = options.addresses().filter_map(|address| match address {
        ListenAddress::Unix(path) => Some(path),
        ListenAddress::Tcp(_) => None,
    });
    let directory = |path: PathBuf| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let paths = paths.chain(options.other_sockets.iter().cloned());
    let directories = paths.map(directory);
    directories
        .map(|directory| FileRule::new(directory, FileAccess::Remove))
        .collect()
}
