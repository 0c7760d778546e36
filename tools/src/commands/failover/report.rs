//! What a failover reports.

use super::waiting::Waiting;
use super::{Claim, FailoverArgs, disks, shown};
use crate::output::{CommandError, print, print_json, tell};
use crate::units::nanoseconds;
use colo_ring::host::Machine;
use colo_ring::metrics::display_nanoseconds;
use colo_ring::receiver::{ClaimedCheckpoint, RestoreReport, RestoredDisk};
use colo_ring::text::{mebibytes, seconds};
use schemars::JsonSchema;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long each step took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    /// Until the checkpoint was ours.
    pub(super) claim: Duration,
    /// Starting QEMU or connecting to it.
    pub(super) start: Duration,
    /// Checking and preparing it.
    pub(super) check: Duration,
    /// The operator's fence.
    pub(super) fence: Duration,
    /// The last checkpoint of a primary that was well, and its end.
    pub(super) handover: Duration,
    /// The receiver's part: holding the checkpoint, and writing it while QEMU loads.
    pub(super) restore: Duration,
    /// From the stream's last byte until the guest runs.
    pub(super) load: Duration,
    /// All of it, until the guest runs.
    pub(super) total: Duration,
    /// Then: until the receiver has given its memory up.
    pub(super) give_up: Duration,
}

/// What became of the checkpoint.
pub(super) struct Outcome {
    /// `shared`, `stream` or `written`.
    way: &'static str,
    /// QEMU's word for what the guest does.
    status: Option<String>,
    qemu: Option<String>,
    pub(super) qmp: Option<PathBuf>,
    pid: Option<u32>,
    to: Option<String>,
    restored: RestoreReport,
    pub(super) times: Times,
}

/// The options in force.
#[derive(Serialize, JsonSchema)]
struct Options<'a> {
    /// The receiver's control socket.
    control: String,
    /// Whether all of the memory is sent, even where QEMU could map it.
    stream: bool,
    /// Whether a session is ended whose primary is connected.
    force: bool,
    /// Whether the operator has said that the primary needs no fence.
    unfenced: bool,
    /// Whether the primary makes a last checkpoint first.
    planned: bool,
    /// Whether a checkpoint is taken that was given away before with an unknown result.
    retry: bool,
    /// The command that ends the primary; null without one.
    fence: Option<&'a str>,
    /// The command line of the fresh QEMU; empty where one is waiting already.
    qemu: &'a [String],
    /// The file of a process's command line that it was taken from; null without one.
    qemu_args: Option<&'a Path>,
}

/// How long each step took.
#[derive(Serialize, JsonSchema)]
struct Steps {
    /// Until the checkpoint was claimed.
    claim_ns: u64,
    /// Starting QEMU, or connecting to it.
    start_ns: u64,
    /// Checking and preparing it.
    check_ns: u64,
    /// The `--fence` command.
    fence_ns: u64,
    /// The last checkpoint of a connected primary, and the end of its QEMU.
    handover_ns: u64,
    /// The receiver's part: `hold_ns`, `keep_ns` and `write_ns`.
    restore_ns: u64,
    /// Of that: ending the session, applying what is left of the disks' logs, locking the checkpoint.
    hold_ns: u64,
    /// Of that: the copy of `--keep`.
    keep_ns: u64,
    /// Of that: writing the stream, which QEMU loads meanwhile.
    write_ns: u64,
    /// From the stream's last byte until the guest runs.
    load_ns: u64,
    /// From the start until the guest runs.
    total_ns: u64,
    /// Afterwards: until the receiver has released its memory.
    give_up_ns: u64,
}

