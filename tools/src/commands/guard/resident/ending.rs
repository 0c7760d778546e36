//! The end of a protection: QEMU leaves COLO, its output is released or its guest stopped, and mirrors are removed.

use super::super::OnReceiverLost;
use super::super::report::GuardState;
use super::{End, Guard, PATIENCE};
use crate::commands::unprotect::end_migration;
use crate::guest_disks::remove_all;
use crate::output::{CommandError, print, printable, tell};
use serde_json::json;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

impl Guard<'_> {
    /// Ends what is left of a protection. The exit code, if the guard ends by it.
    pub(super) fn end(&mut self, end: End) -> Result<Option<ExitCode>, CommandError> {
        let (reason, code) = match end {
            End::Lost(reason) => (reason, None),
            End::Asked => {
                self.path.leave();
                ("the guard was ended".to_owned(), Some(ExitCode::SUCCESS))
            }
            End::NoGuest(error) => return Err(CommandError::failed(error)),
            End::HandedOver => return self.handed_over().map(Some),
        };
        let was = self.mark_unprotected(&reason);
        // One that was never protected is not stopped for want of a receiver.
        let stops =
            self.args.on_receiver_lost == OnReceiverLost::Stop && code.is_none() && (was || self.has_stopped);
        self.leave_colo(stops)
            .map_err(|error| match self.qmp.is_closed() {
                true => CommandError::Failed(format!("QEMU has ended ({reason})")),
                false => error,
            })?;
        if was {
            self.print_state()?;
        }
        if was || self.told != reason {
            self.tell_end(&reason, stops, was);
        }
        if was && code.is_none() {
            self.on_loss(&reason);
        }
        self.told = reason;
        Ok(code)
    }

    /// QEMU was ended, and what was let go has left.
    fn handed_over(&mut self) -> Result<ExitCode, CommandError> {
        let to = &self.args.primary.to;
        tell(&format!(
            "{}: handed over to the receiver at {to}; its QEMU was ended",
            self.args.name
        ));
        self.mark_unprotected("handed over to its receiver");
        self.print_state()?;
        Ok(ExitCode::SUCCESS)
    }

    /// For machines: the state, when it has changed.
    pub(super) fn print_state(&self) -> Result<(), CommandError> {
        match self.args.json {
            true => print(&self.shown.line().map_err(CommandError::failed)?),
            false => Ok(()),
        }
    }

    /// Runs the operator's command, which is not waited for.
    fn on_loss(&self, reason: &str) {
        let Some(command) = &self.args.on_loss else { return };
        let mut shell = Command::new("sh");
        shell
            .args(["-c", command])
            .env("COLO_RING_NAME", &self.args.name)
            .env("COLO_RING_REASON", printable(reason))
            .env("COLO_RING_QMP", &self.args.primary.qmp)
            .env("COLO_RING_TO", self.args.primary.to.to_string())
            .stdin(Stdio::null())
            // Standard output is for the states.
            .stdout(std::io::stderr());
        let name = self.args.name.clone();
        let run = move || match shell.status() {
            Ok(status) if status.success() => {}
            Ok(status) => tell(&format!("{name}: WARNING: --on-loss failed ({status})")),
            Err(error) => tell(&format!("{name}: WARNING: --on-loss: {error}")),
        };
        if let Err(error) = std::thread::Builder::new().name("on-loss".to_owned()).spawn(run) {
            tell(&format!(
                "{}: WARNING: --on-loss was not run: no thread for it: {error}",
                self.args.name
            ));
        }
    }

    fn tell_end(&self, reason: &str, stops: bool, was: bool) {
        let guest = match (stops, was) {
            (true, _) => "the guest is stopped until it is protected again (--on-receiver-lost stop)",
            (false, true) => "the guest runs on, unprotected",
            (false, false) => "the guest is not protected",
        };
        tell(&format!("{}: {reason}; {guest}", self.args.name));
    }

    /// Ends COLO, releases the output unless the guest `stops`, and ends the mirrors.
    fn leave_colo(&mut self, stops: bool) -> Result<(), CommandError> {
        end_migration(&mut self.qmp, PATIENCE)?;
        match stops {
            true => self.path.unlink(),
            false => self.path.open(),
        }
        // What this guard has stopped runs again when it ends.
        let command = match (stops, std::mem::replace(&mut self.has_stopped, stops)) {
            (true, _) => Some("stop"),
            (false, true) => Some("cont"),
            (false, false) => None,
        };
        if let Some(command) = command {
            self.qmp
                .execute(command, &json!({}))
                .map_err(CommandError::failed)?;
        }
        if let Err(error) = remove_all(&mut self.qmp) {
            tell(&format!(
                "WARNING: mirrors of the guest's disks are left: {error}"
            ));
        }
        Ok(())
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
        (self.stopped, self.is_protected, self.session) = (None, false, None);
        was
    }
}
