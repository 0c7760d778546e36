//! `receive --on-loss` and `--on-stall`: telling a cluster manager that a primary is lost, or that a session makes no progress. What to do
//! about it is its decision.
//!
//! For a guest that was protected the command always runs. One thread, made at the start, has all commands run by a process of their own
//! (`hook_runner.rs`), so that none needs a thread. Where too many run, a loss waits in a queue (`hook_queue.rs`). A command that the host
//! cannot start (a limit of processes, no descriptors) is tried again until it is started.

use super::ReceiveArgs;
use super::hook_queue::{FINISH_WITHIN, Loss, PLACES, POLL, Party, Queue};
use super::hook_runner::{HookRunner, Values};
use crate::configuration::GuestFile;
use crate::options::ControlAddress;
use crate::output::{printable, tell};
use colo_ring::net::Origin;
use colo_ring::receiver::{SessionStatus, Stall};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

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
            Some(during) => (
                "stalled",
                format!("next to nothing has come for {silent:.0} s {during}"),
            ),
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
            session: status.title(),
            party: party(status),
            command,
            values: self.line.values(event, status, reason),
        })));
    }
}

/// Whose loss it is. A guest is known by a rule of the operator, or by a certificate; by what its guard calls it, it is not.
fn party(status: &SessionStatus) -> Party {
    let name = status.guest.as_ref().filter(|_| status.is_named_by_rule);
    Party {
        origin: origin(&status.peer),
        guest: name.or(status.identity.as_ref()).cloned(),
    }
}

/// The host of a peer, with IPv6 its network of 64 bits, or the whole name of a process.
fn origin(peer: &str) -> String {
    let Ok(address) = peer.parse::<SocketAddr>() else {
        return peer.to_owned();
    };
    match Origin::Host(address.ip()).group() {
        Origin::Host(IpAddr::V6(network)) => format!("{network}/64"),
        Origin::Host(host) => host.to_string(),
        Origin::Process(_) => peer.to_owned(),
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

fn run(option: &'static str, lost: &Receiver<Message>, runner: HookRunner) {
    let mut queue = Queue::new(option, runner);
    loop {
        let wait = if queue.is_idle() { CHECK } else { POLL };
        match lost.recv_timeout(wait) {
            Ok(Message::Lost(loss)) => queue.push(*loss, Instant::now()),
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Message::Finish) | Err(RecvTimeoutError::Disconnected) => return queue.finish(),
        }
        queue.reap();
        queue.start(&PLACES);
        queue.count_up(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_host_or_a_network() {
        assert_eq!(origin("192.0.2.1:4444"), "192.0.2.1");
        assert_eq!(origin("[::ffff:192.0.2.1]:1"), "192.0.2.1");
        assert_eq!(origin("[2001:db8::1:2]:1"), "2001:db8::/64");
        assert_eq!(origin("[2001:db8::ffff:2]:1"), "2001:db8::/64");
        assert_eq!(origin("unix:/s, process 7"), "unix:/s, process 7");
    }
}
