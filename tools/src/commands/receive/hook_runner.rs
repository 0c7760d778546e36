//! The process that runs hooks. It is split off before the receiver gives up the right to start programs, and can do one thing for it: run
//! one of the operator's commands, with values of its variables.
//!
//! | to the process | |
//! |---|---|
//! | [`Run`] | run a command with these values |
//!
//! | from the process | |
//! |---|---|
//! | [`Report::Started`], [`Report::NotStarted`] | to each [`Run`], in their order |
//! | [`Report::Ended`] | a command has ended |
//!
//! Each is a packet of JSON over a socket pair. Commands that run go on when the receiver has closed its end of it, and the process ends when none of
//! them can print any more ([`super::hook_output`]). What the commands and their variables are, the receiver cannot say: they are arguments of the process.

use super::hook_output::Outputs;
use crate::output::CommandError;
use crate::own_program;
use crate::signals;
use crate::stderr;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

/// The variables of a hook, in the order of their values.
pub(super) const VARIABLES: [&str; 11] = [
    "COLO_RING_EVENT",
    "COLO_RING_SESSION",
    "COLO_RING_CHECKPOINT",
    "COLO_RING_CHECKPOINT_AGE_MS",
    "COLO_RING_REASON",
    "COLO_RING_GUEST",
    "COLO_RING_UUID",
    "COLO_RING_LISTENER",
    "COLO_RING_PEER",
    "COLO_RING_MACHINE",
    "COLO_RING_CONTROL",
];

/// Values of all variables.
pub(super) type Values = [String; VARIABLES.len()];

/// Longest packet, in bytes. Values are names and reasons of at most some hundred bytes each.
const PACKET_MAX: usize = 64 << 10;

/// Most commands at a time; a receiver that is well starts fewer.
const RUNNING_MAX: usize = 4096;

/// Exit code 255, as a wait status.
const UNKNOWN_STATUS: i32 = 0xff00;

/// How often running commands are looked at.
const POLL: Duration = Duration::from_millis(50);

/// A command to run.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    id: u32,
    /// Which of the process's commands.
    command: usize,
    values: Values,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Started { id: u32 },
    NotStarted { id: u32, errno: i32 },
    Ended { id: u32, status: i32 },
}

/// Runs hooks.
pub(super) trait RunHooks {
    /// Runs a command, by its number, and returns the number by which its end is reported. Waits until it is started.
    ///
    /// # Errors
    /// Why it is not.
    fn run(&mut self, command: usize, values: &Values) -> io::Result<u32>;

    /// The commands that have ended since this was asked for the last time.
    fn take_ended(&mut self) -> Vec<(u32, ExitStatus)>;

    /// Whether no command can be run any more.
    fn is_gone(&mut self) -> bool;
}

/// The receiver's end.
#[derive(Debug)]
pub(super) struct HookRunner {
    socket: OwnedFd,
    last: u32,
    ended: VecDeque<(u32, ExitStatus)>,
    gone: bool,
}

impl HookRunner {
    /// Starts the process for these commands. This process must still be allowed to start programs.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn start(commands: &[String]) -> io::Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        own_program::command()
            .arg("run-hooks")
            .args(commands.iter().map(|command| format!("--command={command}")))
            // What the service manager says is for the receiver.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_PID")
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::from(theirs))
            // That is for the receiver's report.
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self {
            socket: ours,
            last: 0,
            ended: VecDeque::new(),
            gone: false,
        })
    }

    /// The next report; none if there is none and this does not `wait`.
    fn report(&mut self, wait: bool) -> io::Result<Option<Report>> {
        let flags = match wait {
            true => RecvFlags::empty(),
            false => RecvFlags::DONTWAIT,
        };
        match receive(self.socket.as_fd(), flags) {
            Ok(Some(report)) => Ok(Some(report)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // Its end, or an answer that makes no sense.
            Ok(None) | Err(_) => {
                self.gone = true;
                Err(io::Error::other(
                    "the process that runs hooks has ended: restart the receiver",
                ))
            }
        }
    }

    fn has_ended(&mut self, id: u32, status: i32) {
        self.ended.push_back((id, ExitStatus::from_raw(status)));
    }
}

