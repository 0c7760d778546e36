//! The thread in the way of the guest's output: it drives the gates and the link, so that no other work delays a barrier.

use super::gate::{Counts, GateError, OutputGate};
use super::link::{Link, LinkError};
use super::supervisor::Heartbeat;
use crate::qmp::{ProcessError, QemuProcess};
use colo_ring::link::{ToGuard, ToReceiver};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Most hold times that are kept between two calls of [`OutputPath::take_hold_times_us`].
const HOLD_TIMES_MAX: usize = 1 << 16;

/// How long telling the receiver that the protection ends may take.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// How long nothing is waited for at most.
const BEAT: u16 = 1000;

/// What happens on the thread, for the guard.
#[derive(Debug)]
pub(super) enum PathEvent {
    /// The link belongs to that session of the receiver.
    Bound { session: u32 },
    /// The link is lost. The session that it belonged to may be there still.
    LinkLost(String),
    /// The receiver has ended the session, or does not take this guard.
    SessionLost(String),
    /// Output waits for a checkpoint that has not begun. Comes once, until [`OutputPath::take_waiting`].
    OutputWaits,
    /// A gate has failed: it holds what it has, and the link was closed.
    GateFailed(String),
    /// The operator wants the guest to go on at the receiver: it waits for [`OutputPath::hand_over`].
    HandoverAsked,
    /// The last checkpoint is committed, what it has let go has left, and QEMU was ended.
    HandedOver,
}

enum Command {
    Link(Link),
    /// The protection is over.
    Unlink,
    /// Release everything, and let everything pass.
    Open,
    /// The operator ends the protection: the receiver is told, and then the sender.
    Leave(mpsc::Sender<()>),
    /// The process to end at the last checkpoint, or why it cannot be ended.
    Handover(Result<QemuProcess, ProcessError>),
    End,
}

/// A card with its gate, in a status.
#[derive(Clone, Debug, Serialize)]
pub(super) struct GateStatus {
    pub(super) nic: String,
    pub(super) gate: &'static str,
    #[serde(flatten)]
    pub(super) counts: Counts,
}

/// What the thread shows of itself.
#[derive(Default)]
struct Shown {
    gates: Mutex<Vec<GateStatus>>,
    hold_times_us: Mutex<Vec<u64>>,
    /// Frames since the last line.
    waiting: AtomicU64,
    /// [`PathEvent::OutputWaits`] was sent.
    is_told: AtomicBool,
}

