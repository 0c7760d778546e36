//! Mirrors of a guest's disks: started, watched, and removed in the order that QEMU demands.

use super::GuestDisk;
use crate::net::Address;
use crate::output::mebibytes;
use crate::qmp::{Event, Qmp, QmpError};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use thiserror::Error;

const JOB: &str = "colo-ring-disk";
const TARGET: &str = "colo-ring-nbd";
const FILTER: &str = "colo-ring-top";

/// How long a job that is cancelled may take before its connection is cut.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);

/// How long it may take then.
const YANK_LIMIT: Duration = Duration::from_secs(10);

/// How often QEMU is asked for a job that is to end.
const POLL: Duration = Duration::from_millis(20);

/// How long a receiver may take to notice that a mirror was removed; it refuses another connection to the export until then.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// Most mirrors of one guest, by which those that are left over are looked for.
pub(crate) const MIRRORS_MAX: usize = 256;

/// Why a disk is not mirrored.
#[derive(Debug, Error)]
pub(crate) enum MirrorError {
    /// QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU cannot connect, or the receiver does not have the export.
    #[error("disk {disk}: {said}; {hint}")]
    Target {
        /// The guest's disk.
        disk: String,
        /// QEMU's own words.
        said: String,
        /// What to do.
        hint: String,
    },
    /// Not the same size at both ends.
    #[error(
        "disk {disk} has {bytes} bytes, and the receiver's {export} has {target_bytes}; make it as large as the disk: \
         truncate --size {bytes} {export}.raw, in the receiver's --disks directory"
    )]
    Size {
        /// The guest's disk.
        disk: String,
        /// Its size.
        bytes: u64,
        /// The receiver's name for it.
        export: String,
        /// The size there.
        target_bytes: u64,
    },
    /// QEMU refused to mirror it.
    #[error("disk {disk}: {said}")]
    Refused {
        /// The guest's disk.
        disk: String,
        /// QEMU's own words.
        said: String,
    },
    /// The job ended.
    #[error("disk {disk}: its mirror has ended: {reason}")]
    Ended {
        /// The guest's disk.
        disk: String,
        /// QEMU's own words.
        reason: String,
    },
    /// What has changed on it is not known.
    #[error(
        "disk {disk}: this QEMU has no record of what has changed since it was copied to {export} at {to}; --disk-sync full \
         copies everything, and begins one"
    )]
    NoRecord {
        /// The guest's disk.
        disk: String,
        /// The receiver's name for it.
        export: String,
        /// Where the receiver serves disks.
        to: String,
    },
    /// The operator interrupts the first copy.
    #[error("interrupted after {:.0} MiB of its disks were copied", mebibytes(*.bytes))]
    Interrupted {
        /// What was copied.
        bytes: u64,
    },
    /// It does not end.
    #[error("QEMU does not end the job {job} even without its connection; `query-block-jobs` shows it")]
    Stuck {
        /// The job.
        job: String,
    },
}

/// How far the copies are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MirrorState {
    /// Bytes that are copied, of all disks.
    pub(crate) done: u64,
    /// Bytes to be copied in all, as far as QEMU knows.
    pub(crate) all: u64,
    /// Whether every disk is copied, and every write of the guest reaches both sides before it is complete.
    pub(crate) is_synced: bool,
}

impl MirrorState {
    /// Adds a job's share.
    pub(super) fn add(&mut self, job: &Value) {
        self.done += job["offset"].as_u64().unwrap_or(0);
        self.all += job["len"].as_u64().unwrap_or(0);
    }
}

/// One disk and its export.
#[derive(Clone, Debug)]
pub(crate) struct Mirror {
    /// The guest's disk.
    pub(crate) disk: GuestDisk,
    /// The receiver's name for it.
    pub(crate) export: String,
}

/// Mirrors that were started, by number.
#[derive(Debug, Default)]
pub(crate) struct Mirrors(Vec<Mirror>);

impl Mirrors {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Connects every disk to its export, and checks its size: nothing is copied yet. Whatever was connected stays when
    /// it fails: see [`remove_all`]. `replaces`: mirrors to the same receiver may have been removed just now.
    ///
    /// # Errors
    /// The first disk that cannot be.
    pub(crate) fn connect(
        qmp: &mut Qmp,
        to: &Address,
        uuid: Option<&str>,
        wanted: Vec<Mirror>,
        replaces: bool,
    ) -> Result<Self, MirrorError> {
        let patience = if replaces { RELEASE_LIMIT } else { Duration::ZERO };
        for (number, mirror) in wanted.iter().enumerate() {
            let node = target(number);
            let wire_name = match uuid {
                Some(uuid) => format!("{}@{uuid}", mirror.export),
                None => mirror.export.clone(),
            };
            // Flushes are of no use there: what makes writes durable is the checkpoint's commit.
            let options = json!({
                "driver": "nbd", "node-name": node, "server": server(to), "export": wire_name,
                "reconnect-delay": 0, "cache": {"no-flush": true},
            });
            add_node(qmp, &options, patience).map_err(|error| not_connected(error, mirror, to))?;
            let target_bytes = node_bytes(qmp, &node)?;
            if target_bytes != mirror.disk.bytes {
                return Err(MirrorError::Size {
                    disk: mirror.disk.name.clone(),
                    bytes: mirror.disk.bytes,
                    export: mirror.export.clone(),
                    target_bytes,
                });
            }
        }
        Ok(Self(wanted))
    }

