//! One protected guest: what its main channel, its multifd channels and the control thread share.
//!
//! It ends once, for one reason: whoever finds the reason records it, shuts all sockets down and wakes everybody.
//! Its connections and presences then leave one by one; when the last has left, nothing writes to its memory any more, and the
//! control thread may drop what was not committed.

use super::budget::Lease;
use super::end::SessionEnd;
use super::promotion::Promotion;
use crate::blocks::BlockTable;
use crate::metrics::SampleQueue;
use crate::ring::Waker;
use crate::session::{Rendezvous, SessionRecord};
use crate::store::{CommittedImage, Flusher, Store};
use crate::units::ChannelId;
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Called when something about a guest has changed that the control thread should look at.
pub(super) type Notify = Arc<dyn Fn() + Send + Sync>;

/// Tells an operator something.
pub(super) type Warn = Arc<dyn Fn(String) + Send + Sync>;

/// Does something that takes seconds where nobody waits for it: on a thread of its own.
pub(super) type RunInBackground = dyn Fn(Box<dyn FnOnce() + Send>) -> std::io::Result<()> + Send + Sync;

/// Makes a guest's memory; may take seconds. Called once, apart.
pub(super) type MakeStore = dyn Fn(&Guest, Arc<BlockTable>) -> Made + Send + Sync;

/// A guest's memory, or why there is none.
pub(super) type Made = Result<Memory, String>;

/// The socket of a guest's channel, and what wakes its driver.
pub(super) struct ChannelSocket {
    pub(super) socket: OwnedFd,
    pub(super) waker: Waker,
}

/// What the receiver's parts are given to work with.
pub(super) struct Services {
    pub(super) started: Instant,
    pub(super) samples: Arc<SampleQueue>,
    pub(super) flusher: Arc<Flusher>,
    pub(super) make_store: Arc<MakeStore>,
    pub(super) run_in_background: Arc<RunInBackground>,
    pub(super) notify: Notify,
    pub(super) warn: Warn,
}

/// Counters for people; written at syncs and commits, never per packet.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Pages received with content.
    pub(super) pages: AtomicU64,
    /// Pages received as zero.
    pub(super) zero_pages: AtomicU64,
    /// Bytes received on all channels.
    pub(super) bytes: AtomicU64,
    /// Nanoseconds from the receiver's start to the last commit; 0 before.
    pub(super) committed_at_ns: AtomicU64,
    /// The last checkpoint's pause in nanoseconds.
    pub(super) pause_ns: AtomicU64,
}

/// A guest's memory, what it takes of the budget, and the steps down from what was asked for.
pub(super) struct Memory {
    /// What its session receives into; none for a session that was recovered.
    pub(super) store: Option<Arc<Store>>,
    /// Its last committed checkpoint.
    pub(super) committed: Arc<CommittedImage>,
    /// Its RAM's part of the budget, held until it goes.
    pub(super) _ram: Lease,
    /// The part that its device state has grown to.
    pub(super) device_state: Lease,
    pub(super) fallbacks: Vec<String>,
}

/// The shared state.
pub(super) struct Guest {
    pub(super) id: u32,
    pub(super) peer: String,
    pub(super) services: Arc<Services>,
    pub(super) rendezvous: Rendezvous,
    pub(super) counters: Counters,
    pub(super) record: OnceLock<Arc<SessionRecord>>,
    /// The main channel's position while the device state looks as if its vmdesc were suppressed; else 0.
    pub(super) suppressed_at: AtomicU64,
    /// Whether its block list has come.
    pub(super) memory_asked: AtomicBool,
    /// Whose its checkpoint is.
    promotion: Mutex<Promotion>,
    /// How old its checkpoint was when this receiver started, if it is of an earlier one.
    pub(super) age_at_start: Duration,
    /// Whether a thread is adding memory to its pool.
    pub(super) growing: AtomicBool,
    /// None for a session that was recovered.
    main: Option<ChannelSocket>,
    channels: Vec<ChannelSocket>,
    /// Cores that help, beside that of the main channel.
    helpers: Vec<Waker>,
    memory: OnceLock<Memory>,
    end: OnceLock<SessionEnd>,
    channel_lost: AtomicBool,
    /// Connections, and cores that it is present on, that have not left.
    parts: AtomicUsize,
}

impl Guest {
    /// A session that is about to begin. `channels` are in the order of their ids. The guest is present on the core of
    /// the main channel and on those of the `helpers`.
    pub(super) fn new(
        id: u32,
        peer: String,
        services: Arc<Services>,
        main: ChannelSocket,
        channels: Vec<ChannelSocket>,
        helpers: Vec<Waker>,
    ) -> Arc<Self> {
        let count = u8::try_from(channels.len()).expect("a session has at most 255 channels");
        Arc::new(Self {
            id,
            peer,
            services,
            rendezvous: Rendezvous::new(count),
            counters: Counters::default(),
            record: OnceLock::new(),
            suppressed_at: AtomicU64::new(0),
            parts: AtomicUsize::new(1 + channels.len() + 1 + helpers.len()),
            memory_asked: AtomicBool::new(false),
            promotion: Mutex::default(),
            growing: AtomicBool::new(false),
            age_at_start: Duration::ZERO,
            main: Some(main),
            channels,
            helpers,
            memory: OnceLock::new(),
            end: OnceLock::new(),
            channel_lost: AtomicBool::new(false),
        })
    }

