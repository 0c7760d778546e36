//! The end of a protection: QEMU leaves COLO, its output is released or its guest stopped, and mirrors are removed.

use super::super::report::GuardState;
use super::super::{on_loss, stop_mark, supervisor};
use super::{End, Guard, PATIENCE};
use crate::commands::unprotect::{cut_connections, end_migration, is_over, status_of};
use crate::guest_disks::remove_all;
use crate::output::{CommandError, print, tell};
use crate::qmp::QmpError;
use serde_json::json;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long a monitor may take to greet whoever looks whether QEMU is there.
const GREETING_LIMIT: Duration = Duration::from_secs(1);

/// How long it may take until it is known that a monitor was closed that could not be written to.
const CLOSE_LIMIT: Duration = Duration::from_millis(100);

/// How long it may take until all gates are open: longer than QEMU may take for a card's filters.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

impl Guard<'_> {
    /// Ends what is left of a protection. The exit code, if the guard ends by it.
    pub(super) fn end(&mut self, end: End) -> Option<ExitCode> {
        let (reason, code) = match end {
            End::Lost(reason) => (reason, None),
            End::Asked => {
                self.path.leave();
                ("the guard was ended".to_owned(), Some(ExitCode::SUCCESS))
            }
            End::Abandoned => return Some(self.abandoned()),
            End::NoGuest(error) => return Some(self.monitor_closed(&error)),
            End::HandedOver => return Some(self.handed_over()),
        };
        let was = self.mark_unprotected(&reason);
        let stops = code.is_none() && self.stops_now(was);
        if let Err(error) = self.leave_colo(stops, was, code.is_some()) {
            return match self.qmp.wait_closed(CLOSE_LIMIT) {
                true => Some(self.monitor_closed(&QmpError::Closed { command: reason })),
                false => {
                    tell(&format!(
                        "WARNING: {}: the protection could not be ended: {error}",
                        self.args.name
                    ));
                    Some(ExitCode::from(supervisor::NOT_RELEASED))
                }
            };
        }
        if was {
            self.print_state();
        }
        if was || self.told != reason {
            let name = &self.args.name;
            tell(&end_line(name, &reason, stops, was, code.is_some()));
        }
        if was && code.is_none() {
            on_loss::run(self.args, &reason);
        }
        self.told = reason;
        code
    }

    /// Whether the guest stops because it is protected no more. One that was never protected is not stopped for want of a receiver.
    fn stops_now(&self, was_protected: bool) -> bool {
        self.stops() && (was_protected || self.has_stopped)
    }

    /// Nobody has asked for the end of this guard: it ends the protection as if its receiver were lost, and nobody protects the guest again.
    fn abandoned(&mut self) -> ExitCode {
        let reason = "the guard's supervisor is gone";
        let was = self.mark_unprotected(reason);
        let stops = self.stops_now(was);
        if !stops {
            self.path.leave();
        }
        if let Err(error) = self.leave_colo(stops, was, !stops) {
            tell(&format!(
                "WARNING: {}: {reason}, and the protection could not be ended: {error}",
                self.args.name
            ));
            return ExitCode::FAILURE;
        }
        self.print_state();
        tell(&end_line(&self.args.name, reason, stops, was, false));
        if was {
            on_loss::run_and_wait(self.args, reason);
        }
        ExitCode::FAILURE
    }

    /// QEMU has ended, or the connection to its monitor alone: then another worker goes on.
    fn monitor_closed(&self, error: &QmpError) -> ExitCode {
        match is_monitor_there(&self.args.primary.qmp) {
            true => {
                tell(&format!(
                    "WARNING: {}: {error}; QEMU is there still, and the guard begins again",
                    self.args.name
                ));
                ExitCode::from(supervisor::MONITOR_LOST)
            }
            false => supervisor::qemu_ended(self.args),
        }
    }

    /// QEMU was ended, and what was let go has left.
    fn handed_over(&mut self) -> ExitCode {
        let to = &self.args.primary.to;
        tell(&format!(
            "{}: handed over to the receiver at {to}; its QEMU was ended",
            self.args.name
        ));
        self.mark_unprotected("handed over to its receiver");
        self.print_state();
        ExitCode::SUCCESS
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
                "WARNING: {}: its state cannot be printed: {error}",
                self.args.name
            ));
        }
    }

    /// Ends COLO, releases the output unless the guest `stops`, and ends the mirrors. Where the guest was protected, QEMU's migration is this one.
    /// What a guard that `ends` cannot release is left to nobody.
    fn leave_colo(&mut self, stops: bool, was: bool, ends: bool) -> Result<(), CommandError> {
        // What waits for a receiver that does not answer need not be waited for.
        if std::mem::take(&mut self.is_silent)
            && let Err(error) = cut_connections(&mut self.qmp)
        {
            tell(&format!("WARNING: {}: {error}", self.args.name));
        }
        if was || !self.is_others_migration() {
            end_migration(&mut self.qmp, PATIENCE)?;
        }
        if stops {
            self.path.unlink();
        } else {
            self.path.left();
            let opened = self.path.open();
            if ends && !opened.recv_timeout(OPEN_LIMIT).unwrap_or(false) {
                return Err(CommandError::Failed(
                    "its output could not be released".to_owned(),
                ));
            }
        }
        self.has_stopped = stops;
        let done = match stops {
            true => stop_mark::stop(&mut self.qmp),
            // What this guard has stopped runs again when it ends.
            false if self.stops() => stop_mark::run_on(&mut self.qmp).map(drop),
            false => Ok(()),
        };
        done.map_err(CommandError::failed)?;
        if let Err(error) = remove_all(&mut self.qmp) {
            tell(&format!(
                "WARNING: mirrors of the guest's disks are left: {error}"
            ));
        }
        Ok(())
    }

    /// Whether a migration is under way that is none of COLO: the operator's, which goes on. A QEMU that does not answer has none that is
    /// known.
    fn is_others_migration(&mut self) -> bool {
        let mut qmp = self.qmp.within(PATIENCE);
        let mut ask = |command| qmp.execute(command, &json!({}));
        let is_under_way = ask("query-migrate").is_ok_and(|state| !is_over(status_of(&state)));
        is_under_way
            && ask("query-migrate-capabilities").is_ok_and(|list| {
                let mut listed = list.as_array().into_iter().flatten();
                listed.any(|one| one["capability"] == "x-colo" && one["state"] == false)
            })
    }

    /// Whether it was protected.
    fn mark_unprotected(&mut self, reason: &str) -> bool {
        let mut was = std::mem::take(&mut self.takes_over);
        self.shown.change(|report| {
            was |= report.state == GuardState::Protected;
            report.state = GuardState::Unprotected;
            report.session = None;
            report.reason = Some(reason.to_owned());
            report.unprotected_since.get_or_insert_with(Instant::now);
        });
        (self.stopped, self.is_protected, self.session) = (None, false, None);
        was
    }
}

