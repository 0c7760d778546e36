//! What the tests of the whole share: the laboratory with real QEMU, captures, the command under test.

use colo_ring::net::{HostWatch, PassedSockets};
use colo_ring::receiver::{GuestRules, ListenAddress, RamLimit, ReceiverOptions};
use colo_ring::ring::BackendKind;
use colo_ring::sandbox::Sandbox;
use colo_ring::store::{HugePages, StoreOptions};
use std::time::Duration;

/// How long a test waits for something that has to happen: a limit against hanging, not against a slow machine.
pub const HANG_LIMIT: Duration = Duration::from_secs(300);

pub mod capture;
pub mod cgroup;
pub mod command;
pub mod conversation;
pub mod hostile;
#[cfg(target_arch = "x86_64")]
pub mod intruder;
pub mod lab;
pub mod loop_device;
pub mod model;
pub mod nbd;
pub mod openmetrics;
pub mod random;
pub mod receiver;
pub mod schema;
pub mod shrink;
pub mod tls;

/// A receiver in this process, on a TCP port that is free, on all cores that it may use.
///
/// # Panics
/// If those are unknown.
#[must_use]
pub fn receiver_options(backend: BackendKind, channels: u8) -> ReceiverOptions {
    ReceiverOptions {
        listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
        guests: GuestRules::default(),
        channels,
        cores: colo_ring::host::allowed_cores().expect("cores to run on"),
        backend,
        registered: true,
        store: StoreOptions {
            hugepages: HugePages::Off,
            ..StoreOptions::default()
        },
        ram_limit: RamLimit::exactly(12 << 30),
        device_state_max_bytes: 64 << 20,
        disks: None,
        tls: None,
        hist: None,
        described: serde_json::Value::Null,
        control: None,
        once: false,
        identify_deadline: HANG_LIMIT,
        limits: colo_ring::receiver::Limits {
            precopy_deadline: HANG_LIMIT,
            sessions_per_origin: usize::MAX,
        },
        host_watch: HostWatch::default(),
        sandbox: Sandbox::off(),
        samples: None,
        other_sockets: Vec::new(),
        configuration: None,
        passed: PassedSockets::default(),
    }
}
