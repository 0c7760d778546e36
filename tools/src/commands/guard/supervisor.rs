//! The process around a guard, which has nothing else to do: a guard that dies or hangs is replaced at once, and what it held is not stranded.
//!
//! The guard itself is a worker: this program once more. Its standard input is a socket to the supervisor, over which the worker says
//! that it is alive, and the supervisor that it is to end. Each takes the end of the socket for the end of the other: a worker
//! without its supervisor ends the protection as when the receiver is lost, since nobody has asked for that.

use super::{GuardArgs, OnReceiverLost, Wish, gates, on_loss, stop_mark};
use crate::commands::unprotect::{end_migration, release};
use crate::output::{CommandError, tell};
use crate::own_program;
use crate::qmp::{CONNECT_LIMIT, Qmp};
use crate::signals;
use colo_ring::text::elapsed;
use nix::sys::socket::{MsgFlags, send};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the supervisor says: that the worker is to end.
const END: u8 = b'E';

/// What the worker says: that it is alive, and that it waits for the end of QEMU.
const ALIVE: u8 = b'.';
const BUSY: u8 = b'b';

/// How long a worker may be silent beyond `--guard-timeout`: a gate waits for QEMU for half of that.
const SILENT_MAX: Duration = Duration::from_secs(10);

/// How long the end of a QEMU may take, whose memory is freed.
const BUSY_MAX: Duration = Duration::from_secs(120);

/// A worker's exit code when it has lost its monitor, and QEMU is there.
pub(super) const MONITOR_LOST: u8 = 3;

/// A worker's exit code, and the guard's own, when QEMU has ended.
pub(super) const QEMU_ENDED: u8 = 4;

/// A worker's exit code when it could not end the protection: what is held is held still.
pub(super) const NOT_RELEASED: u8 = 5;

/// A worker that lives shorter than this has died quickly, and so many of them in a row are not replaced.
const QUICK: Duration = Duration::from_secs(20);
const QUICK_DEATHS_MAX: u32 = 3;

/// How long QEMU may take to leave COLO, when there is no guard, before its connections are cut.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long to wait after what could not be done, before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What a panic leaves.
const PANICKED: u8 = 101;

/// Runs a worker until it ends by itself, and another when it dies.
///
/// # Errors
/// If the first cannot be started, or each dies quickly: the guest's output is released then, or the guest is stopped, as
/// `--on-receiver-lost` says.
pub(super) fn run(args: &GuardArgs) -> Result<ExitCode, CommandError> {
    let current: Arc<Mutex<Current>> = Arc::default();
    let of_signals = Arc::clone(&current);
    signals::on_each(move || lock(&of_signals).end())?;
    signal_hook::flag::register(SIGHUP, Arc::default()).map_err(CommandError::failed)?;
    match supervise(args, &current, start)? {
        Outcome::Ended(code) => {
            if !is_gone(&args.primary.qmp)
                && let Some(text) = gates::relays_end(args)
            {
                tell(&format!("WARNING: {}: {text}", args.name));
            }
            Ok(code)
        }
        Outcome::QemuEnded => Ok(qemu_ended(args)),
        Outcome::GivenUp { is_ending } => give_up(args, is_ending),
    }
}

/// How the workers have ended.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// The last one has done all that was to be done.
    Ended(ExitCode),
    /// The last one has found no QEMU.
    QemuEnded,
    /// There is none, and what the last one held is held still.
    GivenUp { is_ending: bool },
}

/// # Errors
/// If the first worker cannot be started: nothing is held yet.
fn supervise(
    args: &GuardArgs,
    current: &Mutex<Current>,
    mut start: impl FnMut() -> Result<(Child, UnixStream), CommandError>,
) -> Result<Outcome, CommandError> {
    let (mut quick_deaths, mut is_replacement) = (0, false);
    loop {
        let began = Instant::now();
        let death = match start() {
            Ok((mut worker, socket)) => {
                lock(current).replace(&socket);
                match watch(args, &mut worker, socket) {
                    Ok(status) => match after(status, is_replacement, &args.primary.qmp) {
                        Some(outcome) => return Ok(outcome),
                        None => format!("the guard died ({status})"),
                    },
                    Err(error) => format!("the guard died: {error}"),
                }
            }
            Err(error) if !is_replacement => return Err(error),
            // The host may lack what it has again soon.
            Err(error) => {
                std::thread::sleep(RETRY);
                error.to_string()
            }
        };
        is_replacement = true;
        quick_deaths = if began.elapsed() < QUICK {
            quick_deaths + 1
        } else {
            0
        };
        tell(&format!("WARNING: {}: {death}", args.name));
        let is_ending = lock(current).is_ending;
        if is_ending || quick_deaths == QUICK_DEATHS_MAX {
            return Ok(Outcome::GivenUp { is_ending });
        }
    }
}

