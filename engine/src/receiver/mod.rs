//! The receiver: listeners, sessions, their cores and their memory.
//!
//! ```text
//!  control thread (tokio)                                         data plane (a thread per core, or per connection)
//!  ┌────────────────────────────────────────────────┐             ┌──────────────────────────────────────────┐
//!  │ accept ─► identify ─► assemble ─► begin session ├── sockets ──►  MainChannel: session ─► store.commit     │
//!  │ status, dump, histograms, deadlines             ◄─ samples ────┤  PageChannel: packet ─► slots ─► dirty   │
//!  └────────────────────────────────────────────────┘             └──────────────────────────────────────────┘
//! ```

mod assemble;
mod attach;
mod background;
mod budget;
mod checkpoints;
mod control;
mod decode;
mod disks;
mod dump;
mod end;
mod guest_memory;
mod identify;
mod kept_checkpoint;
mod links;
mod live_session;
mod main_buffer;
mod main_channel;
mod options;
mod page_channel;
mod pool_policy;
mod promotion;
mod recovery;
mod restore;
mod services;
mod session_codec;
#[cfg(all(test, not(loom), not(miri)))]
mod sim;
mod start;
mod status;
mod tenant;
mod timeline;

pub use crate::disk::DiskError;
pub use budget::BudgetError;
pub use control::{ClaimedCheckpoint, Request, RequestError, Response};
pub use disks::{DiskState, DiskStatus, RestoredDisk, UnboundDisk};
pub use dump::{DUMP_SCHEMA, DUMP_VERSION, DumpError, Dumped, DumpedBlock, DumpedDisk};
pub use end::{ChannelError, SessionEnd};
pub use guest_memory::MemoryError;
pub use links::GuardStatus;
pub use options::{DiskServing, ReceiverOptions};
pub use promotion::PromotionError;
pub use restore::{RestoreError, RestoreReport, RestoreRequest};
pub use status::{GuestBlock, STATUS_SCHEMA, STATUS_VERSION, SessionState, SessionStatus, StatusReport};

use crate::host::{Placement, Topology};
use crate::metrics::{MetricsError, Report};
pub use crate::net::{AddressError, ListenAddress, ListenError};
use crate::net::{Clients, Listener, bind_unix};
use crate::ring::PlaneError;
use crate::store::FlusherError;
use control::{ClientEvent, ControlInputs, PendingRequest};
use promotion::ClientId;
use start::make_context;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot};

/// What happens in a receiver, for its operator.
#[derive(Debug)]
pub enum Event {
    /// Something is not as requested, or a connection was refused.
    Warning(String),
    /// Something worth knowing.
    Note(String),
    /// A session has all of its connections.
    Began {
        /// Its number.
        session: u32,
        /// Where it comes from.
        peer: String,
    },
    /// A session is over; the status says how.
    Ended(Box<SessionStatus>),
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
    /// The measurements.
    pub report: Report,
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
            .map(|address| Ok(Listener::bind(address)?.watching(options.host_watch)))
            .collect::<Result<_, ListenError>>()?;
        let addresses = listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let disk_listeners: Vec<Listener> = (options.disks.iter().flat_map(|disks| &disks.listen))
            .map(|address| Ok(Listener::bind(address)?.watching(options.host_watch)))
            .collect::<Result<_, ListenError>>()?;
        let disk_addresses = disk_listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let control = options.control.as_deref().map(bind_control).transpose()?;
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
                if let Some((listener, path)) = control {
                    let failed = |source| ReceiverError::Control { path, source };
                    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
                    tokio::task::spawn_local(control::serve(listener, control_ask));
                }
                let listeners = listeners.into_iter().map(Rc::new).collect();
                control::run(context, listeners, inputs).await
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

    /// Sends a request, as a client of the control socket does. Not to be called from an asynchronous task.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn ask(&self, request: Request) -> Result<Response, RequestError> {
        let (reply, response) = oneshot::channel();
        let by = ClientId::OWN;
        self.ask
            .blocking_send(ClientEvent::Request(PendingRequest { by, request, reply }))
            .map_err(|_| RequestError::Ended)?;
        response.blocking_recv().map_err(|_| RequestError::Ended)?
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

fn bind_control(
    path: &std::path::Path,
) -> Result<(std::os::unix::net::UnixListener, PathBuf), ReceiverError> {
    let failed = |source| ReceiverError::Control {
        path: path.to_owned(),
        source,
    };
    let listener = bind_unix(path, Clients::Owner)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((listener, path.to_owned()))
}
