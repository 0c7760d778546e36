//! Starts what a receiver is made of: data plane, flush threads, measurements, recovered checkpoints.

use super::background::Background;
use super::control::{ControlContext, SessionNumbers};
use super::decode::WorkerThreads;
use super::disks::{DiskMemory, DiskRegistry, DiskServer, ServerParts, SessionDisks};
use super::guest::Guests;
use super::guest_memory::{Budgets, GuestMemory, MemoryError};
use super::handshakes::HandshakeThread;
use super::kept_checkpoint::KeptCheckpoint;
use super::live_session::LiveSession;
use super::recovery::{label, recover_all, recover_orphaned_disks};
use super::refusals::{Refusals, Refused};
use super::remark::Remark;
use super::services::{INLINE_STATE_BYTES, Services, Shared, Work};
use super::{Event, Events, ReceiverError, ReceiverOptions};
use crate::blocks::BlockTable;
use crate::budget::Budget;
use crate::disk::{DiskError, DiskOptions, RamShare, SEGMENT_BYTES};
use crate::host::{Machine, Placement, max_mappings};
use crate::metrics::{Recorder, RunDescription, SampleQueue};
use crate::net::Listener;
use crate::ring::{BackendKind, Plane, PlaneError, PlaneOptions};
use crate::sandbox::ThreadKind;
use crate::store::{CopyMethod, Flusher, RamDirectoryLock, Store, StoreError, StoreOptions};
use crate::threads::Threads;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tokio::sync::Notify;

/// Starts the data plane; where io_uring is unavailable, with epoll instead, and warns.
fn start_plane(
    options: &mut ReceiverOptions,
    threads: &Threads,
    events: &Arc<Events>,
) -> Result<Plane, PlaneError> {
    let start = |backend| {
        let (cores, registered) = (options.cores.clone(), options.registered);
        let events = events.clone();
        Plane::start(
            PlaneOptions {
                backend,
                cores,
                registered,
                threads: threads.clone(),
            },
            move |text| events(Event::warning(text)),
        )
    };
    let plane = match start(options.backend) {
        Err(
            error @ PlaneError::Backend {
                backend: BackendKind::Uring,
                ..
            },
        ) => {
            events(Event::warning(format!("{error}; receiving with epoll instead")));
            start(BackendKind::Epoll)?
        }
        other => other?,
    };
    options.backend = plane.options().backend;
    if plane.features().is_some_and(|features| !features.restricted) {
        events(Event::warning(
            "this kernel's io_uring cannot be confined to receiving (Linux 5.10): an intruder could open files and connections by it"
                .to_owned(),
        ));
    }
    if options.registered && plane.features().is_some_and(|features| !features.registered) {
        events(Event::warning(
            "this kernel's io_uring has no sparse table of registered buffers (Linux 5.19); pages are received \
             without them"
                .to_owned(),
        ));
    }
    Ok(plane)
}

