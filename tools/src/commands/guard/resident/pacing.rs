//! When checkpoints begin.
//!
//! Where they follow the output, QEMU is made to ask for the next one as soon as its guest runs again, and the receiver keeps that request
//! ([`colo_ring::link`]). So when output waits, a message on the link lets the checkpoint begin, and QEMU's monitor is not in the way. QEMU's own interval stays
//! what it would be without that: if link or guard are lost, the receiver answers at once, and QEMU asks again after its interval. A checkpoint without a barrier shows that the
//! receiver has given up the link, and keeps nothing: QEMU is not made to ask after that, or one checkpoint would follow the other.

use super::{End, Guard};
use crate::options::Switch;
use crate::qmp::Asked;
use serde_json::json;
use std::time::Instant;

/// By which part the interval must change before it is set in QEMU.
const INTERVAL_CHANGE: f64 = 0.2;

impl Guard<'_> {
    /// Has QEMU ask for the next checkpoint. The receiver keeps that request, so that QEMU's monitor is not in the way when output waits.
    pub(super) fn request_ahead(&mut self) -> Result<(), End> {
        if self.stopped.is_some() || !std::mem::take(&mut self.is_due) {
            return Ok(());
        }
        self.tell_interval()
    }

    /// Lets the next checkpoint begin when output waits, once the pace allows it.
    pub(super) fn follow_output(&mut self, now: Instant) {
        let may = self.asks_for_output() && !self.follows_output && self.stopped.is_none();
        if may && self.pace.wait(now).is_zero() {
            self.follows_output = true;
            self.path.follow_output();
        }
    }

    /// The receiver keeps requests of QEMU, where checkpoints follow the output.
    pub(super) fn keep_requests(&mut self) {
        if self.asks_for_output() {
            self.path.keep_requests(self.interval);
            (self.is_due, self.follows_output) = (true, false);
        }
    }

    /// Sets the time between checkpoints, which starts one at once; or after the one that is under way, and only then QEMU answers.
    pub(super) fn tell_interval(&mut self) -> Result<(), End> {
        if self.is_interval_old() {
            self.interval = self.pace.interval();
            if self.asks_for_output() {
                self.path.keep_requests(self.interval);
            }
        }
        let milliseconds = u32::try_from(self.interval.as_millis()).unwrap_or(u32::MAX);
        let parameters = json!({"x-checkpoint-delay": milliseconds});
        let asked = self.qmp.ask("migrate-set-parameters", &parameters);
        self.asked = Some(asked.map_err(|error| End::Lost(error.to_string()))?);
        Ok(())
    }

    /// Whether QEMU has refused what it was asked for.
    pub(super) fn check_asked(&mut self) -> Result<(), End> {
        match self.asked.as_mut().map(Asked::reply) {
            None | Some(Ok(None)) => {}
            Some(Ok(Some(_))) => self.asked = None,
            Some(Err(error)) => return Err(End::Lost(error.to_string())),
        }
        Ok(())
    }

    /// Whether QEMU's interval is not the one that the pauses ask for any more.
    pub(super) fn is_interval_old(&self) -> bool {
        let (now, told) = (self.pace.interval().as_secs_f64(), self.interval.as_secs_f64());
        (now - told).abs() > told * INTERVAL_CHANGE
    }

    /// Whether checkpoints follow the output.
    pub(super) fn asks_for_output(&self) -> bool {
        self.args.output_checkpoints == Switch::On
    }
}
