//! What the demo measures, and a receiver of each kind at work.

use super::DemoArgs;
use crate::net::Address;
use crate::output::CommandError;
use crate::page_compression::{CompressionArgs, PageCompression};
use crate::primary::{Content, Distribution, Figures, PhaseFigures, SynthOptions, SynthPrimary, Version};
use crate::run_file::{Checkpoint, Clock, RunFile};
use clap::ValueEnum;
use colo_ring::metrics::Summary;
use colo_ring::receiver::{Event, ListenAddress, Receiver, ReceiverOptions, Request, Response, StatusReport};
use colo_ring::ring::BackendKind;
use colo_ring::store::{CacheKind, CommitMode, HugePages, StoreOptions};
use colo_ring::wire::codec::Method;
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The ways to receive: a name, the backend, and whether it reads into registered buffers.
const WAYS: [(&str, BackendKind, bool); 4] = [
    ("uring", BackendKind::Uring, true),
    ("recvmsg", BackendKind::Uring, false),
    ("epoll", BackendKind::Epoll, false),
    ("threads", BackendKind::Threads, false),
];

/// Room for the decoders of a session's channels.
const DECODERS_BYTES: u64 = 64 << 20;

/// How pages compress in sessions that do.
const RATIO: f64 = 3.0;

/// What is measured: a way to receive, a cache and a commit mode.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Variant {
    /// `uring` receives into registered buffers, `recvmsg` is `uring` without them; then cache and commit.
    pub(super) name: String,
    backend: BackendKind,
    registered: bool,
    cache: CacheKind,
    commit: CommitMode,
    #[serde(flatten)]
    compression: PageCompression,
}

impl Variant {
    /// Every combination of what the options of `receive` offer.
    pub(super) fn all() -> Vec<Self> {
        let stores = CacheKind::value_variants().iter().flat_map(|&cache| {
            CommitMode::value_variants()
                .iter()
                .map(move |&commit| (cache, commit))
        });
        stores
            .flat_map(|(cache, commit)| {
                WAYS.map(|(way, backend, registered)| Self {
                    name: format!("{way} {} {}", value_name(cache), value_name(commit)),
                    backend,
                    registered,
                    cache,
                    commit,
                    compression: PageCompression::default(),
                })
            })
            .collect()
    }

    /// The first of all with each method of compression.
    pub(super) fn compressed() -> Vec<Self> {
        let with = |method: &Method| {
            let args = CompressionArgs {
                compression: *method,
                compression_level: None,
            };
            let compression = args.check(1).ok().filter(|compression| compression.is_some())?;
            let first = Self::all().into_iter().next()?;
            Some(Self {
                name: format!("{} {}", first.name, method.name()),
                compression,
                ..first
            })
        };
        Method::value_variants().iter().filter_map(with).collect()
    }
}

fn value_name(value: impl ValueEnum) -> String {
    let value = value.to_possible_value().expect("no variant is hidden");
    value.get_name().to_owned()
}

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

/// A variant at work.
pub(super) struct Contestant {
    variant: Variant,
    receiver: Receiver,
    address: Address,
    figures: Figures,
    run: RunFile,
}

/// One variant's figures.
#[derive(Serialize)]
pub(super) struct VariantReport {
    #[serde(flatten)]
    pub(super) variant: Variant,
    /// By the receiver's clock.
    pub(super) receiver: Summary,
    /// By the primary's clock.
    pub(super) primary: Vec<PhaseFigures>,
}

