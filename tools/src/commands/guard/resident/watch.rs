//! A protected guest is watched: the receiver, QEMU, the link, and the mirrors of its disks.

use super::super::GuardEvent;
use super::super::path::PathEvent;
use super::{DiskMirrors, End, Guard, closed};
use crate::guest_disks::{MirrorError, running_mirrors};
use crate::output::{CommandError, tell};
use crate::qmp::QmpError;
use colo_ring::link::Wanted;
use colo_ring::text::elapsed;
use serde_json::json;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// How long it is waited for where it is only looked at. While pages are sent, it answers nothing.
pub(super) const LOOK_LIMIT: Duration = Duration::from_millis(200);

/// How long a guest may be stopped for a checkpoint, and how late that may begin, beyond the time that the receiver waits for the guard: then
/// the receiver hangs.
const LATE_MAX: Duration = Duration::from_secs(30);

/// How often QEMU is asked whether all is well.
const LOOK: Duration = Duration::from_secs(1);

impl Guard<'_> {
    /// Keeps the guest protected, until it is not any more.
    pub(super) fn watch(&mut self, mirrors: &mut DiskMirrors) -> End {
        let mut looked = Instant::now();
        loop {
            let now = Instant::now();
            if self.is_ending() {
                return self.wished_end();
            }
            if let Some(late) = self.why_late(now) {
                return End::Lost(late);
            }
            if let Err(end) = self
                .check_asked()
                .and_then(|()| self.ask_for_the_last())
                .and_then(|()| self.request_ahead())
            {
                return end;
            }
            self.follow_output(now);
            if now - looked >= LOOK {
                looked = now;
                if let Err(end) = self.look(mirrors) {
                    return end;
                }
            }
            let patience = match self.asks_for_output() && !self.follows_output && self.stopped.is_none() {
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
                Ok(GuardEvent::Path(PathEvent::HandoverAsked)) => self.prepare_handover(),
                Ok(GuardEvent::Path(PathEvent::HandedOver)) => return End::HandedOver,
                Ok(GuardEvent::QemuEnded) => return self.qemu_ended(),
                Ok(GuardEvent::End) => return self.wished_end(),
                Ok(event) => match self.loss(&event) {
                    Some(reason) => return End::Lost(reason),
                    None => self.note(&event),
                },
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    /// Why the receiver hangs, if a checkpoint does not end or does not begin: QEMU asks for one at the latest after its interval, and stops
    /// the guest when it is answered.
    fn why_late(&self, now: Instant) -> Option<String> {
        let limit = LATE_MAX + Duration::from_millis(self.args.guard_timeout.into());
        match self.stopped {
            Some((since, _)) if now - since > limit => Some(format!(
                "the guest has been stopped for a checkpoint for {}",
                elapsed(now - since)
            )),
            None if now - self.ran > self.interval + limit => {
                Some(format!("no checkpoint has begun for {}", elapsed(now - self.ran)))
            }
            _ => None,
        }
    }

    /// The link alone may be lost: a new one belongs to the same session, or there is no session any more.
    pub(super) fn relink(&mut self) -> Result<(), CommandError> {
        if self.qmp.is_closed() {
            return Err(CommandError::Failed("QEMU has ended".to_owned()));
        }
        let wants = self.session.map_or(Wanted::Running, Wanted::Session);
        let link = self.connect(wants).map_err(CommandError::failed)?;
        self.path.set_link(link);
        match Some(self.wait_for_session()?) == self.session {
            true => {
                self.keep_requests();
                // What was before a line of the lost link waits for a commit, and for nothing else that would begin a checkpoint.
                self.path.begin();
                Ok(())
            }
            // Its commits are not this guest's.
            false => Err(CommandError::Failed(
                "the receiver has another session of this guest".to_owned(),
            )),
        }
    }

    /// Whether the disks are mirrored still.
    pub(super) fn look(&mut self, mirrors: &mut DiskMirrors) -> Result<(), End> {
        self.measurements.held(self.path.take_hold_times_us());
        self.measurements.write_if_due();
        let (stopped, held) = self.measurements.times();
        let stopped_share = self.measurements.stopped_share();
        let interval = self.pace.interval();
        self.shown.change(|report| {
            (report.stopped, report.held) = (stopped, held);
            report.stopped_share = stopped_share;
            report.gates = self.path.gates();
            report.interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        });
        // While it sends a checkpoint, QEMU answers nothing: it is looked at again later.
        if self.stopped.is_some() || self.is_asked {
            return Ok(());
        }
        let lost = |error: &dyn std::fmt::Display| End::Lost(error.to_string());
        if self.is_interval_old() {
            self.tell_interval()?;
        }
        // One that has left a question unanswered gets no other, or it would not read in the end that its connections are to be cut.
        if let Some(unanswered) = &mut self.unanswered {
            match unanswered.reply() {
                Ok(None) => return Ok(()),
                Ok(Some(_)) | Err(QmpError::Refused { .. }) => self.unanswered = None,
                Err(error) => return Err(lost(&error)),
            }
        }
        if self.are_marks_due {
            self.set_marks().map_err(|error| lost(&error))?;
            if self.are_marks_due {
                return self.leave_unanswered();
            }
        }
        let mut qmp = self.qmp.within(LOOK_LIMIT);
        let looked = match mirrors {
            DiskMirrors::Own(mirrors) if mirrors.is_empty() => Ok(()),
            DiskMirrors::Own(mirrors) => mirrors.state(&mut qmp).map(drop),
            DiskMirrors::Found(found @ None) => match running_mirrors(&mut qmp) {
                Ok(running) => {
                    *found = Some(running);
                    Ok(())
                }
                Err(error) => Err(MirrorError::from(error)),
            },
            DiskMirrors::Found(Some(0)) => Ok(()),
            DiskMirrors::Found(Some(count)) => match running_mirrors(&mut qmp) {
                Ok(running) if running < *count => return Err(lost(&"the mirror of a disk has ended")),
                looked => looked.map(drop).map_err(MirrorError::from),
            },
        };
        match looked {
            Ok(()) => Ok(()),
            Err(MirrorError::Qmp(QmpError::Timeout { .. })) => self.leave_unanswered(),
            Err(error) => Err(lost(&error)),
        }
    }

    /// QEMU hangs: once it has answered one more question, it has answered all.
    fn leave_unanswered(&mut self) -> Result<(), End> {
        let asked = self.qmp.ask("query-status", &json!({}));
        self.unanswered = Some(asked.map_err(|error| End::Lost(error.to_string()))?);
        Ok(())
    }
}
