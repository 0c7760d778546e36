//! The guard's own loop: protect, watch, end what was lost, and again.

mod ending;

use super::gates;
use super::link::{Link, LinkError};
use super::pace::Pace;
use super::path::{OutputPath, PathEvent};
use super::report::{GuardReport, GuardState, Measurements, Shown};
use super::{Channels, GuardArgs, GuardEvent};
use crate::commands::protect::Beginning;
use crate::commands::unprotect::status_of;
use crate::guest_disks::{Mirrors, running_mirrors};
use crate::options::Switch;
use crate::output::{CommandError, tell};
use crate::qmp::{Event, Qmp, QmpError};
use colo_ring::link::{Hello, LINK_VERSION};
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long QEMU's monitor may take to be there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long QEMU may take to leave COLO, when its receiver is lost, before its connections are cut.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long it is waited for to take a parameter. While pages are sent, it answers nothing, and takes it later.
const ASK_LIMIT: Duration = Duration::from_millis(500);

/// How long a guest may be stopped for a checkpoint, beyond the time that the receiver waits for the guard: then the receiver hangs.
const STOPPED_MAX: Duration = Duration::from_secs(30);

/// By which part the interval must change before it is set in QEMU.
const INTERVAL_CHANGE: f64 = 0.2;

/// How long the receiver may take to bind the link to the session that it protects.
const BIND_LIMIT: Duration = Duration::from_secs(5);

/// How often a guest that is handed over is asked for a checkpoint: the first may have begun before the receiver knew that it was to be the
/// last. Then that of the interval is.
const LAST_ASKS: u8 = 2;

/// How often QEMU is asked whether all is well.
const LOOK: Duration = Duration::from_secs(1);

/// How long to wait before the guest is protected again: twice as long each time, up to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The events of QEMU that the guard handles.
const EVENTS: &[&str] = &["STOP", "RESUME", "COLO_EXIT"];

/// Why a protection has ended.
enum End {
    /// The receiver is lost, or the protection by it.
    Lost(String),
    /// The operator ends the guard.
    Asked,
    /// QEMU has ended.
    NoGuest(QmpError),
    /// The guest goes on at the receiver, and QEMU was ended.
    HandedOver,
}

/// The mirrors of a protected guest's disks.
enum DiskMirrors {
    /// That this guard has started.
    Own(Mirrors),
    /// That it has found: how many.
    Found(usize),
}

/// See the module.
pub(super) struct Guard<'a> {
    args: &'a GuardArgs,
    events: Receiver<GuardEvent>,
    wished: Receiver<()>,
    qmp: Qmp,
    uuid: Option<String>,
    path: OutputPath,
    releases_in_pause: bool,
    pace: Pace,
    measurements: Measurements,
    shown: Shown,
    unprotected_since: Instant,
    /// When the guest was stopped, here and by QEMU's clock, while it is.
    stopped: Option<(Instant, u64)>,
    /// The interval that QEMU has.
    interval: Duration,
    /// The guest is protected: its stops are checkpoints.
    is_protected: bool,
    /// This guard has stopped the guest, since its receiver was lost.
    has_stopped: bool,
    /// The receiver's number of the session.
    session: Option<u32>,
    is_ending: Arc<AtomicBool>,
    /// The guest is to be handed over: how often a checkpoint is still asked for, of which one is the last.
    last_asks: Option<u8>,
    /// A checkpoint was asked for and has not begun.
    is_asked: bool,
    output_waits: bool,
    /// QEMU was protected when this guard came.
    is_found: bool,
    /// It is taken over, which has not succeeded yet: if it fails, a protection is lost.
    takes_over: bool,
    /// The last reason that was printed: it is not printed again at each attempt.
    told: String,
}

