//! What a receiver is started with.

use super::guest_rules::GuestRules;
use super::ram_limit::RamLimit;
use crate::metrics::SampleQueue;
use crate::net::HostWatch;
use crate::net::ListenAddress;
use crate::net::PassedSockets;
use crate::ring::BackendKind;
use crate::sandbox::Sandbox;
use crate::store::StoreOptions;
use crate::tls::ServerCredentials;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where guests' disks are, and where they are served.
#[derive(Clone, Debug)]
pub struct DiskServing {
    /// The directory of their bases, `NAME.raw`.
    pub directory: PathBuf,
    /// Addresses of the NBD server, at least one.
    pub listen: Vec<ListenAddress>,
    /// Most bytes of one disk's log.
    pub log_max_bytes: u64,
}

/// Limits that can change while a receiver runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a primary may send nothing in its first copy.
    pub precopy_deadline: Duration,
    /// Most sessions of one origin, running or kept.
    pub sessions_per_origin: usize,
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a first copy may stand still for {} s, {} sessions of one origin",
            self.precopy_deadline.as_secs(),
            self.sessions_per_origin
        )
    }
}

/// Everything a receiver is started with.
#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// Addresses to listen on, at least one.
    pub listen: Vec<ListenAddress>,
    /// What all connections have their TLS with; without, none has TLS.
    pub tls: Option<Arc<ServerCredentials>>,
    /// What guests are called, and what holds for one of them alone.
    pub guests: GuestRules,
    /// The primaries' `multifd-channels`; 0 is plain mode.
    pub channels: u8,
    /// Cores to receive on, at least one.
    pub cores: Vec<usize>,
    /// How to receive.
    pub backend: BackendKind,
    /// Whether `uring` receives into registered buffers.
    pub registered: bool,
    /// Guests' disks; none are served without.
    pub disks: Option<DiskServing>,
    /// How guests' memory is made. Shards and their nodes are set by the receiver.
    pub store: StoreOptions,
    /// Most memory for guests, over all of them together.
    pub ram_limit: RamLimit,
    /// Most bytes of a guest's device state; no more than [`Self::ram_limit`] has.
    pub device_state_max_bytes: u64,
    /// Path prefix of the histogram files; None writes none.
    pub hist: Option<PathBuf>,
    /// Options as they were given, for the report.
    pub described: serde_json::Value,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// End after the first session.
    pub once: bool,
    /// From a session's first connection until all of its channels must be identified.
    pub identify_deadline: Duration,
    /// Those that can change.
    pub limits: Limits,
    /// When a primary whose host is silent counts as lost.
    pub host_watch: HostWatch,
    /// Confines the threads of the receiver; the thread that starts it is confined in its access to files and to TCP.
    pub sandbox: Sandbox,
    /// Takes the sample of every checkpoint once it is recorded here, for measurements of the caller's own.
    pub samples: Option<Arc<SampleQueue>>,
    /// UNIX sockets of the caller, which the thread that starts the receiver may remove afterwards.
    pub other_sockets: Vec<PathBuf>,
    /// A directory whose files that thread may read again.
    pub configuration: Option<PathBuf>,
    /// Sockets that listen already.
    pub passed: PassedSockets,
}

impl ReceiverOptions {
    /// All addresses that it listens on.
    pub fn addresses(&self) -> impl Iterator<Item = ListenAddress> {
        let disks = self.disks.iter().flat_map(|disks| &disks.listen);
        let control = self.control.clone().map(ListenAddress::Unix);
        self.listen.iter().chain(disks).cloned().chain(control)
    }
}