    /// Begins to mirror: all of every disk, or only what is written from now on.
    ///
    /// # Errors
    /// The first disk that QEMU refuses.
    pub(crate) fn start(&self, qmp: &mut Qmp, copies_all: bool) -> Result<(), MirrorError> {
        for (number, mirror) in self.0.iter().enumerate() {
            let options = json!({
                "job-id": job(number), "device": mirror.disk.node, "target": target(number),
                "sync": if copies_all { "full" } else { "none" }, "copy-mode": "write-blocking",
                "on-target-error": "report", "filter-node-name": format!("{FILTER}{number}"),
            });
            qmp.execute("blockdev-mirror", &options)
                .map_err(|error| refused(error, mirror))?;
        }
        Ok(())
    }

    /// How far they are.
    ///
    /// # Errors
    /// If one has ended.
    pub(crate) fn state(&self, qmp: &mut Qmp) -> Result<MirrorState, MirrorError> {
        let jobs = jobs(qmp)?;
        let mut state = MirrorState {
            is_synced: true,
            ..MirrorState::default()
        };
        for (number, mirror) in self.0.iter().enumerate() {
            let name = job(number);
            let Some(job) = jobs.iter().find(|job| job["device"] == *name) else {
                return Err(MirrorError::Ended {
                    disk: mirror.disk.name.clone(),
                    reason: why_ended(qmp, &name),
                });
            };
            state.add(job);
            state.is_synced &= job["ready"] == true && job["actively-synced"] == true;
        }
        Ok(state)
    }

    /// The disks and their exports.
    pub(crate) fn disks(&self) -> &[Mirror] {
        &self.0
    }
}

/// Ends every mirror that this program has started in that QEMU, now or earlier: jobs, then their connections. Returns
/// how many there were. The guest runs on.
///
/// # Errors
/// If QEMU does not end one.
pub(crate) fn remove_all(qmp: &mut Qmp) -> Result<usize, MirrorError> {
    for job in ours(jobs(qmp)?.iter().map(|job| &job["device"]), JOB) {
        end_job(qmp, job)?;
    }
    let nodes = qmp.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
    let targets = ours(nodes.iter().map(|node| &node["node-name"]), TARGET);
    for number in &targets {
        qmp.execute("blockdev-del", &json!({"node-name": target(*number)}))?;
    }
    Ok(targets.len())
}

/// How many mirrors that this program has started run in that QEMU.
///
/// # Errors
/// If QEMU does not answer.
pub(crate) fn running(qmp: &mut Qmp) -> Result<usize, QmpError> {
    Ok(ours(jobs(qmp)?.iter().map(|job| &job["device"]), JOB).len())
}

/// Adds the node of an export, which may be in use for so long.
fn add_node(qmp: &mut Qmp, options: &Value, patience: Duration) -> Result<(), QmpError> {
    let since = Instant::now();
    loop {
        match qmp.execute("blockdev-add", options) {
            Err(QmpError::Refused { description, .. })
                if description.contains("not available") && since.elapsed() < patience =>
            {
                std::thread::sleep(POLL);
            }
            added => return added.map(drop),
        }
    }
}

/// Whether an entry of `query-yank` is the connection of a mirror.
pub(crate) fn is_mirrors_connection(instance: &Value) -> bool {
    !ours(std::iter::once(&instance["node-name"]), TARGET).is_empty()
}

