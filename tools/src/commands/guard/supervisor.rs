//! The process around a guard, which has nothing else to do: a guard that dies or hangs is replaced at once, and what it held is not stranded.
//!
//! The guard itself is a worker: this program once more. Its standard input is a socket to the supervisor, over which the worker says
//! that it is alive, and the supervisor that it is to end. Each takes the end of the socket for the end of the other: a worker
//! without its supervisor ends the protection, as at SIGTERM.

use super::{GuardArgs, OnReceiverLost, on_loss};
use crate::commands::unprotect::{end_migration, release};
use crate::output::{CommandError, tell};
use crate::qmp::Qmp;
use crate::signals;
use nix::sys::socket::{MsgFlags, send};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the worker is told.
const END: u8 = b'E';

/// What the worker says.
const ALIVE: u8 = b'.';

/// How long a worker may be silent beyond `--guard-timeout`: QEMU answers nothing while it sends a checkpoint.
const SILENT_MAX: Duration = Duration::from_secs(30);

/// A worker that lives shorter than this has died quickly, and so many of them in a row are not replaced.
const QUICK: Duration = Duration::from_secs(20);
const QUICK_DEATHS_MAX: u32 = 3;

/// How long QEMU may take to leave COLO, when no guard can be had, before its connections are cut.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long its monitor may take to be there then.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What a panic leaves.
const PANICKED: i32 = 101;

/// Runs a worker until it ends by itself, and another when it dies.
///
/// # Errors
/// If none can be started, or each dies quickly: the guest's output is released then, or the guest is stopped, as
/// `--on-receiver-lost` says.
pub(super) fn run(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    let current: Arc<Mutex<Current>> = Arc::default();
    let of_signals = Arc::clone(&current);
    signals::on_each(move || lock(&of_signals).end())?;
    signal_hook::flag::register(SIGHUP, Arc::default()).map_err(CommandError::failed)?;
    let (mut quick_deaths, mut is_replacement) = (0, false);
    loop {
        let began = Instant::now();
        let (mut worker, socket) = start()?;
        if !lock(&current).replace(&socket) {
            // The operator has ended the guard while there was no worker.
            return Ok(ExitCode::SUCCESS);
        }
        let status = watch(args, &mut worker, socket)?;
        match status.code() {
            // One in place of another that does not come to work leaves as much behind as one that dies.
            Some(code) if code != PANICKED && !(is_replacement && code == 1) => {
                return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            _ => {}
        }
        is_replacement = true;
        quick_deaths = if began.elapsed() < QUICK {
            quick_deaths + 1
        } else {
            0
        };
        tell(&format!("{}: WARNING: the guard died ({status})", args.name));
        let is_ending = lock(&current).is_ending;
        if is_ending || quick_deaths == QUICK_DEATHS_MAX {
            return give_up(args, is_ending);
        }
    }
}

/// What signals reach.
#[derive(Default)]
struct Current {
    socket: Option<UnixStream>,
    is_ending: bool,
}

impl Current {
    /// Another worker is the one to be told. Whether there is to be one.
    fn replace(&mut self, socket: &UnixStream) -> bool {
        // Without another descriptor the worker is told by the end of the socket, when this process ends.
        self.socket = socket.try_clone().ok();
        !self.is_ending
    }

    /// Tells the worker to end. Whether it was not told before.
    fn end(&mut self) -> bool {
        if let Some(socket) = &mut self.socket {
            // One that has ended needs nothing.
            let _ = socket.write_all(&[END]);
        }
        !std::mem::replace(&mut self.is_ending, true)
    }
}

fn lock(current: &Mutex<Current>) -> MutexGuard<'_, Current> {
    current.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> Result<(Child, UnixStream), CommandError> {
    let failed =
        |error: std::io::Error| CommandError::Failed(format!("the guard could not be started: {error}"));
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    // By this name also when the file was replaced meanwhile.
    let worker = Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_else(|| "colo-ring".into()))
        .args(std::env::args_os().skip(1))
        .arg("--supervised")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(failed)?;
    Ok((worker, ours))
}

/// Waits for the end of a worker, and makes one that hangs end.
fn watch(args: &GuardArgs, worker: &mut Child, mut socket: UnixStream) -> Result<ExitStatus, CommandError> {
    let silent_max = Duration::from_millis(args.guard_timeout.into()) + SILENT_MAX;
    socket
        .set_read_timeout(Some(silent_max))
        .map_err(CommandError::failed)?;
    let mut bytes = [0; 256];
    loop {
        match socket.read(&mut bytes) {
            Ok(1..) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                tell(&format!(
                    "{}: WARNING: the guard has been silent for {silent_max:?}, and is killed",
                    args.name
                ));
                let _ = worker.kill();
                break;
            }
            // It has ended, or has closed its input, which is the same: it would not hear its end.
            Ok(0) | Err(_) => break,
        }
    }
    worker.wait().map_err(CommandError::failed)
}

/// No guard can be had: what the last one held must not wait for the operator.
fn give_up(args: &GuardArgs, is_ending: bool) -> Result<ExitCode, CommandError> {
    let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
    // A guest whose guard was to end runs on.
    let stops = args.on_receiver_lost == OnReceiverLost::Stop && !is_ending;
    let what = match stops {
        false => {
            release(&mut qmp, PATIENCE)?;
            "it is not protected any more, and runs on"
        }
        true => {
            // Its output stays held: nothing that it has sent was committed.
            end_migration(&mut qmp, PATIENCE)?;
            qmp.execute("stop", &json!({})).map_err(CommandError::failed)?;
            "it is not protected any more, and was stopped (--on-receiver-lost stop)"
        }
    };
    let why = match is_ending {
        true => "the guard died when it was to end",
        false => "the guard dies again and again",
    };
    if !is_ending {
        on_loss::run_and_wait(args, why);
    }
    Err(CommandError::Failed(format!("{}: {why}; {what}", args.name)))
}

/// The worker's end of the socket.
#[derive(Debug)]
pub(super) struct Heartbeat {
    socket: UnixStream,
}

impl Heartbeat {
    /// How often the worker says that it is alive.
    pub(super) const EVERY: Duration = Duration::from_secs(1);

    /// Of a worker, from its standard input; `end` is called when it is to end.
    ///
    /// # Errors
    /// If this is no worker of a supervisor.
    pub(super) fn of_worker(end: impl FnOnce() + Send + 'static) -> Result<Self, CommandError> {
        let failed = |error: std::io::Error| CommandError::Failed(format!("no supervisor: {error}"));
        // Its supervisor gets them, too, and tells it.
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::default()).map_err(failed)?;
        }
        let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        let socket = UnixStream::from(socket);
        let mut listens = socket.try_clone().map_err(failed)?;
        let listen = move || {
            let mut word = [0];
            loop {
                match listens.read(&mut word) {
                    Ok(1..) if word[0] != END => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    _ => return end(),
                }
            }
        };
        let thread = std::thread::Builder::new().name("supervisor".to_owned());
        thread.spawn(listen).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Says that the worker is alive.
    pub(super) fn beat(&self) {
        // A supervisor that is gone is noticed by the thread that listens, and one that hangs must not delay this thread.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(self.socket.as_raw_fd(), &[ALIVE], flags);
    }
}
