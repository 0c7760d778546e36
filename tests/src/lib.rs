//! What the tests of the whole share: the laboratory with real QEMU, captures, the command under test.

use colo_ring::net::HostWatch;
use colo_ring::receiver::{ListenAddress, ReceiverOptions};
use colo_ring::ring::BackendKind;
use colo_ring::store::{HugePages, StoreOptions};
use std::time::Duration;

/// How long a test waits for something that has to happen: a limit against hanging, not against a slow machine.
pub const HANG_LIMIT: Duration = Duration::from_secs(300);

pub mod capture;
pub mod cgroup;
pub mod command;
pub mod hostile;
pub mod lab;
pub mod loop_device;
pub mod model;
pub mod nbd;
pub mod random;
pub mod receiver;
pub mod shrink;

/// A receiver in this process, on a TCP port that is free, on all cores that it may use.
///
/// # Panics
/// If those are unknown.
#[must_use]
pub fn receiver_options(backend: BackendKind, channels: u8) -> ReceiverOptions {
    ReceiverOptions {
        listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
        channels,
        cores: colo_ring::host::allowed_cores().expect("cores to run on"),
        backend,
        registered: true,
        store: StoreOptions {
            hugepages: HugePages::Off,
            ..StoreOptions::default()
        },
        ram_limit_bytes: 1 << 30,
        disks: None,
        hist: None,
        described: serde_json::Value::Null,
        control: None,
        once: false,
        identify_deadline: HANG_LIMIT,
        precopy_deadline: HANG_LIMIT,
        sessions_per_origin: usize::MAX,
        host_watch: HostWatch::default(),
    }
}
