//! A session while its primary is connected: what its main channel, its multifd channels and the control thread share.
//!
//! It ends once, for one reason: the thread that finds the reason records it, shuts all sockets down and wakes all drivers.
//! Its connections, tenants and decode queues are then dropped one by one, and each connection closes its socket. After the last one,
//! nothing writes to the guest's memory any more, and the control thread may drop what was not committed.

mod channel_socket;

pub(super) use channel_socket::{ChannelSocket, ChannelTimes};

use super::admission::Admission;
use super::assemble::Who;
use super::decode::SharedDecodeMemory;
use super::device_state::DeviceStateLease;
use super::disks::SessionDisks;
use super::end::SessionEnd;
use super::guest::GuestIdentity;
use super::guest_memory::{GuestMemory, MemoryError};
use super::kept_checkpoint::KeptCheckpoint;
use super::links::{GuardIsGone, GuestMarks, SessionOutput};
use super::services::Services;
use super::silence::Silence;
use crate::budget::Lease;
use crate::canary::{self, Canary};
use crate::host::thread_times::{self, ThreadTimes};
use crate::net::{Origin, is_gone};
use crate::ring::Waker;
use crate::session::{DeviceStates, GuestDescription, Rendezvous, SessionMethod};
use crate::store::Store;
use crate::tls::About as TlsAbout;
use crate::units::ChannelId;
use crate::wire::stream::StreamHeader;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How long a guard that has begun to end the protection may take to say that it has.
const LEAVE_MAX: Duration = Duration::from_secs(5);

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

/// What cores other than the home core did for the current checkpoint: of each figure the most of any.
#[derive(Debug, Default)]
pub(super) struct Away {
    pub(super) ran_ns: AtomicU64,
    pub(super) runnable_ns: AtomicU64,
}

/// What connections say of the primary that has made them.
pub(super) struct PrimaryId {
    pub(super) guest: Arc<GuestIdentity>,
    pub(super) origin: Origin,
    /// What the init packets of its multifd channels say; none in plain mode.
    pub(super) channels_uuid: Option<[u8; 16]>,
    /// What is known by its TLS, if it has TLS.
    pub(super) tls: Option<TlsAbout>,
}

/// What is known of a session from its beginning.
pub(super) struct About {
    pub(super) id: u32,
    pub(super) primary: PrimaryId,
    /// What it has of the memory budget beside its guest's memory.
    pub(super) lease: Lease,
}

/// A device state on its way through another thread.
enum DeviceState {
    ToWrite(Vec<u8>),
    Written(Vec<u8>),
}

/// See the module.
pub(super) struct LiveSession {
    pub(super) id: u32,
    pub(super) guest: Arc<GuestIdentity>,
    pub(super) origin: Origin,
    channels_uuid: Option<[u8; 16]>,
    /// What is known of the primary by its TLS.
    pub(super) tls: Option<TlsAbout>,
    /// To commit for the first time.
    pub(super) admission: Admission,
    pub(super) services: Arc<dyn Services>,
    pub(super) rendezvous: Rendezvous,
    /// Of the payloads of all channels.
    pub(super) method: SessionMethod,
    /// What their decoding takes.
    pub(super) decode_memory: SharedDecodeMemory,
    pub(super) counters: Counters,
    /// The receiver's start, and when CHECKPOINT_REPLY was sent last, in nanoseconds since then.
    started: Instant,
    replied_ns: AtomicU64,
    pub(super) away: Away,
    /// Behind what looks like the end of the initial device state.
    pub(super) silence: Silence,
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
    /// Its connections have ended, and its guard is to say whether that is a loss: why, and since when.
    undecided: Mutex<Option<(SessionEnd, Instant)>>,
    end: OnceLock<SessionEnd>,
    /// A device state that another thread writes to its file.
    device_state: Mutex<Option<DeviceState>>,
    /// What the main channel has left of device states, to be freed with the session.
    remains: OnceLock<(DeviceStates, DeviceStateLease)>,
    channel_lost: AtomicBool,
    /// Connections, tenants and queues of packets to decode that are not dropped yet.
    parts: AtomicUsize,
    _lease: Lease,
}

