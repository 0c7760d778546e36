//! What a capture says of itself in its header.

use colo_ring::host::Machine;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where a capture comes from. The header has it as JSON; unknown keys are skipped when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CaptureInfo {
    /// What recorded it: `proxy`, `synth`, `pcap`.
    pub captured: String,
    /// When the recording began, in nanoseconds since 1970.
    pub created_unix_ns: u64,
    /// The primary, as far as it is known: an address, or what QEMU it is.
    pub primary: Option<String>,
    /// The secondary, likewise.
    pub secondary: Option<String>,
    /// multifd channels, where the recorder knows.
    pub channels: Option<u8>,
    /// The options it was recorded with.
    pub options: serde_json::Value,
    /// The machine it was recorded on.
    pub machine: Machine,
}

impl CaptureInfo {
    /// A capture that begins now on this machine. The sides and the channels are not known yet.
    pub fn now(captured: &str, options: serde_json::Value) -> Self {
        // A clock before 1970 is not set: 0.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            captured: captured.to_owned(),
            created_unix_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            primary: None,
            secondary: None,
            channels: None,
            options,
            machine: Machine::read(),
        }
    }
}
