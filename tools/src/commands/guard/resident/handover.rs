//! A planned move: the guest goes on at the receiver after a last checkpoint.

use super::super::GuardEvent;
use super::super::path::PathEvent;
use super::{BIND_LIMIT, End, Guard, closed};
use crate::output::tell;

/// How often a guest that is handed over is asked for a checkpoint: the first may have begun before the receiver knew that it was to be the
/// last. Then that of the interval is.
const LAST_ASKS: u8 = 2;

impl Guard<'_> {
    /// The operator wants the guest to go on at the receiver: it gets a last checkpoint, and then QEMU is ended.
    pub(super) fn prepare_handover(&mut self) {
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
                "WARNING: {}: it cannot be handed over to the receiver: {error}",
                self.args.name
            )),
        }
        self.path.hand_over(process);
    }

    /// Asks for the last checkpoint at once.
    pub(super) fn ask_for_the_last(&mut self) -> Result<(), End> {
        let Some(left @ 1..) = self.last_asks else {
            return Ok(());
        };
        if self.stopped.is_some() || self.is_asked {
            return Ok(());
        }
        (self.last_asks, self.is_asked) = (Some(left - 1), true);
        self.tell_interval()
    }

    /// QEMU has ended: by itself, or because its guest was handed over.
    pub(super) fn qemu_ended(&mut self) -> End {
        while self.last_asks.is_some() {
            match self.events.recv_timeout(BIND_LIMIT) {
                Ok(GuardEvent::Path(PathEvent::HandedOver)) => return End::HandedOver,
                Ok(event) => self.note(&event),
                Err(_) => break,
            }
        }
        closed()
    }
}