impl<'a> Guard<'a> {
    /// Connects to QEMU and makes the gates of its network cards, which are open unless the guest is protected already.
    ///
    /// # Errors
    /// If QEMU cannot be reached, or the output of a card cannot be held.
    pub(super) fn start(args: &'a GuardArgs, channels: Channels) -> Result<Self, CommandError> {
        let Channels {
            sender,
            events,
            wished,
            is_ending,
            heartbeat,
        } = channels;
        let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
        let uuid = qmp.guest_uuid().map_err(CommandError::failed)?;
        let migration = qmp
            .execute("query-migrate", &json!({}))
            .map_err(CommandError::failed)?;
        // Protected by a guard that has ended, or by `protect`.
        let is_found = status_of(&migration) == "colo";
        let gates = gates::make(args, &mut qmp, is_found).map_err(CommandError::failed)?;
        let releases_in_pause = gates.iter().any(|gate| gate.releases_in_pause());
        let of_path = sender.clone();
        let path = OutputPath::start(gates, heartbeat, move |event| {
            of_path.send(GuardEvent::Path(event))
        });
        let path = path.map_err(CommandError::failed)?;
        qmp.watch_events(EVENTS, move |event| {
            sender.send(event.as_ref().map_or(GuardEvent::QemuEnded, GuardEvent::of));
        });
        let now = Instant::now();
        Ok(Self {
            args,
            events,
            wished,
            uuid,
            qmp,
            path,
            releases_in_pause,
            pace: Pace::new(
                args.pause_share,
                Duration::from_millis(args.interval_max.into()),
                now,
            ),
            measurements: Measurements::new(args).map_err(CommandError::failed)?,
            shown: Shown::start(GuardReport::new(args), args.control.as_ref())?,
            unprotected_since: now,
            stopped: None,
            interval: Duration::from_millis(args.interval_max.into()),
            is_protected: false,
            has_stopped: false,
            session: None,
            is_ending,
            last_asks: None,
            is_asked: false,
            output_waits: false,
            is_found,
            takes_over: false,
            told: String::new(),
        })
    }

