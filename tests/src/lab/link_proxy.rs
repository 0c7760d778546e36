//! A proxy between a guarded primary and its receiver, which reads the guard's link and does something at a message of it.
//!
//! It passes on every byte of the migration's channels. Of the link it passes on line by line, and acts before it does, so that what
//! the message says is not known at its other end then. It can also be a receiver that vanishes, whose connections stay and say nothing.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use colo_ring::link::PREFACE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Address, Lab, LabError};
use crate::HANG_LIMIT;

/// Bytes of the migration that are passed on at a time.
const BYTES_AT_A_TIME: usize = 256 << 10;

/// How long the rest of a piece of the main channel is kept back, for the barrier to come first.
const KEPT_BACK: Duration = Duration::from_millis(500);

/// A COLO message of the main channel: a number, behind which the primary waits, or sends what belongs to it.
const COLO_MESSAGE_BYTES: usize = 4;

/// That one which begins a checkpoint. The guest runs until it is answered.
const CHECKPOINT_REQUEST: [u8; COLO_MESSAGE_BYTES] = [0, 0, 0, 1];

/// The first bytes of a main channel.
const MAIN_CHANNEL: [u8; 4] = *b"QEVM";

/// How often a connection of a receiver that has vanished looks whether it is over.
const POLL: Duration = Duration::from_millis(5);

/// A message of a link, at which something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkMoment {
    /// Output waits, and the receiver, which keeps the primary's request, does not know it yet.
    Begin,
    /// The receiver asks for a line, and the guard does not know it yet.
    Barrier,
    /// The line is drawn, and the receiver does not know it yet.
    Placed,
    /// The checkpoint is committed, and the guard does not know it yet.
    Committed,
    /// So long after the guard was told: it lets go.
    Releasing(Duration),
}

impl LinkMoment {
    fn message(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Barrier => "barrier",
            Self::Placed => "placed",
            Self::Committed | Self::Releasing(_) => "committed",
        }
    }
}

type Act = Box<dyn FnOnce() + Send>;

/// What to do, and when.
struct Plan {
    moment: LinkMoment,
    /// So many of its messages later.
    skip: u32,
    act: Act,
}

#[derive(Default)]
struct Shared {
    fault: Mutex<Option<ReceiverFault>>,
    /// Of the main channel nothing more arrives: what the fault has let go is not committed.
    holds_main: Flag,
    plan: Mutex<Option<Plan>>,
    acted: Flag,
    /// Both ends of the last link.
    link: Mutex<Option<[UnixStream; 2]>>,
    /// Connections are counted; those before the first of these pass nothing on, and those before the second are closed.
    connections: AtomicU64,
    silent_before: AtomicU64,
    closed_before: AtomicU64,
}

/// What a receiver with a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverFault {
    /// It tells the guard of a commit as soon as it asks for the line. The checkpoint does not arrive after that.
    ReleasesEarly,
    /// It acknowledges a checkpoint before its line is drawn: the guard is asked so long after, and the guest runs meanwhile. No further
    /// checkpoint arrives.
    AcknowledgesEarly(Duration),
}

/// Something that happens once.
#[derive(Default)]
struct Flag {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Flag {
    fn set(&self, value: bool) {
        *lock(&self.is_set) = value;
        self.changed.notify_all();
    }

    /// Whether it happens within that time.
    fn wait(&self, limit: Duration) -> bool {
        let is_set = lock(&self.is_set);
        let waited = self.changed.wait_timeout_while(is_set, limit, |is_set| !*is_set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// See the module. Clones are the same proxy.
#[derive(Clone)]
pub struct LinkProxy {
    address: PathBuf,
    to: PathBuf,
    shared: Arc<Shared>,
}

impl LinkProxy {
    /// Listens for a primary and its guard, whose receiver is at `to`, a UNIX socket.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(lab: &Lab, to: &Address) -> Result<Self, LabError> {
        let Address::Unix(to) = to.clone() else {
            panic!("the proxy passes on to UNIX sockets");
        };
        let address = lab.fresh_file("proxy", "sock");
        let listener = UnixListener::bind(&address).map_err(LabError::io("listen as a proxy"))?;
        let shared = Arc::new(Shared::default());
        let (of_thread, receiver) = (shared.clone(), to.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (to, shared) = (receiver.clone(), of_thread.clone());
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                // A connection that breaks is closed at both ends.
                std::thread::spawn(move || drop(pass(client, &to, &shared, number)));
            }
        });
        Ok(Self { address, to, shared })
    }