/// What a failover was.
#[derive(Serialize, JsonSchema)]
pub(crate) struct FailoverReport<'a> {
    schema: &'static str,
    schema_version: u32,
    /// The options in force.
    options: Options<'a>,
    /// The session's number at the receiver.
    session: u32,
    /// The guest's name; null if it has none.
    guest: Option<&'a str>,
    /// The guest's UUID; null if it has none.
    uuid: Option<&'a str>,
    /// The checkpoint that was resumed; 0 is the state at the end of the first copy.
    checkpoint: u64,
    /// Its age when it was claimed.
    checkpoint_age_ms: u64,
    /// The primary's versioned machine type.
    machine_type: &'a str,
    /// How the memory got to QEMU: `shared` (it maps the receiver's file), `stream` (it was sent), or `written` (to `--to`, and no guest was started).
    way: &'static str,
    /// QEMU's word for what the guest does, as `running`; null with `--to`.
    status: Option<&'a str>,
    /// Version of the QEMU that runs the guest; null with `--to`.
    qemu: Option<&'a str>,
    /// Path of its monitor; null with `--to`.
    qmp: Option<String>,
    /// Its process, where it was started here; null otherwise.
    pid: Option<u32>,
    /// Where the stream was written to with `--to`; null otherwise.
    to: Option<&'a str>,
    /// The copy of the checkpoint that `--keep` made; null without it.
    kept: Option<String>,
    /// The guest's disks, whose bases are at the checkpoint.
    disks: &'a [RestoredDisk],
    /// Length of the stream.
    stream_bytes: u64,
    /// Pages with content in the stream.
    pages: u64,
    /// Pages of zeros in the stream.
    zero_pages: u64,
    /// How long each step took; 0 for one that there was not.
    steps: Steps,
    /// Where the command ran.
    machine: Machine,
}

impl Outcome {
    /// A guest runs in a QEMU.
    pub(super) fn resumed(
        waiting: &Waiting,
        status: String,
        shared: Option<String>,
        restored: RestoreReport,
    ) -> Self {
        Self {
            way: if shared.is_some() { "shared" } else { "stream" },
            status: Some(status),
            qemu: Some(waiting.version()),
            qmp: Some(waiting.monitor().to_owned()),
            pid: waiting.pid(),
            to: None,
            restored,
            times: Times::default(),
        }
    }

    /// A stream was written.
    pub(super) fn written(to: String, restored: RestoreReport) -> Self {
        Self {
            way: "written",
            status: None,
            qemu: None,
            qmp: None,
            pid: None,
            to: Some(to),
            restored,
            times: Times::default(),
        }
    }

    fn steps(&self) -> Steps {
        let times = &self.times;
        Steps {
            claim_ns: nanoseconds(times.claim),
            start_ns: nanoseconds(times.start),
            check_ns: nanoseconds(times.check),
            fence_ns: nanoseconds(times.fence),
            handover_ns: nanoseconds(times.handover),
            restore_ns: nanoseconds(times.restore),
            hold_ns: self.restored.hold_ns,
            keep_ns: self.restored.keep_ns,
            write_ns: self.restored.write_ns,
            load_ns: nanoseconds(times.load),
            total_ns: nanoseconds(times.total),
            give_up_ns: nanoseconds(times.give_up),
        }
    }
}

/// Prints it, as text or as JSON. With the stream on standard output only standard error is left.
pub(super) fn print_outcome(
    args: &FailoverArgs,
    claim: &Claim,
    outcome: &Outcome,
) -> Result<(), CommandError> {
    let is_stdout_taken = args.to == Some(super::Target::Here);
    if args.json {
        let report = report(args, &claim.claimed, outcome)?;
        return match is_stdout_taken {
            true => {
                tell(&colo_ring::text::json_line(&report).map_err(std::io::Error::from)?);
                Ok(())
            }
            false => print_json(&report),
        };
    }
    let text = words(args, claim, outcome)?;
    match is_stdout_taken {
        true => {
            tell(text.trim_end());
            Ok(())
        }
        false => print(&text),
    }
}