/// What is over with a worker that has ended so; nothing, if there is to be another.
fn after(status: ExitStatus, is_replacement: bool, monitor: &Path) -> Option<Outcome> {
    let code = u8::try_from(status.code()?).ok()?;
    match code {
        PANICKED | MONITOR_LOST | NOT_RELEASED => None,
        QEMU_ENDED => Some(Outcome::QemuEnded),
        // One in place of another that does not come to work leaves as much behind as one that dies; but for what QEMU takes along.
        1 if is_replacement => is_gone(monitor).then_some(Outcome::QemuEnded),
        code => Some(Outcome::Ended(ExitCode::from(code))),
    }
}

/// Whether nothing listens there: that QEMU has ended.
fn is_gone(monitor: &Path) -> bool {
    UnixStream::connect(monitor)
        .is_err_and(|error| matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound))
}

/// Says that QEMU has ended, and returns the exit code for that.
pub(super) fn qemu_ended(args: &GuardArgs) -> ExitCode {
    tell(&format!("WARNING: {}: QEMU has ended", args.name));
    ExitCode::from(QEMU_ENDED)
}

/// What signals reach.
#[derive(Default)]
struct Current {
    socket: Option<UnixStream>,
    is_ending: bool,
}

impl Current {
    /// Another worker is the one to be told; at once, where the guard was ended while there was none.
    fn replace(&mut self, socket: &UnixStream) {
        // Without another descriptor the worker hears its end by that of the socket, when this process ends.
        self.socket = socket.try_clone().ok();
        if self.is_ending {
            self.end();
        }
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
    let worker = own_program::command()
        .args(std::env::args_os().skip(1))
        .arg("--supervised")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(failed)?;
    Ok((worker, ours))
}

/// Waits for the end of a worker, and makes one that hangs end.
fn watch(args: &GuardArgs, worker: &mut Child, mut socket: UnixStream) -> io::Result<ExitStatus> {
    let mut silent_max = SILENT_MAX;
    let mut bytes = [0; 256];
    loop {
        let limit = Duration::from_millis(args.guard_timeout.into()) + silent_max;
        socket.set_read_timeout(Some(limit))?;
        match socket.read(&mut bytes) {
            Ok(count @ 1..) => {
                silent_max = match bytes[count - 1] {
                    BUSY => BUSY_MAX,
                    _ => SILENT_MAX,
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                tell(&format!(
                    "WARNING: {}: the guard has been silent for {}, and is killed",
                    args.name,
                    elapsed(limit)
                ));
                let _ = worker.kill();
                break;
            }
            // It has ended, or has closed its input, which is the same: it would not hear its end.
            Ok(0) | Err(_) => break,
        }
    }
    worker.wait()
}

/// There is no guard: what the last one held must not wait for the operator. It is tried until QEMU answers, or has ended.
fn give_up(args: &GuardArgs, is_ending: bool) -> Result<ExitCode, CommandError> {
    let why = match is_ending {
        true => "the guard died when it was to end",
        false => "the guard dies again and again",
    };
    // A guest whose guard was to end runs on.
    let stops = args.on_receiver_lost == OnReceiverLost::Stop && !is_ending;
    let mut told = String::new();
    let what = loop {
        match end_protection(&args.primary.qmp, stops) {
            Ok(what) => break what,
            Err(_) if is_gone(&args.primary.qmp) => return Ok(qemu_ended(args)),
            Err(error) => {
                let error = error.to_string();
                if error != told {
                    tell(&format!(
                        "WARNING: {}: {why}, and what it held is held still: {error}; trying again",
                        args.name
                    ));
                }
                told = error;
                std::thread::sleep(RETRY);
            }
        }
    };
    if !is_ending {
        on_loss::run_and_wait(args, why);
    }
    let relays = gates::relays_end(args).map_or_else(String::new, |text| format!("; {text}"));
    Err(CommandError::Failed(format!(
        "{}: {why}; {what}{relays}",
        args.name
    )))
}

/// Ends the protection in place of a worker. Returns what the guest does then.
fn end_protection(monitor: &Path, stops: bool) -> Result<&'static str, CommandError> {
    let mut qmp = Qmp::connect(monitor, CONNECT_LIMIT).map_err(CommandError::failed)?;
    match stops {
        false => {
            release(&mut qmp, PATIENCE)?;
            Ok("it is not protected any more, and runs on")
        }
        true => {
            // Its output stays held: nothing that it has sent was committed.
            end_migration(&mut qmp, PATIENCE)?;
            stop_mark::stop(&mut qmp).map_err(CommandError::failed)?;
            Ok("it is not protected any more, and was stopped (--on-receiver-lost stop)")
        }
    }
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
    pub(super) fn of_worker(end: impl FnOnce(Wish) + Send + 'static) -> Result<Self, CommandError> {
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
                    Ok(1..) if word[0] == END => return end(Wish::End),
                    Ok(1..) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Ok(0) | Err(_) => return end(Wish::Abandoned),
                }
            }
        };
        let thread = std::thread::Builder::new().name("supervisor".to_owned());
        thread.spawn(listen).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Of a worker without a supervisor.
    #[cfg(test)]
    pub(super) fn of_nobody() -> Self {
        let (socket, _) = UnixStream::pair().unwrap();
        Self { socket }
    }

    /// Says that the worker is alive.
    pub(super) fn beat(&self) {
        self.say(ALIVE);
    }

    /// Says that it waits for the end of QEMU, which may take long, until it beats again.
    pub(super) fn busy(&self) {
        self.say(BUSY);
    }

    fn say(&self, word: u8) {
        // A supervisor that is gone is noticed by the thread that listens, and one that hangs must not delay this thread.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(self.socket.as_raw_fd(), &[word], flags);
    }
}