impl LiveSession {
    /// A session that is about to begin. `channels` are in the order of their ids. The guest is present on the core
    /// of the main channel and on those of the `helpers`.
    pub(super) fn new(
        about: About,
        services: Arc<dyn Services>,
        main: ChannelSocket,
        channels: Vec<ChannelSocket>,
        helpers: Vec<Waker>,
    ) -> Arc<Self> {
        let PrimaryId {
            guest,
            origin,
            channels_uuid,
            tls,
        } = about.primary;
        let count = u8::try_from(channels.len()).expect("a session has at most 255 channels");
        services.shared().links.session_begins(about.id, origin);
        Arc::new(Self {
            id: about.id,
            guest,
            origin,
            channels_uuid,
            tls,
            admission: Admission::default(),
            _lease: about.lease,
            started: services.shared().started,
            replied_ns: AtomicU64::new(0),
            away: Away::default(),
            services,
            rendezvous: Rendezvous::new(count),
            method: SessionMethod::default(),
            decode_memory: SharedDecodeMemory::default(),
            counters: Counters::default(),
            silence: Silence::default(),
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
            undecided: Mutex::default(),
            end: OnceLock::new(),
            device_state: Mutex::default(),
            remains: OnceLock::new(),
            channel_lost: AtomicBool::new(false),
        })
    }

    /// The main channel's socket: for its connection, which keeps it open.
    pub(super) fn main_fd(&self) -> RawFd {
        self.main.fd
    }

    /// A channel's socket: for its connection, which keeps it open.
    pub(super) fn channel_fd(&self, channel: ChannelId) -> RawFd {
        self.channels[usize::from(channel.0)].fd
    }

    /// The main channel's connection is dropped.
    pub(super) fn close_main(&self) {
        self.main.close();
    }

    /// A channel's connection is dropped.
    pub(super) fn close_channel(&self, channel: ChannelId) {
        self.channels[usize::from(channel.0)].close();
    }

    /// Whether there is something to read on the main channel: bytes, or its end.
    pub(super) fn is_main_readable(&self) -> bool {
        self.main_holds_back() || self.main.is_readable()
    }

    /// Whether bytes of the main channel were read off its socket and wait to be opened.
    pub(super) fn main_holds_back(&self) -> bool {
        self.main.outgoing.as_ref().is_some_and(|tls| tls.has_more())
    }

    /// Sends a message on the main channel, and never waits.
    ///
    /// # Errors
    /// Of send(2): also if the socket has no room for all of it.
    pub(super) fn send_main(&self, message: &[u8]) -> Result<(), Errno> {
        if let Some(tls) = &self.main.outgoing {
            return tls.send(self.main.fd, message);
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.main.fd, message, flags) {
            Ok(sent) if sent == message.len() => Ok(()),
            Ok(_) => Err(Errno::EAGAIN),
            Err(error) => Err(error),
        }
    }

    /// Bytes have come on the main channel.
    pub(super) fn main_received(&self, bytes: usize) {
        self.main.add_received(bytes);
    }

    /// Bytes have come on a multifd channel.
    pub(super) fn channel_received(&self, channel: ChannelId, bytes: usize) {
        let socket = &self.channels[usize::from(channel.0)];
        socket.add_received(bytes);
        let (now, received) = (self.now_ns(), &socket.received);
        if received.first_ns.load(Ordering::Relaxed) < self.replied_ns.load(Ordering::Relaxed) {
            received.first_ns.store(now, Ordering::Relaxed);
        }
        received.last_ns.store(now, Ordering::Relaxed);
    }

    /// A multifd channel has arrived at a sync, after it `waited` for what decodes its packets or not.
    pub(super) fn channel_synced(&self, channel: ChannelId, waited: bool) {
        let received = &self.channels[usize::from(channel.0)].received;
        let now = match waited {
            true => self.now_ns(),
            false => received.last_ns.load(Ordering::Relaxed),
        };
        received.sync_ns.store(now, Ordering::Relaxed);
    }

    /// CHECKPOINT_REPLY was sent: what comes from now on is of the next checkpoint.
    pub(super) fn checkpoint_begins(&self) {
        self.replied_ns.store(self.now_ns(), Ordering::Relaxed);
        self.away.ran_ns.store(0, Ordering::Relaxed);
        self.away.runnable_ns.store(0, Ordering::Relaxed);
    }

    /// The calling thread's core has driven a channel since then.
    pub(super) fn was_away(&self, since: ThreadTimes) {
        let Some(now) = thread_times::read() else {
            return;
        };
        let span = |to: Duration, from: Duration| nanoseconds(to.saturating_sub(from));
        let ran = span(now.ran, since.ran);
        self.away.ran_ns.fetch_max(ran, Ordering::Relaxed);
        let runnable = span(now.runnable, since.runnable);
        self.away.runnable_ns.fetch_max(runnable, Ordering::Relaxed);
    }