    /// Where the receiver listens.
    #[must_use]
    pub fn behind(&self) -> Address {
        Address::Unix(self.to.clone())
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> Address {
        Address::Unix(self.address.clone())
    }

    /// Breaks the protocol at the next barrier, as a receiver with that fault would. What is let go by it is never committed, so that it
    /// is unmade when the primary dies.
    pub fn break_protocol(&self, fault: ReceiverFault) {
        *lock(&self.shared.fault) = Some(fault);
    }

    /// Does something at a moment to come, the first after `skip` others like it.
    pub fn at(&self, moment: LinkMoment, skip: u32, act: impl FnOnce() + Send + 'static) {
        self.shared.acted.set(false);
        *lock(&self.shared.plan) = Some(Plan {
            moment,
            skip,
            act: Box::new(act),
        });
    }

    /// Kills that process so long after a moment to come begins, and returns the message only when it is dead.
    pub fn kill_at(&self, moment: LinkMoment, after: Duration, skip: u32, process: u32) {
        self.at(moment, skip, move || {
            std::thread::sleep(after);
            kill_and_wait(process);
        });
    }

    /// Waits until that has happened.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_acted(&self) -> Result<(), LabError> {
        match self.shared.acted.wait(HANG_LIMIT) {
            true => Ok(()),
            false => Err(LabError::Timeout {
                what: "a message of the guard's link".into(),
                limit: HANG_LIMIT,
            }),
        }
    }

