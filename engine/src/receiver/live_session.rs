//! A session while its primary is connected: what its main channel, its multifd channels and the control thread share.
//!
//! It ends once, for one reason: the thread that finds the reason records it, shuts all sockets down and wakes all drivers.
//! Its connections, tenants and decode queues are then dropped one by one. After the last one, nothing writes to the guest's memory any
//! more, and the control thread may drop what was not committed.

use super::budget::BudgetError;
use super::decode::SharedDecodeMemory;
use super::disks::SessionDisks;
use super::end::SessionEnd;
use super::guest_memory::{GuestMemory, MemoryError};
use super::kept_checkpoint::KeptCheckpoint;
use super::links::{Guest, SessionOutput};
use super::services::Services;
use crate::net::{Origin, is_gone};
use crate::ring::Waker;
use crate::session::{GuestDescription, Rendezvous, SessionMethod};
use crate::store::Store;
use crate::units::ChannelId;
use crate::wire::stream::StreamHeader;
use nix::sys::socket::{Shutdown, shutdown};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The socket of a channel, and what wakes its driver.
pub(super) struct ChannelSocket {
    pub(super) socket: OwnedFd,
    pub(super) waker: Waker,
    received: Received,
}

/// Bytes that have come on a channel. Only its driver changes it; on a cache line of its own, as drivers are on different cores.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Received(AtomicU64);

impl ChannelSocket {
    pub(super) fn new(socket: OwnedFd, waker: Waker) -> Self {
        Self {
            socket,
            waker,
            received: Received::default(),
        }
    }

    fn add_received(&self, bytes: usize) {
        let before = self.received.0.load(Ordering::Relaxed);
        self.received.0.store(before + bytes as u64, Ordering::Relaxed);
    }
}

/// Counters for the status; written at syncs and commits, never per packet.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Pages received with content.
    pub(super) pages: AtomicU64,
    /// Pages received as zero.
    pub(super) zero_pages: AtomicU64,
    /// Bytes received on all channels.
    pub(super) bytes: AtomicU64,
    /// The last checkpoint's pause in nanoseconds.
    pub(super) pause_ns: AtomicU64,
}

/// See the module.
pub(super) struct LiveSession {
    pub(super) id: u32,
    /// Where its main channel comes from.
    pub(super) peer: String,
    pub(super) origin: Origin,
    pub(super) services: Arc<dyn Services>,
    pub(super) rendezvous: Rendezvous,
    /// Of the payloads of all channels.
    pub(super) method: SessionMethod,
    /// What their decoding takes.
    pub(super) decode_memory: SharedDecodeMemory,
    pub(super) counters: Counters,
    /// The main channel's position while the device state looks as if its vmdesc were suppressed; else 0.
    pub(super) suppressed_at: AtomicU64,
    /// Whether its block list has arrived.
    pub(super) memory_asked: AtomicBool,
    /// Whether a checkpoint was asked for and is not acknowledged.
    pub(super) in_checkpoint: AtomicBool,
    /// Whether a background thread resizes its pool.
    pub(super) growing: AtomicBool,
    main: ChannelSocket,
    channels: Vec<ChannelSocket>,
    /// Cores that help, beside that of the main channel.
    helpers: Vec<Waker>,
    memory: OnceLock<GuestMemory>,
    /// The guest's output, which waits for commits.
    pub(super) output: Arc<SessionOutput>,
    /// Set just before the first commit, before the checkpoint.
    disks: OnceLock<Arc<SessionDisks>>,
    /// Set just before the first commit.
    checkpoint: OnceLock<Arc<KeptCheckpoint>>,
    end: OnceLock<SessionEnd>,
    channel_lost: AtomicBool,
    /// Connections, tenants and queues of packets to decode that are not dropped yet.
    parts: AtomicUsize,
}