/// What is said of the end of a protection, or of an attempt: whether the guest `stops`, `was` protected, and whether the operator has
/// `asked` for it; otherwise it is a warning.
fn end_line(name: &str, reason: &str, stops: bool, was: bool, asked: bool) -> String {
    let guest = match (stops, was) {
        (true, _) => "the guest is stopped until it is protected again (--on-receiver-lost stop)",
        (false, true) => "the guest runs on, unprotected",
        (false, false) => "the guest is not protected",
    };
    let level = if asked { "" } else { "WARNING: " };
    format!("{level}{name}: {reason}; {guest}")
}

/// Whether QEMU serves its monitor. A QEMU that is ending may take a connection, and closes it.
fn is_monitor_there(path: &Path) -> bool {
    let Ok(mut monitor) = UnixStream::connect(path) else {
        return false;
    };
    if monitor.set_read_timeout(Some(GREETING_LIMIT)).is_err() {
        return true;
    }
    match monitor.read(&mut [0]) {
        Ok(count) => count > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Level;

    /// An alert looks at the level.
    #[test]
    fn a_protection_that_is_lost_is_a_warning() {
        for (stops, was) in [(true, true), (false, true), (false, false)] {
            let level = |asked| Level::of(&end_line("web3", "it is gone", stops, was, asked)).0;
            assert_eq!((level(false), level(true)), (Level::Warning, Level::Info));
        }
        assert_eq!(
            end_line("web3", "it is gone", false, true, false),
            "WARNING: web3: it is gone; the guest runs on, unprotected"
        );
    }
}
