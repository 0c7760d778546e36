//! The control thread: assembles connections to sessions, starts them, reaps them when they have ended, serves the control
//! socket's requests and writes the measurements. No page passes through it.

mod connections;
mod error;
mod limits;
mod protocol;
mod requests;
mod socket;
mod state;
mod watch;

pub use error::RequestError;
pub use protocol::{ClaimedCheckpoint, Request, Response};
pub(super) use socket::{ClientEvent, PendingRequest, serve};

use super::background::Background;
use super::budget::Budget;
use super::decode::WorkerThreads;
use super::disks::{DiskRegistry, DiskServer};
use super::kept_checkpoint::KeptCheckpoint;
use super::services::Services;
use super::{Events, Outcome, ReceiverError, ReceiverOptions};
use crate::host::Placement;
use crate::metrics::{self, Recorder};
use crate::net::Listener;
use crate::ring::Plane;
use connections::Connections;
use state::ControlState;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

/// How often deadlines are checked and samples recorded.
const TICK: Duration = Duration::from_millis(200);

/// Accepted connections that wait for the control thread: fewer than there are descriptors in the reserve.
const ACCEPTED_MAX: usize = 8;

/// The parts of a receiver that its control thread owns.
pub(super) struct ControlContext {
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
    /// The disks of all guests, where any are served.
    pub(super) disks: Option<Arc<DiskRegistry>>,
    pub(super) disk_server: Option<DiskServer>,
    /// Checkpoints of earlier receivers, and the first session number that none of them has.
    pub(super) recovered: (Vec<KeptCheckpoint>, u32),
}

/// What the control thread waits for, beside connections.
pub(super) struct ControlInputs {
    pub(super) client_events: mpsc::Receiver<ClientEvent>,
    pub(super) changed: Arc<Notify>,
    pub(super) stop: Arc<Notify>,
}

/// Runs until the receiver is stopped or, with `once`, until the first session has ended.
pub(super) async fn run(
    context: ControlContext,
    listeners: Vec<Rc<Listener>>,
    mut inputs: ControlInputs,
) -> Result<Outcome, ReceiverError> {
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
        connections,
        live: Vec::new(),
        kept: Vec::new(),
        past: Vec::new(),
        next: 1,
        ended_sessions: 0,
        background: JoinSet::new(),
    };
    state.take_recovered();
    let mut tick = tokio::time::interval(TICK);
    let mut interval = tokio::time::interval(metrics::INTERVAL);
    loop {
        tokio::select! {
            Some(connection) = accepted.recv() => state.accept(connection),
            Some(result) = state.connections.identifying.join_next() => state.identify(result),
            Some(event) = inputs.client_events.recv() => state.handle_client_event(event, &listeners),
            () = inputs.changed.notified() => state.reap_ended_sessions(),
            _ = tick.tick() => state.tick(),
            _ = interval.tick() => state.log_interval(),
            () = inputs.stop.notified() => break,
        }
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
