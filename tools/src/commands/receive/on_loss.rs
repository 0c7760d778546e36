//! `receive --on-loss` and `--on-stall`: telling a cluster manager that a primary is lost, or that a session makes no progress. What to do
//! about it is its decision.
//!
//! For a guest that was protected the command always runs. One thread, made at the start, has all commands run by a process of their own
//! (`hook_runner.rs`), so that none needs a thread. Where too many run, a loss waits in a queue; no origin can fill all places. A command that the
//! host cannot start (a limit of processes, no descriptors) is tried again until it is started.

use super::ReceiveArgs;
use super::hook_runner::{HookRunner, RunHooks, Values};
use crate::configuration::GuestFile;
use crate::options::ControlAddress;
use crate::output::{printable, tell};
use colo_ring::receiver::{SessionStatus, Stall};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::Builder;
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

/// How often it is made sure that commands can be run, while there is nothing to run.
const CHECK: Duration = Duration::from_secs(1);

/// The thread that has the command run.
pub(super) struct OnLoss {
    hooks: Hooks,
    /// Answered when it has ended.
    ended: Receiver<()>,
}

/// Hands losses to it. Never waits.
pub(super) struct Hooks {
    line: Line,
    losses: Sender<Message>,
}

/// What is said to the command, and for whom it is run.
#[derive(Clone)]
struct Line {
    /// The option, for messages.
    option: &'static str,
    control: String,
    /// Also for sessions without a checkpoint.
    for_unprotected: bool,
    /// That of guests without one of their own, by its number.
    general: Option<usize>,
    /// Those of single guests, by their names.
    of_guests: BTreeMap<String, usize>,
}

/// The operator's hook.
pub(super) struct Hook {
    /// By their numbers.
    commands: Vec<String>,
    line: Line,
}

impl Hook {
    /// `--on-loss`, and `on-loss` of single guests; none if there is no such command.
    pub(super) fn on_loss(args: &ReceiveArgs) -> Option<Self> {
        Self::of(args, "--on-loss", args.on_loss.as_deref(), GuestFile::on_loss)
    }

    /// `--on-stall`, likewise.
    pub(super) fn on_stall(args: &ReceiveArgs) -> Option<Self> {
        Self::of(args, "--on-stall", args.on_stall.as_deref(), GuestFile::on_stall)
    }

    fn of(
        args: &ReceiveArgs,
        option: &'static str,
        general: Option<&str>,
        own: fn(&GuestFile) -> Option<&str>,
    ) -> Option<Self> {
        let guests = args.guest_files.iter();
        let own: Vec<_> = guests
            .filter_map(|file| Some((file.name().to_string(), own(file)?)))
            .collect();
        let first = usize::from(general.is_some());
        let commands = general.into_iter().chain(own.iter().map(|(_, command)| *command));
        let commands: Vec<_> = commands.map(str::to_owned).collect();
        let names = own.iter().map(|(name, _)| name.clone());
        let line = Line {
            option,
            control: args
                .control
                .as_ref()
                .map(ControlAddress::to_string)
                .unwrap_or_default(),
            for_unprotected: args.on_loss_unprotected,
            general: general.map(|_| 0),
            of_guests: names.zip(first..).collect(),
        };
        (!commands.is_empty()).then_some(Self { commands, line })
    }

    /// Splits off the process that runs it.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn split_off(&self) -> std::io::Result<HookRunner> {
        HookRunner::start(&self.commands)
    }
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
    command: usize,
    values: Values,
}

impl OnLoss {
    /// Starts the thread, which calls `enter` first. `runner` was split off before this process was confined.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub(super) fn start(
        hook: Hook,
        runner: HookRunner,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let line = hook.line;
        let option = line.option;
        let (losses, lost) = channel();
        let (end, ended) = sync_channel(1);
        let work = move || {
            enter();
            run(option, &lost, runner);
            finished(&end);
        };
        let name = option.trim_start_matches('-').to_owned();
        Builder::new().name(name).spawn(work)?;
        let hooks = Hooks { line, losses };
        Ok(Self { hooks, ended })
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
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(FINISH_WITHIN + CHECK) {
            tell(&format!(
                "warning: the process that runs {} does not answer: it is not known whether all were started",
                self.hooks.line.option
            ));
        }
    }
}

