//! The NBD server: accepts clients, does the handshakes of all of them on one thread, and gives each that has chosen an export a thread of
//! its own.
//!
//! The handshakes are not tasks of the control thread, for two reasons. They open bases, lock and write the records of disks, and
//! list the directory: each of these waits for the medium, which a failover must not do. And clients are not authenticated: what
//! they send costs this thread's time only.

use super::connection::{CONNECTION_BYTES, Connection, ConnectionEnd};
use super::registry::{Client, DiskRegistry, ExportError};
use crate::budget::{Budget, BudgetError};
use crate::disk::{Disk, DiskError};
use crate::nbd::handshake::{Agreed, Exports, GREETING, Handshake, HandshakeError, Progress, Unavailable};
use crate::net::{ACCEPTED_MAX, AcceptError, Accepted, DescriptorReserve, Listener, Origin};
use crate::receiver::refusals::{Refusals, Refused};
use crate::sandbox::ThreadKind;
use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::{self, AbortHandle, JoinSet};

/// Most handshakes at a time; more clients are closed.
const HANDSHAKES_MAX: usize = 1024;

/// Most of them from one origin.
const HANDSHAKES_OF_ORIGIN_MAX: usize = 64;

/// Where there are too many clients, one that has sent nothing for so long is closed in favour of another.
const SILENCE: Duration = Duration::from_secs(1);

/// Bytes received at a time in a handshake.
const BUFFER_BYTES: usize = 4096;

/// Most memory of a handshake: an option, and the replies to it.
const HANDSHAKE_BYTES: u64 = 64 << 10;

/// How long to wait for the end of the migration when a disk's connection ends: a primary that died has lost both.
const GRACE: Duration = Duration::from_millis(200);