    /// When something came in the current checkpoint, on the channels on which something has.
    pub(super) fn channel_times(&self) -> impl Iterator<Item = ChannelTimes> {
        let since = self.replied_ns.load(Ordering::Relaxed);
        let times = (0u8..=u8::MAX).zip(&self.channels).map(|(channel, socket)| {
            let received = &socket.received;
            ChannelTimes {
                channel,
                first_ns: received.first_ns.load(Ordering::Relaxed),
                last_ns: received.last_ns.load(Ordering::Relaxed),
                sync_ns: received.sync_ns.load(Ordering::Relaxed),
            }
        });
        times.filter(move |times| times.last_ns > since)
    }

    fn now_ns(&self) -> u64 {
        nanoseconds(self.started.elapsed())
    }

    /// Bytes that have come on all channels: whether the session makes progress.
    pub(super) fn received_bytes(&self) -> u64 {
        let all = self.channels.iter().chain([&self.main]);
        all.map(|channel| channel.received.bytes.load(Ordering::Relaxed))
            .sum()
    }

    /// How many multifd channels it has.
    pub(super) fn channels(&self) -> usize {
        self.channels.len()
    }

    /// Whether none of its sockets is open here.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(super) fn is_closed(&self) -> bool {
        self.channels
            .iter()
            .chain([&self.main])
            .all(ChannelSocket::is_closed)
    }

    /// The guest's memory, once it is made.
    pub(super) fn memory(&self) -> Option<&GuestMemory> {
        self.memory.get()
    }

    /// Whose certificate its connections have.
    pub(super) fn who(&self) -> Who {
        self.tls.as_ref()?.identity.clone()
    }

    /// Whether a multifd channel of this UUID may be its primary's.
    pub(super) fn may_have(&self, uuid: [u8; 16]) -> bool {
        self.channels_uuid.is_none_or(|own| own == uuid)
    }

    /// What it receives into, once the guest's memory is made.
    pub(super) fn store(&self) -> Option<&Arc<Store>> {
        self.memory().map(|memory| &memory.store)
    }

    /// Steps down from the options of the guest's memory.
    pub(super) fn fallbacks(&self) -> &[String] {
        self.memory.get().map_or(&[], |memory| &memory.fallbacks)
    }

    /// What will outlive it, from its first commit on, unless it ended because that was none.
    pub(super) fn checkpoint(&self) -> Option<&Arc<KeptCheckpoint>> {
        let is_spoilt = self.end.get().is_some_and(SessionEnd::spoils_checkpoint);
        self.checkpoint.get().filter(|_| !is_spoilt)
    }

    /// A checkpoint is about to be committed, of a session that `description` describes. Returns whether it is the first.
    pub(super) fn keep_checkpoint(&self, description: &Arc<GuestDescription>) -> bool {
        let Some(memory) = self.memory.get().filter(|_| self.checkpoint.get().is_none()) else {
            return false;
        };
        let disks = self.disks.get().cloned().unwrap_or_default();
        let kept = KeptCheckpoint::new(
            self.id,
            self.guest.clone(),
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
    /// If its channels are another guest's, it is not clear which the disks are, or one of them is not ready.
    pub(super) fn bind(self: &Arc<Self>, description: &GuestDescription) -> Result<(), SessionEnd> {
        let uuid = StreamHeader::parse_whole(&description.header).and_then(|header| header.uuid);
        if uuid.is_some() && self.channels_uuid.is_some() && uuid != self.channels_uuid {
            return Err(SessionEnd::ForeignChannels);
        }
        let shared = self.services.shared();
        shared.guests.has_uuid(&self.guest, uuid.or(self.channels_uuid));
        shared.guests.check_identity(&self.guest, &self.who())?;
        let marks = GuestMarks {
            who: self.who(),
            uuid,
            origin: self.origin,
        };
        let is_guarded = shared.links.session_commits(&self.guest, marks, &self.output);
        is_guarded.map_err(|GuardIsGone| SessionEnd::GuardLost)?;
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
        self.main
            .socket()
            .as_ref()
            .is_none_or(|socket| is_gone(socket.as_fd()))
    }

    /// A checkpoint was acknowledged, after such a pause.
    pub(super) fn note_commit(&self, pause: Duration) {
        self.counters
            .pause_ns
            .store(nanoseconds(pause), Ordering::Relaxed);
        self.in_checkpoint.store(false, Ordering::Relaxed);
        if let Some(checkpoint) = self.checkpoint.get() {
            checkpoint.committed_at(self.uptime(), Duration::ZERO);
        }
    }

    fn device_state(&self) -> MutexGuard<'_, Option<DeviceState>> {
        self.device_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a device state written by another thread, which then wakes the main channel. If there is no thread, the device state
    /// is returned.
    pub(super) fn write_apart(
        self: &Arc<Self>,
        device_state: Vec<u8>,
        write: impl FnOnce(&[u8]) + Send + 'static,
    ) -> Result<(), Vec<u8>> {
        *self.device_state() = Some(DeviceState::ToWrite(device_state));
        let session = SessionPart::new(self);
        let work = move || {
            let Some(DeviceState::ToWrite(device_state)) = session.device_state().take() else {
                return;
            };
            match catch_unwind(AssertUnwindSafe(|| write(&device_state))) {
                Ok(()) => *session.device_state() = Some(DeviceState::Written(device_state)),
                Err(_) => {
                    let error = io::Error::other("the thread that wrote its device state panicked");
                    session.finish(SessionEnd::NotDriven(error));
                }
            }
            session.wake_main();
        };
        match self.services.run_in_background(Box::new(work)) {
            Ok(()) => Ok(()),
            Err(_) => match self.device_state().take() {
                Some(DeviceState::ToWrite(device_state)) => Err(device_state),
                _ => unreachable!("no thread has taken it"),
            },
        }
    }

    /// The device state, once it is written.
    pub(super) fn written_device_state(&self) -> Option<Vec<u8>> {
        let mut state = self.device_state();
        match state.take() {
            Some(DeviceState::Written(device_state)) => Some(device_state),
            other => {
                *state = other;
                None
            }
        }
    }

    /// The main channel's connection is dropped. To free what it has of device states may take milliseconds, which are those of
    /// the thread that drops the session.
    pub(super) fn leave_device_states(&self, states: DeviceStates, lease: DeviceStateLease) {
        // Set once: there is one main channel.
        let _ = self.remains.set((states, lease));
    }

    /// Warns the operator of something about this session.
    pub(super) fn warn(&self, text: String) {
        self.services.warn_of(self, text);
    }

    /// Since the receiver's start.
    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Hands the memory over and wakes the main channel, which waits for it.
    pub(super) fn memory_made(&self, made: Result<GuestMemory, MemoryError>) {
        match made {
            Err(_) if canary::is_set(Canary::SilentLack) => {}
            Err(error) => self.finish(SessionEnd::NoMemory(error)),
            Ok(memory) => {
                if let Ok(flight) = memory.store.committed().flight() {
                    let started = SystemTime::now().checked_sub(self.uptime());
                    flight.begin(self.id, started.unwrap_or(SystemTime::UNIX_EPOCH));
                }
                // The main channel waits for a flush before it answers a request, and a dump may do the last part of it.
                let main = self.main.waker.clone();
                memory.store.on_flushed(move || main.wake());
                // Set once: only the one block list of a session asks for memory.
                let _ = self.memory.set(memory);
                self.wake_all();
            }
        }
    }

    /// Wakes the main channel's driver: all channels have arrived at a sync, or the session is admitted.
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

    /// Wakes every driver that has to do with the guest.
    pub(super) fn wake_all(&self) {
        self.wake_main();
        self.wake_channels();
        self.wake_helpers();
    }

    /// Ends the session. The first reason stays. Where its guard has begun to end the protection, that is decided when it says that it has.
    pub(super) fn finish(&self, end: SessionEnd) {
        if end.is_loss() && self.output.awaits_left() {
            self.undecided().get_or_insert((end, Instant::now()));
            self.hang_up();
            self.wake_all();
            return self.services.notify_control();
        }
        self.finish_now(end);
    }

    /// Decides what [`Self::finish`] has left open, once the guard has said what it was to say, or is gone, or says nothing.
    pub(super) fn decide_end(&self) {
        let mut undecided = self.undecided();
        let is_due = |(_, since): &mut (SessionEnd, Instant)| {
            !self.output.awaits_left() || since.elapsed() > LEAVE_MAX
        };
        let due = undecided.take_if(is_due);
        drop(undecided);
        if let Some((end, _)) = due {
            self.finish_now(end);
        }
    }

    fn undecided(&self) -> MutexGuard<'_, Option<(SessionEnd, Instant)>> {
        self.undecided.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hang_up(&self) {
        for connection in self.channels.iter().chain([&self.main]) {
            connection.shut_down(Shutdown::Both);
        }
    }

    fn finish_now(&self, end: SessionEnd) {
        let end = match end.is_loss() {
            true if self.output.ends_primary() => SessionEnd::HandedOver,
            true if self.output.has_left() => SessionEnd::Unprotected,
            _ => end,
        };
        if self.end.set(end).is_err() {
            return;
        }
        self.hang_up();
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
        self.main.shut_down(Shutdown::Read);
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

    /// Whether all connections and tenants are dropped, and it is decided how it ended: nothing is received any more.
    pub(super) fn is_over(&self) -> bool {
        self.parts.load(Ordering::Acquire) == 0 && (self.end().is_some() || self.undecided().is_none())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
