//! Statuses to change and show in tests.

use colo_ring::metrics::Accumulator;
use colo_ring::receiver::{SessionStatus, StatusReport};
use serde_json::json;

/// A session of which nothing is known yet.
pub(crate) fn session(number: u32) -> SessionStatus {
    let value = json!({
        "session": number, "peer": "192.0.2.7:40000", "state": "precopy", "last_pause_ns": 0, "pages": 0, "zero_pages": 0,
        "bytes": 0, "pool_slabs_inline": 0, "fallbacks": [], "summary": Accumulator::new().summary()
    });
    serde_json::from_value(value).unwrap()
}

/// A receiver without a session.
pub(crate) fn status() -> StatusReport {
    let value = json!({
        "schema": "colo-ring.status", "schema_version": 1, "listen": [], "backend": "epoll", "cores": [0], "uptime_ms": 0,
        "ram_held_bytes": 0, "ram_limit_bytes": 0, "sessions": []
    });
    serde_json::from_value(value).unwrap()
}
