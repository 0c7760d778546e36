//! Starts what a receiver is made of: data plane, flush threads, measurements, recovered checkpoints.

use super::background::Background;
use super::budget::Budget;
use super::control::ControlContext;
use super::decode::WorkerThreads;
use super::disks::{DiskMemory, DiskRegistry, DiskServer, ServerParts, SessionDisks};
use super::guest_memory::{Budgets, GuestMemory, GuestNeeds, MemoryError};
use super::kept_checkpoint::KeptCheckpoint;
use super::live_session::LiveSession;
use super::recovery::{label, recover_all, recover_orphaned_disks};
use super::services::{Services, Shared, Work};
use super::{Event, Events, ReceiverError, ReceiverOptions};
use crate::blocks::BlockTable;
use crate::disk::{DiskError, DiskOptions, RamShare, SEGMENT_BYTES};
use crate::host::{Machine, Placement, max_mappings};
use crate::metrics::{Recorder, RunDescription, SampleQueue};
use crate::net::Listener;
use crate::ring::{BackendKind, Plane, PlaneError, PlaneOptions};
use crate::store::{CopyMethod, Flusher, Store, StoreOptions};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tokio::sync::Notify;

/// Starts the data plane; where io_uring is unavailable, with epoll instead, and warns.
fn start_plane(options: &mut ReceiverOptions, events: &Arc<Events>) -> Result<Plane, PlaneError> {
    let start = |backend| {
        let (cores, registered) = (options.cores.clone(), options.registered);
        let events = events.clone();
        Plane::start(
            PlaneOptions {
                backend,
                cores,
                registered,
            },
            move |text| events(Event::Warning(text)),
        )
    };
    let plane = match start(options.backend) {
        Err(
            error @ PlaneError::Backend {
                backend: BackendKind::Uring,
                ..
            },
        ) => {
            events(Event::Warning(format!("{error}; receiving with epoll instead")));
            start(BackendKind::Epoll)?
        }
        other => other?,
    };
    options.backend = plane.options().backend;
    if options.registered && plane.features().is_some_and(|features| !features.registered) {
        events(Event::Warning(
            "this kernel's io_uring has no sparse table of registered buffers (Linux 5.19); pages are received \
             without them"
                .into(),
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
    let flusher = flusher(&options)?;
    let budgets = Budgets {
        ram: Arc::new(Budget::new(options.ram_limit_bytes, "--ram-limit")),
        device_states: Arc::new(Budget::new(DEVICE_STATES_MAX, "device state")),
        mappings: Arc::new(Budget::of_mappings(max_mappings())),
    };
    let run = RunDescription {
        started: SystemTime::now(),
        options: options.described.clone(),
        machine: Machine::read(),
    };
    let disks = disk_registry(&mut options, &budgets, &events)?.map(Arc::new);
    let recorder = Recorder::start(options.hist.as_deref(), run)?;
    let workers = start_workers(&options, &*events);
    let services: Arc<dyn Services> = Arc::new(ReceiverServices {
        shared: Shared {
            started: Instant::now(),
            samples: SampleQueue::new(),
            flusher: Arc::new(flusher),
            workers: workers.workers().clone(),
            links: Arc::default(),
        },
        store: store_options(&options, &placement, workers.workers().shards()),
        budgets: budgets.clone(),
        disks: disks.clone(),
        changed: changed.clone(),
        events: events.clone(),
    });
    let recovered = match &options.store.ram_dir {
        Some(directory) => recover_all(directory, services.shared().started, &budgets, &*events),
        None => (Vec::new(), 1),
    };
    if let Some(disks) = &disks {
        adopt_disks(disks, &recovered.0, &*events);
    }
    let parts = disks.clone().map(|registry| ServerParts {
        registry,
        budget: budgets.ram.clone(),
        deadline: options.identify_deadline,
    });
    let started = parts.map(|parts| DiskServer::start(parts, disk_listeners));
    let disk_server = started.transpose().map_err(ReceiverError::Thread)?;
    let background = Background::start().map_err(ReceiverError::Thread)?;
    // Last: its threads would not end if something else failed after it.
    let plane = start_plane(&mut options, &events)?;
    Ok(ControlContext {
        options,
        placement,
        services,
        plane,
        workers,
        background,
        budget: budgets.ram,
        recorder,
        events,
        disks,
        disk_server,
        recovered,
    })
}

fn flusher(options: &ReceiverOptions) -> Result<Flusher, ReceiverError> {
    Ok(match options.backend {
        // The baseline flushes as QEMU does: one thread, memcpy.
        BackendKind::Threads => Flusher::new(CopyMethod::Memcpy, 0, &[]),
        BackendKind::Uring | BackendKind::Epoll => {
            let cores = options.cores.get(1..).unwrap_or(&[]);
            Flusher::new(CopyMethod::NonTemporal, cores.len(), cores)
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
        ram: budgets.ram.clone(),
        logs: Arc::new(Budget::new(
            budgets.ram.limit() / LOG_SHARE,
            "the disks' part of --ram-limit",
        )),
    };
    let memory = DiskMemory {
        segments: Arc::new(segments),
        indexes: Arc::new(IndexShare(budgets.ram.clone())),
    };
    let directory = serving.directory.clone();
    Ok(Some(DiskRegistry::new(directory, log, memory, events.clone())))
}

/// The share of the memory that segments of disks' logs may take.
struct LogShare {
    ram: Arc<Budget>,
    logs: Arc<Budget>,
}

impl RamShare for LogShare {
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
        let leases = (self.logs.take(bytes).ok()?, self.ram.take(bytes).ok()?);
        Some(Box::new(leases))
    }
}

/// Indexes of logs have no limit but that of all RAM: without them a log beside its base is of no use, either.
struct IndexShare(Arc<Budget>);

impl RamShare for IndexShare {
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>> {
        let lease = self.0.take(bytes).ok()?;
        Some(Box::new(lease))
    }
}

/// Most device state to hold over all guests, in bytes: two of the largest possible, each with the buffer for the next.
const DEVICE_STATES_MAX: u64 = 4 * crate::wire::limits::VMSTATE_MAX;

/// Starts the workers that decode; without them channels do it themselves. In the baseline they always do, as QEMU's.
fn start_workers(options: &ReceiverOptions, events: &Events) -> WorkerThreads {
    let cores = match options.backend {
        BackendKind::Threads => &[],
        BackendKind::Uring | BackendKind::Epoll => &options.cores[..],
    };
    WorkerThreads::start(cores, options.cores.len()).unwrap_or_else(|error| {
        events(Event::Warning(format!(
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
    changed: Arc<Notify>,
    events: Arc<Events>,
}

impl Services for ReceiverServices {
    fn shared(&self) -> &Shared {
        &self.shared
    }

    fn make_memory(&self, session: u32, table: Arc<BlockTable>) -> Result<GuestMemory, MemoryError> {
        let leases = self.budgets.take(GuestNeeds {
            ram_bytes: table.total_bytes(),
            device_state_bytes: 0,
            mappings: Store::mappings_max(&table, &self.store),
        })?;
        let (store, notes) = Store::create(table, &label(session), &self.store)?;
        let fallbacks: Vec<String> = notes.iter().map(ToString::to_string).collect();
        for note in &fallbacks {
            self.warn(format!("session {session}: {note}"));
        }
        Ok(GuestMemory {
            store: Arc::new(store),
            leases,
            fallbacks,
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
        let thread = std::thread::Builder::new().name("colo-memory".into());
        thread.spawn(work).map(drop)
    }

    fn notify_control(&self) {
        self.changed.notify_one();
    }

    fn warn(&self, text: String) {
        (self.events)(Event::Warning(text));
    }
}