impl LiveSession {
    /// A session that is about to begin. `channels` are in the order of their ids. The guest is present on the core
    /// of the main channel and on those of the `helpers`.
    pub(super) fn new(
        id: u32,
        peer: String,
        origin: Origin,
        services: Arc<dyn Services>,
        main: ChannelSocket,
        channels: Vec<ChannelSocket>,
        helpers: Vec<Waker>,
    ) -> Arc<Self> {
        let count = u8::try_from(channels.len()).expect("a session has at most 255 channels");
        Arc::new(Self {
            id,
            peer,
            origin,
            services,
            rendezvous: Rendezvous::new(count),
            method: SessionMethod::default(),
            decode_memory: SharedDecodeMemory::default(),
            counters: Counters::default(),
            suppressed_at: AtomicU64::new(0),
            parts: AtomicUsize::new(1 + channels.len() + 1 + helpers.len()),
            memory_asked: AtomicBool::new(false),
            in_checkpoint: AtomicBool::new(false),
            growing: AtomicBool::new(false),
            output: Arc::new(SessionOutput::new(main.waker.clone())),
            main,
            channels,
            helpers,
            memory: OnceLock::new(),
            disks: OnceLock::new(),
            checkpoint: OnceLock::new(),
            end: OnceLock::new(),
            channel_lost: AtomicBool::new(false),
        })
    }

    pub(super) fn main_fd(&self) -> RawFd {
        self.main.socket.as_raw_fd()
    }

    pub(super) fn channel_fd(&self, channel: ChannelId) -> RawFd {
        self.channels[usize::from(channel.0)].socket.as_raw_fd()
    }

    /// Bytes have come on the main channel.
    pub(super) fn main_received(&self, bytes: usize) {
        self.main.add_received(bytes);
    }

    /// Bytes have come on a multifd channel.
    pub(super) fn channel_received(&self, channel: ChannelId, bytes: usize) {
        self.channels[usize::from(channel.0)].add_received(bytes);
    }

    /// Bytes that have come on all channels: whether the session makes progress.
    pub(super) fn received_bytes(&self) -> u64 {
        let all = self.channels.iter().chain([&self.main]);
        all.map(|channel| channel.received.0.load(Ordering::Relaxed))
            .sum()
    }

    /// How many multifd channels it has.
    pub(super) fn channels(&self) -> usize {
        self.channels.len()
    }

    /// The guest's memory, once it is made.
    pub(super) fn memory(&self) -> Option<&GuestMemory> {
        self.memory.get()
    }

    /// What it receives into, once the guest's memory is made.
    pub(super) fn store(&self) -> Option<&Arc<Store>> {
        self.memory().map(|memory| &memory.store)
    }

    /// Steps down from the options of the guest's memory.
    pub(super) fn fallbacks(&self) -> &[String] {
        self.memory.get().map_or(&[], |memory| &memory.fallbacks)
    }

    /// What will outlive it, from its first commit on.
    pub(super) fn checkpoint(&self) -> Option<&Arc<KeptCheckpoint>> {
        self.checkpoint.get()
    }

    /// A checkpoint is about to be committed, of a session that `description` describes. Returns whether it is the first.
    pub(super) fn keep_checkpoint(&self, description: &Arc<GuestDescription>) -> bool {
        let Some(memory) = self.memory.get().filter(|_| self.checkpoint.get().is_none()) else {
            return false;
        };
        let disks = self.disks.get().cloned().unwrap_or_default();
        let kept = KeptCheckpoint::new(
            self.id,
            self.peer.clone(),
            memory.store.committed().clone(),
            disks,
            description.clone(),
            memory.leases.clone(),
            self.uptime(),
        );
        self.checkpoint.set(Arc::new(kept)).is_ok()
    }

    /// Binds the guest's disks and its guard, before its first commit.
    ///
    /// # Errors
    /// If it is not clear which the disks are, or one of them is not ready.
    pub(super) fn bind(self: &Arc<Self>, description: &GuestDescription) -> Result<(), SessionEnd> {
        let uuid = StreamHeader::parse_whole(&description.header).and_then(|header| header.uuid);
        let origin = self.origin;
        let links = &self.services.shared().links;
        links.session_commits(self.id, Guest { uuid, origin }, &self.output);
        let bound = self.services.bind_disks(self, uuid);
        let bound = bound.map_err(|error| SessionEnd::Disk(Arc::new(error)))?;
        // Set once: there is one first commit.
        let _ = self.disks.set(Arc::new(bound));
        Ok(())
    }