/// Starts everything but the control thread.
///
/// # Errors
/// See [`ReceiverError`]; nothing is left running then.
pub(super) fn make_context(
    mut options: ReceiverOptions,
    placement: Placement,
    events: Arc<Events>,
    changed: &Arc<Notify>,
    disk_listeners: Vec<Listener>,
) -> Result<ControlContext, ReceiverError> {
    // First: a killed receiver that still holds it may hold more.
    let ram_dir = options.store.ram_dir.as_deref().map(RamDirectoryLock::take);
    let ram_dir = ram_dir.transpose().map_err(ReceiverError::RamDirectory)?;
    if let Some(path) = &mut options.store.ram_dir {
        // A thread that is confined does not know the working directory.
        let whole = path.canonicalize();
        *path = whole.map_err(|error| ReceiverError::RamDirectory(StoreError::file(path, error)))?;
    }
    let threads = threads(&options, &events)?;
    let flusher = flusher(&options, &threads)?;
    let budgets = Budgets {
        memory: options.ram_limit.budget(),
        mappings: Arc::new(Budget::of_mappings(max_mappings())),
    };
    let run = RunDescription {
        started: SystemTime::now(),
        options: options.described.clone(),
        machine: Machine::read(),
    };
    let disks = disk_registry(&mut options, &budgets, &events, &threads)?.map(Arc::new);
    let of_files = events.clone();
    let warn = move |text| of_files(Event::warning(text));
    let recorder = Recorder::start(options.hist.as_deref(), run, &threads, warn)?;
    let recorder = recorder.observed_by(options.samples.clone());
    let workers = start_workers(&options, &threads, &*events);
    let refusals = Arc::new(Refusals::new(events.clone()));
    let services: Arc<dyn Services> = Arc::new(ReceiverServices {
        shared: Shared {
            started: Instant::now(),
            samples: SampleQueue::new(),
            flusher: Arc::new(flusher),
            workers: workers.workers().clone(),
            guests: Arc::new(Guests::new(options.guests.clone())),
            links: Arc::default(),
            inline_state_bytes: INLINE_STATE_BYTES,
        },
        store: StoreOptions {
            budget: budgets.memory.clone(),
            ..store_options(&options, &placement, workers.workers().shards())
        },
        budgets: budgets.clone(),
        disks: disks.clone(),
        threads: threads.clone(),
        changed: changed.clone(),
        events: events.clone(),
        refusals: refusals.clone(),
    });
    let (recovered, found) = match &options.store.ram_dir {
        Some(directory) => recover_all(directory, services.shared().started, &budgets, &*events),
        None => (Vec::new(), BTreeSet::new()),
    };
    if let Some(disks) = &disks {
        adopt_disks(disks, &recovered, &*events);
    }
    let parts = disks.clone().map(|registry| ServerParts {
        registry,
        refusals: refusals.clone(),
        budget: budgets.memory.clone(),
        deadline: options.identify_deadline,
    });
    let started = parts.map(|parts| DiskServer::start(parts, disk_listeners));
    let disk_server = started.transpose().map_err(ReceiverError::Thread)?;
    let handshakes = options
        .tls
        .clone()
        .map(|credentials| HandshakeThread::start(credentials, budgets.memory.clone(), threads.clone()));
    let handshakes = handshakes.transpose().map_err(ReceiverError::Thread)?;
    let background = Background::start(&threads).map_err(ReceiverError::Thread)?;
    // Last: its threads would not end if something else failed after it.
    let plane = start_plane(&mut options, &threads, &events)?;
    Ok(ControlContext {
        threads,
        options,
        placement,
        services,
        plane,
        workers,
        background,
        budget: budgets.memory,
        recorder,
        events,
        refusals,
        disks,
        disk_server,
        handshakes,
        recovered,
        numbers: SessionNumbers::after(found),
        _ram_dir: ram_dir,
    })
}

/// Starts and confines the threads of the receiver.
fn threads(options: &ReceiverOptions, events: &Arc<Events>) -> Result<Threads, ReceiverError> {
    let events = events.clone();
    let warn = move |text| events(Event::warning(text));
    Threads::confined(options.sandbox.clone(), warn).map_err(ReceiverError::Thread)
}

fn flusher(options: &ReceiverOptions, threads: &Threads) -> Result<Flusher, ReceiverError> {
    Ok(match options.backend {
        // The baseline flushes as QEMU does: one thread, memcpy.
        BackendKind::Threads => Flusher::new(CopyMethod::Memcpy, 0, &[]),
        BackendKind::Uring | BackendKind::Epoll => {
            let cores = options.cores.get(1..).unwrap_or(&[]);
            Flusher::confined(CopyMethod::NonTemporal, cores.len(), cores, threads)
        }
    }?)
}

/// Gives recovered checkpoints their disks, and recovers the disks that no checkpoint needs.
fn adopt_disks(disks: &DiskRegistry, recovered: &[KeptCheckpoint], events: &Events) {
    for checkpoint in recovered {
        let all = checkpoint.disks.all().iter();
        all.for_each(|disk| disks.adopt(disk, checkpoint.session));
    }
    recover_orphaned_disks(disks.directory(), events);
}

/// Part of `--ram-limit` that the logs of all disks may take; beyond that they lie beside the bases.
const LOG_SHARE: u64 = 4;

/// The registry of the operator's disks, whose directory is made absolute.
fn disk_registry(
    options: &mut ReceiverOptions,
    budgets: &Budgets,
    events: &Arc<Events>,
    threads: &Threads,
) -> Result<Option<DiskRegistry>, ReceiverError> {
    let Some(serving) = &mut options.disks else {
        return Ok(None);
    };
    let directory = serving.directory.canonicalize();
    serving.directory = directory.map_err(|source| DiskError::File {
        path: serving.directory.clone(),
        source,
    })?;
    let log = DiskOptions {
        log_max: serving.log_max_bytes,
        segment_bytes: SEGMENT_BYTES,
    };
    let segments = LogShare {
        memory: budgets.memory.clone(),
        logs: Arc::new(Budget::new(
            budgets.memory.limit() / LOG_SHARE,
            "the disks' part of --ram-limit",
        )),
    };
    let memory = DiskMemory {
        segments: Arc::new(segments),
        indexes: Arc::new(IndexShare(budgets.memory.clone())),
    };
    let directory = serving.directory.clone();
    Ok(Some(DiskRegistry::new(
        directory,
        log,
        memory,
        events.clone(),
        threads.clone(),
    )))
}

