//! What a session knows of its guest that outlives it.

use crate::blocks::BlockTable;
use std::sync::Arc;

/// What is constant for a session and restarts the guest together with RAM and device state (spec §15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDescription {
    /// Header and configuration, verbatim.
    pub header: Vec<u8>,
    /// The machine type from it.
    pub machine_type: String,
    /// Id of the RAM section.
    pub ram_section: u32,
    /// The RAM blocks, in the primary's order.
    pub blocks: Arc<BlockTable>,
    /// The description of the device state: JSON from the primary, not trusted.
    pub vmdesc: Vec<u8>,
}