    /// Protects the guest for as long as QEMU runs.
    ///
    /// # Errors
    /// If QEMU ends, or the first attempt shows that the guest cannot be protected.
    pub(super) fn run(&mut self) -> Result<ExitCode, CommandError> {
        let mut backoff = BACKOFF.0;
        loop {
            let protected = match std::mem::take(&mut self.is_found) {
                true => self.take_over(),
                false => self.protect(),
            };
            let end = match protected {
                Ok(mirrors) => {
                    backoff = BACKOFF.0;
                    self.watch(&mirrors)
                }
                Err(wrong @ CommandError::Usage(_)) => return Err(wrong),
                Err(_) if self.is_ending() => End::Asked,
                Err(error) => self.why_not(&error),
            };
            let end = match end {
                End::Lost(_) if self.is_ending() => End::Asked,
                end => end,
            };
            match self.end(end)? {
                Some(code) => return Ok(code),
                None if self.wait(backoff) => {
                    self.end(End::Asked)?;
                    return Ok(ExitCode::SUCCESS);
                }
                None => backoff = (backoff * 2).min(BACKOFF.1),
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Why the first copy has failed: it was interrupted, where the receiver or QEMU was lost.
    fn why_not(&mut self, error: &CommandError) -> End {
        let mut reason = error.to_string();
        while let Ok(event) = self.events.try_recv() {
            match event {
                GuardEvent::QemuEnded => return closed(),
                GuardEvent::LeftColo(said)
                | GuardEvent::Path(
                    PathEvent::LinkLost(said) | PathEvent::SessionLost(said) | PathEvent::GateFailed(said),
                ) => reason = said,
                other => self.note(&other),
            }
        }
        End::Lost(reason)
    }

    /// Puts the guest under protection.
    fn protect(&mut self) -> Result<DiskMirrors, CommandError> {
        self.forget_events();
        if self.is_ending() {
            return Err(CommandError::Failed("interrupted".to_owned()));
        }
        let link = self.connect().map_err(CommandError::failed)?;
        self.shown.change(|report| report.state = GuardState::Copying);
        self.path.set_link(link);
        let beginning = Beginning {
            primary: &self.args.primary,
            xbzrle: false,
            interval_ms: self.args.interval_max,
            wait: None,
            shows: true,
        };
        let mirrors = beginning.begin(&mut self.qmp, &self.wished)?.mirrors;
        self.mark_protected()?;
        Ok(DiskMirrors::Own(mirrors))
    }

    /// Continues a protection that is there: no output was released since its guard ended.
    fn take_over(&mut self) -> Result<DiskMirrors, CommandError> {
        self.takes_over = true;
        let link = self.connect().map_err(CommandError::failed)?;
        self.path.set_link(link);
        let mirrors = running_mirrors(&mut self.qmp).map_err(CommandError::failed)?;
        self.mark_protected()?;
        // What was held while there was no guard leaves with the next checkpoint.
        self.tell_interval()?;
        Ok(DiskMirrors::Found(mirrors))
    }

    fn mark_protected(&mut self) -> Result<(), CommandError> {
        let session = self.wait_for_session()?;
        (self.session, self.is_protected, self.has_stopped) = (Some(session), true, false);
        self.takes_over = false;
        self.told.clear();
        self.shown.change(|report| {
            report.state = GuardState::Protected;
            report.session = Some(session);
            report.unprotected_s = None;
            report.protections += 1;
        });
        tell(&format!(
            "{} is protected: session {session} of the receiver at {}",
            self.args.name, self.args.primary.to
        ));
        self.print_state();
        Ok(())
    }

    fn connect(&self) -> Result<Link, LinkError> {
        let hello = Hello {
            version: LINK_VERSION,
            name: self.args.name.clone(),
            uuid: self.uuid.clone(),
            releases_in_pause: self.releases_in_pause,
            timeout_ms: self.args.guard_timeout,
        };
        Link::connect(&self.args.primary.to, hello)
    }

    /// The receiver binds the link when the first copy ends, before the guest runs on.
    fn wait_for_session(&mut self) -> Result<u32, CommandError> {
        let deadline = Instant::now() + BIND_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(GuardEvent::Path(PathEvent::Bound { session })) => return Ok(session),
                Ok(
                    GuardEvent::LeftColo(reason)
                    | GuardEvent::Path(
                        PathEvent::LinkLost(reason)
                        | PathEvent::SessionLost(reason)
                        | PathEvent::GateFailed(reason),
                    ),
                ) => return Err(CommandError::Failed(reason)),
                Ok(GuardEvent::QemuEnded) => return Err(CommandError::Failed("QEMU has ended".to_owned())),
                Ok(GuardEvent::End) => return Err(CommandError::Failed("interrupted".to_owned())),
                Ok(event) => self.note(&event),
                Err(_) => {
                    return Err(CommandError::Failed(format!(
                        "the receiver does not know within {BIND_LIMIT:?} which session this guard's is; does another guest have the \
                         same UUID or none?"
                    )));
                }
            }
        }
    }

    /// Events of an earlier protection.
    fn forget_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.note(&event);
        }
        while self.wished.try_recv().is_ok() {}
        (self.is_asked, self.last_asks) = (false, None);
    }

    /// Keeps the guest protected, until it is not any more.
    fn watch(&mut self, mirrors: &DiskMirrors) -> End {
        let mut looked = Instant::now();
        loop {
            let now = Instant::now();
            if self.is_ending() {
                return End::Asked;
            }
            if let Some((since, _)) = self.stopped
                && now - since > STOPPED_MAX + Duration::from_millis(self.args.guard_timeout.into())
            {
                return End::Lost(format!(
                    "the guest has been stopped for a checkpoint for {:?}",
                    now - since
                ));
            }
            if let Err(end) = self
                .ask_for_the_last()
                .and_then(|()| self.ask_if_output_waits(now))
            {
                return end;
            }
            if now - looked >= LOOK {
                looked = now;
                if let Err(end) = self.look(mirrors) {
                    return end;
                }
            }
            let patience = match self.output_waits && !self.is_asked && self.stopped.is_none() {
                true => self.pace.wait(now).min(LOOK),
                false => LOOK,
            };
            match self.events.recv_timeout(patience) {
                Ok(GuardEvent::Path(PathEvent::LinkLost(reason))) => match self.relink() {
                    Ok(()) => tell(&format!("the link to the receiver is back ({reason})")),
                    // A primary that has ended takes its session along.
                    Err(_) if self.qmp.is_closed() => return closed(),
                    Err(_) => return End::Lost(reason),
                },
                Ok(GuardEvent::Path(PathEvent::SessionLost(reason) | PathEvent::GateFailed(reason))) => {
                    return End::Lost(reason);
                }
                Ok(GuardEvent::LeftColo(reason)) => return End::Lost(format!("QEMU left COLO ({reason})")),
                Ok(GuardEvent::Path(PathEvent::HandoverAsked)) => self.prepare_handover(),
                Ok(GuardEvent::Path(PathEvent::HandedOver)) => return End::HandedOver,
                Ok(GuardEvent::QemuEnded) => return self.qemu_ended(),
                Ok(GuardEvent::End) => return End::Asked,
                Ok(event) => self.note(&event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    /// The operator wants the guest to go on at the receiver: it gets a last checkpoint, and then QEMU is ended.
    fn prepare_handover(&mut self) {
        let process = self.qmp.process();
        match &process {
            Ok(_) => {
                tell(&format!(
                    "{}: it is handed over to the receiver with the next checkpoint",
                    self.args.name
                ));
                self.last_asks = Some(LAST_ASKS);
            }
            Err(error) => tell(&format!(
                "{}: WARNING: it cannot be handed over to the receiver: {error}",
                self.args.name
            )),
        }
        self.path.hand_over(process);
    }

    /// Asks for the last checkpoint at once.
    fn ask_for_the_last(&mut self) -> Result<(), End> {
        let Some(left @ 1..) = self.last_asks else {
            return Ok(());
        };
        if self.stopped.is_some() || self.is_asked {
            return Ok(());
        }
        (self.last_asks, self.is_asked) = (Some(left - 1), true);
        self.tell_interval().map_err(|error| End::Lost(error.to_string()))
    }

    /// QEMU has ended: by itself, or because its guest was handed over.
    fn qemu_ended(&mut self) -> End {
        while self.last_asks.is_some() {
            match self.events.recv_timeout(BIND_LIMIT) {
                Ok(GuardEvent::Path(PathEvent::HandedOver)) => return End::HandedOver,
                Ok(event) => self.note(&event),
                Err(_) => break,
            }
        }
        closed()
    }

    /// The link alone may be lost: a new one belongs to the same session, or there is no session any more.
    fn relink(&mut self) -> Result<(), CommandError> {
        if self.qmp.is_closed() {
            return Err(CommandError::Failed("QEMU has ended".to_owned()));
        }
        let link = self.connect().map_err(CommandError::failed)?;
        self.path.set_link(link);
        match Some(self.wait_for_session()?) == self.session {
            true => Ok(()),
            // Its commits are not this guest's.
            false => Err(CommandError::Failed(
                "the receiver has another session of this guest".to_owned(),
            )),
        }
    }

    /// Asks for a checkpoint, if output waits for one and the pace allows it.
    fn ask_if_output_waits(&mut self, now: Instant) -> Result<(), End> {
        if self.stopped.is_some() || self.is_asked || !self.output_waits || !self.pace.wait(now).is_zero() {
            return Ok(());
        }
        // Unless a checkpoint has begun meanwhile, which takes it along.
        self.output_waits = self.path.take_waiting() > 0;
        if !self.output_waits {
            return Ok(());
        }
        self.is_asked = true;
        self.shown.change(|report| report.asked_for_output += 1);
        self.tell_interval().map_err(|error| End::Lost(error.to_string()))
    }

    /// Sets the time between checkpoints, which starts one at once.
    fn tell_interval(&mut self) -> Result<(), CommandError> {
        self.interval = self.pace.interval();
        let milliseconds = u32::try_from(self.interval.as_millis()).unwrap_or(u32::MAX);
        let parameters = json!({"x-checkpoint-delay": milliseconds});
        let told = self
            .qmp
            .execute_within("migrate-set-parameters", &parameters, ASK_LIMIT);
        match told {
            // A checkpoint is under way.
            Ok(_) | Err(QmpError::Timeout { .. }) => Ok(()),
            Err(error) => Err(CommandError::failed(error)),
        }
    }

    /// Whether QEMU's interval is not the one that the pauses ask for any more.
    fn is_interval_old(&self) -> bool {
        let (now, told) = (self.pace.interval().as_secs_f64(), self.interval.as_secs_f64());
        (now - told).abs() > told * INTERVAL_CHANGE
    }

    /// Whether the disks are mirrored still.
    fn look(&mut self, mirrors: &DiskMirrors) -> Result<(), End> {
        self.measurements.held(self.path.take_hold_times_us());
        self.measurements.write_if_due();
        let (stopped, held) = self.measurements.times();
        let interval = self.pace.interval();
        self.shown.change(|report| {
            (report.stopped, report.held) = (stopped, held);
            report.gates = self.path.gates();
            report.interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        });
        // While it sends a checkpoint, QEMU answers nothing.
        if self.stopped.is_some() || self.is_asked {
            return Ok(());
        }
        let lost = |error: &dyn std::fmt::Display| End::Lost(error.to_string());
        if self.is_interval_old() {
            self.tell_interval().map_err(|error| lost(&error))?;
        }
        match mirrors {
            DiskMirrors::Own(mirrors) if mirrors.is_empty() => Ok(()),
            DiskMirrors::Own(mirrors) => mirrors
                .state(&mut self.qmp)
                .map(drop)
                .map_err(|error| lost(&error)),
            DiskMirrors::Found(0) => Ok(()),
            DiskMirrors::Found(count) => match running_mirrors(&mut self.qmp) {
                Ok(running) if running < *count => Err(lost(&"the mirror of a disk has ended")),
                Ok(_) => Ok(()),
                Err(error) => Err(lost(&error)),
            },
        }
    }

    /// What any event changes.
    fn note(&mut self, event: &GuardEvent) {
        match event {
            GuardEvent::Path(PathEvent::OutputWaits) => self.output_waits = self.asks_for_output(),
            GuardEvent::Path(PathEvent::GateFailed(reason)) => tell(&format!("WARNING: {reason}")),
            GuardEvent::Stopped(at_us) => {
                self.stopped = Some((Instant::now(), *at_us));
                self.is_asked = false;
            }
            GuardEvent::Resumed(at_us) => {
                if let Some((_, stopped_at_us)) = self.stopped.take()
                    && self.is_protected
                {
                    let pause = Duration::from_micros(at_us.saturating_sub(stopped_at_us));
                    self.pace.paused(pause, Instant::now());
                    self.measurements.stopped(pause);
                    self.shown.change(|report| report.checkpoints += 1);
                }
                self.output_waits = self.path.take_waiting() > 0 && self.asks_for_output();
            }
            _ => {}
        }
    }

    /// Whether checkpoints follow the output.
    fn asks_for_output(&self) -> bool {
        self.args.output_checkpoints == Switch::On
    }

    /// Waits before the next attempt. Whether the operator ends the guard meanwhile.
    fn wait(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            if self.is_ending() {
                return true;
            }
            let since = self.unprotected_since.elapsed().as_secs();
            self.shown.change(|report| report.unprotected_s = Some(since));
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(GuardEvent::End) => return true,
                // The next attempt says so.
                Ok(GuardEvent::QemuEnded) | Err(_) => return false,
                Ok(event) => self.note(&event),
            }
        }
    }
}

/// QEMU has closed its monitor.
fn closed() -> End {
    let command = "its events".to_owned();
    End::NoGuest(QmpError::Closed { command })
}

impl GuardEvent {
    fn of(event: &Event) -> Self {
        match event.name.as_str() {
            "STOP" => Self::Stopped(event.at_us),
            "RESUME" => Self::Resumed(event.at_us),
            _ => Self::LeftColo(event.data["reason"].as_str().unwrap_or("unknown").to_owned()),
        }
    }
}
