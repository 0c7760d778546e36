//! The TCP settings that decide how fast a checkpoint is received.

use super::proc;
use schemars::JsonSchema;
use serde::Serialize;

/// The settings of this network namespace. A value that cannot be read is none.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct NetworkReport {
    /// Congestion control of new sockets. The primary's decides how it sends; ours only matters for tests on loopback.
    pub congestion_control: Option<String>,
    /// Whether a connection that was idle starts slowly again: that delays every checkpoint, on the primary.
    pub slow_start_after_idle: Option<bool>,
    /// Most connections that wait to be accepted: it must hold the channels of all sessions that begin together.
    pub somaxconn: Option<u64>,
    /// Most bytes to which a TCP receive buffer grows by itself.
    pub tcp_rmem_max_bytes: Option<u64>,
}

impl NetworkReport {
    /// Reads them.
    pub fn read() -> Self {
        Self {
            congestion_control: congestion_control(),
            slow_start_after_idle: proc::number("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
                .map(|n| n != 0),
            somaxconn: proc::number("/proc/sys/net/core/somaxconn"),
            tcp_rmem_max_bytes: proc::text("/proc/sys/net/ipv4/tcp_rmem")
                .and_then(|text| text.split_whitespace().nth(2)?.parse().ok()),
        }
    }
}

/// Congestion control of new sockets.
pub(super) fn congestion_control() -> Option<String> {
    proc::text("/proc/sys/net/ipv4/tcp_congestion_control")
}
