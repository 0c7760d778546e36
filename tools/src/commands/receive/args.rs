//! The options of `colo-ring receive`, and what a receiver is started with by them.

use crate::configuration::{self, Fault, GuestFile};
use crate::cores::{check_cores, cores_of_node, default_cores};
use crate::log::LogArgs;
use crate::options::{ControlAddress, CoreList, Size, Switch};
use crate::output::CommandError;
use clap::Args;
use colo_ring::host::{Placement, Topology};
use colo_ring::net::{HostWatch, PassedSockets};
use colo_ring::receiver::{
    DiskServing, GuestRules, Limits, ListenAddress, NameRule, RamLimit, ReceiverOptions,
};
use colo_ring::ring::BackendKind;
use colo_ring::sandbox::Sandbox;
use colo_ring::store::{CacheKind, CommitMode, HugePages, StoreOptions};
use colo_ring::text::mebibytes;
use colo_ring::tls::{Allowed, ServerCredentials};
use schemars::JsonSchema;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The port that IANA has assigned to NBD.
const NBD_PORT: u16 = 10809;

/// Largest device state of a guest, if nothing is said. Seen: 405 KB; a virtual GPU can have some ten MB.
const DEVICE_STATE_MAX: u64 = 64 << 20;

/// Least bytes of that.
const DEVICE_STATE_MIN: u64 = 1 << 20;

/// Least memory for all guests: with less, none that is one has a place.
const RAM_LIMIT_MIN: u64 = 16 << 20;

/// Least bytes of a disk's log.
const DISK_LOG_MIN: u64 = 8 << 20;