    /// The guest's disks, from just before its first commit on.
    pub(super) fn disks(&self) -> Option<&Arc<SessionDisks>> {
        self.disks.get()
    }

    /// Whether the primary has closed its main connection, even if not all that it sent was read.
    pub(super) fn is_primary_gone(&self) -> bool {
        is_gone(self.main.socket.as_fd())
    }

    /// A checkpoint was acknowledged, after such a pause.
    pub(super) fn note_commit(&self, pause: Duration) {
        let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.counters.pause_ns.store(pause_ns, Ordering::Relaxed);
        self.in_checkpoint.store(false, Ordering::Relaxed);
        if let Some(checkpoint) = self.checkpoint.get() {
            checkpoint.committed_at(self.uptime(), Duration::ZERO);
        }
    }

    /// Since the receiver's start.
    pub(super) fn uptime(&self) -> Duration {
        self.services.shared().started.elapsed()
    }

    /// Takes more of the budget for this guest's device state.
    pub(super) fn grow_device_state(&self, bytes: u64) -> Result<(), BudgetError> {
        self.memory
            .get()
            .map_or(Ok(()), |memory| memory.leases.grow_device_state(bytes))
    }

    /// Hands the memory over and wakes the main channel, which waits for it.
    pub(super) fn memory_made(&self, made: Result<GuestMemory, MemoryError>) {
        match made {
            Err(error) => self.finish(SessionEnd::NoMemory(error)),
            Ok(memory) => {
                // The main channel waits for a flush before it answers a request, and a dump may do the last part of it.
                let main = self.main.waker.clone();
                memory.store.on_flushed(move || main.wake());
                // Set once: only the one block list of a session asks for memory.
                let _ = self.memory.set(memory);
                self.wake_all();
            }
        }
    }

    /// Wakes the main channel's driver: all channels have arrived at a sync.
    pub(super) fn wake_main(&self) {
        self.main.waker.wake();
    }

    /// Wakes the driver of a channel at its home core.
    pub(super) fn wake_channel(&self, channel: ChannelId) {
        self.channels[usize::from(channel.0)].waker.wake();
    }

    /// Wakes the drivers of all channels, each once: the channels were released.
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

    /// Wakes the cores that help: a primary waits for a flush.
    pub(super) fn wake_helpers(&self) {
        self.helpers.iter().for_each(Waker::wake);
    }

    fn wake_all(&self) {
        self.wake_main();
        self.wake_channels();
        self.wake_helpers();
    }

    /// Ends the session. The first reason stays.
    pub(super) fn finish(&self, end: SessionEnd) {
        let end = match end.is_loss() {
            true if self.output.ends_primary() => SessionEnd::HandedOver,
            true if self.output.is_leaving() => SessionEnd::Unprotected,
            _ => end,
        };
        if self.end.set(end).is_err() {
            return;
        }
        for connection in self.channels.iter().chain([&self.main]) {
            // It fails only where the peer has closed already.
            let _ = shutdown(connection.socket.as_raw_fd(), Shutdown::Both);
        }
        if let Some(end) = self.end() {
            self.output.end(end.to_string());
        }
        self.wake_all();
        self.services.notify_control();
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

    /// A connection, a tenant or another [`SessionPart`] was dropped.
    pub(super) fn part_dropped(&self) {
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.services.notify_control();
        }
    }

    /// Whether all connections and tenants are dropped: nothing is received any more.
    pub(super) fn is_over(&self) -> bool {
        self.parts.load(Ordering::Acquire) == 0
    }
}

/// A part of a session beside its connections and tenants: the session is not over before it is dropped.
pub(super) struct SessionPart(Arc<LiveSession>);

impl SessionPart {
    /// To be called by another part of the session.
    pub(super) fn new(session: &Arc<LiveSession>) -> Self {
        session.parts.fetch_add(1, Ordering::Relaxed);
        Self(session.clone())
    }
}

impl Deref for SessionPart {
    type Target = LiveSession;

    fn deref(&self) -> &LiveSession {
        &self.0
    }
}

impl Drop for SessionPart {
    fn drop(&mut self) {
        self.0.part_dropped();
    }
}
