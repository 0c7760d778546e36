//! What a guard says of itself: on its control socket, and in histogram logs.

use super::path::GateStatus;
use super::{GuardArgs, OnReceiverLost};
use crate::options::ControlAddress;
use crate::output::{CommandError, tell};
use colo_ring::metrics::{IntervalLog, MetricsError, with_suffix};
use colo_ring::net::{Clients, bind_unix};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How often the logs get an interval.
const INTERVAL: Duration = Duration::from_secs(1);

/// Where the guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum GuardState {
    /// It has no receiver.
    Unprotected,
    /// Its disks and its memory are copied.
    Copying,
    /// A failover would resume it.
    Protected,
}

/// Times, summarised.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Times {
    count: u64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

impl Times {
    fn of(histogram: &Histogram<u64>) -> Self {
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
#[derive(Clone, Debug, Serialize)]
pub(super) struct GuardReport {
    schema: &'static str,
    schema_version: u32,
    name: String,
    qmp: String,
    to: String,
    on_receiver_lost: OnReceiverLost,
    pub(super) state: GuardState,
    /// The receiver's number of the session.
    pub(super) session: Option<u32>,
    /// Why the guest is not protected, or was not before.
    pub(super) reason: Option<String>,
    /// Seconds for which it is not protected.
    pub(super) unprotected_s: Option<u64>,
    /// How often it was protected.
    pub(super) protections: u64,
    pub(super) checkpoints: u64,
    /// Checkpoints that were asked for because output waited.
    pub(super) asked_for_output: u64,
    pub(super) interval_ms: u64,
    /// STOP to RESUME.
    pub(super) stopped: Times,
    /// A frame's arrival to its release, where a relay holds them.
    pub(super) held: Times,
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
            protections: 0,
            checkpoints: 0,
            asked_for_output: 0,
            interval_ms: args.interval_max.into(),
            stopped: Times::default(),
            held: Times::default(),
            gates: Vec::new(),
        }
    }
}

/// The report as the control socket gives it: a line for each connection.
#[derive(Clone)]
pub(super) struct Shown(Arc<Mutex<GuardReport>>);

impl Shown {
    /// Serves the report, if there is a socket for it.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub(super) fn start(report: GuardReport, control: Option<&ControlAddress>) -> Result<Self, CommandError> {
        let shown = Self(Arc::new(Mutex::new(report)));
        let Some(address) = control else { return Ok(shown) };
        let listener = bind_unix(&address.0, Clients::Owner).map_err(CommandError::failed)?;
        let served = shown.clone();
        let serve = move || {
            for mut client in listener.incoming().flatten() {
                let line = served.line().unwrap_or_default();
                // A client that has gone needs none.
                let _ = client.set_write_timeout(Some(INTERVAL));
                let _ = client.write_all(line.as_bytes());
            }
        };
        let thread = std::thread::Builder::new().name("guard-control".to_owned());
        thread.spawn(serve).map_err(CommandError::failed)?;
        Ok(shown)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, GuardReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The report as a line of JSON.
    pub(super) fn line(&self) -> Result<String, serde_json::Error> {
        Ok(colo_ring::text::json_line(&*self.lock())? + "\n")
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut GuardReport)) {
        change(&mut self.lock());
    }
}

/// A measured time, all of it and that of the interval.
struct Measured {
    all: Histogram<u64>,
    interval: Histogram<u64>,
    log: Option<IntervalLog>,
}

impl Measured {
    fn new(args: &GuardArgs, phase: &str) -> Result<Self, MetricsError> {
        let log = args.hist.as_ref().map(|prefix| {
            let comments = [format!("{phase} of the guest {}, in nanoseconds", args.name)];
            IntervalLog::create(
                with_suffix(prefix, &format!(".{phase}.hlog")),
                &comments,
                SystemTime::now(),
            )
        });
        let histogram = || Histogram::new(3).expect("three digits are possible");
        Ok(Self {
            all: histogram(),
            interval: histogram(),
            log: log.transpose()?,
        })
    }

    fn record(&mut self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // It grows as it is needed.
        let _ = self.all.record(nanoseconds);
        let _ = self.interval.record(nanoseconds);
    }

    fn write(&mut self, start: Duration, length: Duration) -> Result<(), MetricsError> {
        if let Some(log) = self.log.as_mut().filter(|_| !self.interval.is_empty()) {
            log.add(None, &self.interval, start, length)?;
            log.append()?;
        }
        self.interval.reset();
        Ok(())
    }
}

/// How long the guest was stopped, and its frames were held.
pub(super) struct Measurements {
    started: Instant,
    written: Instant,
    stopped: Measured,
    held: Measured,
    is_warned: bool,
}

impl Measurements {
    /// # Errors
    /// If a log cannot be made.
    pub(super) fn new(args: &GuardArgs) -> Result<Self, MetricsError> {
        let now = Instant::now();
        Ok(Self {
            started: now,
            written: now,
            stopped: Measured::new(args, "stopped")?,
            held: Measured::new(args, "held")?,
            is_warned: false,
        })
    }

    pub(super) fn stopped(&mut self, time: Duration) {
        self.stopped.record(time);
    }

    pub(super) fn held(&mut self, times_us: Vec<u64>) {
        times_us
            .into_iter()
            .for_each(|time| self.held.record(Duration::from_micros(time)));
    }

    /// Writes an interval when it is due. A full disk costs measurements, not the guest's protection.
    pub(super) fn write_if_due(&mut self) {
        let length = self.written.elapsed();
        if length < INTERVAL {
            return;
        }
        let start = self.written - self.started;
        self.written += length;
        let both = [&mut self.stopped, &mut self.held].map(|measured| measured.write(start, length));
        for error in both.into_iter().filter_map(Result::err) {
            if !std::mem::replace(&mut self.is_warned, true) {
                tell(&format!("measurements are lost: {error}"));
            }
        }
    }

    /// What was measured.
    pub(super) fn times(&self) -> (Times, Times) {
        (Times::of(&self.stopped.all), Times::of(&self.held.all))
    }
}