/// Why a client was disconnected in its handshake.
#[derive(Debug, Error)]
enum Refusal {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] HandshakeError),
    #[error("it did not choose an export within {0:?}")]
    Deadline(Duration),
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// A server that is running.
pub(in crate::receiver) struct DiskServer {
    registry: Arc<DiskRegistry>,
    stop: Arc<Notify>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the server needs beside its listeners.
#[derive(Clone)]
pub(in crate::receiver) struct ServerParts {
    pub(in crate::receiver) registry: Arc<DiskRegistry>,
    pub(in crate::receiver) refusals: Arc<Refusals>,
    pub(in crate::receiver) budget: Arc<Budget>,
    pub(in crate::receiver) deadline: Duration,
}

impl DiskServer {
    /// Starts serving.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(in crate::receiver) fn start(parts: ServerParts, listeners: Vec<Listener>) -> io::Result<Self> {
        let registry = parts.registry.clone();
        let stop = Arc::new(Notify::new());
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new().name("colo-nbd".into());
        let threads = registry.threads().clone();
        let thread = thread.spawn(move || {
            threads.enter(ThreadKind::DiskServer);
            let serve = serve(parts, listeners, stopped);
            tokio::task::LocalSet::new().block_on(&runtime, serve);
        })?;
        Ok(Self {
            registry,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            // It reports its own panic.
            let _ = thread.join();
        }
        self.registry.hang_up_all();
    }
}

async fn serve(parts: ServerParts, listeners: Vec<Listener>, stop: Arc<Notify>) {
    let (sender, mut accepted) = mpsc::channel(ACCEPTED_MAX);
    for (position, listener) in listeners.into_iter().enumerate() {
        let accepting = Rc::new(listener).accept_all(position, sender.clone());
        tokio::task::spawn_local(accepting);
    }
    let mut handshakes = Handshakes {
        parts,
        running: JoinSet::new(),
        clients: HashMap::new(),
        descriptors: DescriptorReserve::of_process(),
    };
    loop {
        tokio::select! {
            Some(connection) = accepted.recv() => handshakes.accept(connection),
            Some(ended) = handshakes.running.join_next_with_id() => {
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                // It is not there any more if it was closed to make room.
                handshakes.clients.remove(&id);
            }
            () = stop.notified() => return,
        }
    }
}

/// A client that has not chosen an export yet.
struct PendingClient {
    origin: Origin,
    from: String,
    last_received: Rc<Cell<Instant>>,
    task: AbortHandle,
}

struct Handshakes {
    parts: ServerParts,
    running: JoinSet<()>,
    clients: HashMap<task::Id, PendingClient>,
    descriptors: DescriptorReserve,
}

impl Handshakes {
    fn accept(&mut self, accepted: Result<Accepted, AcceptError>) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => return self.parts.refusals.warn_of_all(error.to_string()),
        };
        let origin = accepted.peer.origin.group();
        let of_origin = self.clients.values().filter(|client| client.origin == origin);
        let has_room = match () {
            () if of_origin.count() >= HANDSHAKES_OF_ORIGIN_MAX => {
                self.make_room(|client| client.origin == origin)
            }
            () if self.descriptors.has(&accepted.socket) => {
                // For the next client: this one's descriptor is given back.
                self.make_room(|_| true);
                false
            }
            () if self.clients.len() >= HANDSHAKES_MAX => self.make_room(|_| true),
            () => true,
        };
        let from = accepted.from.clone();
        let refuse = |why: &dyn std::fmt::Display| {
            let why = format!("closed: {why}");
            self.parts.refusals.warn(origin, Refused::Client, &from, &why);
        };
        if !has_room {
            return refuse(
                &"too many clients of disks have not chosen an export yet, or too many files are open",
            );
        }
        let lease = match self.parts.budget.take(HANDSHAKE_BYTES) {
            Ok(lease) => lease,
            Err(error) => return refuse(&error),
        };
        let last_received = Rc::new(Cell::new(Instant::now()));
        let (parts, received) = (self.parts.clone(), last_received.clone());
        let task = self.running.spawn_local(async move {
            let from = accepted.from.clone();
            match shake_hands(&parts, accepted, &received).await {
                // A client may disconnect without an export.
                Ok(()) | Err(Refusal::Io(_)) => {}
                Err(refusal) => {
                    let why = format!("closed: {refusal}");
                    parts.refusals.warn(origin, Refused::Stranger, &from, &why);
                }
            }
            drop(lease);
        });
        let client = PendingClient {
            origin,
            from,
            last_received,
            task,
        };
        self.clients.insert(client.task.id(), client);
    }

    /// Closes the client that has been silent longest. False if none is silent.
    fn make_room(&mut self, which: impl Fn(&PendingClient) -> bool) -> bool {
        let all = self.clients.iter().filter(|(_, client)| which(client));
        let oldest = all.min_by_key(|(_, client)| client.last_received.get());
        let silent = oldest.filter(|(_, client)| client.last_received.get().elapsed() >= SILENCE);
        let Some(client) = silent.map(|(id, _)| *id).and_then(|id| self.clients.remove(&id)) else {
            return false;
        };
        client.task.abort();
        let silence = client.last_received.get().elapsed();
        let why = format!("closed: it was silent for {silence:.1?}, and other clients of disks wait");
        let (refusals, origin) = (&self.parts.refusals, client.origin);
        refusals.warn(origin, Refused::Stranger, &client.from, &why);
        true
    }
}

/// The exports for one client.
struct ClientExports<'a> {
    registry: &'a DiskRegistry,
    refusals: &'a Refusals,
    from: &'a str,
    origin: Origin,
    socket: &'a Arc<OwnedFd>,
    opened: Option<Arc<Disk>>,
}

impl Exports for ClientExports<'_> {
    fn names(&self) -> Vec<String> {
        self.registry.names()
    }

    fn size(&self, name: &str) -> Result<u64, Unavailable> {
        self.registry.size(name).map_err(unavailable)
    }

    fn open(&mut self, name: &str) -> Result<u64, Unavailable> {
        let client = Client {
            from: self.from.to_owned(),
            origin: self.origin,
            socket: self.socket.clone(),
        };
        let opened = self.registry.open(name, client);
        let warn = |why: &ExportError| {
            let why = format!("refused: {why}");
            self.refusals.warn(self.origin, Refused::Client, self.from, &why);
        };
        let disk = opened.inspect_err(warn).map_err(unavailable)?;
        let size = disk.base().size();
        self.opened = Some(disk);
        Ok(size)
    }
}