/// Options of `colo-ring receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Read options from this file, too, and what holds for single guests from guests.d/*.toml beside it: by their names, as in
    /// `listen = ["tcp:0.0.0.0:4444"]` and `ram-limit = "6G"`; those of the command line
    /// win [default: /etc/colo-ring/receive.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Where primaries connect to: tcp:ADDRESS:PORT (IPv6 in brackets, port 0 takes a free one) or unix:PATH;
    /// may be given several times
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub(super) listen: Vec<ListenAddress>,

    /// What a guest is called, and by what it is known: NAME,CONDITION… with one or more of listener=ADDRESS (as given to --listen),
    /// peer=ADDRESS or NETWORK, uuid=UUID; may be given several times. Else a guest has the name that its guard or `colo-ring protect`
    /// gives it, or its UUID. What a file of guests.d says of a guest of that name holds, but for its conditions
    #[arg(long, value_name = "NAME,CONDITION")]
    pub(super) guest: Vec<NameRule>,

    /// The primaries' multifd-channels; 0 = capability multifd off
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(super) channels: u8,

    /// Cores to receive on, like 2-5,8; the first guest begins at the first one, best not that of the network card's
    /// interrupt [default: those this process may use, at most one per channel]
    #[arg(long, value_name = "LIST", value_parser = CoreList::parse)]
    pub(super) cores: Option<CoreList>,

    /// Receive on the cores of this NUMA node, at most one per channel, into its memory: that of the network card, best
    #[arg(long, value_name = "N", conflicts_with = "cores")]
    pub(super) numa_node: Option<usize>,

    /// How to receive; without io_uring on this host, epoll takes its place with a warning
    #[arg(long, value_enum, default_value_t = BackendKind::Uring)]
    pub(super) backend: BackendKind,

    /// Receive into registered buffers (uring only) [default: on]
    #[arg(long, value_enum)]
    pub(super) registered: Option<Switch>,

    /// Where received pages wait for their commit
    #[arg(long, value_enum, default_value_t = CacheKind::Pool)]
    pub(super) cache: CacheKind,

    /// Most memory that the cache `pool` grows to by itself, like 512M, which is reserved for each guest; a checkpoint that needs more
    /// gets it as far as --ram-limit allows, slower, with a warning [default: as much as needed, of which half of the guest's
    /// RAM is reserved]
    #[arg(long, value_name = "SIZE")]
    pub(super) pool_max: Option<Size>,

    /// When pages are copied to the RAM image
    #[arg(long, value_enum, default_value_t = CommitMode::Deferred)]
    pub(super) commit: CommitMode,

    /// What guest memory is made of; what this host lacks is replaced, with a warning
    #[arg(long, value_enum, default_value_t = HugePages::Huge2M)]
    pub(super) hugepages: HugePages,

    /// Directory for guests' memory in files, on hugetlbfs or tmpfs: the last committed checkpoint is there for the next
    /// receiver with this directory, also when this one is killed [default: memory without a name]
    #[arg(long, value_name = "DIR")]
    pub(super) ram_dir: Option<PathBuf>,

    /// Make the directory of --ram-dir for this user alone (mode 0700) if it is not there: nothing below /dev/shm outlives a reboot
    #[arg(long, requires = "ram_dir")]
    pub(super) create_ram_dir: bool,

    /// Directory of guests' disks: the base of the export NAME is DIR/NAME.raw, a raw file or a symbolic link to a block device. Their
    /// primaries mirror them there over NBD, and what they write is committed with their checkpoints
    #[arg(long, value_name = "DIR")]
    pub(super) disks: Option<PathBuf>,

    /// Where to serve the disks: tcp:ADDRESS:PORT or unix:PATH; may be given several times [default: port 10809 of every
    /// --listen tcp:ADDRESS:PORT, and PATH.nbd of every --listen unix:PATH]
    #[arg(long, value_name = "ADDRESS", requires = "disks")]
    pub(super) nbd: Vec<ListenAddress>,

    /// Most bytes that the log of one disk may take; a guest whose log is full waits until some of it is applied
    #[arg(long, value_name = "SIZE", default_value = "4G", requires = "disks")]
    pub(super) disk_log_max: Size,

    /// Most memory for all guests together, like 6G: RAM, page pools, tables, device states, logs of disks; never more than this host, its
    /// cgroup and `ulimit -v` allow [default: three quarters of this host's memory]
    #[arg(long, value_name = "SIZE")]
    pub(super) ram_limit: Option<Size>,

    /// Largest device state of a guest: one that sends more ends. It has some hundred KB, with a virtual GPU many MB [default: 64M, or
    /// --ram-limit if that is less]
    #[arg(long, value_name = "SIZE")]
    pub(super) device_state_max: Option<Size>,

    /// All connections have TLS, with the certificates in this directory under QEMU's names: ca-cert.pem, server-cert.pem, server-key.pem,
    /// and ca-crl.pem if there is one. SIGHUP reads them again
    #[arg(long, value_name = "DIR")]
    pub(super) tls: Option<PathBuf>,

    /// Whether primaries and guards must have a certificate of that CA [default: on]
    #[arg(long, value_enum, requires = "tls")]
    pub(super) tls_verify_peer: Option<Switch>,

    /// Only this identity may connect: the distinguished name of a certificate, like CN=host1,O=Example, or one of its alternative names;
    /// may be given several times [default: every one that the CA has signed]
    #[arg(long, value_name = "IDENTITY", requires = "tls")]
    pub(super) tls_allow: Vec<String>,

    /// Write latency histograms to PREFIX.PHASE.hlog while it runs and PREFIX.json at the end; those of
    /// earlier runs are set aside as PREFIX.run-N.*, of which the newest 16 stay
    #[arg(long, value_name = "PREFIX")]
    pub(super) hist: Option<PathBuf>,

    /// Serve measurements to Prometheus at http://ADDRESS:PORT/metrics: tcp:ADDRESS:PORT or unix:PATH. Anyone who can connect reads
    /// them
    #[arg(long, value_name = "ADDRESS")]
    pub(super) metrics: Option<ListenAddress>,

    /// Answer `colo-ring status`, `dump`, `discard`, `end` and `failover` there; only this user may connect
    #[arg(long, value_name = "unix:PATH")]
    pub(super) control: Option<ControlAddress>,

    /// End after one session; exit code 0 if it was protected and ended by the primary's going away
    #[arg(long)]
    pub(super) once: bool,

    /// Seconds from a session's first connection until all of its channels must be there
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(super) accept_timeout: u64,

    /// Seconds that a primary may send next to nothing (less than 4 KiB a second) in its first copy, before its session is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(super) precopy_timeout: u64,

    /// Most sessions, running or kept, of one host (with IPv6, of one network of 64 bits)
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) sessions_per_origin: u16,

    /// Run CMD by sh when a primary is lost that has committed a checkpoint: with COLO_RING_EVENT (lost), COLO_RING_SESSION, COLO_RING_GUEST,
    /// COLO_RING_UUID, COLO_RING_LISTENER, COLO_RING_PEER, COLO_RING_CHECKPOINT (empty: nothing to resume),
    /// COLO_RING_CHECKPOINT_AGE_MS, COLO_RING_REASON, COLO_RING_MACHINE and COLO_RING_CONTROL
    #[arg(long, value_name = "CMD")]
    pub(super) on_loss: Option<String>,

    /// Run CMD by sh when a protected guest's session makes no progress for longer than its checkpoints are usually apart (COLO_RING_EVENT
    /// is stalled), and when it goes on (resumed); the other variables are those of --on-loss
    #[arg(long, value_name = "CMD")]
    pub(super) on_stall: Option<String>,

    /// Run it also for primaries that are lost before their first checkpoint; anyone who can connect can cause that
    #[arg(long, requires = "on_loss")]
    pub(super) on_loss_unprotected: bool,

    /// Seconds of silence after which a primary's host is probed (TCP keep-alive)
    #[arg(long, value_name = "SECONDS", default_value_t = HostWatch::default().probe_after_s, value_parser = clap::value_parser!(u32).range(1..=32767))]
    pub(super) keepalive: u32,

    /// Seconds without a sign of life after which a primary is lost (TCP_USER_TIMEOUT)
    #[arg(long, value_name = "SECONDS", default_value_t = HostWatch::default().give_up_after_s, value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub(super) user_timeout: u32,

    /// Confine this process to what a receiver needs: system calls, files, capabilities (docs/threat-model.md); `off` to look for a fault
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(super) sandbox: Switch,

    /// What guests.d has, beside the configuration file.
    #[arg(skip)]
    pub(crate) guest_files: Vec<GuestFile>,

    #[command(flatten)]
    pub(super) log: LogArgs,

    /// Print the report at the end as JSON (schema colo-ring.receive, version 1)
    #[arg(long)]
    pub(super) json: bool,
}