    /// Closes the link, and nothing else.
    pub fn cut_link(&self) {
        for end in lock(&self.shared.link).iter().flatten() {
            // It may be closed.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// From now on nothing arrives at the receiver, and nothing comes from it; no connection is closed, and none is refused.
    pub fn vanish(&self) {
        self.shared.silent_before.store(u64::MAX, Ordering::SeqCst);
    }

    /// After [`Self::vanish`], connections that come from now on reach the receiver, which knows of no end of those before.
    pub fn pass_new_connections(&self) {
        let next = self.shared.connections.load(Ordering::SeqCst);
        self.shared.silent_before.store(next, Ordering::SeqCst);
    }

    /// A receiver is there again: connections that come from now on reach it, and those before are closed.
    pub fn come_back(&self) {
        let next = self.shared.connections.load(Ordering::SeqCst);
        self.shared.closed_before.store(next, Ordering::SeqCst);
        self.shared.silent_before.store(next, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Whether a connection passes on what it has; waits for its end where nothing arrives any more.
    fn passes(&self, number: u64) -> bool {
        while number < self.silent_before.load(Ordering::SeqCst) {
            if number < self.closed_before.load(Ordering::SeqCst) {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }

    /// A message is about to be passed on. Returns what is to be done after how long then, if not before.
    fn before(&self, line: &str) -> Option<(Duration, Act)> {
        let message: Value = serde_json::from_str(line).ok()?;
        // A message that comes before the fault is none that is waited for.
        if self.fault().is_some() && !self.holds_main.wait(Duration::ZERO) {
            return None;
        }
        let mut plan = lock(&self.plan);
        let Plan { moment, skip, .. } = plan.as_mut()?;
        if message["type"] != moment.message() {
            return None;
        }
        if *skip > 0 {
            *skip -= 1;
            return None;
        }
        let Plan { moment, act, .. } = plan.take()?;
        drop(plan);
        match moment {
            LinkMoment::Releasing(after) => Some((after, act)),
            _ => {
                self.act(act);
                None
            }
        }
    }

    fn act(&self, act: Act) {
        act();
        self.acted.set(true);
    }

    fn fault(&self) -> Option<ReceiverFault> {
        *lock(&self.fault)
    }

    /// Passes on a line of the receiver, as one with a fault would send it.
    fn pass_faulty(
        &self,
        line: &str,
        fault: ReceiverFault,
        guard: &UnixStream,
        receiver: &UnixStream,
    ) -> io::Result<()> {
        let (mut guard, mut receiver) = (guard, receiver);
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        if message["type"] != "barrier" || *lock(&self.holds_main.is_set) {
            return guard.write_all(line.as_bytes());
        }
        let about = |kind: &str| format!("{}\n", json!({"type": kind, "checkpoint": message["checkpoint"]}));
        match fault {
            ReceiverFault::ReleasesEarly => {
                self.holds_main.set(true);
                guard.write_all((line.to_owned() + &about("committed")).as_bytes())
            }
            ReceiverFault::AcknowledgesEarly(after) => {
                self.holds_main.set(true);
                receiver.write_all(about("placed").as_bytes())?;
                std::thread::sleep(after);
                guard.write_all(line.as_bytes())
            }
        }
    }

    /// Whether a line of the guard is passed on: the answer to a barrier that was answered for it is not.
    fn passes_on(&self, line: &str) -> bool {
        let is_answered = matches!(self.fault(), Some(ReceiverFault::AcknowledgesEarly(_)))
            && self.holds_main.wait(Duration::ZERO);
        !is_answered || !line.contains("\"placed\"")
    }
}

/// Returns when the process is dead: whoever has started it reaps it.
fn kill_and_wait(process: u32) {
    let pid = i32::try_from(process).expect("process ids are below 2^22 on Linux");
    // It may have ended.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let deadline = Instant::now() + HANG_LIMIT;
    while is_alive(process) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn is_alive(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The state follows the command's name, which may contain anything.
    let state = status.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carries {
    Link,
    Main,
    Pages,
}

/// One direction of a connection.
struct Direction<'a> {
    from: UnixStream,
    to: UnixStream,
    carries: Carries,
    is_from_receiver: bool,
    /// The connection's.
    number: u64,
    shared: &'a Shared,
}

/// Passes on a connection, until it ends.
fn pass(mut client: UnixStream, to: &Path, shared: &Arc<Shared>, number: u64) -> io::Result<()> {
    let mut first = [0; PREFACE.len()];
    client.read_exact(&mut first)?;
    if !shared.passes(number) {
        return Ok(());
    }
    let mut server = UnixStream::connect(to)?;
    server.write_all(&first)?;
    let carries = match first {
        PREFACE => Carries::Link,
        MAIN_CHANNEL => Carries::Main,
        _ => Carries::Pages,
    };
    if carries == Carries::Link {
        *lock(&shared.link) = Some([server.try_clone()?, client.try_clone()?]);
    }
    let (from_server, to_client, of_thread) = (server.try_clone()?, client.try_clone()?, shared.clone());
    let back = std::thread::spawn(move || {
        let direction = Direction {
            from: from_server,
            to: to_client,
            // Only what comes from the primary is kept back.
            carries: if carries == Carries::Link {
                carries
            } else {
                Carries::Pages
            },
            is_from_receiver: true,
            number,
            shared: &of_thread,
        };
        direction.pump();
    });
    let direction = Direction {
        from: client,
        to: server,
        carries,
        is_from_receiver: false,
        number,
        shared,
    };
    direction.pump();
    // Its panic was printed.
    let _ = back.join();
    Ok(())
}

impl Direction<'_> {
    /// Passes on what comes, and its end.
    fn pump(&self) {
        // An end, however it comes, is passed on as one.
        let _ = match self.carries {
            Carries::Link => self.pass_lines(),
            Carries::Main | Carries::Pages => self.pass_bytes(),
        };
        // Nor does an end arrive where nothing does.
        self.shared.passes(self.number);
        // Either may be closed already.
        let _ = self.to.shutdown(Shutdown::Write);
        let _ = self.from.shutdown(Shutdown::Read);
    }

    fn pass_bytes(&self) -> io::Result<()> {
        let (mut from, mut to) = (&self.from, &self.to);
        let mut buffer = vec![0; BYTES_AT_A_TIME];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 || !self.shared.passes(self.number) {
                return Ok(());
            }
            let piece = &buffer[..count];
            let is_passed = match self.shared.fault() {
                Some(fault) if self.carries == Carries::Main => self.pass_faulty(piece, fault)?,
                _ => to.write_all(piece).map(|()| true)?,
            };
            if !is_passed {
                // The rest never arrives, nor does the end of its primary before that is dead.
                self.shared.acted.wait(HANG_LIMIT);
                return Ok(());
            }
        }
    }

    /// Passes on a piece of the main channel to a receiver with a fault, unless by the rest of it the checkpoint would be committed that must not be.
    /// Whether all was.
    fn pass_faulty(&self, piece: &[u8], fault: ReceiverFault) -> io::Result<bool> {
        let (mut to, holds) = (&self.to, &self.shared.holds_main);
        let is_held = holds.wait(Duration::ZERO);
        let rest = match fault {
            ReceiverFault::ReleasesEarly if is_held => return Ok(false),
            // The barrier follows VMSTATE_SEND, behind which the primary may have sent the rest already.
            ReceiverFault::ReleasesEarly => {
                let (message, rest) = piece.split_at(piece.len().min(COLO_MESSAGE_BYTES));
                to.write_all(message)?;
                if holds.wait(KEPT_BACK) {
                    return Ok(false);
                }
                rest
            }
            ReceiverFault::AcknowledgesEarly(_) if is_held && piece == CHECKPOINT_REQUEST => {
                return Ok(false);
            }
            ReceiverFault::AcknowledgesEarly(_) => piece,
        };
        to.write_all(rest).map(|()| true)
    }

    fn pass_lines(&self) -> io::Result<()> {
        let (mut reader, mut line) = (BufReader::new(&self.from), String::new());
        while reader.read_line(&mut line)? > 0 {
            let later = self.shared.before(&line);
            if !self.shared.passes(self.number) {
                return Ok(());
            }
            match (self.shared.fault(), self.is_from_receiver) {
                (Some(fault), true) => self.shared.pass_faulty(&line, fault, &self.to, &self.from)?,
                (Some(_), false) if !self.shared.passes_on(&line) => {}
                _ => (&self.to).write_all(line.as_bytes())?,
            }
            if let Some((after, act)) = later {
                std::thread::sleep(after);
                self.shared.act(act);
            }
            line.clear();
        }
        Ok(())
    }
}
