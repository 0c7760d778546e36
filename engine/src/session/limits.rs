//! Limits of a session.

/// What the receiver was configured for.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// The primary's `multifd-channels`; 0 is plain mode.
    pub channels: u8,
    /// Largest guest to accept, in bytes over all RAM blocks.
    pub ram_limit_bytes: u64,
}

/// PINGs that are answered before RAM: 11.x sends one. The limit bounds what a primary can make the receiver send.
pub(super) const PINGS_MAX: u32 = 16;