/// The options in force, as reports echo them.
#[derive(Serialize, JsonSchema)]
pub(super) struct Described {
    /// Addresses that primaries connect to.
    listen: Vec<String>,
    /// Names of guests, and by what they are recognised.
    guests: Vec<String>,
    /// multifd channels of each primary; 0 is plain mode.
    channels: u8,
    /// Cores that receive.
    cores: Vec<usize>,
    /// On which NUMA nodes they and the memory of guests are.
    placement: Placement,
    /// How bytes are received.
    backend: BackendKind,
    /// Whether reads go into registered buffers.
    registered: bool,
    /// Where received pages wait for their commit.
    cache: CacheKind,
    /// Most bytes of the pool of a guest; null for no limit of its own.
    pool_max_bytes: Option<u64>,
    /// When pages are copied to the RAM image.
    commit: CommitMode,
    /// The pages that hold guest memory.
    hugepages: HugePages,
    /// The directory of RAM images; null for a memfd.
    ram_dir: Option<PathBuf>,
    /// Memory that all guests may take together.
    ram_limit_bytes: u64,
    /// Largest device state.
    device_state_max_bytes: u64,
    /// The directory of guests' disks; null if none are served.
    disks: Option<PathBuf>,
    /// Addresses that disks are served on.
    nbd: Vec<String>,
    /// Most bytes of a disk's log.
    disk_log_max_bytes: u64,
    /// The directory of certificates and keys; null without TLS.
    tls: Option<PathBuf>,
    /// Whether primaries must have a certificate.
    tls_verify_peer: bool,
    /// Identities that may connect; empty for every one that the CA has signed.
    tls_allow: Vec<String>,
    /// Address of the metrics; null without them.
    metrics: Option<String>,
    /// Whether it ends after one session.
    once: bool,
    /// After how long a connection that says nothing is closed.
    accept_timeout_s: u64,
    /// Longest first copy without progress.
    precopy_timeout_s: u64,
    /// Most sessions from one host.
    sessions_per_origin: usize,
    /// Silence of a primary after which it is probed.
    keepalive_s: u32,
    /// Silence of a primary after which it is lost.
    user_timeout_s: u32,
    /// The `--on-loss` command; null without it.
    on_loss: Option<String>,
    /// Whether the process is confined.
    sandbox: bool,
}

/// The options, as a command of clap's.
pub(crate) fn command() -> clap::Command {
    ReceiveArgs::augment_args(clap::Command::new("receive"))
}

