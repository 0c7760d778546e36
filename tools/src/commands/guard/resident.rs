//! The guard's own loop: protect, watch, end what was lost, and again.

use super::gates;
use super::link::{Link, LinkError};
use super::pace::Pace;
use super::path::{OutputPath, PathEvent};
use super::report::{GuardReport, GuardState, Measurements, Shown};
use super::{GuardArgs, GuardEvent, OnReceiverLost};
use crate::commands::protect::Beginning;
use crate::commands::unprotect::{end_migration, status_of};
use crate::guest_disks::{Mirrors, remove_all, running_mirrors};
use crate::options::Switch;
use crate::output::{CommandError, print, tell};
use crate::qmp::{Event, Qmp, QmpError};
use colo_ring::link::{Hello, LINK_VERSION};
use serde_json::json;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How long QEMU's monitor may take to be there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long QEMU may take to leave COLO, when its receiver is lost, before its connections are cut.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long it may take to start a checkpoint that is asked for. While pages are sent, it answers nothing.
const ASK_LIMIT: Duration = Duration::from_secs(30);

/// How long the receiver may take to bind the link to the session that it protects.
const BIND_LIMIT: Duration = Duration::from_secs(5);

/// How often QEMU is asked whether all is well.
const LOOK: Duration = Duration::from_secs(1);

/// How long to wait before the guest is protected again: twice as long each time, up to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Events of QEMU that the guard lives by.
const EVENTS: &[&str] = &["STOP", "RESUME", "COLO_EXIT"];

/// Why a protection has ended.
enum End {
    /// The receiver is lost, or the protection by it.
    Lost(String),
    /// The operator ends the guard.
    Asked,
    /// QEMU has ended.
    NoGuest(QmpError),
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
    /// QEMU's clock when the guest was stopped, while it is.
    stopped_at_us: Option<u64>,
    /// A checkpoint was asked for and has not begun.
    is_asked: bool,
    output_waits: bool,
    /// QEMU was protected when this guard came.
    is_found: bool,
    /// The last reason that was told: the same is not told again at each attempt.
    told: String,
}

impl<'a> Guard<'a> {
    /// Connects to QEMU and gets in the way of its output, which passes.
    ///
    /// # Errors
    /// If QEMU cannot be reached, or the output of a card cannot be held.
    pub(super) fn start(
        args: &'a GuardArgs,
        sender: Sender<GuardEvent>,
        events: Receiver<GuardEvent>,
        wished: Receiver<()>,
    ) -> Result<Self, CommandError> {
        let mut qmp = Qmp::connect(&args.primary.qmp, CONNECT_LIMIT).map_err(CommandError::failed)?;
        let uuid = qmp
            .execute("query-uuid", &json!({}))
            .map_err(CommandError::failed)?;
        let uuid = uuid["UUID"]
            .as_str()
            .filter(|uuid| uuid.bytes().any(|byte| !b"0-".contains(&byte)));
        let migration = qmp
            .execute("query-migrate", &json!({}))
            .map_err(CommandError::failed)?;
        // Protected by a guard that has ended, or by `protect`.
        let is_found = status_of(&migration) == "colo";
        let gates = match args.dry_run {
            true => Vec::new(),
            false => gates::make(args, &mut qmp, is_found).map_err(CommandError::failed)?,
        };
        let releases_in_pause = gates.iter().any(|gate| gate.releases_in_pause());
        let path = OutputPath::start(gates, sender.clone()).map_err(CommandError::failed)?;
        qmp.watch_events(EVENTS, move |event| {
            // The guard may have ended.
            let _ = sender.send(event.as_ref().map_or(GuardEvent::QemuEnded, GuardEvent::of));
        });
        let now = Instant::now();
        Ok(Self {
            args,
            events,
            wished,
            uuid: uuid.map(str::to_owned),
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
            stopped_at_us: None,
            is_asked: false,
            output_waits: false,
            is_found,
            told: String::new(),
        })
    }