#[cfg(test)]
mod tests {
    use super::super::OnlyGuard;
    use super::*;
    use clap::Parser;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    fn args(monitor: &Path) -> GuardArgs {
        let monitor = monitor.display().to_string();
        let words = [
            "guard",
            "--to",
            "tcp:192.0.2.3:4444",
            "--name",
            "web3",
            "--qmp",
            &monitor,
        ];
        OnlyGuard::parse_from(words).args
    }

    /// Supervises workers that end with these codes, or by a signal, or are not started; where QEMU is there or not. Returns also how many
    /// of them were used.
    fn supervised(workers: &[Option<i32>], is_qemu_there: bool) -> (Result<Outcome, CommandError>, usize) {
        let directory = tempfile::tempdir().unwrap();
        let monitor = directory.path().join("qmp");
        let _qemu = is_qemu_there.then(|| UnixListener::bind(&monitor).unwrap());
        let mut used = 0;
        let start = || {
            let worker = workers[used];
            used += 1;
            let code = worker.ok_or_else(|| CommandError::Failed("no memory".to_owned()))?;
            let (ours, theirs) = UnixStream::pair().unwrap();
            let script = match code {
                ..0 => "kill -9 $$".to_owned(),
                code => format!("exit {code}"),
            };
            let mut shell = Command::new("sh");
            shell
                .args(["-c", &script])
                .stdin(Stdio::from(OwnedFd::from(theirs)));
            Ok((shell.spawn().unwrap(), ours))
        };
        (supervise(&args(&monitor), &Mutex::default(), start), used)
    }

    const KILLED: i32 = -1;

    #[test]
    fn what_a_worker_leaves_behind_is_never_left_to_nobody() {
        let given_up = Outcome::GivenUp { is_ending: false };
        let not_released = i32::from(NOT_RELEASED);
        // No process for the next worker, which the host may lack for the reason for which the last one died.
        let (outcome, used) = supervised(&[Some(KILLED), None, None], true);
        assert_eq!((outcome.unwrap(), used), (given_up, 3));
        let (outcome, used) = supervised(&[Some(KILLED), None, Some(0)], true);
        assert_eq!((outcome.unwrap(), used), (Outcome::Ended(ExitCode::SUCCESS), 3));
        // The first one could not end the protection.
        let (outcome, used) = supervised(&[Some(not_released), Some(0)], true);
        assert_eq!((outcome.unwrap(), used), (Outcome::Ended(ExitCode::SUCCESS), 2));
        let (outcome, used) = supervised(&[Some(KILLED), Some(1), Some(not_released)], true);
        assert_eq!(
            (outcome.unwrap(), used),
            (Outcome::GivenUp { is_ending: false }, 3)
        );
    }

    #[test]
    fn the_end_of_qemu_is_no_death_of_the_guard() {
        let ended = i32::from(QEMU_ENDED);
        for (workers, is_qemu_there) in [
            (&[Some(ended)][..], true),
            (&[Some(KILLED), Some(ended)], true),
            (&[Some(KILLED), Some(1)], false),
        ] {
            let (outcome, used) = supervised(workers, is_qemu_there);
            assert_eq!((outcome.unwrap(), used), (Outcome::QemuEnded, workers.len()));
        }
    }

    #[test]
    fn a_guard_that_cannot_begin_is_not_begun_again() {
        for code in [1, 2] {
            let (outcome, used) = supervised(&[Some(code)], false);
            let failed = u8::try_from(code).unwrap();
            assert_eq!(
                (outcome.unwrap(), used),
                (Outcome::Ended(ExitCode::from(failed)), 1)
            );
        }
        let (outcome, used) = supervised(&[None], true);
        assert_eq!(
            (outcome.unwrap_err().to_string(), used),
            ("no memory".to_owned(), 1)
        );
    }

    #[test]
    fn a_worker_is_told_of_an_end_that_came_before_it() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut current = Current::default();
        assert!(current.end());
        current.replace(&theirs);
        let mut word = [0];
        ours.read_exact(&mut word).unwrap();
        assert_eq!(word, [END]);
    }
}
