//! What a guard says of itself on its control socket.

use super::path::GateStatus;
use super::{GuardArgs, OnReceiverLost};
use crate::options::ControlAddress;
use crate::output::CommandError;
use colo_ring::net::{Clients, SocketFile, bind_unix};
use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a client may take to read its answer.
const WRITE_WITHIN: Duration = Duration::from_secs(1);

/// Where the guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum GuardState {
    /// It has no receiver.
    Unprotected,
    /// Its disks and its memory are copied.
    Copying,
    /// A failover would resume it.
    Protected,
}

impl GuardState {
    pub(super) const ALL: [Self; 3] = [Self::Unprotected, Self::Copying, Self::Protected];

    /// As in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Copying => "copying",
            Self::Protected => "protected",
        }
    }
}

/// Times, summarised.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub(super) struct Times {
    /// How many.
    count: u64,
    /// Median.
    p50_us: u64,
    /// 99th percentile.
    p99_us: u64,
    /// The longest.
    max_us: u64,
}

impl Times {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        let us = |nanoseconds: u64| nanoseconds / 1000;
        Self {
            count: histogram.len(),
            p50_us: us(histogram.value_at_quantile(0.5)),
            p99_us: us(histogram.value_at_quantile(0.99)),
            max_us: us(histogram.max()),
        }
    }
}

/// The state of a guard.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct GuardReport {
    schema: &'static str,
    schema_version: u32,
    /// The operator's name for the guest.
    pub(super) name: String,
    /// Path of its QEMU's monitor.
    qmp: String,
    /// The receiver's address.
    to: String,
    /// What becomes of the guest without a receiver.
    on_receiver_lost: OnReceiverLost,
    /// Where the guest stands.
    pub(super) state: GuardState,
    /// The receiver's number of the session.
    pub(super) session: Option<u32>,
    /// Why the guest is not protected, or was not before.
    pub(super) reason: Option<String>,
    /// Seconds for which it is not protected.
    pub(super) unprotected_s: Option<u64>,
    /// From which those are counted when the report is shown.
    #[serde(skip)]
    pub(super) unprotected_since: Option<Instant>,
    /// How often it was protected.
    pub(super) protections: u64,
    /// Committed checkpoints.
    pub(super) checkpoints: u64,
    /// Checkpoints that were asked for because output waited.
    pub(super) asked_for_output: u64,
    /// Longest time between two checkpoints now.
    pub(super) interval_ms: u64,
    /// STOP to RESUME.
    pub(super) stopped: Times,
    /// The share of its time that the guest was stopped, of the last second or so.
    pub(super) stopped_share: f64,
    /// A frame's arrival to its release.
    pub(super) held: Times,
    /// The network cards and how their output is held.
    pub(super) gates: Vec<GateStatus>,
}

impl GuardReport {
    pub(super) fn new(args: &GuardArgs) -> Self {
        Self {
            schema: "colo-ring.guard",
            schema_version: 1,
            name: args.name.clone(),
            qmp: args.primary.qmp.display().to_string(),
            to: args.primary.to.to_string(),
            on_receiver_lost: args.on_receiver_lost,
            state: GuardState::Unprotected,
            session: None,
            reason: None,
            unprotected_s: Some(0),
            unprotected_since: Some(Instant::now()),
            protections: 0,
            checkpoints: 0,
            asked_for_output: 0,
            interval_ms: args.interval_max.into(),
            stopped: Times::default(),
            stopped_share: 0.0,
            held: Times::default(),
            gates: Vec::new(),
        }
    }
}

/// The report as the control socket gives it: a line for each connection.
pub(super) struct Shown {
    report: Arc<Mutex<GuardReport>>,
    /// The socket's, removed with this.
    _file: Option<SocketFile>,
}

impl Shown {
    /// Serves the report, if there is a socket for it.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub(super) fn start(report: GuardReport, control: Option<&ControlAddress>) -> Result<Self, CommandError> {
        let report = Arc::new(Mutex::new(report));
        let file = control
            .map(|address| serve(address, report.clone()))
            .transpose()?;
        Ok(Self { report, _file: file })
    }

    /// The same report, for another thread.
    pub(super) fn shared(&self) -> SharedReport {
        SharedReport(self.report.clone())
    }

    /// The report as a line of JSON.
    pub(super) fn line(&self) -> Result<String, serde_json::Error> {
        line(&self.report)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut GuardReport)) {
        change(&mut lock(&self.report));
    }
}

/// The report, wherever it is read.
pub(super) struct SharedReport(Arc<Mutex<GuardReport>>);

impl SharedReport {
    /// The report as it is.
    pub(super) fn now(&self) -> GuardReport {
        now(&self.0)
    }
}

/// The report as it is shown now.
fn now(report: &Mutex<GuardReport>) -> GuardReport {
    let mut report = lock(report).clone();
    report.unprotected_s = report.unprotected_since.map(|since| since.elapsed().as_secs());
    report
}

fn lock(report: &Mutex<GuardReport>) -> MutexGuard<'_, GuardReport> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

fn line(report: &Mutex<GuardReport>) -> Result<String, serde_json::Error> {
    Ok(colo_ring::text::json_line(&now(report))? + "\n")
}

/// Answers every client of a socket with the report, for as long as this process lives.
fn serve(address: &ControlAddress, report: Arc<Mutex<GuardReport>>) -> Result<SocketFile, CommandError> {
    let socket = bind_unix(&address.0, Clients::Owner).map_err(CommandError::failed)?;
    let (listener, file) = socket.into_parts();
    let serve = move || {
        for mut client in listener.incoming().flatten() {
            let line = line(&report).unwrap_or_default();
            // A client that has gone needs none.
            let _ = client.set_write_timeout(Some(WRITE_WITHIN));
            let _ = client.write_all(line.as_bytes());
        }
    };
    let thread = std::thread::Builder::new().name("guard-control".to_owned());
    thread.spawn(serve).map_err(CommandError::failed)?;
    Ok(file)
}