    /// Says how the guest would be protected.
    ///
    /// # Errors
    /// If it could not be.
    pub(super) fn show_plan(&mut self) -> Result<ExitCode, CommandError> {
        let mut lines = gates::describe(self.args, &mut self.qmp).map_err(CommandError::failed)?;
        let rate = self.dirty_rate().map_err(CommandError::failed)?;
        lines.push(match rate {
            Some(mebibytes) => format!("the guest dirties {mebibytes} MiB of memory a second"),
            None => "QEMU cannot measure how much memory the guest dirties".to_owned(),
        });
        print(&(lines.join("\n") + "\n"))?;
        Ok(ExitCode::SUCCESS)
    }

    /// MiB that the guest dirties in a second, as QEMU measures it.
    fn dirty_rate(&mut self) -> Result<Option<u64>, QmpError> {
        match self.qmp.execute("calc-dirty-rate", &json!({"calc-time": 1})) {
            Ok(_) => {}
            Err(QmpError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let rate = self.qmp.execute("query-dirty-rate", &json!({}))?;
            if rate["status"] != "measuring" {
                return Ok(rate["dirty-rate"].as_u64());
            }
        }
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
                Err(_) if self.wished.try_recv().is_ok() => End::Asked,
                Err(error) => End::Lost(error.to_string()),
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

    /// Puts the guest under protection.
    fn protect(&mut self) -> Result<DiskMirrors, CommandError> {
        self.forget_events();
        let link = self.connect().map_err(CommandError::failed)?;
        self.shown.change(|report| report.state = GuardState::Copying);
        self.path.set_link(link);
        let beginning = Beginning {
            primary: &self.args.primary,
            xbzrle: false,
            interval_ms: self.args.interval_max,
            sends_uuid: true,
            wait: None,
            shows: true,
        };
        let mirrors = beginning.begin(&mut self.qmp, &self.wished)?.mirrors;
        self.mark_protected()?;
        Ok(DiskMirrors::Own(mirrors))
    }

    /// Goes on with a protection that is there: it has no output let go since its guard ended.
    fn take_over(&mut self) -> Result<DiskMirrors, CommandError> {
        let link = self.connect().map_err(CommandError::failed)?;
        self.path.set_link(link);
        let mirrors = running_mirrors(&mut self.qmp).map_err(CommandError::failed)?;
        self.mark_protected()?;
        Ok(DiskMirrors::Found(mirrors))
    }

    fn mark_protected(&mut self) -> Result<(), CommandError> {
        let session = self.wait_for_session()?;
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
                Ok(GuardEvent::Path(PathEvent::LinkLost(reason)) | GuardEvent::LeftColo(reason)) => {
                    return Err(CommandError::Failed(reason));
                }
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
        self.is_asked = false;
    }

    /// Keeps the guest protected, until it is not any more.
    fn watch(&mut self, mirrors: &DiskMirrors) -> End {
        let mut looked = Instant::now();
        loop {
            let now = Instant::now();
            if let Err(end) = self.ask_if_output_waits(now) {
                return end;
            }
            if now - looked >= LOOK {
                looked = now;
                if let Err(end) = self.look(mirrors) {
                    return end;
                }
            }
            let patience = match self.output_waits && !self.is_asked && self.stopped_at_us.is_none() {
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
                Ok(GuardEvent::LeftColo(reason)) => return End::Lost(format!("QEMU left COLO ({reason})")),
                Ok(GuardEvent::QemuEnded) => return closed(),
                Ok(GuardEvent::End) => return End::Asked,
                Ok(event) => self.note(&event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    /// The link alone may be lost: a new one belongs to the same session, or there is no session any more.
    fn relink(&mut self) -> Result<(), CommandError> {
        if self.qmp.is_closed() {
            return Err(CommandError::Failed("QEMU has ended".to_owned()));
        }
        let link = self.connect().map_err(CommandError::failed)?;
        self.path.set_link(link);
        self.wait_for_session().map(drop)
    }

    /// Asks for a checkpoint, if output waits for one and the pace allows it.
    fn ask_if_output_waits(&mut self, now: Instant) -> Result<(), End> {
        if self.stopped_at_us.is_some()
            || self.is_asked
            || !self.output_waits
            || !self.pace.wait(now).is_zero()
        {
            return Ok(());
        }
        // Unless a checkpoint has begun meanwhile, which takes it along.
        self.output_waits = self.path.take_waiting() > 0;
        if !self.output_waits {
            return Ok(());
        }
        self.is_asked = true;
        self.shown.change(|report| report.asked_for_output += 1);
        self.ask_for_checkpoint()
    }

    /// Any value of this parameter starts a checkpoint at once.
    fn ask_for_checkpoint(&mut self) -> Result<(), End> {
        let interval = u64::try_from(self.pace.interval().as_millis()).unwrap_or(u64::MAX);
        let parameters = json!({"x-checkpoint-delay": interval});
        match self
            .qmp
            .execute_within("migrate-set-parameters", &parameters, ASK_LIMIT)
        {
            Ok(_) => Ok(()),
            Err(error @ QmpError::Closed { .. }) => Err(End::NoGuest(error)),
            Err(error) => Err(End::Lost(error.to_string())),
        }
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
        if self.stopped_at_us.is_some() {
            return Ok(());
        }
        let lost = |error: &dyn std::fmt::Display| End::Lost(error.to_string());
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
                self.stopped_at_us = Some(*at_us);
                self.is_asked = false;
            }
            GuardEvent::Resumed(at_us) => {
                if let Some(stopped_at_us) = self.stopped_at_us.take() {
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

    /// Ends what is left of a protection. The exit code, if the guard ends by it.
    fn end(&mut self, end: End) -> Result<Option<ExitCode>, CommandError> {
        let (reason, code) = match end {
            End::Lost(reason) => (reason, None),
            End::Asked => ("the guard was ended".to_owned(), Some(ExitCode::SUCCESS)),
            End::NoGuest(error) => return Err(CommandError::failed(error)),
        };
        let stops = self.args.on_receiver_lost == OnReceiverLost::Stop && code.is_none();
        self.leave_colo(stops)
            .map_err(|error| match self.qmp.is_closed() {
                true => CommandError::Failed(format!("QEMU has ended ({reason})")),
                false => error,
            })?;
        if !stops {
            self.path.open();
        }
        let was = self.mark_unprotected(&reason);
        if was || self.told != reason {
            self.tell_end(&reason, stops, was);
        }
        self.told = reason;
        Ok(code)
    }

    fn tell_end(&self, reason: &str, stops: bool, was: bool) {
        let guest = match (stops, was) {
            (true, _) => "the guest is stopped until it is protected again (--on-receiver-lost stop)",
            (false, true) => "the guest runs on, unprotected",
            (false, false) => "the guest is not protected",
        };
        tell(&format!("{}: {reason}; {guest}", self.args.name));
    }

    /// Ends COLO and the mirrors. The guest runs then, unless it is to be stopped.
    fn leave_colo(&mut self, stops: bool) -> Result<(), CommandError> {
        end_migration(&mut self.qmp, PATIENCE)?;
        if stops {
            self.qmp
                .execute("stop", &json!({}))
                .map_err(CommandError::failed)?;
        }
        let removed = remove_all(&mut self.qmp);
        removed.map(drop).map_err(CommandError::failed)
    }

    /// Whether it was protected.
    fn mark_unprotected(&mut self, reason: &str) -> bool {
        let mut was = false;
        self.shown.change(|report| {
            was = report.state == GuardState::Protected;
            report.state = GuardState::Unprotected;
            report.session = None;
            report.reason = Some(reason.to_owned());
        });
        if was {
            self.unprotected_since = Instant::now();
        }
        self.stopped_at_us = None;
        was
    }

    /// Waits before the next attempt. Whether the operator ends the guard meanwhile.
    fn wait(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
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
