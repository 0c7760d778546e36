//! A client of QEMU's monitor (QMP): commands and their replies, events collected as they come.
//!
//! A reply that comes after its command was given up is dropped. Where QEMU offers it, some commands go out of band, past one that hangs.
//!
//! A thread reads; it ends when QEMU closes the connection. A line is at most `LINE_MAX` bytes and at most
//! `EVENTS_MAX` events are kept, so that whatever listens at the path cannot fill this process's memory.

mod conversation;
mod error;
mod process;

pub(crate) use conversation::Asked;
use conversation::{Conversation, Replies, Verb};
use serde_json::{Value, json};
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use error::QmpError;
pub use process::{ProcessError, QemuProcess};

/// `PATH` or `unix:PATH`.
pub(crate) fn socket_path(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").unwrap_or(text) {
        tcp if tcp.starts_with("tcp:") => Err("only UNIX sockets are supported".to_owned()),
        path => colo_ring::net::socket_path(path).map_err(|error| error.to_string()),
    }
}

/// How long a monitor that should be there may take to be there.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long QEMU may take to answer a command.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// How long the greeting may take: QEMU sends it at once, unless another client is connected.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// How long to wait between attempts to connect.
const RETRY: Duration = Duration::from_millis(5);

/// Longest message, in bytes. The longest known (`query-qmp-schema`) has some 200 KB.
const LINE_MAX: u64 = 16 << 20;

/// Most events that are kept: a protected guest makes two a checkpoint.
const EVENTS_MAX: usize = 1 << 20;

/// An asynchronous message of QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// QEMU's own time stamp, microseconds since the epoch.
    pub at_us: u64,
    /// Its data; null where it has none.
    pub data: Value,
}

/// QEMU's version, from its greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As in 11.1.3: 11.
    pub major: u64,
    /// As in 11.1.3: 1.
    pub minor: u64,
    /// As in 11.1.3: 3.
    pub micro: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qmp")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Takes events of some names, on the thread that reads; none means that QEMU has closed the connection.
type Watcher = Box<dyn Fn(Option<Event>) + Send>;

/// Events that have come, and whether more can.
#[derive(Default)]
struct Collected {
    state: Mutex<Events>,
    changed: Condvar,
    watcher: Mutex<Option<(&'static [&'static str], Watcher)>>,
}

#[derive(Debug, Default)]
struct Events {
    list: Vec<Event>,
    closed: bool,
}

impl Collected {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an event to the watcher, if it wants that one; otherwise returns it.
    fn offer(&self, event: Event) -> Option<Event> {
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        match &*watcher {
            Some((names, watch)) if names.contains(&event.name.as_str()) => watch(Some(event)),
            _ => return Some(event),
        }
        None
    }

    /// QEMU has closed the connection.
    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, watch)) = &*watcher {
            watch(None);
        }
    }
}

/// A connection to QEMU's monitor. Clones share it. QEMU runs their commands in the order in which they were sent.
#[derive(Clone)]
pub struct Qmp {
    path: PathBuf,
    conversation: Arc<Conversation>,
    collected: Arc<Collected>,
    version: Version,
    out_of_band: bool,
    /// How long QEMU may take to answer a command for which nothing else is said.
    reply_limit: Duration,
}

