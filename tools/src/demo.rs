//! `colo-ring demo`: a synthetic primary against a receiver of every backend, on this machine alone.
//!
//! All receivers run from the beginning to the end, and get their sessions in turn, in an order that is rotated from
//! round to round: what disturbs the machine meanwhile disturbs them alike.

use crate::options::{Backend, HugePages, Size};
use crate::output::{CommandError, ProgressLine, print, print_json, table, tell};
use crate::receive::default_cores;
use crate::synth::{Address, Distribution, SynthOptions, SynthPrimary, Version};
use clap::Args;
use colo_ring::host::Machine;
use colo_ring::metrics::{Phase, Summary, display_nanoseconds};
use colo_ring::receiver::{Answer, Event, ListenAddress, Receiver, ReceiverOptions, Request, StatusReport};
use colo_ring::store::StoreOptions;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Options of `colo-ring demo`.
#[derive(Debug, Args, Serialize)]
pub struct DemoArgs {
    /// RAM of the synthetic guest
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    #[serde(rename = "ram_bytes")]
    ram: Size,

    /// Pages that the guest dirties before each checkpoint
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pages: u64,

    /// Multifd channels; 0 sends all pages on the main channel
    #[arg(long, value_name = "N", default_value_t = 4)]
    channels: u8,

    /// Checkpoints of each session
    #[arg(long, value_name = "N", default_value_t = 35, value_parser = clap::value_parser!(u64).range(1..))]
    checkpoints: u64,

    /// Milliseconds from one checkpoint to the next
    #[arg(long = "interval", value_name = "MS", default_value_t = 20)]
    #[serde(rename = "interval_ms")]
    interval: u64,

    /// Rounds: each backend has one session in each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,

    /// Print JSON (schema colo-ring.demo, version 1)
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// Everything the demo found out.
#[derive(Serialize)]
struct DemoReport<'a> {
    schema: &'static str,
    schema_version: u32,
    options: &'a DemoArgs,
    machine: Machine,
    cores: &'a [usize],
    backends: Vec<BackendReport>,
    /// What was asked for and not to be had.
    warnings: BTreeSet<String>,
}

/// What is measured: a backend, and `uring` with and without registered buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    name: &'static str,
    backend: Backend,
    registered: bool,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        name: "uring",
        backend: Backend::Uring,
        registered: true,
    },
    Variant {
        name: "recvmsg",
        backend: Backend::Uring,
        registered: false,
    },
    Variant {
        name: "epoll",
        backend: Backend::Epoll,
        registered: false,
    },
    Variant {
        name: "threads",
        backend: Backend::Threads,
        registered: false,
    },
];

/// One backend's figures.
#[derive(Serialize)]
struct BackendReport {
    /// `uring` receives into registered buffers, `recvmsg` is `uring` without them.
    name: &'static str,
    backend: Backend,
    registered: bool,
    /// By the receiver's clock.
    receiver: Summary,
    /// By the primary's clock.
    primary: PrimarySummary,
}

#[derive(Serialize)]
struct PrimarySummary {
    received: Quantiles,
    loaded: Quantiles,
}

#[derive(Clone, Copy, Serialize)]
struct Quantiles {
    count: u64,
    p50_ns: u64,
    p99_ns: u64,
}

/// A backend at work.
struct Contestant {
    variant: Variant,
    receiver: Receiver,
    address: Address,
    received: Histogram<u64>,
    loaded: Histogram<u64>,
}

type Warnings = Arc<Mutex<BTreeSet<String>>>;

