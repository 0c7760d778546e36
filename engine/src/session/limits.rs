//! Limits of a session.

use crate::wire::limits::VMSTATE_MAX;

/// What the receiver was configured for.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// The primary's `multifd-channels`; 0 is plain mode.
    pub channels: u8,
    /// Largest device state to accept, in bytes.
    pub device_state_max_bytes: u64,
}

impl SessionLimits {
    /// Those of the protocol alone, where nothing of a guest is kept.
    pub fn of_protocol(channels: u8) -> Self {
        Self {
            channels,
            device_state_max_bytes: VMSTATE_MAX,
        }
    }

    /// The same as a length.
    pub(super) fn device_state_max(&self) -> usize {
        usize::try_from(self.device_state_max_bytes).unwrap_or(usize::MAX)
    }
}

/// PINGs that are answered before RAM: 11.x sends one. The limit bounds what a primary can make the receiver send.
pub(super) const PINGS_MAX: u32 = 16;
