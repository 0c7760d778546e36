//! The thread that does TLS handshakes: see [`crate::tls`] for why they are not tasks of the control thread.

use super::identify::{Identified, IdentifyError, identify_secured, socket_of, stream};
use crate::budget::Budget;
use crate::sandbox::ThreadKind;
use crate::threads::Threads;
use crate::tls::{self, HANDSHAKE_MEMORY, ServerCredentials};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task;

/// Connections that wait for the thread: their sockets are open, whatever has become of those who wait for them.
const WAITING_MAX: usize = 16;

/// How much less of the processor it has than the receiving cores.
const NICENESS: i32 = 10;

/// A connection to identify.
struct Job {
    socket: OwnedFd,
    /// Closed when it is not wanted any more.
    reply: oneshot::Sender<Result<Identified, IdentifyError>>,
}

/// The thread, while it runs.
pub(super) struct HandshakeThread {
    handshakes: Handshakes,
    stop: Arc<Notify>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What takes connections to it. Clones are the same.
#[derive(Clone)]
pub(super) struct Handshakes(mpsc::Sender<Job>);

impl HandshakeThread {
    /// Starts it.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(super) fn start(
        credentials: Arc<ServerCredentials>,
        budget: Arc<Budget>,
        threads: Threads,
    ) -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel(WAITING_MAX);
        let stop = Arc::new(Notify::new());
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new().name("colo-tls".into());
        let thread = thread.spawn(move || {
            // It fails only for a process that may not even have less.
            let _ = rustix::process::setpriority_process(None, NICENESS);
            tls::begin_random_numbers();
            threads.enter(ThreadKind::Handshake);
            let serve = serve(jobs, credentials, budget, stopped);
            task::LocalSet::new().block_on(&runtime, serve);
        })?;
        Ok(Self {
            handshakes: Handshakes(sender),
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn handshakes(&self) -> &Handshakes {
        &self.handshakes
    }
}

impl Drop for HandshakeThread {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            // It reports its own panic.
            let _ = thread.join();
        }
    }
}

impl Handshakes {
    /// Has a connection's handshake done, and reads what kind of connection it is. It may be given up at any time.
    ///
    /// # Errors
    /// If it has no TLS, is no migration channel, ends early or stays silent; it is closed then.
    pub(super) async fn identify(
        self,
        socket: OwnedFd,
        deadline: Duration,
    ) -> Result<Identified, IdentifyError> {
        let identifying = async {
            let (reply, identified) = oneshot::channel();
            let job = Job { socket, reply };
            let sent = self.0.send(job).await;
            sent.map_err(|_| IdentifyError::NoHandshakes)?;
            identified.await.map_err(|_| IdentifyError::NoHandshakes)?
        };
        let result = tokio::time::timeout(deadline, identifying).await;
        result.unwrap_or(Err(IdentifyError::HandshakeDeadline(deadline)))
    }
}

async fn serve(
    mut jobs: mpsc::Receiver<Job>,
    credentials: Arc<ServerCredentials>,
    budget: Arc<Budget>,
    stop: Arc<Notify>,
) {
    let credentials = Rc::new(credentials);
    loop {
        let job = tokio::select! {
            job = jobs.recv() => job,
            () = stop.notified() => return,
        };
        let Some(job) = job else { return };
        let (credentials, budget) = (credentials.clone(), budget.clone());
        task::spawn_local(async move {
            let Job { socket, mut reply } = job;
            let identified = tokio::select! {
                identified = one(socket, &credentials, &budget) => identified,
                () = reply.closed() => return,
            };
            // It may not be wanted any more.
            let _ = reply.send(identified);
        });
    }
}

async fn one(
    socket: OwnedFd,
    credentials: &ServerCredentials,
    budget: &Arc<Budget>,
) -> Result<Identified, IdentifyError> {
    let stream = stream(socket)?;
    // One that is silent takes no memory.
    if stream.peek(&mut [0]).await? == 0 {
        return Err(IdentifyError::Closed);
    }
    // Until its buffers are those of a session, or of a link, which has memory of its own.
    let _lease = budget.take(HANDSHAKE_MEMORY)?;
    let (stream, kind, secured) = identify_secured(stream, credentials).await?;
    Ok(Identified {
        socket: socket_of(stream)?,
        kind,
        tls: Some(secured),
    })
}
