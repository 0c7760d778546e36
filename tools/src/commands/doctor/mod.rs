//! `colo-ring doctor`: what this machine lacks, what that means, and the command that fixes it.

mod guest;
mod tls;

use crate::options::Size;
use crate::output::{CommandError, print, print_json};
use crate::qmp::socket_path;
use clap::Args;
use colo_ring::host::HostReport;
use colo_ring::ring::{RegistrationReport, RingReport, RingUnavailable};
use colo_ring::sandbox::Sandbox;
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `colo-ring doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Also judge the guest of the QEMU with this QMP socket: whether it can be protected, and what becomes of its disks
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    qmp: Option<PathBuf>,

    /// Also judge the certificates in this directory: those of a receiver's --tls, or of a primary
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,

    /// Print JSON (schema colo-ring.doctor, version 1) with everything that was found out
    #[arg(long)]
    json: bool,
}

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// A receiver works, but slower or with less.
    Warn,
    /// A receiver does not work.
    Missing,
}

/// One line of the doctor's table.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Check {
    /// What was looked at.
    pub item: &'static str,
    /// Its outcome.
    pub state: State,
    /// What was seen.
    pub seen: String,
    /// What that means for a receiver; empty if all is well.
    pub meaning: String,
    /// The command that fixes it; none if nothing is wrong, or no command does.
    pub remedy: Option<String>,
}

/// What this machine has and lacks.
#[derive(Serialize, JsonSchema)]
pub(crate) struct DoctorReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// Whether a receiver works here.
    usable: bool,
    /// What was looked at, in the order of the table.
    checks: &'a [Check],
    /// Everything that was probed.
    host: &'a Probe,
}

/// Everything that was probed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Probe {
    /// This machine.
    #[serde(flatten)]
    pub host: HostReport,
    /// io_uring as this process may use it.
    pub ring: Result<RingReport, RingUnavailable>,
    /// What is lacking to confine a receiver, or why that cannot be tried.
    pub sandbox: Result<Vec<String>, String>,
}

/// Looks at this machine and prints what it found.
///
/// # Errors
/// If the result cannot be printed.
pub fn run(args: &DoctorArgs) -> Result<ExitCode, CommandError> {
    let host = HostReport::probe();
    let ring = RingReport::probe(host.memory.memlock_limit_bytes);
    let sandbox = Sandbox::probe().map_err(|error| error.to_string());
    let probe = Probe { host, ring, sandbox };
    let mut checks = checks(&probe);
    if let Some(monitor) = &args.qmp {
        checks.extend(guest::checks(monitor).map_err(CommandError::failed)?);
    }
    if let Some(directory) = &args.tls {
        checks.extend(tls::checks(directory));
    }
    let usable = !checks.iter().any(|check| check.state == State::Missing);
    if args.json {
        print_json(&DoctorReport {
            schema: "colo-ring.doctor",
            schema_version: 1,
            usable,
            checks: &checks,
            host: &probe,
        })?;
    } else {
        print(&format!("{}\n\n{}", probe.host.machine, render(&checks)))?;
        if args.qmp.is_none() {
            print("For a guest and its disks, on the primary's host: colo-ring doctor --qmp PATH\n")?;
        }
    }
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn render(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.item.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let state = match check.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Missing => "MISSING",
        };
        let line = |text: &mut String, left: &str, item: &str, right: &str| {
            writeln!(text, "{left:<8} {item:<width$}  {right}")
                .expect("a string takes all that is written to it");
        };
        line(&mut text, state, check.item, &check.seen);
        if !check.meaning.is_empty() {
            line(&mut text, "", "", &check.meaning);
        }
        if let Some(command) = &check.remedy {
            line(&mut text, "", "", &format!("fix: {command}"));
        }
    }
    let bad = |state| checks.iter().filter(|check| check.state == state).count();
    let verdict = match (bad(State::Missing), bad(State::Warn)) {
        (0, 0) => "This host has everything that a receiver can use.".to_owned(),
        (0, warnings) => format!("A receiver works here, with {warnings} warnings."),
        (missing, _) => format!("A receiver does not work here: {missing} essential things are missing."),
    };
    text.push('\n');
    text.push_str(&verdict);
    text.push('\n');
    text
}

impl Check {
    fn ok(item: &'static str, seen: impl Into<String>) -> Self {
        let seen = seen.into();
        Self {
            item,
            state: State::Ok,
            seen,
            meaning: String::new(),
            remedy: None,
        }
    }

    fn warn(item: &'static str, seen: impl Into<String>, meaning: &str, remedy: Option<&str>) -> Self {
        let (seen, meaning, remedy) = (seen.into(), meaning.to_owned(), remedy.map(str::to_owned));
        Self {
            item,
            state: State::Warn,
            seen,
            meaning,
            remedy,
        }
    }

    fn missing(item: &'static str, seen: impl Into<String>, meaning: &str, remedy: Option<&str>) -> Self {
        Self {
            state: State::Missing,
            ..Self::warn(item, seen, meaning, remedy)
        }
    }
}

/// Judges a report.
pub fn checks(probe: &Probe) -> Vec<Check> {
    let host = &probe.host;
    let mut checks = vec![cores(host), numa(host), memory(host), shareable_memory(host)];
    checks.push(locked_memory(host));
    checks.extend(huge_pages(host));
    match &probe.ring {
        Ok(ring) => {
            checks.push(Check::ok(
                "io_uring",
                format!("set up with flags {}", ring.setup.name()),
            ));
            checks.push(opcodes(ring));
            checks.push(registered_buffers(host, &ring.registration));
        }
        Err(unavailable) => checks.push(Check::warn(
            "io_uring",
            unavailable.reason.clone(),
            "the backend epoll is used instead, without registered buffers",
            Some(&unavailable.remedy),
        )),
    }
    checks.extend(network(host));
    checks.extend(sandbox(probe));
    checks
}

fn sandbox(probe: &Probe) -> Vec<Check> {
    const ITEM: &str = "sandbox";
    const MEANING: &str = "an intruder in a receiver is confined less than docs/threat-model.md says";
    match &probe.sandbox {
        Ok(lacks) if lacks.is_empty() => vec![Check::ok(ITEM, "system calls, files and TCP can be confined")],
        Ok(lacks) => lacks
            .iter()
            .map(|lack| Check::warn(ITEM, lack.clone(), MEANING, None))
            .collect(),
        Err(error) => vec![Check::warn(
            ITEM,
            format!("cannot be tried: {error}"),
            MEANING,
            Some("colo-ring receive --sandbox off"),
        )],
    }
}

fn cores(host: &HostReport) -> Check {
    let seen = format!(
        "{} of {} may be used",
        host.cores_allowed.len(),
        host.machine.cores_online
    );
    match host.cores_allowed.len() {
        0 => Check::missing(
            "cores",
            seen,
            "the kernel does not say on which cores this process may run",
            None,
        ),
        1 => Check::warn(
            "cores",
            seen,
            "one core receives, commits and does everything else",
            None,
        ),
        _ => Check::ok("cores", seen),
    }
}

fn numa(host: &HostReport) -> Check {
    let nodes: Vec<_> = host
        .numa_nodes
        .iter()
        .filter(|node| !node.cores.is_empty())
        .collect();
    let seen = format!("{} with cores", nodes.len());
    if nodes.len() < 2 {
        return Check::ok("NUMA nodes", seen);
    }
    let lists = nodes
        .iter()
        .map(|node| format!("node {}: {:?}", node.node, node.cores));
    Check::warn(
        "NUMA nodes",
        lists.collect::<Vec<_>>().join(", "),
        "receive on cores of the node to which the network card belongs: cat /sys/class/net/DEVICE/device/numa_node",
        Some("colo-ring receive --numa-node N"),
    )
}

fn memory(host: &HostReport) -> Check {
    let seen = format!(
        "{} GiB, {} GiB of it available",
        gib(host.memory.total_bytes),
        gib(host.memory.available_bytes)
    );
    Check::ok(
        "memory",
        seen + "; a guest takes its RAM, and what its checkpoints change",
    )
}

fn shareable_memory(host: &HostReport) -> Check {
    match &host.memory.memfd {
        Ok(()) => Check::ok("memfd", "can be made"),
        Err(error) => Check::missing(
            "memfd",
            error.to_string(),
            "there is nothing to hold guest memory in; --ram-dir on a tmpfs takes its place",
            None,
        ),
    }
}

fn huge_pages(host: &HostReport) -> Vec<Check> {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let pool = |bytes| {
        host.memory
            .pool(bytes)
            .filter(|pool| pool.pages_free + pool.pages_overcommit > 0)
    };
    let pool_seen =
        |pool: &colo_ring::host::HugePagePool| format!("{} free of {}", pool.pages_free, pool.pages);
    let two = match pool(2 * MIB) {
        Some(pool) => Check::ok("2 MiB huge pages", pool_seen(pool)),
        None => Check::warn(
            "2 MiB huge pages",
            "none free",
            "guest memory is made of ordinary pages: more page-table walks on the way of every page; \
             a guest takes its RAM twice, so 1024 pages hold one of 1 GiB",
            Some("sysctl -w vm.nr_hugepages=1024"),
        ),
    };
    let mut checks = vec![two];
    // They are only used with --hugepages 1G.
    checks.extend(pool(GIB).map(|pool| Check::ok("1 GiB huge pages", pool_seen(pool))));
    let thp = |item, choice: &Option<String>, meaning, remedy| match choice.as_deref() {
        Some("never" | "deny") => {
            Check::warn(item, choice.clone().unwrap_or_default(), meaning, Some(remedy))
        }
        Some(choice) => Check::ok(item, choice),
        None => Check::warn(item, "not in this kernel", meaning, None),
    };
    checks.push(thp(
        "THP, private memory",
        &host.memory.thp,
        "cache slots without a pool of huge pages are made of 4 KiB pages",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    ));
    checks.push(thp(
        "THP, shared memory",
        &host.memory.thp_shmem,
        "a RAM image without a pool of huge pages is made of 4 KiB pages",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    ));
    checks
}

fn opcodes(ring: &RingReport) -> Check {
    let lacking: Vec<_> = ring.opcodes.iter().filter(|opcode| !opcode.supported).collect();
    if lacking.is_empty() {
        return Check::ok("io_uring operations", format!("all {}", ring.opcodes.len()));
    }
    let list = lacking
        .iter()
        .map(|opcode| format!("{} ({})", opcode.name, opcode.purpose));
    let meaning = if lacking.iter().any(|opcode| opcode.essential) {
        "rings cannot receive without them: the backend epoll is used instead; a newer kernel has them"
    } else {
        "others take their place (RECVMSG receives without registered buffers); a newer kernel has them"
    };
    let seen = format!("without {}", list.collect::<Vec<_>>().join(", "));
    Check::warn("io_uring operations", seen, meaning, None)
}

fn locked_memory(host: &HostReport) -> Check {
    const ITEM: &str = "locked memory";
    let limit = host
        .memory
        .memlock_limit_bytes
        .filter(|_| !host.memory.cap_ipc_lock);
    match (host.memory.swap_bytes, limit) {
        (0, _) => Check::ok(ITEM, "not needed: this host has no swap"),
        (_, None) => Check::ok(ITEM, "all of a guest's memory may be locked"),
        (_, Some(limit)) => Check::warn(
            ITEM,
            format!("RLIMIT_MEMLOCK is {}, and this host has swap", Size(limit)),
            "guest memory may be swapped out, and is then read back within a pause",
            Some("ulimit -l unlimited   (service: LimitMEMLOCK=infinity), or swapoff -a"),
        ),
    }
}

fn registered_buffers(host: &HostReport, registration: &RegistrationReport) -> Check {
    const ITEM: &str = "registered buffers";
    const REMEDY: &str =
        "ulimit -l unlimited   (service: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1)";
    const MEANING: &str = "the cache of a guest with more RAM cannot be registered: RECVMSG is used instead";
    if let Err(error) = &registration.small {
        return Check::warn(ITEM, format!("refused: {error}"), MEANING, Some(REMEDY));
    }
    let Some(limit) = host.memory.memlock_limit_bytes else {
        return Check::ok(ITEM, "RLIMIT_MEMLOCK is unlimited");
    };
    let seen = format!("RLIMIT_MEMLOCK is {}", Size(limit));
    match registration.beyond_limit {
        Some(true) => Check::ok(ITEM, format!("{seen}, but does not bind this process")),
        // Too large to be tried, so what is left is what the kernel goes by.
        None if host.memory.cap_ipc_lock => Check::ok(ITEM, format!("{seen}; CAP_IPC_LOCK lifts it")),
        Some(false) | None => Check::warn(ITEM, seen, MEANING, Some(REMEDY)),
    }
}

fn network(host: &HostReport) -> Vec<Check> {
    /// One main channel and the most multifd channels that a primary can have.
    const CONNECTIONS_MAX: u64 = 256;
    /// Smaller fixed buffers were measured to stall big checkpoints.
    const RECEIVE_BUFFER_MIN: u64 = 4 << 20;
    let network = &host.network;
    let unreadable = |item| Check::warn(item, "cannot be read here", "look at it on the host", None);
    let control = match network.congestion_control.as_deref() {
        Some(name @ ("cubic" | "reno")) => Check::ok("congestion control", name),
        Some(name) => Check::warn(
            "congestion control",
            name,
            "counts where data is sent: on the primary's host, and here for measurements on loopback; \
             one that paces, like bbr, blurs them",
            Some("sysctl -w net.ipv4.tcp_congestion_control=cubic"),
        ),
        None => unreadable("congestion control"),
    };
    let slow_start = match network.slow_start_after_idle {
        Some(false) => Check::ok("slow start after idle", "off"),
        Some(true) => Check::warn(
            "slow start after idle",
            "on",
            "counts where data is sent: on the primary's host every checkpoint after a pause starts slowly",
            Some("sysctl -w net.ipv4.tcp_slow_start_after_idle=0   (on the primary's host too)"),
        ),
        None => unreadable("slow start after idle"),
    };
    let backlog = match network.somaxconn {
        Some(connections) if connections >= CONNECTIONS_MAX => {
            Check::ok("listen backlog", format!("{connections} connections"))
        }
        Some(connections) => Check::warn(
            "listen backlog",
            format!("{connections} connections"),
            "many channels that connect at once are delayed by a second and more",
            Some("sysctl -w net.core.somaxconn=4096"),
        ),
        None => unreadable("listen backlog"),
    };
    let buffer = match network.tcp_rmem_max_bytes {
        Some(bytes) if bytes >= RECEIVE_BUFFER_MIN => {
            Check::ok("receive buffers", format!("grow to {}", Size(bytes)))
        }
        Some(bytes) => Check::warn(
            "receive buffers",
            format!("grow to {} only", Size(bytes)),
            "big checkpoints wait for acknowledgements",
            Some("sysctl -w net.ipv4.tcp_rmem='4096 131072 33554432'"),
        ),
        None => unreadable("receive buffers"),
    };
    vec![control, slow_start, backlog, buffer]
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests;
