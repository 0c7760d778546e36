//! The NBD server: accepts clients, shakes hands with all of them on one thread, and gives those that have chosen an export a thread of
//! their own.

use super::connection::{CONNECTION_BYTES, Connection, ConnectionEnd};
use super::registry::{Client, DiskRegistry, ExportError};
use crate::disk::{Disk, DiskError};
use crate::nbd::handshake::{Agreed, Exports, GREETING, Handshake, HandshakeError, Progress, Unavailable};
use crate::net::{AcceptError, Accepted, Listener, Origin};
use crate::receiver::budget::{Budget, BudgetError};
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

/// Most clients that shake hands at a time; more are closed.
const HANDSHAKES_MAX: usize = 1024;

/// Most of them from one origin.
const HANDSHAKES_OF_ORIGIN_MAX: usize = 64;

/// A client that has said nothing for so long gives its place to another one where there are too many.
const SILENCE: Duration = Duration::from_secs(1);

/// Bytes received at a time in a handshake.
const BUFFER_BYTES: usize = 4096;

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
        let thread = thread.spawn(move || {
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
    let (sender, mut accepted) = mpsc::channel(64);
    for (position, listener) in listeners.into_iter().enumerate() {
        let accepting = Rc::new(listener).accept_all(position, sender.clone());
        tokio::task::spawn_local(accepting);
    }
    let mut handshakes = Handshakes {
        parts,
        running: JoinSet::new(),
        clients: HashMap::new(),
    };
    loop {
        tokio::select! {
            Some(connection) = accepted.recv() => handshakes.accept(connection),
            Some(ended) = handshakes.running.join_next_with_id() => {
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                // It is not there any more if it had to make room.
                handshakes.clients.remove(&id);
            }
            () = stop.notified() => return,
        }
    }
}

/// A client that shakes hands.
struct Greeted {
    origin: Origin,
    from: String,
    /// When it was heard last.
    heard: Rc<Cell<Instant>>,
    task: AbortHandle,
}

struct Handshakes {
    parts: ServerParts,
    running: JoinSet<()>,
    clients: HashMap<task::Id, Greeted>,
}

impl Handshakes {
    fn accept(&mut self, accepted: Result<Accepted, AcceptError>) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => return self.parts.registry.warn(error.to_string()),
        };
        let origin = accepted.peer.origin;
        let of_origin = self.clients.values().filter(|client| client.origin == origin);
        let has_room = match () {
            () if of_origin.count() >= HANDSHAKES_OF_ORIGIN_MAX => {
                self.make_room(|client| client.origin == origin)
            }
            () if self.clients.len() >= HANDSHAKES_MAX => self.make_room(|_| true),
            () => true,
        };
        let from = accepted.from.clone();
        if !has_room {
            return self.parts.registry.warn(format!(
                "{from}: closed: too many clients of disks have not chosen an export yet"
            ));
        }
        let heard = Rc::new(Cell::new(Instant::now()));
        let (parts, own) = (self.parts.clone(), heard.clone());
        let task = self.running.spawn_local(async move {
            let from = accepted.from.clone();
            match greet(&parts, accepted, &own).await {
                // A client that only looked needs no farewell.
                Ok(()) | Err(Refusal::Io(_)) => {}
                Err(refusal) => parts.registry.warn(format!("{from}: closed: {refusal}")),
            }
        });
        let client = Greeted {
            origin,
            from,
            heard,
            task,
        };
        self.clients.insert(client.task.id(), client);
    }

    /// Closes the client that has been silent longest. False if none is silent.
    fn make_room(&mut self, which: impl Fn(&Greeted) -> bool) -> bool {
        let all = self.clients.iter().filter(|(_, client)| which(client));
        let oldest = all.min_by_key(|(_, client)| client.heard.get());
        let silent = oldest.filter(|(_, client)| client.heard.get().elapsed() >= SILENCE);
        let Some(client) = silent.map(|(id, _)| *id).and_then(|id| self.clients.remove(&id)) else {
            return false;
        };
        client.task.abort();
        let silence = client.heard.get().elapsed();
        self.parts.registry.warn(format!(
            "{}: closed: it was silent for {silence:.1?}, and other clients of disks wait",
            client.from
        ));
        true
    }
}