impl RunHooks for HookRunner {
    fn run(&mut self, command: usize, values: &Values) -> io::Result<u32> {
        self.last = self.last.wrapping_add(1);
        let id = self.last;
        let run = Run {
            id,
            command,
            values: values.clone(),
        };
        if transmit(self.socket.as_fd(), &run).is_err() {
            // The reason is what is read now.
            self.gone = true;
        }
        loop {
            match self.report(true)? {
                Some(Report::Started { id: started }) if started == id => return Ok(id),
                Some(Report::NotStarted { id: refused, errno }) if refused == id => {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Some(Report::Ended { id, status }) => self.has_ended(id, status),
                _ => {}
            }
        }
    }

    fn take_ended(&mut self) -> Vec<(u32, ExitStatus)> {
        while let Ok(Some(report)) = self.report(false) {
            if let Report::Ended { id, status } = report {
                self.has_ended(id, status);
            }
        }
        self.ended.drain(..).collect()
    }

    fn is_gone(&mut self) -> bool {
        self.gone
    }
}

fn transmit(socket: BorrowedFd<'_>, message: &impl Serialize) -> io::Result<()> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > PACKET_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match send(socket, &packet, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A message; none at the end.
fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>, flags: RecvFlags) -> io::Result<Option<M>> {
    let mut packet = vec![0; PACKET_MAX];
    loop {
        match recv(socket, &mut packet[..], flags) {
            Ok((0, _)) => return Ok(None),
            Ok((length, _)) => return Ok(Some(serde_json::from_slice(&packet[..length])?)),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Is the process: runs one of `commands` whenever the receiver, at the other end of standard input, asks for it.
///
/// # Errors
/// If signals cannot be caught, or the receiver asks for something else.
pub(crate) fn serve(commands: &[String]) -> Result<ExitCode, CommandError> {
    // A terminal, or a unit that ends, sends these to all processes. The receiver ends by them, and this with it: not before all hooks
    // are started.
    signals::survive_end()?;
    stderr::never_wait(|| ()).map_err(CommandError::failed)?;
    let mut server = Server {
        socket: io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(CommandError::failed)?,
        commands,
        running: Vec::new(),
        outputs: Outputs::default(),
    };
    let served = server.serve();
    while !server.outputs.is_empty() {
        let ready = ready(server.outputs.polled(), PollTimeout::NONE).map_err(CommandError::failed)?;
        server.outputs.pass_on(&ready);
    }
    served.map_err(CommandError::failed)?;
    Ok(ExitCode::SUCCESS)
}

/// What the process has.
struct Server<'a> {
    socket: OwnedFd,
    commands: &'a [String],
    running: Vec<(u32, Child)>,
    outputs: Outputs,
}

impl Server<'_> {
    /// Returns when the receiver has closed its end.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            let timeout = match self.running.is_empty() {
                true => PollTimeout::NONE,
                false => PollTimeout::try_from(POLL).unwrap_or(PollTimeout::NONE),
            };
            if self.wait_asked(timeout)? {
                let Some(run) = receive(self.socket.as_fd(), RecvFlags::empty())? else {
                    return Ok(());
                };
                let report = self.start(run);
                transmit(self.socket.as_fd(), &report)?;
            }
            for report in reap(&mut self.running) {
                transmit(self.socket.as_fd(), &report)?;
            }
        }
    }

    /// Waits, and passes on what hooks print. Whether the receiver asks for something, or has closed its end.
    fn wait_asked(&mut self, timeout: PollTimeout) -> io::Result<bool> {
        let socket = PollFd::new(self.socket.as_fd(), PollFlags::POLLIN);
        let ready = ready([socket].into_iter().chain(self.outputs.polled()), timeout)?;
        let (is_asked, ready) = ready.split_first().unwrap_or((&false, &[]));
        self.outputs.pass_on(ready);
        Ok(*is_asked)
    }

    fn start(&mut self, run: Run) -> Report {
        let id = run.id;
        let not_started = |errno| Report::NotStarted { id, errno };
        let Some(command) = self.commands.get(run.command) else {
            return not_started(nix::libc::EINVAL);
        };
        if self.running.len() >= RUNNING_MAX {
            return not_started(nix::libc::EAGAIN);
        }
        let (out, error) = self.outputs.begin();
        let spawned = Command::new("sh")
            .args(["-c", command])
            .envs(VARIABLES.into_iter().zip(run.values))
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(error)
            .spawn();
        match spawned {
            Ok(child) => {
                self.running.push((id, child));
                Report::Started { id }
            }
            Err(error) => not_started(error.raw_os_error().unwrap_or(nix::libc::EINVAL)),
        }
    }
}

/// Which of them can be read, or are at their end.
fn ready<'fd>(polled: impl Iterator<Item = PollFd<'fd>>, timeout: PollTimeout) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = polled.collect();
    match poll(&mut polled, timeout) {
        // A signal: nothing is known of them.
        Err(nix::errno::Errno::EINTR) => Ok(Vec::new()),
        Err(errno) => Err(errno.into()),
        Ok(_) => Ok(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect()),
    }
}

fn reap(running: &mut Vec<(u32, Child)>) -> Vec<Report> {
    let mut ended = Vec::new();
    running.retain_mut(|(id, child)| match child.try_wait() {
        Ok(None) => true,
        status => {
            // An error means that it is not this process's child any more: nothing is known of it.
            let status = status
                .ok()
                .flatten()
                .map_or(UNKNOWN_STATUS, ExitStatusExt::into_raw);
            ended.push(Report::Ended { id: *id, status });
            false
        }
    });
    ended
}
