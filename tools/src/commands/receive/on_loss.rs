//! `receive --on-loss`: telling a cluster manager that a primary is lost. What to do about it is its decision.
//!
//! For a guest that was protected the command always runs. One thread, made at the start, starts all commands and waits for them,
//! so that none needs a thread of its own. Where too many run, a loss waits in a queue; no origin can fill all places. A command that the host
//! cannot start (a limit of processes, no descriptors) is tried again until it is started.

use super::ReceiveArgs;
use crate::options::ControlAddress;
use crate::output::{CommandError, printable, tell};
use colo_ring::receiver::SessionStatus;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Most commands at a time: any peer can end a session, and each takes a process.
const RUNNING_MAX: usize = 64;

/// Most of them for one origin, so that another finds a place.
const RUNNING_OF_ORIGIN_MAX: usize = 32;

/// Most losses of one origin that wait: as many as a receiver has sessions.
const WAITING_OF_ORIGIN_MAX: usize = 256;

/// How soon a command that could not be started is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long the end of the receiver waits for commands to be started.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// How often the running commands are looked at.
const POLL: Duration = Duration::from_millis(50);

/// The thread that runs the command.
pub(super) struct OnLoss {
    hooks: Hooks,
    thread: JoinHandle<()>,
}

/// Hands losses to it. Never waits.
pub(super) struct Hooks {
    line: Line,
    losses: Sender<Message>,
}

/// What is run, and for whom.
#[derive(Clone)]
struct Line {
    command: String,
    control: String,
    /// Also for sessions without a checkpoint.
    for_unprotected: bool,
}

enum Message {
    Lost(Box<Loss>),
    /// Start what waits, and return.
    Finish,
}

/// A primary that was lost.
struct Loss {
    session: u32,
    origin: String,
    command: Command,
}

impl OnLoss {
    /// Starts it, if the options have a command.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(super) fn of(args: &ReceiveArgs) -> Result<Option<Self>, CommandError> {
        let Some(command) = args.on_loss.clone() else {
            return Ok(None);
        };
        let line = Line {
            command,
            control: args
                .control
                .as_ref()
                .map(ControlAddress::to_string)
                .unwrap_or_default(),
            for_unprotected: args.on_loss_unprotected,
        };
        Self::start(line).map(Some).map_err(CommandError::failed)
    }

    fn start(line: Line) -> std::io::Result<Self> {
        let (losses, lost) = channel();
        let thread = Builder::new()
            .name("on-loss".to_owned())
            .spawn(move || run(&lost))?;
        let hooks = Hooks { line, losses };
        Ok(Self { hooks, thread })
    }

    pub(super) fn sender(&self) -> Hooks {
        Hooks {
            line: self.hooks.line.clone(),
            losses: self.hooks.losses.clone(),
        }
    }

    /// Returns when all commands are started. Those that run go on.
    pub(super) fn finish(self) {
        let _ = self.hooks.losses.send(Message::Finish);
        // It reports its own panic.
        let _ = self.thread.join();
    }
}

impl Hooks {
    /// Has the command run if the session ended because its primary was lost.
    pub(super) fn session_ended(&self, status: &SessionStatus) {
        let is_wanted = status.checkpoint.is_some() || self.line.for_unprotected;
        if !status.lost || !is_wanted {
            return;
        }
        // Its thread ends only at the very end.
        let _ = self.losses.send(Message::Lost(Box::new(Loss {
            session: status.session,
            origin: origin(&status.peer),
            command: self.line.shell(status),
        })));
    }
}

/// The host of a peer, or the whole name of a process.
fn origin(peer: &str) -> String {
    match peer.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_canonical().to_string(),
        Err(_) => peer.to_owned(),
    }
}

impl Line {
    fn shell(&self, status: &SessionStatus) -> Command {
        let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
        let age = status.checkpoint.and(status.checkpoint_age_ms);
        let mut command = Command::new("sh");
        command
            .args(["-c", &self.command])
            .env("COLO_RING_SESSION", status.session.to_string())
            .env("COLO_RING_CHECKPOINT", number(status.checkpoint))
            .env("COLO_RING_CHECKPOINT_AGE_MS", number(age))
            .env(
                "COLO_RING_REASON",
                printable(status.end.as_deref().unwrap_or_default()),
            )
            .env("COLO_RING_PEER", &status.peer)
            .env(
                "COLO_RING_MACHINE",
                printable(status.machine.as_deref().unwrap_or_default()),
            )
            .env("COLO_RING_CONTROL", &self.control)
            .stdin(Stdio::null())
            // Standard output is for the report.
            .stdout(std::io::stderr());
        command
    }
}

struct Running {
    session: u32,
    origin: String,
    child: Child,
}

/// What waits and what runs.
#[derive(Default)]
struct Queue {
    waiting: Vec<Loss>,
    running: Vec<Running>,
    /// Until then nothing is started, because that has failed.
    not_before: Option<Instant>,
}