/// The thread.
pub(super) struct OutputPath {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    shown: Arc<Shown>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl OutputPath {
    /// Starts it; output passes.
    ///
    /// # Errors
    /// If there is no descriptor or no thread for it.
    pub(super) fn start(
        gates: Vec<Box<dyn OutputGate>>,
        heartbeat: Heartbeat,
        report: impl Fn(PathEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let shown = Arc::new(Shown::default());
        let (commands, received) = mpsc::channel();
        let mut own = PathThread {
            gates,
            link: None,
            process: None,
            heartbeat,
            commands: received,
            wake: wake.clone(),
            shown: shown.clone(),
            report: Box::new(report),
        };
        own.show();
        let thread = std::thread::Builder::new().name("guard-output".to_owned());
        let thread = thread.spawn(move || own.run())?;
        Ok(Self {
            commands,
            wake,
            shown,
            thread: Some(thread),
        })
    }

    /// Barriers come over this link from now on.
    pub(super) fn set_link(&self, link: Link) {
        self.command(Command::Link(link));
    }

    /// Answers [`PathEvent::HandoverAsked`]: with the process to end at the last checkpoint, or why it cannot be ended.
    pub(super) fn hand_over(&self, process: Result<QemuProcess, ProcessError>) {
        self.command(Command::Handover(process));
    }

    /// Tells the receiver that the protection is ended on purpose, if there is a link.
    pub(super) fn leave(&self) {
        let (told, wait) = mpsc::channel();
        self.command(Command::Leave(told));
        // A thread that has ended drops the sender.
        let _ = wait.recv_timeout(LEAVE_LIMIT);
    }

    /// The protection is over, and the output stays held.
    pub(super) fn unlink(&self) {
        self.command(Command::Unlink);
    }

    /// The protection is over: releases everything, and lets everything pass.
    pub(super) fn open(&self) {
        self.command(Command::Open);
    }

    fn command(&self, command: Command) {
        // The thread ends only at Command::End.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    /// Frames that wait for a checkpoint that has not begun. Where there is none, the next one sends [`PathEvent::OutputWaits`].
    pub(super) fn take_waiting(&self) -> u64 {
        self.shown.is_told.store(false, Ordering::SeqCst);
        self.shown.waiting.load(Ordering::SeqCst)
    }

    /// The gates and what passes them.
    pub(super) fn gates(&self) -> Vec<GateStatus> {
        let gates = self.shown.gates.lock();
        gates.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long frames waited that have left since the last call, in microseconds.
    pub(super) fn take_hold_times_us(&self) -> Vec<u64> {
        let times = self.shown.hold_times_us.lock();
        std::mem::take(&mut *times.unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for OutputPath {
    fn drop(&mut self) {
        self.command(Command::End);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed.
            let _ = thread.join();
        }
    }
}

struct PathThread {
    gates: Vec<Box<dyn OutputGate>>,
    link: Option<Link>,
    /// To be ended at the last checkpoint.
    process: Option<QemuProcess>,
    heartbeat: Heartbeat,
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    shown: Arc<Shown>,
    report: Box<dyn Fn(PathEvent) + Send>,
}

impl PathThread {
    fn run(mut self) {
        let mut beaten = Instant::now();
        self.heartbeat.beat();
        loop {
            if beaten.elapsed() >= Heartbeat::EVERY {
                beaten = Instant::now();
                self.heartbeat.beat();
            }
            // EAGAIN: woken by something else.
            let _ = self.wake.read();
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Link(link) => {
                        self.drop_link();
                        self.link = Some(link);
                        // What came with the welcome.
                        self.read_link(false);
                    }
                    Command::Unlink => self.drop_link(),
                    Command::Open => {
                        // No barrier that is on its way closes a gate again.
                        self.drop_link();
                        self.open();
                    }
                    Command::Leave(told) => {
                        self.tell(&ToReceiver::Leaving);
                        let _ = told.send(());
                    }
                    Command::Handover(process) => self.answer_handover(process),
                    Command::End => return,
                }
            }
            let (is_link_ready, ready) = self.wait();
            if is_link_ready {
                self.read_link(true);
            }
            for (number, is_ready) in ready.into_iter().enumerate() {
                if is_ready && let Err(error) = self.gates[number].go_on() {
                    self.gate_failed(&error);
                }
            }
            self.show();
        }
    }

    /// Waits until something has arrived: whether on the link, and for which gates.
    fn wait(&self) -> (bool, Vec<bool>) {
        let mut fds = vec![(self.wake.as_fd(), PollFlags::POLLIN)];
        if let Some(link) = &self.link {
            fds.push((link.as_fd(), PollFlags::POLLIN));
        }
        let link = fds.len() - 1;
        let ends: Vec<usize> = (self.gates.iter())
            .map(|gate| {
                gate.wait_for(&mut fds);
                fds.len()
            })
            .collect();
        let mut polled: Vec<_> = fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
        // EINTR: looked at as if nothing had come.
        let _ = poll(&mut polled, BEAT);
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let mut from = link + 1;
        let ready = ends.iter().map(|end| {
            let any = polled[from..*end].iter().any(is_ready);
            from = *end;
            any
        });
        let ready = ready.collect();
        (self.link.is_some() && is_ready(&polled[link]), ready)
    }

    /// Carries out what has arrived; with `fill`, after reading what the socket has.
    fn read_link(&mut self, fill: bool) {
        let Some(mut link) = self.link.take() else { return };
        let filled = if fill { link.fill() } else { Ok(()) };
        // Lines that came before the end count.
        let done = self.carry_out_all(&mut link);
        match done.and(filled.map_err(|error| PathEvent::LinkLost(error.to_string()))) {
            Ok(()) => self.link = Some(link),
            Err(event) => {
                self.forget_barriers();
                (self.report)(event);
            }
        }
    }

    /// Does what the receiver asks for. The error ends the link.
    fn carry_out_all(&mut self, link: &mut Link) -> Result<(), PathEvent> {
        let lost = |error: LinkError| PathEvent::LinkLost(error.to_string());
        while let Some(message) = link.next_message().map_err(lost)? {
            let answer = self.carry_out(message)?;
            answer.map_or(Ok(()), |answer| link.send(&answer)).map_err(lost)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, message: ToGuard) -> Result<Option<ToReceiver>, PathEvent> {
        let failed = |error: GateError| PathEvent::GateFailed(error.to_string());
        let mut gates = self.gates.iter_mut();
        match message {
            ToGuard::Bound { session } => (self.report)(PathEvent::Bound { session }),
            ToGuard::Barrier { checkpoint } => {
                gates
                    .try_for_each(|gate| gate.place(checkpoint))
                    .map_err(failed)?;
                return Ok(Some(ToReceiver::Placed { checkpoint }));
            }
            ToGuard::Committed { checkpoint } => {
                gates
                    .try_for_each(|gate| gate.committed(checkpoint))
                    .map_err(failed)?;
                let is_awaited = self.gates.iter().any(|gate| gate.releases_in_pause());
                return Ok(is_awaited.then_some(ToReceiver::Released { checkpoint }));
            }
            ToGuard::Handover => (self.report)(PathEvent::HandoverAsked),
            ToGuard::Last { .. } => return Ok(Some(self.end_primary())),
            ToGuard::Ended { session, reason } => {
                return Err(PathEvent::SessionLost(format!(
                    "session {session} has ended: {reason}"
                )));
            }
            ToGuard::Refused { reason } => return Err(PathEvent::SessionLost(reason)),
            ToGuard::Welcome { .. } => {}
        }
        Ok(None)
    }

    fn answer_handover(&mut self, process: Result<QemuProcess, ProcessError>) {
        let answer = match process {
            Ok(process) => {
                self.process = Some(process);
                ToReceiver::HandoverReady
            }
            Err(error) => ToReceiver::HandoverRefused {
                reason: error.to_string(),
            },
        };
        self.tell(&answer);
    }

    /// Without a link there is nobody to tell, and one that is broken is noticed when it is read.
    fn tell(&mut self, message: &ToReceiver) {
        if let Some(link) = &mut self.link {
            let _ = link.send(message);
        }
    }

    /// The guest, which is stopped, must not run here any more.
    fn end_primary(&mut self) -> ToReceiver {
        let ended = match self.process.take() {
            Some(process) => process.end().map_err(|error| error.to_string()),
            None => Err("it is not known which process to end".to_owned()),
        };
        match ended {
            Ok(()) => {
                (self.report)(PathEvent::HandedOver);
                ToReceiver::PrimaryEnded
            }
            Err(reason) => ToReceiver::HandoverRefused { reason },
        }
    }

    fn gate_failed(&mut self, error: &GateError) {
        self.drop_link();
        (self.report)(PathEvent::GateFailed(error.to_string()));
    }

    fn drop_link(&mut self) {
        (self.link, self.process) = (None, None);
        self.forget_barriers();
    }

    fn forget_barriers(&mut self) {
        self.gates.iter_mut().for_each(|gate| gate.forget_barriers());
    }

    fn open(&mut self) {
        for gate in &mut self.gates {
            if let Err(error) = gate.open() {
                (self.report)(PathEvent::GateFailed(error.to_string()));
            }
        }
    }

    fn show(&mut self) {
        let waiting = self.gates.iter().map(|gate| gate.waiting()).sum();
        self.shown.waiting.store(waiting, Ordering::SeqCst);
        if waiting > 0 && !self.shown.is_told.swap(true, Ordering::SeqCst) {
            (self.report)(PathEvent::OutputWaits);
        }
        let gates = self.gates.iter().map(|gate| GateStatus {
            nic: gate.nic().to_owned(),
            gate: gate.kind(),
            counts: gate.counts(),
        });
        let gates = gates.collect();
        *self.shown.gates.lock().unwrap_or_else(PoisonError::into_inner) = gates;
        let mut times = self
            .shown
            .hold_times_us
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.gates
            .iter_mut()
            .for_each(|gate| gate.take_hold_times_us(&mut times));
        times.truncate(HOLD_TIMES_MAX);
    }
}
