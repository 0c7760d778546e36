//! The thread in the way of the guest's output: it drives the gates and the link, so that no other work delays a barrier.

#[cfg(test)]
mod tests;

use super::gate::{Counts, HOLD_TIMES_MAX, OutputGate};
use super::gate_in_use::GateInUse;
use super::link::{Link, LinkError};
use super::link_watch::LinkWatch;
use super::supervisor::Heartbeat;
use crate::qmp::{ProcessError, QemuProcess};
use colo_ring::link::{ToGuard, ToReceiver};
use colo_ring::units::CheckpointId;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use schemars::JsonSchema;
use serde::Serialize;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// How long telling the receiver that the protection ends may take.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// How long nothing is waited for at most.
const BEAT: u16 = 1000;

/// How often gates are looked after.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What happens on the thread, for the guard.
#[derive(Debug)]
pub(super) enum PathEvent {
    /// The link belongs to that session of the receiver.
    Bound { session: u32 },
    /// The link is lost. The session that it belonged to may be there still.
    LinkLost(String),
    /// The receiver does not answer: nothing has come for so long.
    ReceiverSilent(Duration),
    /// The receiver has ended the session, or does not take this guard.
    SessionLost(String),
    /// Output waits, and the guard has asked the receiver for the next checkpoint.
    OutputBegins,
    /// A gate has failed: it holds what it has, and the link was closed.
    GateFailed(String),
    /// The operator wants the guest to go on at the receiver: it waits for [`OutputPath::hand_over`].
    HandoverAsked,
    /// The last checkpoint is committed, what it has let go has left, and QEMU was ended.
    HandedOver,
}

enum Command {
    Link(Link),
    /// The receiver keeps requests for so long at most.
    Keep(Duration),
    /// Output that waits lets the next checkpoint begin.
    FollowOutput,
    /// The next checkpoint may begin, whatever waits.
    Begin,
    /// The protection is over.
    Unlink,
    /// Release everything, and let everything pass; whether every gate did is sent.
    Open(mpsc::Sender<bool>),
    /// The guard ends the protection: a message for the receiver, and then one for the sender of this.
    Leave(mpsc::Sender<()>),
    /// QEMU has left COLO: a message for the receiver.
    Left,
    /// The process to end at the last checkpoint, or why it cannot be ended.
    Handover(Result<QemuProcess, ProcessError>),
    End,
}

/// A card with its gate, in a status.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct GateStatus {
    /// The network card.
    pub(super) nic: String,
    /// How its output is held.
    pub(super) gate: &'static str,
    #[serde(flatten)]
    pub(super) counts: Counts,
}