impl ReceiveArgs {
    pub(crate) fn into_options(self) -> Result<ReceiverOptions, CommandError> {
        self.check()?;
        let guests = self.guest_rules()?;
        let cores = match (&self.cores, self.numa_node) {
            (Some(list), _) => {
                check_cores(&list.0)?;
                list.0.clone()
            }
            (None, Some(node)) => cores_of_node(node, self.channels)?,
            (None, None) => default_cores(self.channels)?,
        };
        let ram_limit = RamLimit::find(self.ram_limit.map(|size| size.0), cores.len());
        let device_state_max_bytes = self.device_state_max(&ram_limit)?;
        let limits = self.limits();
        let tls = self.credentials()?;
        let disks = self.disks.map(|directory| DiskServing {
            directory,
            listen: match self.nbd.is_empty() {
                true => default_nbd(&self.listen),
                false => self.nbd,
            },
            log_max_bytes: self.disk_log_max.0,
        });
        let mut options = ReceiverOptions {
            described: serde_json::Value::Null,
            guests,
            listen: self.listen,
            channels: self.channels,
            cores,
            backend: self.backend,
            registered: self.registered != Some(Switch::Off),
            disks,
            tls,
            store: StoreOptions {
                hugepages: self.hugepages,
                ram_dir: self.ram_dir,
                cache: self.cache,
                pool_max: self.pool_max.map(|size| size.0),
                commit: self.commit,
                ..StoreOptions::default()
            },
            ram_limit,
            device_state_max_bytes,
            hist: self.hist,
            control: self.control.map(|address| address.0),
            once: self.once,
            identify_deadline: Duration::from_secs(self.accept_timeout),
            limits,
            host_watch: HostWatch {
                probe_after_s: self.keepalive,
                give_up_after_s: self.user_timeout,
            },
            sandbox: Sandbox::off(),
            samples: None,
            other_sockets: self.metrics.iter().filter_map(socket_path).collect(),
            configuration: configuration::directory(self.config.as_deref()),
            passed: PassedSockets::default(),
        };
        let is_confined = self.sandbox == Switch::On;
        let described = Described {
            metrics: self.metrics.as_ref().map(ToString::to_string),
            ..Described::of(&options, self.disk_log_max.0, self.on_loss, is_confined)
        };
        options.described = serde_json::to_value(described).map_err(std::io::Error::from)?;
        Ok(options)
    }

    /// Largest device state in bytes.
    fn device_state_max(&self, ram_limit: &RamLimit) -> Result<u64, CommandError> {
        let (most, name) = (ram_limit.bytes(), ram_limit.name());
        let refused = |text: String| Err(CommandError::Usage(text));
        match self.device_state_max.map(|size| size.0) {
            _ if most == 0 => refused(format!("no guest fits {name}: give --ram-limit, like 6G")),
            None => Ok(DEVICE_STATE_MAX.min(most)),
            Some(bytes) if bytes < DEVICE_STATE_MIN => refused(
                "--device-state-max must be at least 1M: device states of ordinary guests have some hundred KB".to_owned(),
            ),
            Some(bytes) if bytes > most => refused(format!(
                "--device-state-max {} is more than all guests may take together: {name} is {}",
                Size(bytes),
                mebibytes(most)
            )),
            Some(bytes) => Ok(bytes),
        }
    }

    /// What connections have their TLS with.
    fn credentials(&self) -> Result<Option<Arc<ServerCredentials>>, CommandError> {
        let Some(directory) = &self.tls else {
            return Ok(None);
        };
        let demands_certificate = self.tls_verify_peer != Some(Switch::Off);
        let allowed = Allowed::new(self.tls_allow.clone());
        let credentials = ServerCredentials::load(directory, demands_certificate, allowed);
        let credentials = credentials.map_err(|error| CommandError::Failed(format!("--tls: {error}")))?;
        Ok(Some(Arc::new(credentials)))
    }