impl Qmp {
    /// Connects, as soon as a QEMU listens, reads the greeting and leaves the negotiation mode.
    ///
    /// # Errors
    /// When no process listens at `path` within `limit`, or no QEMU greets there.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let began = Instant::now();
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if began.elapsed() < limit => std::thread::sleep(RETRY),
                Err(source) => {
                    let path = path.to_owned();
                    return Err(QmpError::Connect { path, source });
                }
            }
        };
        Self::greet(path, writer)
    }

    fn greet(path: &Path, writer: UnixStream) -> Result<Self, QmpError> {
        let owned = path.to_owned();
        let reader = writer.try_clone().map_err(|source| QmpError::Connect {
            path: owned.clone(),
            source,
        })?;
        let (replies, collected) = (Replies::default(), Arc::new(Collected::default()));
        let greeting = replies.wait();
        let (of_thread, there) = (replies.clone(), Arc::clone(&collected));
        std::thread::spawn(move || {
            if let Some(said) = read_all(reader, &there, &of_thread) {
                // Only the greeting is looked at for it.
                of_thread.deliver(Value::String(said));
            }
            of_thread.close();
            there.close();
        });
        let greeting = match greeting.receive(GREETING_LIMIT) {
            Ok(greeting) => greeting,
            Err(RecvTimeoutError::Timeout) => return Err(QmpError::Busy(owned)),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(QmpError::Closed {
                    command: "the greeting".into(),
                });
            }
        };
        let Some(version) = parse_version(&greeting) else {
            let said = greeting
                .as_str()
                .map_or_else(|| greeting.to_string(), str::to_owned);
            return Err(QmpError::NotQmp { path: owned, said });
        };
        let offered = greeting["QMP"]["capabilities"].as_array();
        let out_of_band = offered.is_some_and(|list| list.iter().any(|one| one == "oob"));
        let mut qmp = Self {
            path: owned,
            conversation: Arc::new(Conversation::new(writer, replies)),
            collected,
            version,
            out_of_band,
            reply_limit: REPLY_LIMIT,
        };
        let enabled = match out_of_band {
            true => json!({"enable": ["oob"]}),
            false => json!({}),
        };
        qmp.execute("qmp_capabilities", &enabled)?;
        Ok(qmp)
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's own words; [`QmpError::Closed`] when QEMU is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.reply_limit)
    }

    /// The same connection, whose commands are given up after `limit`.
    pub(crate) fn within(&self, limit: Duration) -> Self {
        Self {
            reply_limit: limit,
            ..self.clone()
        }
    }

    /// Sends a command and returns at once.
    ///
    /// # Errors
    /// [`QmpError::Closed`] when QEMU is gone.
    pub(crate) fn ask(&self, command: &'static str, arguments: &Value) -> Result<Asked, QmpError> {
        self.conversation.ask(command, arguments)
    }

    /// The same, given up after `limit`: QEMU answers nothing while a checkpoint hangs.
    ///
    /// # Errors
    /// As of [`Self::execute`], and [`QmpError::Timeout`]; QEMU may still run the command later.
    pub fn execute_within(
        &mut self,
        command: &str,
        arguments: &Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.conversation
            .run(Verb::InTurn, &[(command, arguments)], limit)
    }

    /// Runs a command past those that are not answered yet, where QEMU offers that. Few commands can be run so.
    ///
    /// # Errors
    /// As of [`Self::execute_within`].
    pub fn execute_out_of_band(
        &mut self,
        command: &str,
        arguments: &Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let verb = match self.out_of_band {
            true => Verb::OutOfBand,
            false => Verb::InTurn,
        };
        self.conversation.run(verb, &[(command, arguments)], limit)
    }

    /// Runs commands one after the other that are sent together: nothing else comes between them, and QEMU waits for none.
    ///
    /// # Errors
    /// As of [`Self::execute_within`], for the first that failed; those after it may have been run.
    pub(crate) fn execute_together(
        &mut self,
        commands: &[(&str, Value)],
        limit: Duration,
    ) -> Result<(), QmpError> {
        let commands: Vec<_> = (commands.iter())
            .map(|(command, arguments)| (*command, arguments))
            .collect();
        self.conversation.run(Verb::InTurn, &commands, limit).map(drop)
    }

    /// The names of the objects that were added to QEMU.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(crate) fn objects(&mut self) -> Result<Vec<String>, QmpError> {
        let listed = self.execute("qom-list", &json!({"path": "/objects"}))?;
        let objects = listed.as_array().into_iter().flatten();
        let names = objects.filter_map(|object| object["name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// The guest's UUID, where it has one; without, QEMU says zeroes.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(crate) fn guest_uuid(&mut self) -> Result<Option<String>, QmpError> {
        let answer = self.execute("query-uuid", &json!({}))?;
        let is_set = |uuid: &&str| uuid.bytes().any(|byte| byte != b'0' && byte != b'-');
        Ok(answer["UUID"].as_str().filter(is_set).map(str::to_owned))
    }

    /// From now on, events of these names go to `watch`, on the thread that reads, and are not kept. At the end it gets none.
    pub fn watch_events(
        &self,
        names: &'static [&'static str],
        watch: impl Fn(Option<Event>) + Send + 'static,
    ) {
        let watcher = self.collected.watcher.lock();
        *watcher.unwrap_or_else(PoisonError::into_inner) = Some((names, Box::new(watch)));
    }

    /// Whether QEMU has closed the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.collected.lock().closed
    }

    /// Waits until QEMU has closed the connection, at most for `limit`. Whether it has.
    pub(crate) fn wait_closed(&self, limit: Duration) -> bool {
        let is_open = |events: &mut Events| !events.closed;
        let waited = (self.collected.changed).wait_timeout_while(self.collected.lock(), limit, is_open);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// All events so far, in order. An event that QEMU sent before a reply is in the list when the reply is.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.collected.lock().list.clone()
    }

    /// Waits until an event of that name has come, at most for `limit`. Returns whether it has.
    #[must_use]
    pub fn wait_event(&self, name: &str, limit: Duration) -> bool {
        let missing =
            |events: &mut Events| !events.closed && events.list.iter().all(|event| event.name != name);
        let waited = self
            .collected
            .changed
            .wait_timeout_while(self.collected.lock(), limit, missing);
        let (events, _) = waited.unwrap_or_else(PoisonError::into_inner);
        events.list.iter().any(|event| event.name == name)
    }
}

/// Reads messages until the connection ends, or something comes that is no message: its beginning is returned.
fn read_all(reader: UnixStream, collected: &Collected, replies: &Replies) -> Option<String> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line);
        if read.map_or(true, |bytes| bytes == 0) {
            return None;
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            return Some(String::from_utf8_lossy(&line).chars().take(60).collect());
        };
        let Some(event) = parse_event(&message) else {
            replies.deliver(message);
            continue;
        };
        let Some(event) = collected.offer(event) else {
            continue;
        };
        let mut events = collected.lock();
        if events.list.len() == EVENTS_MAX {
            // Of a client that never looks, the older half is dropped.
            events.list.drain(..EVENTS_MAX / 2);
        }
        events.list.push(event);
        collected.changed.notify_all();
    }
}

fn parse_version(greeting: &Value) -> Option<Version> {
    let version = &greeting.get("QMP")?["version"]["qemu"];
    Some(Version {
        major: version["major"].as_u64()?,
        minor: version["minor"].as_u64()?,
        micro: version["micro"].as_u64()?,
    })
}

fn parse_event(message: &Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    let stamp = |part: &str| message["timestamp"][part].as_u64();
    let (seconds, microseconds) = (stamp("seconds")?, stamp("microseconds")?);
    Some(Event {
        name,
        at_us: seconds.saturating_mul(1_000_000).saturating_add(microseconds),
        data: message["data"].clone(),
    })
}

#[cfg(test)]
pub(crate) mod tests;