fn unavailable(error: ExportError) -> Unavailable {
    Unavailable(error.to_string())
}

/// Does the handshake with a client, and hands it over to a thread if it chooses an export.
async fn shake_hands(
    parts: &ServerParts,
    accepted: Accepted,
    last_received: &Cell<Instant>,
) -> Result<(), Refusal> {
    let kept = Arc::new(accepted.socket.try_clone()?);
    let mut exports = ClientExports {
        registry: &parts.registry,
        refusals: &parts.refusals,
        from: &accepted.from,
        origin: accepted.peer.origin,
        socket: &kept,
        opened: None,
    };
    // Reading and writing is the same for every family.
    let stream = std::os::unix::net::UnixStream::from(accepted.socket);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let negotiating = negotiate(&mut stream, &mut exports, last_received);
    let negotiated = tokio::time::timeout(parts.deadline, negotiating).await;
    let Some((agreed, rest)) = negotiated.map_err(|_| Refusal::Deadline(parts.deadline))?? else {
        return Ok(());
    };
    let Some(disk) = exports.opened.take() else {
        return Ok(());
    };
    let lease = parts.budget.take(CONNECTION_BYTES)?;
    let stream = stream.into_std()?;
    // The mode belongs to the connection, not to the descriptor.
    stream.set_nonblocking(false)?;
    let threads = parts.registry.threads();
    let connection = Connection::new(stream.into(), disk.clone(), agreed, &rest, threads.clone())?;
    let parts = parts.clone();
    let client = (accepted.from, accepted.peer.origin);
    threads.start(ThreadKind::Disk, "colo-disk", move || {
        drive(connection, &disk, &parts, &client);
        drop(lease);
    })?;
    Ok(())
}

/// Answers options until the client has chosen an export or is gone. Returns what was received beyond.
async fn negotiate(
    stream: &mut UnixStream,
    exports: &mut ClientExports<'_>,
    last_received: &Cell<Instant>,
) -> Result<Option<(Agreed, Vec<u8>)>, Refusal> {
    stream.write_all(&GREETING).await?;
    let mut handshake = Handshake::new();
    let (mut arrived, mut out) = (Vec::new(), Vec::new());
    loop {
        out.clear();
        let (taken, progress) = handshake.step(&arrived, exports, &mut out)?;
        arrived.drain(..taken);
        stream.write_all(&out).await?;
        match progress {
            Progress::Continue => {}
            Progress::Chosen(agreed) => return Ok(Some((agreed, arrived))),
            Progress::Ended => return Ok(None),
            Progress::NeedMore => {
                let mut bytes = [0; BUFFER_BYTES];
                match stream.read(&mut bytes).await? {
                    0 => return Ok(None),
                    got => arrived.extend(&bytes[..got]),
                }
                last_received.set(Instant::now());
            }
        }
    }
}

/// Serves a client until its connection ends, and then ends the session that has lost its disk by that.
fn drive(mut connection: Connection, disk: &Disk, parts: &ServerParts, (from, origin): &(String, Origin)) {
    let registry = &parts.registry;
    let end = connection.serve();
    let lost = || DiskError::ConnectionLost {
        disk: disk.name().to_owned(),
        reason: end.to_string(),
    };
    let is_lost = disk.disconnected();
    match is_lost {
        // No further epoch can be cut from now on.
        true => drop(disk.note_loss(lost())),
        false => registry.disconnected(disk),
    }
    if matches!(end, ConnectionEnd::Disconnected) {
        connection.finish_reads();
    }
    drop(connection);
    if !matches!(end, ConnectionEnd::Disconnected | ConnectionEnd::Closed) {
        let text = format!("disk {}: {end}", disk.name());
        match is_lost {
            true => registry.warn(format!("{from}: {text}")),
            false => parts.refusals.warn(*origin, Refused::Client, from, &text),
        }
    }
    if is_lost {
        std::thread::sleep(GRACE);
        disk.lose(lost());
    }
}