impl Contestant {
    /// Starts a receiver. None if it would use another backend than asked: that is no measurement of this one.
    pub(super) fn start(
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
            backend,
            registered: variant.registered,
            store: StoreOptions {
                hugepages: HugePages::Huge2M,
                cache: variant.cache,
                commit: variant.commit,
                ..StoreOptions::default()
            },
            // No other primary connects, and an ended session's memory is given up at once; a guest has small blocks, too, and
            // its channels may have decoders.
            ram_limit_bytes: args.ram.0.saturating_mul(2).saturating_add(DECODERS_BYTES),
            disks: None,
            hist: None,
            described: serde_json::Value::Null,
            control: None,
            once: false,
            identify_deadline: Duration::from_secs(10),
            precopy_deadline: Duration::from_secs(300),
            sessions_per_origin: 64,
            host_watch: colo_ring::net::HostWatch::default(),
        };
        let collected = warnings.clone();
        let collect = move |event| {
            if let Event::Warning(text) = event {
                // What is the same in every session is printed once.
                let session = text.strip_prefix("session ");
                let text = session
                    .and_then(|rest| rest.split_once(": "))
                    .map_or(text.as_str(), |(_, text)| text);
                collected.add(text.to_owned());
            }
        };
        let receiver = Receiver::start(options, collect).map_err(CommandError::failed)?;
        let address = receiver.addresses()[0]
            .to_string()
            .parse()
            .map_err(CommandError::failed)?;
        if status(&receiver)?.backend != backend.name() {
            warnings.add(format!("{backend} is not available here and was not measured"));
            receiver.stop_handle().stop();
            receiver.wait().map_err(CommandError::failed)?;
            return Ok(None);
        }
        let described = serde_json::to_value(&variant).map_err(CommandError::failed)?;
        let mut run = RunFile::new(
            &variant.name,
            "demo",
            described,
            Clock::Primary,
            SystemTime::now(),
        );
        run.compression = Some(variant.compression.to_string());
        Ok(Some(Self {
            run,
            figures: Figures::new(args.interval > 0),
            variant,
            receiver,
            address,
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
        let options = SynthOptions {
            ram_bytes: args.ram.0,
            channels: args.channels,
            dirty_pages: Distribution::Fixed(args.pages),
            compression: self.variant.compression,
            content: match self.variant.compression.is_some() {
                true => Content::Ratio(RATIO),
                false => Content::Random,
            },
            interval: Duration::from_millis(args.interval),
            seed: u64::from(round) + 1,
            ..SynthOptions::new(Version::V11_1)
        };
        let mut primary = SynthPrimary::connect(&self.address, &options).map_err(CommandError::failed)?;
        for _ in 0..args.checkpoints {
            let report = primary.checkpoint().map_err(CommandError::failed)?;
            self.figures.record(&report);
            self.run.checkpoints.push(Checkpoint {
                round,
                at_ns: u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX),
                ..self.figures.checkpoint(&report)
            });
        }
        primary.close().map_err(CommandError::failed)?;
        self.discard()
    }

    /// Waits until the receiver has noticed the end, and makes it release what it keeps.
    fn discard(&self) -> Result<(), CommandError> {
        // Against hanging only: a busy machine may take its time.
        const PATIENCE: Duration = Duration::from_secs(300);
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
                return Err(CommandError::Failed(format!(
                    "the receiver ({}) did not end its session within {PATIENCE:?}: {reason}",
                    self.variant.name
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the receiver.
    pub(super) fn finish(self) -> Result<(VariantReport, RunFile), CommandError> {
        self.receiver.stop_handle().stop();
        let outcome = self.receiver.wait().map_err(CommandError::failed)?;
        let report = VariantReport {
            variant: self.variant,
            receiver: outcome.report.total,
            primary: self.figures.phases(),
        };
        Ok((report, self.run))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cache_and_commit_mode_is_measured_with_every_way_to_receive() {
        let variants = Variant::all();
        let names: BTreeSet<_> = variants.iter().map(|variant| variant.name.clone()).collect();
        let stores = CacheKind::value_variants().len() * CommitMode::value_variants().len();
        assert_eq!((variants.len(), names.len()), (4 * stores, 4 * stores));
        assert!(names.contains(super::super::BASELINE), "{names:?}");
        let compressed: Vec<_> = Variant::compressed().into_iter().map(|one| one.name).collect();
        assert_eq!(
            compressed,
            [
                format!("{} zlib", variants[0].name),
                format!("{} zstd", variants[0].name)
            ]
        );
    }
}
