//! The guard's own loop: protect, watch, end what was lost, and again.

mod ending;
mod handover;
mod pacing;
mod watch;

use super::gates;
use super::link::{Link, LinkError};
use super::measurements::Measurements;
use super::metrics;
use super::pace::Pace;
use super::path::{OutputPath, PathEvent};
use super::report::{GuardReport, GuardState, Shown};
use super::stop_mark::{self, StopMarks};
use super::{Channels, GuardArgs, GuardEvent, OnReceiverLost, SharedWish, Wish};
use crate::commands::protect::Beginning;
use crate::commands::unprotect::{guest_status, is_over, status_of};
use crate::guest_disks::Mirrors;
use crate::metrics_server::MetricsServer;
use crate::output::{CommandError, tell};
use crate::qmp::{Asked, CONNECT_LIMIT, Event, Qmp, QmpError};
use colo_ring::link::{Hello, LINK_VERSION, Wanted};
use colo_ring::text::elapsed;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// How long QEMU may take to leave COLO, when its receiver is lost, before its connections are cut.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long the receiver may take to bind the link to the session that it protects.
const BIND_LIMIT: Duration = Duration::from_secs(5);

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
    /// The supervisor is gone.
    Abandoned,
    /// QEMU has ended.
    NoGuest(QmpError),
    /// The guest goes on at the receiver, and QEMU was ended.
    HandedOver,
}

/// The mirrors of a protected guest's disks.
enum DiskMirrors {
    /// That this guard has started.
    Own(Mirrors),
    /// That it has found: how many, once QEMU has told.
    Found(Option<usize>),
}

