//! A secondary of each kind at work.

use super::DemoArgs;
use super::usage::processor_time;
use super::variant::{ReceiverKind, Secondary, Variant};
use crate::commands::sink;
use crate::net::Address;
use crate::output::CommandError;
use crate::primary::{Content, Distribution, Figures, PhaseFigures, SynthOptions, SynthPrimary, Version};
use crate::run_file::{Checkpoint, Clock, RunFile, SecondaryUse};
use colo_ring::metrics::Summary;
use colo_ring::receiver::{
    Event, GuestRules, ListenAddress, RamLimit, Receiver, ReceiverOptions, Remark, Request, Response,
    StatusReport,
};
use colo_ring::store::{HugePages, StoreOptions};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// What the receivers warned of, each text once.
#[derive(Clone, Default)]
pub(super) struct Warnings(Arc<Mutex<BTreeSet<String>>>);

impl Warnings {
    fn add(&self, text: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(text);
    }

    pub(super) fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How pages compress in sessions that do.
const RATIO: f64 = 3.0;

/// A variant at work.
pub(super) struct Contestant {
    variant: Variant,
    /// None of a sink, which needs nothing.
    receiver: Option<Receiver>,
    address: Address,
    figures: Figures,
    run: RunFile,
    /// Its threads' processor time while checkpoints were taken; none if the kernel does not say it.
    cpu: Option<Duration>,
    /// What it held for the guest.
    memory_bytes: u64,
}

/// One variant's figures.
#[derive(Serialize, JsonSchema)]
pub(super) struct VariantReport {
    #[serde(flatten)]
    pub(super) variant: Variant,
    /// By the receiver's clock; none of a sink.
    receiver: Option<Summary>,
    /// By the primary's clock.
    primary: Vec<PhaseFigures>,
    /// Processor time of its threads for a checkpoint, where the kernel says it.
    pub(super) cpu_ns_per_checkpoint: Option<u64>,
    /// Memory that it held for the guest; of a sink its buffers are not counted.
    pub(super) memory_bytes: u64,
}

impl Contestant {
    /// Starts a variant. None if it would use another backend than asked: that is no measurement of this one.
    pub(super) fn start(
        variant: Variant,
        args: &DemoArgs,
        cores: &[usize],
        warnings: &Warnings,
    ) -> Result<Option<Self>, CommandError> {
        let (receiver, address) = match &variant.secondary {
            Secondary::Sink => {
                let address = sink::serve_in_background(args.channels).map_err(CommandError::failed)?;
                (None, address.to_string())
            }
            Secondary::Receiver(kind) => match start_receiver(kind, args, cores, warnings)? {
                None => return Ok(None),
                Some(receiver) => {
                    let address = receiver.addresses()[0].to_string();
                    (Some(receiver), address)
                }
            },
        };
        let described = serde_json::to_value(&variant).map_err(CommandError::failed)?;
        let mut run = RunFile::new(
            &variant.name,
            "colo-ring demo",
            described,
            Clock::Primary,
            SystemTime::now(),
        );
        run.compression = Some(variant.compression().to_string());
        Ok(Some(Self {
            run,
            figures: Figures::new(args.interval > 0),
            variant,
            receiver,
            address: address.parse().map_err(CommandError::failed)?,
            cpu: Some(Duration::ZERO),
            memory_bytes: 0,
        }))
    }

    pub(super) fn name(&self) -> &str {
        &self.variant.name
    }

    /// Protects a synthetic guest for a while. The same round is the same session for every variant.
    pub(super) fn session(
        &mut self,
        args: &DemoArgs,
        round: u32,
        started: Instant,
    ) -> Result<(), CommandError> {
        let compression = self.variant.compression();
        let options = SynthOptions {
            ram_bytes: args.ram.0,
            channels: args.channels,
            dirty_pages: Distribution::Fixed(args.pages),
            compression,
            content: match compression.is_some() {
                true => Content::Ratio(RATIO),
                false => Content::Random,
            },
            interval: Duration::from_millis(args.interval),
            seed: u64::from(round) + 1,
            ..SynthOptions::new(Version::V11_1)
        };
        let mut primary = SynthPrimary::connect(&self.address, &options).map_err(CommandError::failed)?;
        let cpu_before = processor_time();
        for _ in 0..args.checkpoints {
            let report = primary.checkpoint().map_err(CommandError::failed)?;
            self.figures.record(&report);
            self.run.checkpoints.push(Checkpoint {
                round,
                at_ns: u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
                ..self.figures.checkpoint(&report)
            });
        }
        // Before threads of the session end, and take their times with them. The others' are idle.
        let used = processor_time()
            .zip(cpu_before)
            .map(|(after, before)| after.saturating_sub(before));
        self.cpu = self.cpu.zip(used).map(|(before, used)| before + used);
        if let Some(receiver) = &self.receiver {
            self.memory_bytes = self.memory_bytes.max(status(receiver)?.ram_held_bytes);
        }
        primary.close().map_err(CommandError::failed)?;
        self.discard()
    }

