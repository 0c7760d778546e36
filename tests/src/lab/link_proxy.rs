//! A proxy between a guarded primary and its receiver, which reads the guard's link and kills the primary at a message of it.
//!
//! It passes on every byte of the migration's channels. Of the link it passes on line by line, and kills before it does, so that what
//! the message says is not known at its other end when the primary dies.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
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

/// At which message of a link the primary is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkMoment {
    /// The receiver asks for a line, and the guard does not know it yet.
    Barrier,
    /// The line is drawn, and the receiver does not know it yet.
    Placed,
    /// The checkpoint is committed, and the guard does not know it yet.
    Committed,
    /// So long after the guard was told: it lets go.
    Releasing(Duration),
    /// A guard that lets go in the pause has, and the receiver does not know it yet.
    Released,
}

impl LinkMoment {
    fn message(self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::Placed => "placed",
            Self::Committed | Self::Releasing(_) => "committed",
            Self::Released => "released",
        }
    }
}

/// Whom to kill, and when.
#[derive(Debug)]
struct Plan {
    moment: LinkMoment,
    /// So many of its messages later.
    skip: u32,
    process: u32,
}

#[derive(Debug, Default)]
struct Shared {
    /// The guard is told of a commit as soon as it is asked for the line.
    releases_early: AtomicBool,
    plan: Mutex<Option<Plan>>,
    is_killed: Mutex<bool>,
    killed: Condvar,
}

/// See the module.
#[derive(Debug)]
pub struct LinkProxy {
    address: PathBuf,
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
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (to, shared) = (to.clone(), of_thread.clone());
                // A connection that breaks is closed at both ends.
                std::thread::spawn(move || drop(pass(client, &to, &shared)));
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> Address {
        Address::Unix(self.address.clone())
    }

    /// Breaks the protocol from now on, as a receiver with a fault would: the guard is told of a commit as soon as it is asked for the line.
    pub fn release_early(&self) {
        self.shared.releases_early.store(true, Ordering::Relaxed);
    }

    /// Kills that process at a moment to come, the first after `skip` others like it.
    pub fn kill_at(&self, moment: LinkMoment, skip: u32, process: u32) {
        *lock(&self.shared.plan) = Some(Plan {
            moment,
            skip,
            process,
        });
    }

    /// Waits until that has happened.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_killed(&self) -> Result<(), LabError> {
        let is_killed = lock(&self.shared.is_killed);
        let waited = self
            .shared
            .killed
            .wait_timeout_while(is_killed, HANG_LIMIT, |is_killed| !*is_killed);
        let (is_killed, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match *is_killed {
            true => Ok(()),
            false => Err(LabError::Timeout {
                what: "a message of the guard's link".into(),
                limit: HANG_LIMIT,
            }),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// A message is about to be passed on. Returns after how long it is to be killed then, if not before.
    fn before(&self, line: &str) -> Option<(Duration, u32)> {
        let message: Value = serde_json::from_str(line).ok()?;
        let mut plan = lock(&self.plan);
        let Plan {
            moment,
            skip,
            process,
        } = plan.as_mut()?;
        if message["type"] != moment.message() {
            return None;
        }
        if *skip > 0 {
            *skip -= 1;
            return None;
        }
        let (moment, process) = (*moment, *process);
        *plan = None;
        match moment {
            LinkMoment::Releasing(after) => Some((after, process)),
            _ => {
                self.kill(process);
                None
            }
        }
    }

    /// What follows that line by the fault.
    fn early_commit(&self, line: &str) -> Option<String> {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_early = self.releases_early.load(Ordering::Relaxed) && message["type"] == "barrier";
        is_early.then(|| {
            format!(
                "{}\n",
                json!({"type": "committed", "checkpoint": message["checkpoint"]})
            )
        })
    }

    /// Returns when the process is dead: whoever has started it reaps it.
    fn kill(&self, process: u32) {
        let pid = i32::try_from(process).expect("process ids are below 2^22 on Linux");
        // It may have ended.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let deadline = Instant::now() + HANG_LIMIT;
        while is_alive(process) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(100));
        }
        *lock(&self.is_killed) = true;
        self.killed.notify_all();
    }
}

fn is_alive(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The state follows the command's name, which may contain anything.
    let state = status.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// Passes on a connection, until it ends.
fn pass(mut client: UnixStream, to: &Path, shared: &Arc<Shared>) -> io::Result<()> {
    let mut server = UnixStream::connect(to)?;
    let mut first = [0; PREFACE.len()];
    client.read_exact(&mut first)?;
    server.write_all(&first)?;
    let is_link = first == PREFACE;
    let (from_server, to_client, of_thread) = (server.try_clone()?, client.try_clone()?, shared.clone());
    let back = std::thread::spawn(move || pump(from_server, to_client, is_link, &of_thread));
    pump(client, server, is_link, shared);
    // Its panic was printed.
    let _ = back.join();
    Ok(())
}

/// Passes on one direction, and its end.
fn pump(from: UnixStream, to: UnixStream, is_link: bool, shared: &Shared) {
    // An end, however it comes, is passed on as one.
    let _ = match is_link {
        true => pass_lines(&from, &to, shared),
        false => pass_bytes(&from, &to),
    };
    // Either may be closed already.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

fn pass_bytes(mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; BYTES_AT_A_TIME];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

fn pass_lines(from: &UnixStream, mut to: &UnixStream, shared: &Shared) -> io::Result<()> {
    let (mut reader, mut line) = (BufReader::new(from), String::new());
    while reader.read_line(&mut line)? > 0 {
        let later = shared.before(&line);
        to.write_all(line.as_bytes())?;
        if let Some(early) = shared.early_commit(&line) {
            to.write_all(early.as_bytes())?;
        }
        if let Some((after, process)) = later {
            std::thread::sleep(after);
            shared.kill(process);
        }
        line.clear();
    }
    Ok(())
}