/// See the module.
pub(super) struct Guard<'a> {
    args: &'a GuardArgs,
    events: Receiver<GuardEvent>,
    interrupted: Receiver<()>,
    qmp: Qmp,
    uuid: Option<String>,
    path: OutputPath,
    pace: Pace,
    measurements: Measurements,
    shown: Shown,
    _metrics: Option<MetricsServer>,
    /// When the guest was stopped, here and by QEMU's clock, while it is.
    stopped: Option<(Instant, u64)>,
    /// When it ran again after the last checkpoint, or was protected.
    ran: Instant,
    /// The interval that QEMU has.
    interval: Duration,
    /// The guest is protected: its stops are checkpoints.
    is_protected: bool,
    /// This guard has stopped the guest, since its receiver was lost.
    has_stopped: bool,
    /// The receiver's number of the session.
    session: Option<u32>,
    wish: Arc<SharedWish>,
    /// The guest is to be handed over: how often a checkpoint is still asked for, of which one is the last.
    last_asks: Option<u8>,
    /// A checkpoint was asked for and has not begun.
    is_asked: bool,
    /// What QEMU was asked to take as its interval the last time, until it has answered.
    asked: Option<Asked>,
    /// What QEMU was asked while it hung, until it has answered.
    unanswered: Option<Asked>,
    /// The receiver is lost by its silence: what waits for it waits for ever.
    is_silent: bool,
    /// QEMU is to ask for the next checkpoint, which the receiver keeps.
    is_due: bool,
    /// Output that waits lets it begin.
    follows_output: bool,
    /// Barriers before the last checkpoint ended.
    barriers: u64,
    /// QEMU was protected when this guard came.
    is_found: bool,
    /// It is taken over, which has not succeeded yet: if it fails, a protection is lost.
    takes_over: bool,
    /// QEMU was hanging when it was to keep what the next guard has to know.
    are_marks_due: bool,
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
            interrupted,
            wish,
            heartbeat,
        } = channels;
        let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
        let uuid = qmp.guest_uuid().map_err(CommandError::failed)?;
        let migration = qmp
            .execute("query-migrate", &json!({}))
            .map_err(CommandError::failed)?;
        // Protected by a guard that has ended, or by `protect`.
        let is_found = status_of(&migration) == "colo";
        let has_stopped = !is_found && keep_stopped(args, &mut qmp).map_err(CommandError::failed)?;
        // One that is on the way to it will not be this guard's, and its receiver may know that output is held.
        let is_beginning = is_colo_beginning(&mut qmp, &migration).map_err(CommandError::failed)?;
        let holds = is_found || is_beginning || has_stopped;
        let gates = gates::make(args, &mut qmp, holds).map_err(CommandError::failed)?;
        let of_path = sender.clone();
        let path = OutputPath::start(gates, heartbeat, args.receiver_timeout(), move |event| {
            of_path.send(GuardEvent::Path(event))
        });
        let path = path.map_err(CommandError::failed)?;
        qmp.watch_events(EVENTS, move |event| {
            sender.send(event.as_ref().map_or(GuardEvent::QemuEnded, GuardEvent::of));
        });
        let measurements = Measurements::new(args);
        let shown = Shown::start(GuardReport::new(args), args.control.as_ref())?;
        let metrics = metrics::serve(args, &shown, &measurements);
        let now = Instant::now();
        Ok(Self {
            args,
            events,
            interrupted,
            uuid,
            qmp,
            path,
            pace: Pace::new(
                args.pause_share,
                Duration::from_millis(args.interval_max.into()),
                now,
            ),
            measurements,
            shown,
            _metrics: metrics,
            stopped: None,
            ran: now,
            interval: Duration::from_millis(args.interval_max.into()),
            is_protected: false,
            has_stopped,
            session: None,
            wish,
            last_asks: None,
            is_asked: false,
            asked: None,
            unanswered: None,
            is_silent: false,
            is_due: false,
            follows_output: false,
            barriers: 0,
            is_found,
            takes_over: false,
            are_marks_due: false,
            told: String::new(),
        })
    }

    /// Protects the guest for as long as QEMU runs.
    ///
    /// # Errors
    /// If the first attempt shows that the guest cannot be protected.
    pub(super) fn run(&mut self) -> Result<ExitCode, CommandError> {
        let mut backoff = BACKOFF.0;
        loop {
            let protected = match std::mem::take(&mut self.is_found) {
                true => self.take_over(),
                false => self.protect(),
            };
            let end = match protected {
                Ok(mut mirrors) => {
                    backoff = BACKOFF.0;
                    self.watch(&mut mirrors)
                }
                Err(wrong @ CommandError::Usage(_)) => return Err(wrong),
                Err(_) if self.is_ending() => self.wished_end(),
                Err(error) => self.why_not(&error),
            };
            let end = match end {
                End::Lost(_) if self.is_ending() => self.wished_end(),
                end => end,
            };
            match self.end(end) {
                Some(code) => return Ok(code),
                None if self.wait(backoff) => {
                    let end = self.wished_end();
                    return Ok(self.end(end).unwrap_or(ExitCode::SUCCESS));
                }
                None => backoff = (backoff * 2).min(BACKOFF.1),
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.wish.get() != Wish::GoOn
    }

    /// The end of a guard that is to end.
    fn wished_end(&self) -> End {
        match self.wish.get() {
            Wish::Abandoned => End::Abandoned,
            Wish::End | Wish::GoOn => End::Asked,
        }
    }

    /// Why the first copy has failed: it was interrupted, where the receiver or QEMU was lost.
    fn why_not(&mut self, error: &CommandError) -> End {
        let mut reason = error.to_string();
        while let Ok(event) = self.events.try_recv() {
            match (&event, self.loss(&event)) {
                (GuardEvent::QemuEnded, _) => return closed(),
                (_, Some(said)) => reason = said,
                _ => self.note(&event),
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
        let link = self.connect(Wanted::Next).map_err(CommandError::failed)?;
        self.shown.change(|report| report.state = GuardState::Copying);
        self.path.set_link(link);
        let beginning = Beginning {
            primary: &self.args.primary,
            xbzrle: false,
            interval_ms: self.args.interval_max,
            wait: None,
            shows: true,
        };
        let mirrors = beginning.begin(&mut self.qmp, &self.interrupted)?.mirrors;
        self.mark_protected()?;
        Ok(DiskMirrors::Own(mirrors))
    }

    /// Continues a protection that is there: no output was released since its guard ended.
    fn take_over(&mut self) -> Result<DiskMirrors, CommandError> {
        self.takes_over = true;
        let link = self.connect(Wanted::Running).map_err(CommandError::failed)?;
        self.path.set_link(link);
        self.mark_protected()?;
        // What was held while there was no guard leaves with the next checkpoint.
        self.is_due = true;
        self.path.begin();
        Ok(DiskMirrors::Found(None))
    }

    fn mark_protected(&mut self) -> Result<(), CommandError> {
        let session = self.wait_for_session()?;
        (self.session, self.is_protected, self.has_stopped) = (Some(session), true, false);
        self.takes_over = false;
        self.ran = Instant::now();
        self.keep_requests();
        self.told.clear();
        self.set_marks().map_err(CommandError::failed)?;
        self.shown.change(|report| {
            report.state = GuardState::Protected;
            report.session = Some(session);
            report.unprotected_since = None;
            report.protections += 1;
        });
        tell(&format!(
            "{} is protected: session {session} of the receiver at {}",
            self.args.name, self.args.primary.to
        ));
        self.print_state();
        Ok(())
    }

    /// Leaves in QEMU what the next guard has to know. One that hangs in a checkpoint is asked again later.
    fn set_marks(&mut self) -> Result<(), QmpError> {
        let marked = StopMarks::set_running(&mut self.qmp.within(watch::LOOK_LIMIT), self.stops());
        self.are_marks_due = matches!(marked, Err(QmpError::Timeout { .. }));
        match marked {
            Err(QmpError::Timeout { .. }) => Ok(()),
            marked => marked,
        }
    }

    fn connect(&self, wants: Wanted) -> Result<Link, LinkError> {
        let hello = Hello {
            version: LINK_VERSION,
            name: self.args.name.clone(),
            uuid: self.uuid.clone(),
            timeout_ms: self.args.guard_timeout,
            wants,
        };
        let primary = &self.args.primary;
        Link::connect(&primary.to, &primary.tls, hello, self.args.receiver_timeout())
    }

    /// Whether the guest is stopped when its receiver is lost.
    fn stops(&self) -> bool {
        self.args.on_receiver_lost == OnReceiverLost::Stop
    }

    /// Why the protection does not go on after that event, if it does not.
    fn loss(&mut self, event: &GuardEvent) -> Option<String> {
        use PathEvent::{GateFailed, LinkLost, ReceiverSilent, SessionLost};
        match event {
            GuardEvent::LeftColo(reason) => Some(format!("QEMU left COLO ({reason})")),
            GuardEvent::Path(LinkLost(reason) | SessionLost(reason) | GateFailed(reason)) => {
                Some(reason.clone())
            }
            GuardEvent::Path(ReceiverSilent(limit)) => {
                self.is_silent = true;
                Some(format!("the receiver has not answered for {}", elapsed(*limit)))
            }
            _ => None,
        }
    }

    /// The receiver binds the link when the first copy ends, before the guest runs on.
    fn wait_for_session(&mut self) -> Result<u32, CommandError> {
        let deadline = Instant::now() + BIND_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(GuardEvent::Path(PathEvent::Bound { session })) => return Ok(session),
                Ok(GuardEvent::QemuEnded) => return Err(CommandError::Failed("QEMU has ended".to_owned())),
                Ok(GuardEvent::End) => return Err(CommandError::Failed("interrupted".to_owned())),
                Ok(event) => match self.loss(&event) {
                    Some(reason) => return Err(CommandError::Failed(reason)),
                    None => self.note(&event),
                },
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
        while self.interrupted.try_recv().is_ok() {}
        (self.is_asked, self.asked, self.last_asks) = (false, None, None);
        self.is_silent = false;
    }

    /// What any event changes.
    fn note(&mut self, event: &GuardEvent) {
        match event {
            GuardEvent::Path(PathEvent::OutputBegins) => {
                self.shown.change(|report| report.asked_for_output += 1);
            }
            GuardEvent::Path(PathEvent::GateFailed(reason)) => tell(&format!("WARNING: {reason}")),
            GuardEvent::Stopped(at_us) => {
                self.stopped = Some((Instant::now(), *at_us));
                (self.is_asked, self.follows_output) = (false, false);
            }
            GuardEvent::Resumed(at_us) => {
                self.ran = Instant::now();
                if let Some((_, stopped_at_us)) = self.stopped.take()
                    && self.is_protected
                {
                    let pause = Duration::from_micros(at_us.saturating_sub(stopped_at_us));
                    self.pace.paused(pause, Instant::now());
                    self.measurements.stopped(pause);
                    self.shown.change(|report| report.checkpoints += 1);
                }
                let barriers = self.path.barriers();
                let was_linked = std::mem::replace(&mut self.barriers, barriers) != barriers;
                self.is_due |= was_linked && self.asks_for_output();
            }
            _ => {}
        }
    }

    /// Waits before the next attempt. Whether the operator ends the guard meanwhile.
    fn wait(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            if self.is_ending() {
                return true;
            }
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

/// Whether a migration of COLO's is under way that has not come to COLO yet.
fn is_colo_beginning(qmp: &mut Qmp, migration: &Value) -> Result<bool, QmpError> {
    if is_over(status_of(migration)) || status_of(migration) == "colo" {
        return Ok(false);
    }
    let capabilities = qmp.execute("query-migrate-capabilities", &json!({}))?;
    let mut listed = capabilities.as_array().into_iter().flatten();
    Ok(listed.any(|one| one["capability"] == "x-colo" && one["state"] == true))
}

/// A guest that an earlier guard has stopped because it was not protected, or was about to, stands until it is; where it may run
/// unprotected, it runs on. Whether it stands.
fn keep_stopped(args: &GuardArgs, qmp: &mut Qmp) -> Result<bool, QmpError> {
    let found = StopMarks::find(qmp)?;
    if args.on_receiver_lost == OnReceiverLost::Run {
        if stop_mark::run_on(qmp)? {
            tell(&format!(
                "{}: an earlier guard has stopped it; it runs on",
                args.name
            ));
        }
        return Ok(false);
    }
    // One that runs has lost its receiver while it had no guard.
    let is_to_stop = found.stops && !found.stopped && guest_status(qmp)? == "running";
    if is_to_stop {
        stop_mark::stop(qmp)?;
    }
    let stands = found.stopped || is_to_stop;
    if stands {
        tell(&format!(
            "WARNING: {}: its receiver was lost; it is stopped until it is protected again (--on-receiver-lost stop)",
            args.name
        ));
    }
    Ok(stands)
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
