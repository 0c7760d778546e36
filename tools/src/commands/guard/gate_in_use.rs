//! A gate as the output's thread uses it.

use super::gate::{GateError, OutputGate};
use super::path::PathEvent;

/// A gate, and whether it has failed: then it is left alone until it recovers. What it waits for may be there for ever.
pub(super) struct GateInUse {
    pub(super) gate: Box<dyn OutputGate>,
    pub(super) has_failed: bool,
    /// It was to be opened, and could not.
    is_to_open: bool,
}

impl From<Box<dyn OutputGate>> for GateInUse {
    fn from(gate: Box<dyn OutputGate>) -> Self {
        Self {
            gate,
            has_failed: false,
            is_to_open: false,
        }
    }
}

impl GateInUse {
    /// Has the gate do something. The event, when it fails.
    pub(super) fn act(
        &mut self,
        act: impl FnOnce(&mut dyn OutputGate) -> Result<(), GateError>,
    ) -> Result<(), PathEvent> {
        act(&mut *self.gate).map_err(|error| {
            self.has_failed = true;
            PathEvent::GateFailed(error.to_string())
        })
    }

    /// One that has failed is used again, if it can be.
    pub(super) fn recover(&mut self) -> Result<(), PathEvent> {
        if self.has_failed {
            self.act(|gate| gate.recover())?;
            if self.is_to_open {
                self.open()?;
            }
            self.has_failed = false;
        }
        Ok(())
    }

    /// Lets everything pass; one that fails does so when it recovers.
    pub(super) fn open(&mut self) -> Result<(), PathEvent> {
        self.is_to_open = true;
        self.act(|gate| gate.open())?;
        self.is_to_open = false;
        Ok(())
    }
}