    /// A session of an earlier receiver, with its checkpoint of that age.
    pub(super) fn recovered(
        id: u32,
        peer: String,
        services: Arc<Services>,
        record: SessionRecord,
        memory: Memory,
        age: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            peer,
            rendezvous: Rendezvous::new(0),
            counters: Counters::default(),
            record: OnceLock::from(Arc::new(record)),
            suppressed_at: AtomicU64::new(0),
            parts: AtomicUsize::new(0),
            memory_asked: AtomicBool::new(true),
            promotion: Mutex::default(),
            growing: AtomicBool::new(false),
            age_at_start: age.saturating_sub(services.started.elapsed()),
            services,
            main: None,
            channels: Vec::new(),
            helpers: Vec::new(),
            memory: OnceLock::from(memory),
            end: OnceLock::from(SessionEnd::Recovered),
            channel_lost: AtomicBool::new(false),
        })
    }

    /// Whose its checkpoint is, for a moment.
    pub(super) fn promotion(&self) -> MutexGuard<'_, Promotion> {
        self.promotion.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn main_fd(&self) -> RawFd {
        let main = self.main.as_ref().expect("whoever drives a main channel has one");
        main.socket.as_raw_fd()
    }

    pub(super) fn channel_fd(&self, channel: ChannelId) -> RawFd {
        self.channels[usize::from(channel.0)].socket.as_raw_fd()
    }

    /// The guest's memory, once it is made.
    pub(super) fn store(&self) -> Option<&Arc<Store>> {
        self.memory.get()?.store.as_ref()
    }

    /// The guest's last committed checkpoint, once its memory is made.
    pub(super) fn committed(&self) -> Option<&Arc<CommittedImage>> {
        self.memory.get().map(|memory| &memory.committed)
    }

    /// What its memory had to do without.
    pub(super) fn fallbacks(&self) -> &[String] {
        self.memory.get().map_or(&[], |memory| &memory.fallbacks)
    }

    /// Takes more of the budget for this guest's device state.
    pub(super) fn grow(&self, bytes: u64) -> Result<(), String> {
        self.memory
            .get()
            .map_or(Ok(()), |memory| memory.device_state.grow(bytes))
    }

    /// Hands the memory over and wakes the main channel, which waits for it.
    pub(super) fn memory_made(&self, made: Made) {
        match made {
            Err(reason) => self.finish(SessionEnd::NoMemory(reason)),
            Ok(memory) => {
                // The main channel waits for a flush before it answers a request, and a dump may do the last part of it.
                if let (Some(main), Some(store)) = (&self.main, &memory.store) {
                    let main = main.waker.clone();
                    store.on_flushed(move || main.wake());
                }
                // Set once: only the one block list of a session asks for memory.
                let _ = self.memory.set(memory);
                self.wake_all();
            }
        }
    }

    /// Wakes the main channel's driver: all channels have arrived at a sync.
    pub(super) fn wake_main(&self) {
        if let Some(main) = &self.main {
            main.waker.wake();
        }
    }

    /// Wakes everybody who drives a channel: they were released. Every driver once.
    pub(super) fn wake_channels(&self) {
        for (position, channel) in self.channels.iter().enumerate() {
            if !self.channels[..position]
                .iter()
                .any(|before| before.waker.same(&channel.waker))
            {
                channel.waker.wake();
            }
        }
    }

    /// Wakes the cores that help: there is work that can wait, and much of it.
    pub(super) fn wake_helpers(&self) {
        self.helpers.iter().for_each(Waker::wake);
    }

    fn wake_all(&self) {
        if let Some(main) = &self.main {
            main.waker.wake();
        }
        self.wake_channels();
        self.wake_helpers();
    }

    /// Ends the session. The first reason stays.
    pub(super) fn finish(&self, end: SessionEnd) {
        if self.end.set(end).is_err() {
            return;
        }
        for connection in self.channels.iter().chain(&self.main) {
            // It fails only where the peer has closed already.
            let _ = shutdown(connection.socket.as_raw_fd(), Shutdown::Both);
        }
        self.wake_all();
        (self.services.notify)();
    }

    /// Why the session has ended.
    pub(super) fn end(&self) -> Option<&SessionEnd> {
        self.end.get()
    }

    /// A multifd channel's stream ended. The main channel may still hold what completes a checkpoint, so it is
    /// read to its end, and that end decides (spec §14.1).
    pub(super) fn channel_ended(&self) {
        self.channel_lost.store(true, Ordering::Release);
        // On Linux what has arrived can still be read after this; then comes the end of the stream.
        let _ = shutdown(self.main_fd(), Shutdown::Read);
        self.wake_main();
    }

    /// Whether a multifd channel's stream has ended: a sync that is not complete will never be.
    pub(super) fn is_channel_lost(&self) -> bool {
        self.channel_lost.load(Ordering::Acquire)
    }

    /// A connection or a presence is gone.
    pub(super) fn leave(&self) {
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.services.notify)();
        }
    }

    /// Whether all connections and presences are gone: nothing is received any more.
    pub(super) fn is_over(&self) -> bool {
        self.parts.load(Ordering::Acquire) == 0
    }
}