/// The share of the memory that segments of disks' logs may take.
struct LogShare {
    memory: Arc<Budget>,
    logs: Arc<Budget>,
}

impl RamShare for LogShare {
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
        let leases = (self.logs.take(bytes).ok()?, self.memory.take(bytes).ok()?);
        Some(Box::new(leases))
    }
}

/// Indexes of logs have no limit but that of all memory: without them a log beside its base is of no use, either.
struct IndexShare(Arc<Budget>);

impl RamShare for IndexShare {
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
        let lease = self.0.take(bytes).ok()?;
        Some(Box::new(lease))
    }
}

/// Starts the workers that decode; without them channels do it themselves. In the baseline they always do, as QEMU's.
fn start_workers(options: &ReceiverOptions, threads: &Threads, events: &Events) -> WorkerThreads {
    let cores = match options.backend {
        BackendKind::Threads => &[],
        BackendKind::Uring | BackendKind::Epoll => &options.cores[..],
    };
    WorkerThreads::start(cores, options.cores.len(), threads).unwrap_or_else(|error| {
        events(Event::warning(format!(
            "no threads to decode compressed pages, which the receiving cores do instead: {error}"
        )));
        WorkerThreads::none()
    })
}

/// How guests' memory is made. `workers` have shards behind those of the receiving threads.
fn store_options(options: &ReceiverOptions, placement: &Placement, workers: usize) -> StoreOptions {
    let mut store = options.store.clone();
    store.shards = workers
        + match options.backend {
            BackendKind::Threads => usize::from(options.channels) + 1,
            BackendKind::Uring | BackendKind::Epoll => options.cores.len(),
        };
    // Threads of the baseline run on any of the cores: their memory is spread evenly.
    let nodes = placement.memory_nodes();
    store.nodes = nodes.iter().copied().cycle().take(store.shards).collect();
    store
}

/// What a receiver does for its sessions.
struct ReceiverServices {
    shared: Shared,
    store: StoreOptions,
    budgets: Budgets,
    disks: Option<Arc<DiskRegistry>>,
    threads: Threads,
    changed: Arc<Notify>,
    events: Arc<Events>,
    refusals: Arc<Refusals>,
}

impl Services for ReceiverServices {
    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn make_memory(&self, session: u32, table: Arc<BlockTable>) -> Result<GuestMemory, MemoryError> {
        let leases = self.budgets.take(Store::mappings_max(&table, &self.store))?;
        let (store, notes) = Store::create(table, &label(session), &self.store)?;
        Ok(GuestMemory {
            store: Arc::new(store),
            leases,
            fallbacks: notes.iter().map(ToString::to_string).collect(),
        })
    }

    fn bind_disks(
        &self,
        session: &Arc<LiveSession>,
        uuid: Option<[u8; 16]>,
    ) -> Result<SessionDisks, DiskError> {
        let Some(disks) = &self.disks else {
            return Ok(SessionDisks::default());
        };
        let durable = session.store().and_then(|store| store.committed().durable());
        let ram = durable.map(|durable| durable.files());
        let bound = disks.bind(session, uuid, ram)?;
        Ok(SessionDisks::new(bound, ram.is_none()))
    }

    fn run_in_background(&self, work: Work) -> std::io::Result<()> {
        let started = self.threads.start(ThreadKind::Memory, "colo-memory", work);
        started.map(drop)
    }

    fn notify_control(&self) {
        self.changed.notify_one();
    }

    fn warn(&self, remark: Remark) {
        (self.events)(Event::Warning(remark));
    }

    fn warn_of(&self, session: &LiveSession, text: String) {
        let title = session.guest.title();
        let event = || Event::warning(Remark::of(&title, format!("session {title}: {text}")));
        self.refusals
            .report(session.origin, Refused::Session, &session.guest.peer, event);
    }
}