/// What the thread shows of itself.
#[derive(Default)]
struct Shown {
    gates: Mutex<Vec<GateStatus>>,
    hold_times_us: Mutex<Vec<u64>>,
    /// That the receiver has asked for.
    barriers: AtomicU64,
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
        receiver_timeout: Duration,
        report: impl Fn(PathEvent) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let shown = Arc::new(Shown::default());
        let (commands, received) = mpsc::channel();
        let mut own = PathThread {
            gates: gates.into_iter().map(GateInUse::from).collect(),
            looked_at: Instant::now(),
            link: None,
            watch: None,
            receiver_timeout,
            last_barrier: None,
            follows_output: false,
            process: None,
            heartbeat,
            commands: received,
            wake: wake.clone(),
            shown: shown.clone(),
            report: Arc::new(report),
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

    /// The receiver keeps the primary's requests from now on, for so long after a commit at most.
    pub(super) fn keep_requests(&self, limit: Duration) {
        self.command(Command::Keep(limit));
    }

    /// As soon as output waits, the receiver is asked for the next checkpoint; up to the next barrier.
    pub(super) fn follow_output(&self) {
        self.command(Command::FollowOutput);
    }

    /// The receiver is asked for the next checkpoint.
    pub(super) fn begin(&self) {
        self.command(Command::Begin);
    }

    /// How many barriers the receiver has asked for: one more after each checkpoint in which it knew of this link.
    pub(super) fn barriers(&self) -> u64 {
        self.shown.barriers.load(Ordering::SeqCst)
    }

    /// Answers [`PathEvent::HandoverAsked`]: with the process to end at the last checkpoint, or why it cannot be ended.
    pub(super) fn hand_over(&self, process: Result<QemuProcess, ProcessError>) {
        self.command(Command::Handover(process));
    }

    /// Tells the receiver that the guard ends the protection, if there is a link.
    pub(super) fn leave(&self) {
        let (told, wait) = mpsc::channel();
        self.command(Command::Leave(told));
        // A thread that has ended drops the sender.
        let _ = wait.recv_timeout(LEAVE_LIMIT);
    }

    /// Tells it that QEMU has left COLO, and that its guest runs on.
    pub(super) fn left(&self) {
        self.command(Command::Left);
    }

    /// The protection is over, and the output stays held.
    pub(super) fn unlink(&self) {
        self.command(Command::Unlink);
    }

    /// The protection is over: releases everything, and lets everything pass. Whether nothing is held any more that this guard would leave behind
    /// is received once that is done.
    pub(super) fn open(&self) -> mpsc::Receiver<bool> {
        let (done, opened) = mpsc::channel();
        self.command(Command::Open(done));
        opened
    }

    fn command(&self, command: Command) {
        // The thread ends only at Command::End.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
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
    gates: Vec<GateInUse>,
    /// When gates were looked after.
    looked_at: Instant,
    link: Option<Link>,
    /// While there is a link.
    watch: Option<LinkWatch>,
    receiver_timeout: Duration,
    /// On this link.
    last_barrier: Option<CheckpointId>,
    /// Output that waits lets the next checkpoint begin, once.
    follows_output: bool,
    /// To be ended at the last checkpoint.
    process: Option<QemuProcess>,
    heartbeat: Heartbeat,
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    shown: Arc<Shown>,
    report: Arc<dyn Fn(PathEvent) + Send + Sync>,
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
                        self.take_link(link);
                        // What came with the welcome.
                        self.read_link(false);
                    }
                    Command::Keep(limit) => {
                        let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
                        self.tell(&ToReceiver::Keep { limit_ms });
                    }
                    Command::FollowOutput => self.follows_output = true,
                    Command::Begin => self.begin(),
                    Command::Unlink => self.drop_link(),
                    Command::Open(done) => {
                        // No barrier that is on its way closes a gate again.
                        self.drop_link();
                        // A guard that stays opens later what could not be opened, and waits for nothing.
                        let _ = done.send(self.open());
                    }
                    Command::Leave(told) => {
                        self.tell(&ToReceiver::Leaving);
                        let _ = told.send(());
                    }
                    Command::Left => self.tell(&ToReceiver::Left),
                    Command::Handover(process) => self.answer_handover(process),
                    Command::End => return,
                }
            }
            self.look_after_gates();
            // What waits already has no other event to tell of it.
            self.begin_if_output_waits();
            let (is_link_ready, ready) = self.wait();
            if is_link_ready {
                self.read_link(true);
            }
            for (number, is_ready) in ready.into_iter().enumerate() {
                if is_ready && let Err(event) = self.gates[number].act(|gate| gate.go_on()) {
                    self.drop_link();
                    (self.report)(event);
                }
            }
            self.begin_if_output_waits();
            self.show();
        }
    }

    fn begin_if_output_waits(&mut self) {
        let waits = self.follows_output && self.gates.iter().any(|used| used.gate.waiting() > 0);
        if waits && self.link.is_some() {
            self.follows_output = false;
            self.begin();
            (self.report)(PathEvent::OutputBegins);
        }
    }

    fn begin(&mut self) {
        let after = self.last_barrier;
        self.tell(&ToReceiver::Begin { after });
    }

    /// Waits until something has arrived: whether on the link, and for which gates.
    fn wait(&self) -> (bool, Vec<bool>) {
        let mut fds = vec![(self.wake.as_fd(), PollFlags::POLLIN)];
        if let Some(link) = &self.link {
            fds.push((link.as_fd(), PollFlags::POLLIN));
        }
        let link = fds.len() - 1;
        let ends: Vec<usize> = (self.gates.iter())
            .map(|used| {
                if !used.has_failed {
                    used.gate.wait_for(&mut fds);
                }
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
                self.drop_link();
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
        let mut gates = self.gates.iter_mut();
        match message {
            ToGuard::Bound { session } => (self.report)(PathEvent::Bound { session }),
            ToGuard::Barrier { checkpoint } => {
                (self.last_barrier, self.follows_output) = (Some(checkpoint), false);
                self.shown.barriers.fetch_add(1, Ordering::SeqCst);
                gates.try_for_each(|used| used.act(|gate| gate.place(checkpoint)))?;
                return Ok(Some(ToReceiver::Placed { checkpoint }));
            }
            ToGuard::Committed { checkpoint } => {
                gates.try_for_each(|used| used.act(|gate| gate.committed(checkpoint)))?;
            }
            ToGuard::Handover => (self.report)(PathEvent::HandoverAsked),
            ToGuard::Last { .. } => return Ok(Some(self.end_primary())),
            ToGuard::Ended { session, reason } => {
                return Err(PathEvent::SessionLost(format!(
                    "session {session} has ended: {reason}"
                )));
            }
            ToGuard::Refused { reason } => return Err(PathEvent::SessionLost(reason)),
            // The watch has seen that something came.
            ToGuard::Welcome { .. } | ToGuard::Pong | ToGuard::Called { .. } => {}
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

    /// Sends a message where there is a link. One that is broken is noticed when it is read.
    fn tell(&mut self, message: &ToReceiver) {
        if let Some(link) = &mut self.link {
            let _ = link.send(message);
        }
    }

    /// The guest, which is stopped, must not run here any more.
    fn end_primary(&mut self) -> ToReceiver {
        self.heartbeat.busy();
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

    /// Tries the gates that have failed, now and then.
    /// Gates that have failed are tried again; what the others have held and dropped is counted, also where nothing has come since.
    fn look_after_gates(&mut self) {
        if self.looked_at.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked_at = Instant::now();
        for number in 0..self.gates.len() {
            let used = &mut self.gates[number];
            if used.has_failed {
                // That it has was reported.
                let _ = used.recover();
            } else if let Err(event) = used.act(|gate| gate.count()) {
                self.drop_link();
                (self.report)(event);
            }
        }
    }

    fn take_link(&mut self, link: Link) {
        self.drop_link();
        // Without its gate the guest would be protected for nothing.
        if let Err(event) = self.gates.iter_mut().try_for_each(GateInUse::recover) {
            return (self.report)(event);
        }
        let watch = LinkWatch::start(link.socket(), self.receiver_timeout, self.report.clone());
        match watch {
            Ok(watch) => (self.link, self.watch) = (Some(link), Some(watch)),
            Err(error) => (self.report)(PathEvent::LinkLost(format!(
                "no thread to watch the link: {error}"
            ))),
        }
    }

    fn drop_link(&mut self) {
        (self.link, self.watch, self.process) = (None, None, None);
        (self.last_barrier, self.follows_output) = (None, false);
        self.forget_barriers();
    }

    fn forget_barriers(&mut self) {
        self.gates.iter_mut().for_each(|used| used.gate.forget_barriers());
    }

    /// Opens every gate. Whether none is closed that outlives this guard.
    fn open(&mut self) -> bool {
        let mut all = true;
        for used in &mut self.gates {
            let had_failed = used.has_failed;
            if let Err(event) = used.open() {
                all &= !used.gate.outlives_guard();
                if !had_failed {
                    (self.report)(event);
                }
            }
        }
        all
    }

    fn show(&mut self) {
        let gates = self.gates.iter().map(|GateInUse { gate, .. }| GateStatus {
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
            .for_each(|used| used.gate.take_hold_times_us(&mut times));
        times.truncate(HOLD_TIMES_MAX);
    }
}