/// The exports as one client sees them.
struct Seen<'a> {
    registry: &'a DiskRegistry,
    from: &'a str,
    origin: Origin,
    socket: &'a Arc<OwnedFd>,
    claimed: Option<Arc<Disk>>,
}

impl Exports for Seen<'_> {
    fn names(&self) -> Vec<String> {
        self.registry.names()
    }

    fn look_up(&mut self, name: &str, claim: bool) -> Result<u64, Unavailable> {
        let unavailable = |error: ExportError| Unavailable(error.to_string());
        if !claim {
            return self.registry.size(name).map_err(unavailable);
        }
        let client = Client {
            from: self.from.to_owned(),
            origin: self.origin,
            socket: self.socket.clone(),
        };
        let claimed = self.registry.claim(name, client);
        let warn = |why: &ExportError| self.registry.warn(format!("{}: refused: {why}", self.from));
        let disk = claimed.inspect_err(warn).map_err(unavailable)?;
        let size = disk.base().size();
        self.claimed = Some(disk);
        Ok(size)
    }
}

/// Shakes hands with a client, and hands it over to a thread if it chooses an export.
async fn greet(parts: &ServerParts, accepted: Accepted, heard: &Cell<Instant>) -> Result<(), Refusal> {
    let kept = Arc::new(accepted.socket.try_clone()?);
    let mut seen = Seen {
        registry: &parts.registry,
        from: &accepted.from,
        origin: accepted.peer.origin,
        socket: &kept,
        claimed: None,
    };
    // Reading and writing is the same for every family.
    let stream = std::os::unix::net::UnixStream::from(accepted.socket);
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let talking = talk(&mut stream, &mut seen, heard);
    let talked = tokio::time::timeout(parts.deadline, talking).await;
    let Some((agreed, rest)) = talked.map_err(|_| Refusal::Deadline(parts.deadline))?? else {
        return Ok(());
    };
    let Some(disk) = seen.claimed.take() else {
        return Ok(());
    };
    let lease = parts.budget.take(CONNECTION_BYTES)?;
    let stream = stream.into_std()?;
    // The mode belongs to the connection, not to the descriptor.
    stream.set_nonblocking(false)?;
    let connection = Connection::new(stream.into(), disk.clone(), agreed, &rest)?;
    let (registry, from) = (parts.registry.clone(), accepted.from.clone());
    let thread = std::thread::Builder::new().name("colo-disk".into());
    thread.spawn(move || {
        drive(connection, &disk, &registry, &from);
        drop(lease);
    })?;
    Ok(())
}

/// Answers options until the client has chosen an export or is gone. Returns what was received beyond.
async fn talk(
    stream: &mut UnixStream,
    seen: &mut Seen<'_>,
    heard: &Cell<Instant>,
) -> Result<Option<(Agreed, Vec<u8>)>, Refusal> {
    stream.write_all(&GREETING).await?;
    let mut handshake = Handshake::new();
    let (mut arrived, mut out) = (Vec::new(), Vec::new());
    loop {
        out.clear();
        let (taken, progress) = handshake.step(&arrived, seen, &mut out)?;
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
                heard.set(Instant::now());
            }
        }
    }
}

/// Serves a client to its end, and tells the session what that means.
fn drive(mut connection: Connection, disk: &Disk, registry: &DiskRegistry, from: &str) {
    let end = connection.serve();
    drop(connection);
    if !matches!(end, ConnectionEnd::Disconnected | ConnectionEnd::Closed) {
        registry.warn(format!("{from}: disk {}: {end}", disk.name()));
    }
    if disk.disconnected() {
        let lost = || DiskError::ConnectionLost {
            disk: disk.name().to_owned(),
            reason: end.to_string(),
        };
        // No further epoch can be cut from now on.
        disk.note_loss(lost());
        std::thread::sleep(GRACE);
        disk.lose(lost());
    }
}
