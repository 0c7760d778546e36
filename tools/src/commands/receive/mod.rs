//! `colo-ring receive`: the secondary.

mod event_log;
mod on_loss;
#[cfg(test)]
mod tests;

use crate::cores::{cores_of_node, default_cores};
use crate::options::{ControlAddress, CoreList, Size, Switch};
use crate::output::{CommandError, ProgressLine, print, print_json, tell};
use crate::{session_text, signals, stderr};
use clap::Args;
use colo_ring::host::{Machine, Placement, Topology};
use colo_ring::metrics::Report;
use colo_ring::net::HostWatch;
use colo_ring::receiver::{
    DiskServing, Event, ListenAddress, Outcome, Receiver, ReceiverOptions, Request, Response, SessionStatus,
    StatusReport,
};
use colo_ring::ring::BackendKind;
use colo_ring::store::{CacheKind, CommitMode, HugePages, StoreOptions};
use event_log::EventLog;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use on_loss::OnLoss;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Options of `colo-ring receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where primaries connect to: tcp:ADDRESS:PORT (IPv6 in brackets, port 0 takes a free one) or unix:PATH;
    /// may be given several times
    #[arg(long, value_name = "ADDRESS", required = true)]
    listen: Vec<ListenAddress>,

    /// The primaries' multifd-channels; 0 = capability multifd off
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,

    /// Cores to receive on, like 2-5,8; the first guest begins at the first one, best not that of the network card's
    /// interrupt [default: those this process may use, at most one per channel]
    #[arg(long, value_name = "LIST", value_parser = CoreList::parse)]
    cores: Option<CoreList>,

    /// Receive on the cores of this NUMA node, at most one per channel, into its memory: that of the network card, best
    #[arg(long, value_name = "N", conflicts_with = "cores")]
    numa_node: Option<usize>,

    /// How to receive; without io_uring on this host, epoll takes its place with a warning
    #[arg(long, value_enum, default_value_t = BackendKind::Uring)]
    backend: BackendKind,

    /// Receive into registered buffers (uring only)
    #[arg(long, value_enum, default_value_t = Switch::On)]
    registered: Switch,

    /// Where received pages wait for their commit
    #[arg(long, value_enum, default_value_t = CacheKind::Pool)]
    cache: CacheKind,

    /// Most memory that the cache `pool` grows to by itself, like 512M; a checkpoint that needs more gets it, slower,
    /// with a warning [default: as much as the guest's RAM]
    #[arg(long, value_name = "SIZE")]
    pool_max: Option<Size>,

    /// When pages are copied to the RAM image
    #[arg(long, value_enum, default_value_t = CommitMode::Deferred)]
    commit: CommitMode,

    /// What guest memory is made of; what this host lacks is replaced, with a warning
    #[arg(long, value_enum, default_value_t = HugePages::Huge2M)]
    hugepages: HugePages,

    /// Directory for guests' memory in files, on hugetlbfs or tmpfs: the last committed checkpoint is there for the next
    /// receiver with this directory, also when this one is killed [default: memory without a name]
    #[arg(long, value_name = "DIR")]
    ram_dir: Option<PathBuf>,

    /// Directory of guests' disks: the base of the export NAME is DIR/NAME.raw, a raw file or a symbolic link to a block device. Their
    /// primaries mirror them there over NBD, and what they write is committed with their checkpoints
    #[arg(long, value_name = "DIR")]
    disks: Option<PathBuf>,

    /// Where to serve the disks: tcp:ADDRESS:PORT or unix:PATH; may be given several times [default: port 10809 of every
    /// --listen tcp:ADDRESS:PORT, and PATH.nbd of every --listen unix:PATH]
    #[arg(long, value_name = "ADDRESS", requires = "disks")]
    nbd: Vec<ListenAddress>,

    /// Most bytes that the log of one disk may take; a guest whose log is full waits until some of it is applied
    #[arg(long, value_name = "SIZE", default_value = "4G", requires = "disks")]
    disk_log_max: Size,

    /// Most guest RAM to hold, over all guests, like 6G [default: half of this host's memory]
    #[arg(long, value_name = "SIZE")]
    ram_limit: Option<Size>,

    /// Write latency histograms to PREFIX.PHASE.hlog while it runs and PREFIX.json at the end; files of an earlier
    /// run are replaced
    #[arg(long, value_name = "PREFIX")]
    hist: Option<PathBuf>,

    /// Answer `colo-ring status`, `dump`, `discard`, `end` and `failover` there; only this user may connect
    #[arg(long, value_name = "unix:PATH")]
    control: Option<ControlAddress>,

    /// End after one session; exit code 0 if it was protected and ended by the primary's going away
    #[arg(long)]
    once: bool,

    /// Seconds from a session's first connection until all of its channels must be there
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    accept_timeout: u64,

    /// Seconds that a primary may send nothing in its first copy, before its session is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86400))]
    precopy_timeout: u64,

    /// Most sessions, running or kept, of one host (with IPv6, of one network of 64 bits)
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    sessions_per_origin: u16,

    /// Run CMD by sh when a primary is lost that has committed a checkpoint: with COLO_RING_SESSION, COLO_RING_CHECKPOINT (empty: nothing to resume),
    /// COLO_RING_CHECKPOINT_AGE_MS, COLO_RING_REASON, COLO_RING_PEER, COLO_RING_MACHINE and COLO_RING_CONTROL
    #[arg(long, value_name = "CMD")]
    on_loss: Option<String>,

    /// Run it also for primaries that are lost before their first checkpoint; anyone who can connect can cause that
    #[arg(long, requires = "on_loss")]
    on_loss_unprotected: bool,

    /// Seconds of silence after which a primary's host is probed (TCP keep-alive)
    #[arg(long, value_name = "SECONDS", default_value_t = HostWatch::default().probe_after_s, value_parser = clap::value_parser!(u32).range(1..=32767))]
    keepalive: u32,

    /// Seconds without a sign of life after which a primary is lost (TCP_USER_TIMEOUT)
    #[arg(long, value_name = "SECONDS", default_value_t = HostWatch::default().give_up_after_s, value_parser = clap::value_parser!(u32).range(1..=86400))]
    user_timeout: u32,

    /// Print the report at the end as JSON (schema colo-ring.receive, version 1)
    #[arg(long)]
    json: bool,
}

/// The options in force, as reports echo them.
#[derive(Serialize)]
struct Described {
    listen: Vec<String>,
    channels: u8,
    cores: Vec<usize>,
    placement: Placement,
    backend: BackendKind,
    registered: bool,
    cache: CacheKind,
    pool_max_bytes: Option<u64>,
    commit: CommitMode,
    hugepages: HugePages,
    ram_dir: Option<PathBuf>,
    ram_limit_bytes: u64,
    disks: Option<PathBuf>,
    nbd: Vec<String>,
    disk_log_max_bytes: u64,
    once: bool,
    accept_timeout_s: u64,
    precopy_timeout_s: u64,
    sessions_per_origin: usize,
    keepalive_s: u32,
    user_timeout_s: u32,
    on_loss: Option<String>,
}

#[derive(Serialize)]
struct ReceiveReport<'a> {
    schema: &'static str,
    schema_version: u32,
    sessions: &'a [SessionStatus],
    report: &'a Report,
}

/// A guest takes a descriptor for each of its channels and RAM blocks: what the hard limit allows is used. Where even
/// that is refused, the limit is as it was, and connections over it are refused with a message.
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Receives until a signal ends it, or --once does.
///
/// # Errors
/// If it cannot start or go on.
pub fn run(args: ReceiveArgs) -> Result<ExitCode, CommandError> {
    let (once, json, hist) = (args.once, args.json, args.hist.clone());
    let on_loss = OnLoss::of(&args)?;
    let options = args.into_options()?;
    stderr::never_wait().map_err(CommandError::failed)?;
    let (wish, wished) = mpsc::channel();
    signals::on_end(move || {
        // Without a receiver it is ending already.
        let _ = wish.send(());
    })?;
    raise_open_files();
    let log = Arc::new(EventLog::new());
    let (event_log, hooks) = (log.clone(), on_loss.as_ref().map(OnLoss::sender));
    let on_event = move |event: Event| {
        event_log.tell(&event);
        if let (Some(hooks), Event::Ended(status)) = (&hooks, &event) {
            hooks.session_ended(status);
        }
    };
    let receiver = Receiver::start(options, on_event).map_err(CommandError::failed)?;
    for address in receiver.addresses() {
        tell(&format!("listening on {address}"));
    }
    for address in receiver.disk_addresses() {
        tell(&format!("serving disks on {address}"));
    }
    tell(&format!("receiving on {}", receiver.placement()));
    watch(&receiver, &wished, &log);
    let outcome = receiver.wait();
    if let Some(on_loss) = on_loss {
        on_loss.finish();
    }
    let outcome = outcome.map_err(CommandError::failed)?;
    if json {
        print_json(&ReceiveReport {
            schema: "colo-ring.receive",
            schema_version: 1,
            sessions: &outcome.sessions,
            report: &outcome.report,
        })?;
    } else {
        print(&render(&outcome, hist.as_ref()))?;
    }
    let failed = once && !outcome.sessions.iter().any(was_protected);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

impl ReceiveArgs {
    fn into_options(self) -> Result<ReceiverOptions, CommandError> {
        let ram_limit_bytes = self.check()?;
        let cores = match (&self.cores, self.numa_node) {
            (Some(list), _) => list.0.clone(),
            (None, Some(node)) => cores_of_node(node, self.channels)?,
            (None, None) => default_cores(self.channels)?,
        };
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
            listen: self.listen,
            channels: self.channels,
            cores,
            backend: self.backend,
            registered: self.registered == Switch::On,
            disks,
            store: StoreOptions {
                hugepages: self.hugepages,
                ram_dir: self.ram_dir,
                cache: self.cache,
                pool_max: self.pool_max.map(|size| size.0),
                commit: self.commit,
                ..StoreOptions::default()
            },
            ram_limit_bytes,
            hist: self.hist,
            control: self.control.map(|address| address.0),
            once: self.once,
            identify_deadline: Duration::from_secs(self.accept_timeout),
            precopy_deadline: Duration::from_secs(self.precopy_timeout),
            sessions_per_origin: self.sessions_per_origin.into(),
            host_watch: HostWatch {
                probe_after_s: self.keepalive,
                give_up_after_s: self.user_timeout,
            },
        };
        let described = Described::of(&options, self.disk_log_max.0, self.on_loss);
        options.described = serde_json::to_value(described).map_err(std::io::Error::from)?;
        Ok(options)
    }

    /// Refuses what contradicts itself. Returns the limit of guests' RAM in bytes.
    fn check(&self) -> Result<u64, CommandError> {
        let usage = |text: &str| Err(CommandError::Usage(text.to_owned()));
        if self.user_timeout < self.keepalive {
            return usage(
                "--user-timeout must not be shorter than --keepalive: a silent host is not given up before it was probed",
            );
        }
        let ram_limit_bytes = match self.ram_limit {
            Some(size) => size.0,
            None => Machine::read().memory_bytes / 2,
        };
        if ram_limit_bytes == 0 {
            return usage("no guest fits: give --ram-limit, like 6G");
        }
        if self.pool_max.is_some() && self.cache != CacheKind::Pool {
            return usage("--pool-max is a limit of --cache pool");
        }
        if self.disk_log_max.0 < DISK_LOG_MIN {
            return usage("--disk-log-max must be at least 8M: a log has two segments of 4 MiB");
        }
        Ok(ram_limit_bytes)
    }
}

impl Described {
    fn of(options: &ReceiverOptions, disk_log_max_bytes: u64, on_loss: Option<String>) -> Self {
        let texts = |addresses: &[ListenAddress]| addresses.iter().map(ToString::to_string).collect();
        let disks = options.disks.as_ref();
        Self {
            disks: disks.map(|disks| disks.directory.clone()),
            nbd: disks.map_or_else(Vec::new, |disks| texts(&disks.listen)),
            disk_log_max_bytes,
            listen: texts(&options.listen),
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
            ram_limit_bytes: options.ram_limit_bytes,
            once: options.once,
            accept_timeout_s: options.identify_deadline.as_secs(),
            precopy_timeout_s: options.precopy_deadline.as_secs(),
            sessions_per_origin: options.sessions_per_origin,
            keepalive_s: options.host_watch.probe_after_s,
            user_timeout_s: options.host_watch.give_up_after_s,
            on_loss,
        }
    }
}

/// The port that IANA has assigned to NBD.
const NBD_PORT: u16 = 10809;

/// Least bytes of a disk's log.
const DISK_LOG_MIN: u64 = 8 << 20;

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

/// Shows progress until the receiver has ended; stops it when a signal asks for that.
fn watch(receiver: &Receiver, wished: &mpsc::Receiver<()>, log: &EventLog) {
    const REFRESH: Duration = Duration::from_millis(250);
    let mut line = ProgressLine::new(true);
    while !receiver.is_finished() {
        match wished.recv_timeout(REFRESH) {
            Ok(()) => {
                line.clear();
                tell("ending: sockets are closed, histograms written");
                receiver.stop_handle().stop();
            }
            // The signals' thread never ends, so the other end is always there.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        log.count_up();
        // Without an answer it is about to end.
        if let (true, Ok(Response::Status(status))) = (line.is_shown(), receiver.ask(Request::Status)) {
            line.show(&progress(&status));
        }
    }
}

fn progress(status: &StatusReport) -> String {
    let sessions = status.sessions.iter().filter(|session| session.end.is_none());
    let sessions: Vec<_> = sessions.map(session_text::brief).collect();
    match sessions.len() {
        0 => "waiting for a primary".to_owned(),
        1..=3 => sessions.join(" | "),
        many => format!("{many} sessions; colo-ring status lists them"),
    }
}

fn render(outcome: &Outcome, hist: Option<&PathBuf>) -> String {
    let mut text: String = outcome
        .sessions
        .iter()
        .map(|session| {
            format!(
                "session {} of {}: {}\n",
                session.session,
                session.peer,
                session_text::end(session)
            )
        })
        .collect();
    if outcome.report.total.checkpoints > 0 {
        text.push_str(&format!("\n{}", outcome.report.total));
    }
    if outcome.report.samples_dropped > 0 {
        text.push_str(&format!(
            "{} checkpoints are missing above: the queue of samples was full\n",
            outcome.report.samples_dropped
        ));
    }
    if let Some(prefix) = hist {
        text.push_str(&format!(
            "histograms: {0}.<phase>.hlog and {0}.json\n",
            prefix.display()
        ));
    }
    text
}

fn was_protected(session: &SessionStatus) -> bool {
    session.checkpoint.is_some() && session.orderly == Some(true)
}
