//! The control thread: assembles connections to sessions, starts them, reaps them when they have ended, serves the control
//! socket's requests and writes the measurements. No page passes through it.

mod admission;
mod connections;
mod error;
mod limits;
mod make_room;
mod protocol;
mod replacement;
mod request_line;
mod requests;
mod session_numbers;
mod silence;
mod socket;
mod state;
mod watch;

pub use error::RequestError;
pub use protocol::{ClaimedCheckpoint, Request, Response};
pub(super) use session_numbers::SessionNumbers;
pub(super) use socket::{ClientEvent, Conversation, PendingRequest, serve, serve_client};

use super::background::Background;
use super::decode::WorkerThreads;
use super::disks::{DiskRegistry, DiskServer};
use super::handshakes::HandshakeThread;
use super::kept_checkpoint::KeptCheckpoint;
use super::outlet::Stopping;
use super::refusals::Refusals;
use super::services::Services;
use super::{Events, Outcome, ReceiverError, ReceiverOptions};
use crate::budget::Budget;
use crate::host::Placement;
use crate::metrics::{self, Recorder};
use crate::net::{ACCEPTED_MAX, Listener};
use crate::ring::Plane;
use crate::sandbox::ThreadKind;
use crate::store::RamDirectoryLock;
use crate::threads::Threads;
use connections::Connections;
use state::ControlState;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// How often deadlines are checked and samples recorded.
const TICK: Duration = Duration::from_millis(200);

/// The parts of a receiver that its control thread owns.
pub(super) struct ControlContext {
    pub(super) threads: Threads,
    pub(super) options: ReceiverOptions,
    pub(super) placement: Placement,
    pub(super) services: Arc<dyn Services>,
    pub(super) plane: Plane,
    /// They end after the plane, whose connections hand work to them.
    pub(super) workers: WorkerThreads,
    pub(super) background: Background,
    pub(super) budget: Arc<Budget>,
    pub(super) recorder: Recorder,
    pub(super) events: Arc<Events>,
    /// Connections that are refused, of which anyone can cause any number.
    pub(super) refusals: Arc<Refusals>,
    /// The disks of all guests, where any are served.
    pub(super) disks: Option<Arc<DiskRegistry>>,
    pub(super) disk_server: Option<DiskServer>,
    /// With `--tls`.
    pub(super) handshakes: Option<HandshakeThread>,
    /// Checkpoints of earlier receivers.
    pub(super) recovered: Vec<KeptCheckpoint>,
    pub(super) numbers: SessionNumbers,
    /// No other receiver has the RAM directory before this one's checkpoints are kept there or gone.
    pub(super) _ram_dir: Option<RamDirectoryLock>,
}

/// What the control thread waits for, beside connections.
pub(super) struct ControlInputs {
    pub(super) client_events: mpsc::Receiver<ClientEvent>,
    pub(super) changed: Arc<Notify>,
    pub(super) stop: Arc<Notify>,
}

/// For ever, without an instant.
async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

/// Runs until the receiver is stopped or, with `once`, until the first session has ended.
pub(super) async fn run(
    context: ControlContext,
    listeners: Vec<Rc<Listener>>,
    mut inputs: ControlInputs,
) -> Result<Outcome, ReceiverError> {
    context.threads.enter(ThreadKind::Control);
    let (accepted_sender, mut accepted) = mpsc::channel(ACCEPTED_MAX);
    let accepting: Vec<_> = (listeners.iter().enumerate())
        .map(|(position, listener)| {
            let listener = listener.clone().accept_all(position, accepted_sender.clone());
            tokio::task::spawn_local(listener)
        })
        .collect();
    let connections = Connections::new(context.options.channels, context.options.identify_deadline);
    let mut state = ControlState {
        context,
        listeners: listeners.clone(),
        connections,
        live: Vec::new(),
        kept: Vec::new(),
        past: Vec::new(),
        ended_sessions: 0,
        background: JoinSet::new(),
        stopping: Stopping::default(),
        ticked: Instant::now(),
    };
    state.take_recovered();
    let mut tick = tokio::time::interval(TICK);
    let mut interval = tokio::time::interval(metrics::INTERVAL);
    // After a pause of this process, others are heard before they are judged.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silence: Option<Instant> = None;
    loop {
        tokio::select! {
            Some(connection) = accepted.recv() => state.accept(connection),
            Some(result) = state.connections.identifying.join_next() => state.identify(result),
            Some(event) = inputs.client_events.recv() => state.handle_client_event(event, &listeners),
            () = inputs.changed.notified() => state.reap_ended_sessions(),
            _ = tick.tick() => state.tick(),
            _ = interval.tick() => state.log_interval(),
            () = sleep_until(silence) => {}
            () = inputs.stop.notified() => break,
        }
        state.admit_sessions(&listeners, accepted.capacity() == accepted.max_capacity());
        silence = state.decide_silences();
        if state.context.options.once && state.ended_sessions > 0 {
            break;
        }
    }
    // Tasks first: a socket that is shut down may stay readable without ever giving a connection.
    accepting.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::task::yield_now().await;
    listeners.iter().for_each(|listener| listener.close());
    state.end_all(&inputs.changed).await;
    state.close().await
}