    /// What SIGHUP can change.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            precopy_deadline: Duration::from_secs(self.precopy_timeout),
            sessions_per_origin: self.sessions_per_origin.into(),
        }
    }

    /// What guests are called, and what holds for one of them alone.
    pub(super) fn guest_rules(&self) -> Result<GuestRules, CommandError> {
        let rules = GuestFile::rules(&self.guest_files, &self.guest);
        let rules = GuestRules::new(rules, &self.listen);
        rules.map_err(|error| CommandError::Usage(format!("--guest: {error}")))
    }

    /// What is wrong with a guest's file beside the options and the other files.
    pub(crate) fn guest_fault(&self) -> Option<Fault> {
        let has_identities = self.tls.is_some() && self.tls_verify_peer != Some(Switch::Off);
        let needless = || (!has_identities).then(|| GuestFile::needless_identities(&self.guest_files))?;
        let rules = GuestFile::rules(&self.guest_files, &self.guest);
        match GuestRules::new(rules, &self.listen) {
            Err(error) => GuestFile::fault(&self.guest_files, &self.guest, &error),
            Ok(_) => needless(),
        }
    }

    /// Refuses what contradicts itself.
    pub(crate) fn check(&self) -> Result<(), CommandError> {
        let usage = |text: &str| Err(CommandError::Usage(text.to_owned()));
        if let Some(fault) = self.guest_fault() {
            return Err(CommandError::Usage(fault.to_string()));
        }
        self.guest_rules()?;
        if self.user_timeout < self.keepalive {
            return usage(
                "--user-timeout must not be shorter than --keepalive: a silent host is not given up before it was probed",
            );
        }
        if self.registered == Some(Switch::On) && self.backend != BackendKind::Uring {
            return usage("--registered on is for --backend uring: the others have no registered buffers");
        }
        if let Some(limit) = self.ram_limit.filter(|limit| limit.0 < RAM_LIMIT_MIN) {
            return Err(CommandError::Usage(format!(
                "--ram-limit {limit} is {}, in which no guest fits: give the unit, as in 6G",
                match limit.0 {
                    0..1024 => format!("{} bytes", limit.0),
                    bytes => mebibytes(bytes),
                }
            )));
        }
        if self.pool_max.is_some() && self.cache != CacheKind::Pool {
            return usage("--pool-max is a limit of --cache pool");
        }
        if self.tls_verify_peer == Some(Switch::Off) && !self.tls_allow.is_empty() {
            return usage("--tls-allow names identities, which --tls-verify-peer off does not ask for");
        }
        if self.disk_log_max.0 < DISK_LOG_MIN {
            return usage("--disk-log-max must be at least 8M: a log has two segments of 4 MiB");
        }
        Ok(())
    }
}

impl Described {
    fn of(
        options: &ReceiverOptions,
        disk_log_max_bytes: u64,
        on_loss: Option<String>,
        sandbox: bool,
    ) -> Self {
        let texts = |addresses: &[ListenAddress]| addresses.iter().map(ToString::to_string).collect();
        let disks = options.disks.as_ref();
        Self {
            disks: disks.map(|disks| disks.directory.clone()),
            nbd: disks.map_or_else(Vec::new, |disks| texts(&disks.listen)),
            disk_log_max_bytes,
            tls: options.tls.as_ref().map(|tls| tls.directory().to_owned()),
            tls_verify_peer: options.tls.as_ref().is_some_and(|tls| tls.demands_certificate()),
            tls_allow: (options.tls.as_ref())
                .map_or_else(Vec::new, |tls| tls.allowed().identities().to_vec()),
            metrics: None,
            listen: texts(&options.listen),
            guests: options.guests.iter().map(|rule| rule.name.to_string()).collect(),
            channels: options.channels,
            placement: Topology::read().place(&options.cores),
            cores: options.cores.clone(),
            backend: options.backend,
            registered: options.registered,
            cache: options.store.cache,
            pool_max_bytes: options.store.pool_max,
            commit: options.store.commit,
            hugepages: options.store.hugepages,
            ram_dir: options.store.ram_dir.clone(),
            ram_limit_bytes: options.ram_limit.bytes(),
            device_state_max_bytes: options.device_state_max_bytes,
            once: options.once,
            accept_timeout_s: options.identify_deadline.as_secs(),
            precopy_timeout_s: options.limits.precopy_deadline.as_secs(),
            sessions_per_origin: options.limits.sessions_per_origin,
            keepalive_s: options.host_watch.probe_after_s,
            user_timeout_s: options.host_watch.give_up_after_s,
            on_loss,
            sandbox,
        }
    }
}

/// Where disks are served if nothing is said: beside where primaries connect to.
fn default_nbd(listen: &[ListenAddress]) -> Vec<ListenAddress> {
    let mut addresses = Vec::new();
    for address in listen {
        let address = match address {
            ListenAddress::Tcp(address) => {
                let mut address = *address;
                address.set_port(NBD_PORT);
                ListenAddress::Tcp(address)
            }
            ListenAddress::Unix(path) => {
                let mut path = path.clone().into_os_string();
                path.push(".nbd");
                ListenAddress::Unix(path.into())
            }
        };
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// The path of a UNIX socket.
fn socket_path(address: &ListenAddress) -> Option<PathBuf> {
    match address {
        ListenAddress::Tcp(_) => None,
        ListenAddress::Unix(path) => Some(path.clone()),
    }
}