/// Runs the demo and prints its table.
///
/// # Errors
/// If not a single backend works, or a session fails.
pub fn run(args: &DemoArgs) -> Result<ExitCode, CommandError> {
    let warnings = Warnings::default();
    let cores = default_cores(args.channels)?;
    let mut contestants = Vec::new();
    for variant in VARIANTS {
        contestants.extend(Contestant::start(variant, args, &cores, &warnings)?);
    }
    if contestants.is_empty() {
        let warnings = warnings.lock().unwrap_or_else(PoisonError::into_inner);
        let reasons = warnings.iter().map(String::as_str).collect::<Vec<_>>();
        return Err(CommandError::Failed(format!(
            "no backend works here: {}",
            reasons.join("; ")
        )));
    }
    let started = Instant::now();
    let mut line = ProgressLine::new(!args.json);
    for round in 0..args.rounds {
        if round > 0 {
            contestants.rotate_left(1);
        }
        for contestant in &mut contestants {
            line.show(&format!(
                "round {} of {}: {}",
                round + 1,
                args.rounds,
                contestant.variant.name
            ));
            contestant.session(args, round)?;
        }
    }
    line.clear();
    let elapsed = started.elapsed();
    contestants.sort_by_key(|contestant| VARIANTS.iter().position(|variant| *variant == contestant.variant));
    let backends = contestants
        .into_iter()
        .map(Contestant::finish)
        .collect::<Result<_, _>>()?;
    let report = DemoReport {
        schema: "colo-ring.demo",
        schema_version: 1,
        options: args,
        machine: Machine::read(),
        cores: &cores,
        backends,
        warnings: std::mem::take(&mut *warnings.lock().unwrap_or_else(PoisonError::into_inner)),
    };
    if args.json {
        print_json(&report)?;
    } else {
        report
            .warnings
            .iter()
            .for_each(|warning| tell(&format!("warning: {warning}")));
        print(&render(&report, elapsed))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Contestant {
    /// Starts a receiver. None if it would use another backend than asked: that is no measurement of this one.
    fn start(
        variant: Variant,
        args: &DemoArgs,
        cores: &[usize],
        warnings: &Warnings,
    ) -> Result<Option<Self>, CommandError> {
        let backend = variant.backend;
        let options = ReceiverOptions {
            listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
            channels: args.channels,
            cores: cores.to_vec(),
            backend: backend.into(),
            registered: variant.registered,
            store: StoreOptions {
                hugepages: HugePages::TwoMiB.into(),
                ..StoreOptions::default()
            },
            // Nobody else connects, and an ended session's memory is given up at once; a guest has small blocks too.
            ram_limit_bytes: args.ram.0.saturating_mul(2),
            hist: None,
            described: serde_json::Value::Null,
            control: None,
            once: false,
            identify_deadline: Duration::from_secs(10),
        };
        let collected = warnings.clone();
        let collect = move |event| {
            if let Event::Warning(text) = event {
                // The same in every session is told once.
                let text = match text
                    .strip_prefix("session ")
                    .and_then(|rest| rest.split_once(": "))
                {
                    Some((_, text)) => text.to_owned(),
                    None => text,
                };
                collected
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(text);
            }
        };
        let receiver = Receiver::start(options, collect).map_err(failed)?;
        let address = receiver.addresses()[0].to_string().parse().map_err(failed)?;
        if status(&receiver)?.backend != backend.name() {
            let text = format!("{backend} is not available here and was not measured");
            warnings
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(text);
            receiver.stop_handle().stop();
            receiver.wait().map_err(failed)?;
            return Ok(None);
        }
        let empty = || Histogram::new(3).map_err(failed);
        Ok(Some(Self {
            variant,
            receiver,
            address,
            received: empty()?,
            loaded: empty()?,
        }))
    }

    /// Protects a synthetic guest for a while. The same round is the same session for every backend.
    fn session(&mut self, args: &DemoArgs, round: u64) -> Result<(), CommandError> {
        let options = SynthOptions {
            ram_bytes: args.ram.0,
            channels: args.channels,
            dirty_pages: Distribution::Fixed(args.pages),
            interval: Duration::from_millis(args.interval),
            seed: round + 1,
            ..SynthOptions::new(Version::V11_1)
        };
        let mut primary = SynthPrimary::connect(&self.address, &options).map_err(failed)?;
        for _ in 0..args.checkpoints {
            let checkpoint = primary.checkpoint().map_err(failed)?;
            record(&mut self.received, checkpoint.received)?;
            record(&mut self.loaded, checkpoint.loaded)?;
        }
        primary.close().map_err(failed)?;
        self.discard()
    }

    /// Waits until the receiver has noticed the end, and gives up what it keeps.
    fn discard(&self) -> Result<(), CommandError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let started = Instant::now();
        loop {
            let sessions = status(&self.receiver)?.sessions;
            let Some(session) = sessions.first() else {
                return Ok(());
            };
            let request = Request::Discard {
                session: session.session,
            };
            // Refused until the last of its connections has left.
            let refused = self.receiver.ask(request).err();
            if let Some(reason) = refused.filter(|_| started.elapsed() > PATIENCE) {
                let backend = self.variant.name;
                return Err(CommandError::Failed(format!(
                    "the receiver ({backend}) did not end its session within {PATIENCE:?}: {reason}"
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn finish(self) -> Result<BackendReport, CommandError> {
        self.receiver.stop_handle().stop();
        let outcome = self.receiver.wait().map_err(failed)?;
        Ok(BackendReport {
            name: self.variant.name,
            backend: self.variant.backend,
            registered: self.variant.registered,
            receiver: outcome.report.total,
            primary: PrimarySummary {
                received: Quantiles::of(&self.received),
                loaded: Quantiles::of(&self.loaded),
            },
        })
    }
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            count: histogram.len(),
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
        }
    }
}

fn record(histogram: &mut Histogram<u64>, duration: Duration) -> Result<(), CommandError> {
    histogram
        .record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
        .map_err(failed)
}

fn status(receiver: &Receiver) -> Result<StatusReport, CommandError> {
    match receiver.ask(Request::Status).map_err(CommandError::Failed)? {
        Answer::Status(status) => Ok(*status),
        other => Err(CommandError::Failed(format!(
            "the receiver answered {other:?} to a question for its status"
        ))),
    }
}

fn render(report: &DemoReport, elapsed: Duration) -> String {
    let options = report.options;
    let mut text = format!(
        "{}\n{} of guest RAM, {} dirty pages and {} ms a checkpoint, {} channels over loopback TCP; \
         primary and receiver share cores {:?}\n\n",
        report.machine, options.ram, options.pages, options.interval, options.channels, report.cores
    );
    let mut head = vec![String::new()];
    for backend in &report.backends {
        head.extend([format!("{} p50", backend.name), "p99".to_owned()]);
    }
    let row = |name: &str, figures: &dyn Fn(&BackendReport) -> (u64, u64)| {
        let mut row = vec![name.to_owned()];
        for (p50, p99) in report.backends.iter().map(figures) {
            row.extend([display_nanoseconds(p50), display_nanoseconds(p99)]);
        }
        row
    };
    let mut rows = vec![head, vec!["receiver's clock".to_owned()]];
    for phase in Phase::ALL {
        rows.push(row(&format!("  {phase}"), &|backend| {
            let figures = backend.receiver.phase(phase);
            (figures.p50_ns, figures.p99_ns)
        }));
    }
    rows.push(vec!["primary's clock".to_owned()]);
    rows.push(row("  received", &|backend| {
        (backend.primary.received.p50_ns, backend.primary.received.p99_ns)
    }));
    rows.push(row("  loaded", &|backend| {
        (backend.primary.loaded.p50_ns, backend.primary.loaded.p99_ns)
    }));
    text.push_str(&table(&rows));
    let counts = report
        .backends
        .iter()
        .map(|b| format!("{} {}", b.receiver.checkpoints, b.name));
    text.push_str(&format!(
        "\ncheckpoints: {}; in {:.1} s\n\
         uring: reads into registered buffers. recvmsg: io_uring without them.\n\
         reply: REQUEST to REPLY. transfer: SEND to all pages here. vmstate: to the device state here. \
         commit: to LOADED sent.\npause: REPLY to LOADED. flush: copying to the RAM image. \
         received, loaded: SEND to RECEIVED and to LOADED.\n",
        counts.collect::<Vec<_>>().join(", "),
        elapsed.as_secs_f64()
    ));
    text
}

fn failed(error: impl std::fmt::Display) -> CommandError {
    CommandError::Failed(error.to_string())
}