fn run(lost: &Receiver<Message>) {
    let mut queue = Queue::default();
    loop {
        let message = match queue.is_idle() {
            true => lost.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => lost.recv_timeout(POLL),
        };
        match message {
            Ok(Message::Lost(loss)) => queue.push(*loss),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Message::Finish) | Err(RecvTimeoutError::Disconnected) => return queue.finish(),
        }
        queue.reap();
        queue.start(RUNNING_OF_ORIGIN_MAX, RUNNING_MAX);
    }
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    fn push(&mut self, loss: Loss) {
        let of_origin = self.waiting.iter().filter(|other| other.origin == loss.origin);
        if of_origin.count() < WAITING_OF_ORIGIN_MAX {
            return self.waiting.push(loss);
        }
        tell(&format!(
            "warning: session {}: --on-loss is not run: {WAITING_OF_ORIGIN_MAX} losses of {} wait for it",
            loss.session, loss.origin
        ));
    }

    /// Starts what waits and has a place.
    fn start(&mut self, of_origin_max: usize, max: usize) {
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return;
        }
        while self.running.len() < max {
            let Some(position) = self.next(of_origin_max) else {
                return;
            };
            let spawned = self.waiting[position].command.spawn();
            match spawned {
                Ok(child) => {
                    let Loss { session, origin, .. } = self.waiting.remove(position);
                    self.running.push(Running {
                        session,
                        origin,
                        child,
                    });
                    self.not_before = None;
                }
                Err(error) => {
                    // Once, and not at each try.
                    if self.not_before.is_none() {
                        let session = self.waiting[position].session;
                        tell(&format!(
                            "warning: session {session}: --on-loss cannot be started, and is tried again: {error}"
                        ));
                    }
                    self.not_before = Some(Instant::now() + RETRY_AFTER);
                    return;
                }
            }
        }
    }

    /// The loss whose turn it is: the oldest of the origin for which the fewest commands run.
    fn next(&self, of_origin_max: usize) -> Option<usize> {
        let running = |origin: &str| self.running.iter().filter(|other| other.origin == origin).count();
        let counts = self.waiting.iter().map(|loss| running(&loss.origin)).enumerate();
        let turn = counts.min_by_key(|(_, count)| *count);
        turn.filter(|(_, count)| *count < of_origin_max)
            .map(|(position, _)| position)
    }

    /// Forgets the commands that have ended.
    fn reap(&mut self) {
        self.running.retain_mut(|running| {
            let session = running.session;
            match running.child.try_wait() {
                Ok(None) => return true,
                Ok(Some(status)) if status.success() => {}
                Ok(Some(status)) => tell(&format!(
                    "warning: session {session}: --on-loss failed ({status})"
                )),
                Err(error) => tell(&format!("warning: session {session}: --on-loss: {error}")),
            }
            false
        });
    }

    /// Starts all that waits, whatever runs.
    fn finish(&mut self) {
        let begin = Instant::now();
        loop {
            self.start(usize::MAX, usize::MAX);
            if self.waiting.is_empty() {
                return;
            }
            if begin.elapsed() > FINISH_WITHIN {
                for loss in &self.waiting {
                    tell(&format!(
                        "warning: session {}: --on-loss was not run",
                        loss.session
                    ));
                }
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(session: u32, origin: &str, script: &str) -> Loss {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Loss {
            session,
            origin: origin.to_owned(),
            command,
        }
    }

    /// However many losses of strangers are before it.
    #[test]
    fn a_loss_of_another_origin_finds_a_place() {
        let mut queue = Queue::default();
        (0..100).for_each(|session| queue.push(loss(session, "192.0.2.1", "exec sleep 1000")));
        queue.start(2, 4);
        assert_eq!((queue.running.len(), queue.waiting.len()), (2, 98));
        queue.push(loss(100, "192.0.2.2", "exit 0"));
        queue.start(2, 4);
        assert_eq!(queue.running.last().unwrap().session, 100);
        while queue.running.len() == 3 {
            queue.reap();
        }
        for running in &mut queue.running {
            running.child.kill().unwrap();
            running.child.wait().unwrap();
        }
    }

    #[test]
    fn what_cannot_be_started_stays_in_the_queue() {
        let mut queue = Queue::default();
        queue.push(Loss {
            command: Command::new("/nonexistent"),
            ..loss(1, "192.0.2.1", "")
        });
        queue.start(1, 1);
        assert_eq!((queue.running.len(), queue.waiting.len()), (0, 1));
        // Not at once, but later.
        queue.waiting[0].command = Command::new("true");
        queue.start(1, 1);
        assert_eq!(queue.waiting.len(), 1);
        queue.not_before = Some(Instant::now());
        queue.start(1, 1);
        assert_eq!(queue.waiting.len(), 0);
        queue.running[0].child.wait().unwrap();
    }

    #[test]
    fn an_origin_is_a_host() {
        assert_eq!(origin("192.0.2.1:4444"), "192.0.2.1");
        assert_eq!(origin("[::ffff:192.0.2.1]:1"), "192.0.2.1");
        assert_eq!(origin("unix:/s, process 7"), "unix:/s, process 7");
    }
}
