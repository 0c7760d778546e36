//! What a receiver is started with.

use crate::net::HostWatch;
use crate::net::ListenAddress;
use crate::ring::BackendKind;
use crate::store::StoreOptions;
use std::path::PathBuf;
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

/// Everything a receiver is started with.
#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// Addresses to listen on, at least one.
    pub listen: Vec<ListenAddress>,
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
    /// Most guest RAM to hold, over all guests together, in bytes.
    pub ram_limit_bytes: u64,
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
    /// How long a primary may send nothing in its first copy.
    pub precopy_deadline: Duration,
    /// Most sessions of one origin, running or kept.
    pub sessions_per_origin: usize,
    /// When a primary whose host is silent counts as lost.
    pub host_watch: HostWatch,
}
