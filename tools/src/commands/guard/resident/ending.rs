//! The end of a protection: QEMU leaves COLO, its output is released or its guest stopped, and mirrors are removed.

use super::super::report::GuardState;
use super::super::{OnReceiverLost, on_loss};
use super::{End, Guard, PATIENCE};
use crate::commands::unprotect::end_migration;
use crate::guest_disks::remove_all;
use crate::output::{CommandError, print, tell};
use serde_json::json;
use std::process::ExitCode;
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
            self.print_state();
        }
        if was || self.told != reason {
            self.tell_end(&reason, stops, was);
        }
        if was && code.is_none() {
            on_loss::run(self.args, &reason);
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
        self.print_state();
        Ok(ExitCode::SUCCESS)
    }

    /// For machines: the state, when it has changed.
    pub(super) fn print_state(&self) {
        if !self.args.json {
            return;
        }
        // Nobody may be there to read it: that ends no protection.
        let printed = self
            .shown
            .line()
            .map_err(CommandError::failed)
            .and_then(|line| print(&line));
        if let Err(error) = printed {
            tell(&format!(
                "{}: WARNING: its state cannot be printed: {error}",
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
        let mut was = std::mem::take(&mut self.takes_over);
        self.shown.change(|report| {
            was |= report.state == GuardState::Protected;
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