    /// Waits until the receiver has noticed the end, and makes it release what it keeps.
    fn discard(&self) -> Result<(), CommandError> {
        // Against hanging only: a busy machine may take its time.
        const PATIENCE: Duration = Duration::from_secs(300);
        let Some(receiver) = &self.receiver else {
            return Ok(());
        };
        let started = Instant::now();
        loop {
            let sessions = status(receiver)?.sessions;
            let Some(session) = sessions.first() else {
                return Ok(());
            };
            let request = Request::Discard {
                session: session.session,
            };
            // Refused until the last of its connections has left.
            let refused = receiver.ask(request).err();
            if let Some(reason) = refused.filter(|_| started.elapsed() > PATIENCE) {
                return Err(CommandError::Failed(format!(
                    "the receiver ({}) did not end its session within {PATIENCE:?}: {reason}",
                    self.variant.name
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the receiver.
    pub(super) fn finish(mut self) -> Result<(VariantReport, RunFile), CommandError> {
        let outcome = self.receiver.map(|receiver| {
            receiver.stop_handle().stop();
            receiver.wait()
        });
        let outcome = outcome.transpose().map_err(CommandError::failed)?;
        let cpu_ns = self
            .cpu
            .map(|cpu| u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX));
        self.run.secondary = cpu_ns.map(|cpu_ns| SecondaryUse {
            pid: std::process::id(),
            cpu_ns,
            rss_bytes_max: self.memory_bytes,
        });
        let report = VariantReport {
            variant: self.variant,
            receiver: outcome.map(|outcome| outcome.report.total),
            primary: self.figures.phases(),
            cpu_ns_per_checkpoint: cpu_ns.map(|cpu_ns| cpu_ns / self.figures.checkpoints.max(1)),
            memory_bytes: self.memory_bytes,
        };
        Ok((report, self.run))
    }
}

/// Starts a receiver. None if it would use another backend than asked.
fn start_receiver(
    kind: &ReceiverKind,
    args: &DemoArgs,
    cores: &[usize],
    warnings: &Warnings,
) -> Result<Option<Receiver>, CommandError> {
    let backend = kind.backend;
    let options = ReceiverOptions {
        listen: vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into())],
        guests: GuestRules::default(),
        channels: args.channels,
        cores: cores.to_vec(),
        backend,
        registered: kind.registered,
        store: StoreOptions {
            hugepages: HugePages::Huge2M,
            cache: kind.cache,
            commit: kind.commit,
            ..StoreOptions::default()
        },
        // No other primary connects, and an ended session's memory is given up at once.
        ram_limit: RamLimit::find(Some(u64::MAX), cores.len()),
        device_state_max_bytes: 64 << 20,
        disks: None,
        tls: None,
        hist: None,
        described: serde_json::Value::Null,
        control: None,
        once: false,
        identify_deadline: Duration::from_secs(10),
        limits: colo_ring::receiver::Limits {
            precopy_deadline: Duration::from_secs(300),
            sessions_per_origin: 64,
        },
        host_watch: colo_ring::net::HostWatch::default(),
        sandbox: colo_ring::sandbox::Sandbox::off(),
        samples: None,
        other_sockets: Vec::new(),
        configuration: None,
        passed: colo_ring::net::PassedSockets::default(),
    };
    let collected = warnings.clone();
    let collect = move |event| {
        if let Event::Warning(Remark { text, .. }) = event {
            // What is the same in every session is printed once.
            let session = text.strip_prefix("session ");
            let text = session
                .and_then(|rest| rest.split_once(": "))
                .map_or(text.as_str(), |(_, text)| text);
            collected.add(text.to_owned());
        }
    };
    let receiver = Receiver::start(options, collect).map_err(CommandError::failed)?;
    if status(&receiver)?.backend != backend.name() {
        warnings.add(format!("{backend} is not available here and was not measured"));
        receiver.stop_handle().stop();
        receiver.wait().map_err(CommandError::failed)?;
        return Ok(None);
    }
    Ok(Some(receiver))
}

fn status(receiver: &Receiver) -> Result<StatusReport, CommandError> {
    let status = receiver.ask(Request::Status);
    match status.map_err(|error| CommandError::Failed(error.to_string()))? {
        Response::Status(status) => Ok(*status),
        other => Err(CommandError::Failed(format!(
            "the receiver answered {other:?} to a question for its status"
        ))),
    }
}