fn finished(end: &SyncSender<()>) {
    // There may be none that waits for it.
    let _ = end.send(());
}

impl Hooks {
    /// Has the command run if the session ended because its primary was lost.
    pub(super) fn session_ended(&self, status: &SessionStatus) {
        let is_wanted = status.checkpoint.is_some() || self.line.for_unprotected;
        if !status.lost || !is_wanted {
            return;
        }
        self.call("lost", status, status.end.as_deref().unwrap_or_default());
    }

    /// Has the command run for a protected guest whose session makes no progress, or makes some again. Anyone who can connect can let a
    /// first copy stand still.
    pub(super) fn stalled(&self, stall: &Stall) {
        if stall.status.checkpoint.is_none() {
            return;
        }
        let silent = stall.silent.as_secs_f64();
        let (event, reason) = match stall.during {
            Some(during) => ("stalled", format!("nothing has come for {silent:.0} s {during}")),
            None => (
                "resumed",
                format!("it goes on after {silent:.0} s without progress"),
            ),
        };
        self.call(event, &stall.status, &reason);
    }

    fn call(&self, event: &str, status: &SessionStatus, reason: &str) {
        let Some(command) = self.line.command(status.guest.as_deref()) else {
            return;
        };
        // Its thread ends only at the very end.
        let _ = self.losses.send(Message::Lost(Box::new(Loss {
            session: status.session,
            origin: origin(&status.peer),
            command,
            values: self.line.values(event, status, reason),
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
    /// The command for a guest, by its number.
    fn command(&self, guest: Option<&str>) -> Option<usize> {
        let own = guest.and_then(|guest| self.of_guests.get(guest)).copied();
        own.or(self.general)
    }

    /// In the order of the variables.
    fn values(&self, event: &str, status: &SessionStatus, reason: &str) -> Values {
        let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
        let text = |text: &Option<String>| printable(text.as_deref().unwrap_or_default());
        let age = status.checkpoint.and(status.checkpoint_age_ms);
        [
            event.to_owned(),
            status.session.to_string(),
            number(status.checkpoint),
            number(age),
            printable(reason),
            text(&status.guest),
            text(&status.uuid),
            text(&status.listener),
            status.peer.clone(),
            text(&status.machine),
            self.control.clone(),
        ]
    }
}

struct Running {
    session: u32,
    origin: String,
    /// By which its end is reported.
    id: u32,
}

/// What waits and what runs.
struct Queue<R> {
    option: &'static str,
    runner: R,
    waiting: Vec<Loss>,
    running: Vec<Running>,
    /// Until then nothing is started, because that has failed.
    not_before: Option<Instant>,
    has_warned: bool,
}

fn run(option: &'static str, lost: &Receiver<Message>, runner: HookRunner) {
    let mut queue = Queue::new(option, runner);
    loop {
        let wait = if queue.is_idle() { CHECK } else { POLL };
        match lost.recv_timeout(wait) {
            Ok(Message::Lost(loss)) => queue.push(*loss),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Message::Finish) | Err(RecvTimeoutError::Disconnected) => return queue.finish(),
        }
        queue.reap();
        queue.start(RUNNING_OF_ORIGIN_MAX, RUNNING_MAX);
    }
}

impl<R: RunHooks> Queue<R> {
    fn new(option: &'static str, runner: R) -> Self {
        Self {
            option,
            runner,
            waiting: Vec::new(),
            running: Vec::new(),
            not_before: None,
            has_warned: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    fn push(&mut self, loss: Loss) {
        let of_origin = self.waiting.iter().filter(|other| other.origin == loss.origin);
        if of_origin.count() < WAITING_OF_ORIGIN_MAX {
            return self.waiting.push(loss);
        }
        tell(&format!(
            "warning: session {}: {} is not run: {WAITING_OF_ORIGIN_MAX} sessions of {} wait for it",
            loss.session, self.option, loss.origin
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
            match self
                .runner
                .run(self.waiting[position].command, &self.waiting[position].values)
            {
                Ok(id) => {
                    let Loss { session, origin, .. } = self.waiting.remove(position);
                    self.running.push(Running { session, origin, id });
                    self.not_before = None;
                }
                Err(error) => {
                    // Once, and not at each try.
                    if self.not_before.is_none() {
                        let (session, option) = (self.waiting[position].session, self.option);
                        tell(&format!(
                            "warning: session {session}: {option} cannot be started, and is tried again: {error}"
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
        for (id, status) in self.runner.take_ended() {
            let Some(position) = self.running.iter().position(|running| running.id == id) else {
                continue;
            };
            let Running { session, .. } = self.running.swap_remove(position);
            if !status.success() {
                let option = self.option;
                tell(&format!("warning: session {session}: {option} failed ({status})"));
            }
        }
        if self.runner.is_gone() && !self.has_warned {
            self.has_warned = true;
            let option = self.option;
            tell(&format!(
                "WARNING: the process that runs {option} has ended, so {option} is not run any more: restart the receiver"
            ));
        }
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
                        "warning: session {}: {} was not run",
                        loss.session, self.option
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
    use std::process::ExitStatus;

    /// Runs nothing.
    #[derive(Default)]
    struct Pretended {
        started: u32,
        ended: Vec<u32>,
        refuses: bool,
    }

    impl RunHooks for Pretended {
        fn run(&mut self, _: usize, _: &Values) -> std::io::Result<u32> {
            if self.refuses {
                return Err(std::io::ErrorKind::WouldBlock.into());
            }
            self.started += 1;
            Ok(self.started)
        }

        fn take_ended(&mut self) -> Vec<(u32, ExitStatus)> {
            self.ended
                .drain(..)
                .map(|id| (id, ExitStatus::default()))
                .collect()
        }

        fn is_gone(&mut self) -> bool {
            false
        }
    }

    fn loss(session: u32, origin: &str) -> Loss {
        Loss {
            session,
            origin: origin.to_owned(),
            command: 0,
            values: Values::default(),
        }
    }

    /// However many losses of strangers are before it.
    #[test]
    fn a_loss_of_another_origin_finds_a_place() {
        let mut queue = Queue::new("--on-loss", Pretended::default());
        (0..100).for_each(|session| queue.push(loss(session, "192.0.2.1")));
        queue.start(2, 4);
        assert_eq!((queue.running.len(), queue.waiting.len()), (2, 98));
        queue.push(loss(100, "192.0.2.2"));
        queue.start(2, 4);
        assert_eq!(queue.running.last().unwrap().session, 100);
        queue.runner.ended.push(queue.running[2].id);
        queue.reap();
        assert_eq!(queue.running.len(), 2);
    }

    #[test]
    fn what_cannot_be_started_stays_in_the_queue() {
        let mut queue = Queue::new(
            "--on-loss",
            Pretended {
                refuses: true,
                ..Pretended::default()
            },
        );
        queue.push(loss(1, "192.0.2.1"));
        queue.start(1, 1);
        assert_eq!((queue.running.len(), queue.waiting.len()), (0, 1));
        // Not at once, but later.
        queue.runner.refuses = false;
        queue.start(1, 1);
        assert_eq!(queue.waiting.len(), 1);
        queue.not_before = Some(Instant::now());
        queue.start(1, 1);
        assert_eq!(queue.waiting.len(), 0);
    }

    #[test]
    fn an_origin_is_a_host() {
        assert_eq!(origin("192.0.2.1:4444"), "192.0.2.1");
        assert_eq!(origin("[::ffff:192.0.2.1]:1"), "192.0.2.1");
        assert_eq!(origin("unix:/s, process 7"), "unix:/s, process 7");
    }
}