fn report<'a>(
    args: &'a FailoverArgs,
    claimed: &'a ClaimedCheckpoint,
    outcome: &'a Outcome,
) -> Result<FailoverReport<'a>, CommandError> {
    Ok(FailoverReport {
        schema: "colo-ring.failover",
        schema_version: 1,
        options: Options {
            control: args.control.to_string(),
            stream: args.stream,
            force: args.force,
            unfenced: args.unfenced,
            planned: args.planned,
            retry: args.retry,
            fence: args.fence.as_deref(),
            qemu: &args.qemu,
            qemu_args: args.qemu_args.as_deref(),
        },
        session: claimed.session,
        guest: claimed.guest.as_deref(),
        uuid: claimed.uuid.as_deref(),
        checkpoint: outcome.restored.checkpoint,
        checkpoint_age_ms: claimed.checkpoint_age_ms,
        machine_type: &claimed.machine,
        way: outcome.way,
        status: outcome.status.as_deref(),
        qemu: outcome.qemu.as_deref(),
        qmp: outcome.qmp.as_deref().map(shown),
        pid: outcome.pid,
        to: outcome.to.as_deref(),
        kept: args.keep()?.as_deref().map(shown),
        disks: &outcome.restored.disks,
        stream_bytes: outcome.restored.stream.bytes,
        pages: outcome.restored.stream.pages,
        zero_pages: outcome.restored.stream.zero_pages,
        steps: outcome.steps(),
        machine: Machine::read(),
    })
}

fn words(args: &FailoverArgs, claim: &Claim, outcome: &Outcome) -> Result<String, CommandError> {
    let (session, checkpoint) = (&claim.title, outcome.restored.checkpoint);
    let age = claim.claimed.checkpoint_age_ms;
    let sent = mebibytes(outcome.restored.stream.bytes);
    let mut text = match (&outcome.status, &outcome.to) {
        (Some(status), _) => {
            let does = if status == "running" {
                "runs".to_owned()
            } else {
                format!("stopped ({status})")
            };
            let qemu = outcome.qemu.as_deref().unwrap_or_default();
            let of_when = match args.planned {
                true => ", its last; its primary has ended".to_owned(),
                false => format!(", which was {} old", seconds(age)),
            };
            format!(
                "the guest of session {session} {does} in QEMU {qemu} from checkpoint {checkpoint}{of_when}\n"
            )
        }
        (None, to) => format!(
            "checkpoint {checkpoint} of session {session} was written to {} ({sent}). When its guest runs: \
             colo-ring discard; if it does not start: --retry\n",
            to.as_deref().unwrap_or_default()
        ),
    };
    match outcome.way {
        "shared" => text.push_str(&format!(
            "its memory is the receiver's file, which the guest consumes and the receiver releases; {sent} were sent\n"
        )),
        "stream" => text.push_str(&format!("its memory was sent: {sent}; the receiver releases its own copy\n")),
        _ => {}
    }
    text.push_str(&disks::lines(&outcome.restored));
    if let Some(kept) = args.keep()? {
        text.push_str(&format!(
            "a copy is kept: qemu-system-x86_64 … -incoming file:{}\n",
            kept.display()
        ));
        for disk in &outcome.restored.disks {
            text.push_str(&format!(
                "  with disk {} as {}.{}.raw\n",
                disk.name,
                kept.display(),
                disk.name
            ));
        }
    }
    if let Some(pid) = outcome.pid {
        let monitor = outcome.qmp.as_deref().map(shown).unwrap_or_default();
        text.push_str(&format!("process {pid}, monitor unix:{monitor}\n"));
    }
    let steps = outcome.steps();
    let named = [
        ("claim", steps.claim_ns),
        ("QEMU's start", steps.start_ns),
        ("check", steps.check_ns),
        ("fence", steps.fence_ns),
        ("last checkpoint and primary's end", steps.handover_ns),
        ("stream", steps.restore_ns),
        ("QEMU's loading", steps.load_ns),
        ("all", steps.total_ns),
    ];
    let named = named.iter().filter(|(_, ns)| *ns > 0);
    let named: Vec<_> = named
        .map(|(name, ns)| format!("{name} {}", display_nanoseconds(*ns)))
        .collect();
    text.push_str(&format!("{}\n", named.join(", ")));
    Ok(text)
}