/// Cancels a job and waits until it is gone; with its connection cut, if it does not go otherwise.
fn end_job(qmp: &mut Qmp, number: usize) -> Result<(), MirrorError> {
    let job = job(number);
    match qmp.execute("job-cancel", &json!({"id": job})) {
        // It may have ended by itself.
        Ok(_) | Err(QmpError::Refused { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    for (limit, is_cut) in [(CANCEL_LIMIT, false), (YANK_LIMIT, true)] {
        if is_cut {
            let instances = json!({"instances": [yank_instance(number)]});
            qmp.execute_out_of_band("yank", &instances, limit)?;
        }
        let since = Instant::now();
        while since.elapsed() < limit {
            if !ours(jobs(qmp)?.iter().map(|job| &job["device"]), JOB).contains(&number) {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }
    Err(MirrorError::Stuck { job })
}

fn yank_instance(number: usize) -> Value {
    json!({"type": "block-node", "node-name": target(number)})
}

/// The id of a disk's job.
pub(super) fn job(number: usize) -> String {
    format!("{JOB}{number}")
}

/// The node of its export.
pub(super) fn target(number: usize) -> String {
    format!("{TARGET}{number}")
}

/// An error of a command about a disk.
pub(super) fn refused(error: QmpError, mirror: &Mirror) -> MirrorError {
    match error {
        QmpError::Refused { description, .. } => MirrorError::Refused {
            disk: mirror.disk.name.clone(),
            said: description,
        },
        other => other.into(),
    }
}

pub(super) fn jobs(qmp: &mut Qmp) -> Result<Vec<Value>, QmpError> {
    let listed = qmp.execute("query-block-jobs", &json!({}))?;
    Ok(listed.as_array().cloned().unwrap_or_default())
}

/// The numbers of names that begin so.
fn ours<'a>(names: impl Iterator<Item = &'a Value>, prefix: &str) -> Vec<usize> {
    let numbers = names.filter_map(|name| name.as_str()?.strip_prefix(prefix)?.parse().ok());
    numbers.filter(|number| *number < MIRRORS_MAX).collect()
}

/// What QEMU said last of a job that has ended.
fn last_words(qmp: &Qmp, job: &str) -> Option<Event> {
    let events = qmp.events().into_iter().rev();
    let mut of_job =
        events.filter(|event| event.name.starts_with("BLOCK_JOB_C") && event.data["device"] == *job);
    of_job.next()
}

/// Whether a job that is gone had done all that it was to do.
pub(super) fn check_completed(qmp: &Qmp, job: &str, mirror: &Mirror) -> Result<(), MirrorError> {
    match last_words(qmp, job) {
        Some(event) if event.name == "BLOCK_JOB_COMPLETED" && event.data["error"].is_null() => Ok(()),
        _ => Err(MirrorError::Ended {
            disk: mirror.disk.name.clone(),
            reason: why_ended(qmp, job),
        }),
    }
}

/// What QEMU said when a job ended.
fn why_ended(qmp: &Qmp, job: &str) -> String {
    match last_words(qmp, job) {
        Some(event) if event.name == "BLOCK_JOB_CANCELLED" => "it was cancelled".to_owned(),
        Some(event) => event.data["error"]
            .as_str()
            .unwrap_or("QEMU does not say why")
            .to_owned(),
        None => "QEMU does not say why".to_owned(),
    }
}

fn server(to: &Address) -> Value {
    match to {
        Address::Unix(path) => json!({"type": "unix", "path": path}),
        Address::Tcp(host_port) => {
            let (host, port) = host_port.rsplit_once(':').unwrap_or((host_port, ""));
            let host = host.trim_start_matches('[').trim_end_matches(']');
            json!({"type": "inet", "host": host, "port": port})
        }
    }
}

/// A node, as QEMU describes it.
pub(super) fn node(qmp: &mut Qmp, name: &str) -> Result<Value, MirrorError> {
    let nodes = qmp.execute("query-named-block-nodes", &json!({"flat": true}))?;
    let mut found = nodes.as_array().into_iter().flatten();
    let node = found.find(|found| found["node-name"] == *name);
    node.cloned().ok_or_else(|| not_listed(name))
}

fn node_bytes(qmp: &mut Qmp, name: &str) -> Result<u64, MirrorError> {
    let bytes = node(qmp, name)?["image"]["virtual-size"].as_u64();
    bytes.ok_or_else(|| not_listed(name))
}

fn not_listed(node: &str) -> MirrorError {
    MirrorError::Refused {
        disk: node.to_owned(),
        said: "QEMU does not list it".to_owned(),
    }
}

fn not_connected(error: QmpError, mirror: &Mirror, to: &Address) -> MirrorError {
    let QmpError::Refused {
        description: said, ..
    } = error
    else {
        return error.into();
    };
    let (disk, export, bytes) = (mirror.disk.name.clone(), &mirror.export, mirror.disk.bytes);
    let hint = if said.contains("connect") {
        format!(
            "does a receiver with --disks listen on {to}? --disk-to names its address; --no-disks protects the guest's \
             memory alone, and a failover then finds the disk ahead of it"
        )
    } else {
        format!(
            "the receiver at {to} has no {export}.raw in its --disks directory (make it there: truncate --size {bytes} \
             {export}.raw; or name another one: --disk {disk}=NAME), or a checkpoint that it keeps owns it (colo-ring \
             status and discard there), or another QEMU uses it; its log says which"
        )
    };
    MirrorError::Target { disk, said, hint }
}
