//! Accepts what the primary connects, and forwards it until the session is over.

use super::delay::{Added, Delays};
use super::pair;
use super::recorder::{Recorded, Recorder};
use super::runtime::Runtime;
use super::session::{Connection, Progress, Session, Wish};
use crate::net::Address;
use crate::output::tell;
use colo_ring::net::Listener;
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Accepted connections that are not forwarded yet.
const ACCEPTED_MAX: usize = 64;

/// What is left when it is over.
pub(super) struct Outcome {
    pub(super) recorded: Recorded,
    pub(super) connections: Vec<Connection>,
    /// By how much checkpoints were lengthened, or why that is not known.
    pub(super) added: Result<Added, &'static str>,
    /// Whether a primary has been here.
    pub(super) had_primary: bool,
    /// Whether io_uring was used.
    pub(super) uring: bool,
}

/// Forwards on this thread what comes to `listener`. It is over when a primary was here and its last connection has
/// ended, or when that is wished.
///
/// # Errors
/// If connections cannot be waited for.
pub(super) fn run(
    listener: Listener,
    to: Address,
    recorder: Recorder,
    progress: Arc<Progress>,
    wish: watch::Receiver<Wish>,
) -> io::Result<Outcome> {
    let (runtime, fallback) = Runtime::new()?;
    if let Some(error) = fallback {
        tell(&format!(
            "warning: forwarding without io_uring ({error}): it waits for readiness instead, which takes more system calls"
        ));
    }
    let uring = runtime.is_uring();
    let session = Session {
        to,
        uring,
        recorder,
        delays: RefCell::new(Delays::new()),
        connections: RefCell::default(),
        progress,
    };
    let session = Rc::new(session);
    let served = runtime.block_on(serve(session.clone(), Rc::new(listener), wish));
    let session = Rc::into_inner(session).expect("every connection's task has ended");
    let had_primary = session.had_primary();
    let recorded = session.recorder.finish();
    served?;
    Ok(Outcome {
        recorded,
        connections: session.connections.into_inner(),
        added: session.delays.borrow().added(),
        had_primary,
        uring,
    })
}

async fn serve(
    session: Rc<Session>,
    listener: Rc<Listener>,
    mut wish: watch::Receiver<Wish>,
) -> io::Result<()> {
    let (tell_accepted, mut accepted) = mpsc::channel(ACCEPTED_MAX);
    let accepting = listener.clone().accept_all(0, tell_accepted);
    let accepting = tokio::task::spawn_local(accepting);
    let mut pairs = JoinSet::new();
    loop {
        tokio::select! {
            connection = accepted.recv() => match connection {
                Some(Ok(connection)) => {
                    pairs.spawn_local(pair::run(session.clone(), connection, wish.clone()));
                }
                Some(Err(error)) => tell(&format!("warning: {error}")),
                // Nothing can be accepted at all.
                None => return accepting.await.map_err(io::Error::other),
            },
            Some(_) = pairs.join_next() => {}
            Ok(()) = wish.changed() => {}
        }
        let wished = *wish.borrow_and_update();
        if wished >= Wish::StopRecording {
            session.recorder.stop(None);
        }
        let over = pairs.is_empty() && (session.had_primary() || wished >= Wish::StopRecording);
        if over || wished == Wish::Cut {
            break;
        }
    }
    // The task first: a socket that is shut down may stay readable without ever giving a connection.
    accepting.abort();
    tokio::task::yield_now().await;
    listener.close();
    while pairs.join_next().await.is_some() {}
    Ok(())
}
