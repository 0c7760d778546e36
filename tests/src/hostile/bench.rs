//! A receiver in this process with a guest that behaves, while others beside it do not.

use super::HostilePrimary;
use crate::receiver::dump;
use crate::{HANG_LIMIT, receiver_options};
use colo_ring::receiver::{
    Dumped, Event, ListenAddress, RamLimit, Receiver, ReceiverOptions, Request, Response, SessionStatus,
};
use colo_ring::ring::BackendKind;
use colo_ring::wire::codec::Method;
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// By how much the end of a session after a fault may be slower than a checkpoint of the neighbour or an answer of the
/// control thread: all are a few messages between the same threads. An end that only a timer brings is a thousand times
/// slower.
const END_RATIO_MAX: u32 = 100;

/// Where the wrong bytes began, and so how the message has to begin.
#[derive(Clone, Copy, Debug)]
pub enum At {
    /// On the main channel.
    Main {
        /// Its byte.
        byte: u64,
    },
    /// On a multifd channel.
    Channel {
        /// Its id.
        id: usize,
        /// Its packet.
        packet: u64,
        /// The packet's first byte.
        byte: u64,
    },
    /// Nowhere: the connection went away, or something is missing.
    Nowhere,
}

impl At {
    /// What the main channel sends next.
    #[must_use]
    pub fn main(primary: &HostilePrimary) -> Self {
        let byte = primary.main.bytes;
        Self::Main { byte }
    }

    /// The packet that this channel sends next.
    #[must_use]
    pub fn channel(primary: &HostilePrimary, id: usize) -> Self {
        let (packet, byte) = (primary.channels[id].packets, primary.channels[id].bytes);
        Self::Channel { id, packet, byte }
    }

    fn prefix(self) -> String {
        match self {
            Self::Main { byte } => format!("main channel, byte {byte}: "),
            Self::Channel { id, packet, byte } => format!("channel {id}, packet {packet}, byte {byte}: "),
            Self::Nowhere => String::new(),
        }
    }
}

/// What a session's end took, and what was done right after it.
struct End {
    /// From the fault to the end of its session.
    after: Duration,
    /// A checkpoint of the neighbour.
    checkpoint: Duration,
    /// A control request.
    answer: Duration,
}

/// The receiver, its neighbouring guest and what was told.
pub struct Bench {
    /// The receiver.
    pub receiver: Receiver,
    /// Where it listens.
    pub address: SocketAddr,
    channels: u8,
    events: mpsc::Receiver<Event>,
    told: Vec<Event>,
    neighbour: SynthPrimary,
    directory: TempDir,
    ends: Vec<End>,
}

impl Bench {
    /// Starts a receiver, and a guest that behaves.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start(backend: BackendKind, channels: u8) -> Self {
        Self::start_with(backend, channels, HANG_LIMIT)
    }

    /// The same, for a test that waits for the end of the time in which connections have to become a session. It is
    /// long in comparison with what a session needs for that on this machine.
    #[must_use]
    pub fn start_with_deadline(backend: BackendKind, channels: u8) -> (Self, Duration) {
        let since = Instant::now();
        Self::start(backend, channels).end();
        let deadline = Duration::from_secs(1).max(10 * since.elapsed());
        (Self::start_with(backend, channels, deadline), deadline)
    }

    fn start_with(backend: BackendKind, channels: u8, identify_deadline: Duration) -> Self {
        let (tell, events) = mpsc::channel();
        let options = options(backend, channels, identify_deadline);
        let receiver = Receiver::start(options, move |event| {
            // At the very end the other side of the queue is gone.
            let _ = tell.send(event);
        });
        let receiver = receiver.expect("a receiver");
        let ListenAddress::Tcp(address) = receiver.addresses()[0] else {
            panic!("the receiver listens on TCP")
        };
        let shape = SynthOptions {
            ram_bytes: 2 << 20,
            channels,
            dirty_pages: Distribution::Fixed(40),
            interval: Duration::ZERO,
            uuid: [9; 16],
            ..SynthOptions::new(Version::V11_1)
        };
        let to = receiver.addresses()[0].to_string();
        let neighbour = SynthPrimary::connect(&to.parse().expect("an address"), &shape).expect("a session");
        let directory = tempfile::tempdir().expect("a directory");
        let mut bench = Self {
            receiver,
            address,
            channels,
            events,
            told: Vec::new(),
            neighbour,
            directory,
            ends: Vec::new(),
        };
        assert_eq!(bench.began(), 1);
        bench
    }

    /// A hostile primary's session with one committed checkpoint, and its number.
    pub fn protected(&mut self) -> (u32, HostilePrimary) {
        let primary = HostilePrimary::protected(self.address, self.channels);
        (self.began(), primary)
    }

    /// The same from a primary that compresses.
    pub fn protected_with(&mut self, method: Method) -> (u32, HostilePrimary) {
        let primary = HostilePrimary::protected_with(self.address, self.channels, method);
        (self.began(), primary)
    }

    /// A hostile primary's session of which only the main channel's first bytes have been sent, and its number.
    pub fn connected(&mut self) -> (u32, HostilePrimary) {
        let mut primary = HostilePrimary::connect(self.address, self.channels);
        primary.main.send(&super::header()[..4]);
        (self.began(), primary)
    }

    /// Waits until a session has begun.
    pub fn began(&mut self) -> u32 {
        self.wait_for("a session that begins", |event| match event {
            Event::Began { session, .. } => Some(session.session),
            _ => None,
        })
    }

    /// Waits until this session has ended.
    pub fn ended(&mut self, session: u32) -> SessionStatus {
        self.wait_for("the session's end", |event| match event {
            Event::Ended(status) if status.session == session => Some(SessionStatus::clone(status)),
            _ => None,
        })
    }

    /// How a session stands; none if it has ended without a checkpoint.
    pub fn status_of(&self, session: u32) -> Option<SessionStatus> {
        match self.receiver.ask(Request::Status) {
            Ok(Response::Status(report)) => {
                (report.sessions.into_iter()).find(|status| status.session == session)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Waits for a warning with this in it.
    pub fn warned(&mut self, part: &str) {
        self.wait_for(part, |event| match event {
            Event::Warning(remark) => remark.text.contains(part).then_some(()),
            _ => None,
        });
    }

    fn wait_for<T>(&mut self, what: &str, find: impl Fn(&Event) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            let found = self.told.iter().position(|event| find(event).is_some());
            if let Some(position) = found {
                return find(&self.told.remove(position)).expect("found just now");
            }
            let left = HANG_LIMIT.saturating_sub(since.elapsed());
            match self.events.recv_timeout(left) {
                Ok(event) => self.told.push(event),
                Err(_) => panic!(
                    "waited {HANG_LIMIT:?} for {what}; told meanwhile: {:?}",
                    self.told
                ),
            }
        }
    }

    /// After a fault: the session has ended at once with such a message and its sockets are closed, the checkpoint is
    /// the last one committed, and the neighbour goes on.
    pub fn survives(
        &mut self,
        name: &str,
        session: u32,
        primary: &mut HostilePrimary,
        at: At,
        says: &[&str],
    ) {
        println!("{name}");
        let fault = Instant::now();
        let status = self.ended(session);
        let took = fault.elapsed();
        let end = status.end.expect("it has ended");
        println!("    {end}");
        assert!(
            end.starts_with(&at.prefix()),
            "{name}: {end}, but it began at {at:?}"
        );
        for part in says {
            assert!(end.contains(part), "{name}: {part:?} is missing in: {end}");
        }
        assert!(primary.is_closed(), "{name}: connections were left open");
        if status.checkpoint.is_some() {
            self.compare(session, primary);
            self.discard(session);
        }
        let checkpoint = Instant::now();
        self.neighbour.checkpoint().expect("a session beside it goes on");
        let checkpoint = checkpoint.elapsed();
        let request = Instant::now();
        self.receiver
            .ask(Request::Status)
            .expect("the neighbour is there");
        self.ends.push(End {
            after: took,
            checkpoint,
            answer: request.elapsed(),
        });
    }

    /// The primary closes its main channel: the session ends by that, and keeps the last checkpoint.
    pub fn closes(&mut self, session: u32, primary: &mut HostilePrimary) {
        primary.main.half_close();
        self.survives(
            "its end",
            session,
            primary,
            At::Nowhere,
            &["the primary went away"],
        );
    }

    /// The committed checkpoint is what this primary knows to be committed.
    pub fn compare(&self, session: u32, primary: &HostilePrimary) -> u64 {
        let dumped = self.dump(session).expect("it has a checkpoint");
        let read = |file: &str| std::fs::read(self.directory.path().join(file)).expect("a dumped file");
        let blocks: Vec<_> = primary.image().collect();
        assert_eq!(dumped.blocks.len(), blocks.len());
        for (block, (name, image)) in dumped.blocks.iter().zip(blocks) {
            assert_eq!(block.name, name);
            assert!(
                read(&block.file) == image,
                "block {name} is not as it was committed"
            );
        }
        assert_eq!(read(&dumped.device_state_file), primary.device_state());
        dumped.checkpoint
    }

    /// The device state of a session's checkpoint.
    pub fn device_state(&self, session: u32) -> Vec<u8> {
        let dumped = self.dump(session).expect("it has a checkpoint");
        std::fs::read(self.directory.path().join(dumped.device_state_file)).expect("a dumped file")
    }

    /// Dumps a session.
    ///
    /// # Errors
    /// What the receiver says.
    pub fn dump(&self, session: u32) -> Result<Dumped, String> {
        dump(&self.receiver, session, self.directory.path())
    }

    /// Sessions have ended as soon as their faults were there. A busy machine makes many ends late, a timer makes all.
    fn check_ends(&self) {
        // Fewer say nothing.
        if self.ends.len() < 5 {
            return;
        }
        let sorted = |of: fn(&End) -> Duration| {
            let mut times: Vec<_> = self.ends.iter().map(of).collect();
            times.sort_unstable();
            times
        };
        let after = sorted(|end| end.after)[self.ends.len() / 4];
        let checkpoint = sorted(|end| end.checkpoint)[self.ends.len() / 2];
        let answer = sorted(|end| end.answer)[self.ends.len() / 2];
        let times = format!(
            "a quarter of the sessions ended within {after:?} of their faults; half of the checkpoints took up to \
             {checkpoint:?}, half of the answers {answer:?}"
        );
        println!("{times}");
        assert!(after < END_RATIO_MAX * checkpoint.max(answer), "{times}");
    }

    /// Gives the checkpoint of a session up that has ended.
    pub fn discard(&self, session: u32) {
        let answer = self.receiver.ask(Request::Discard { session });
        assert!(
            matches!(answer, Ok(Response::Discarded { discarded }) if discarded == session),
            "{answer:?}"
        );
    }

    /// The neighbour's checkpoint is right to the end, nothing else is held, and the receiver ends.
    ///
    /// # Panics
    /// If it is not so.
    pub fn end(mut self) {
        self.check_ends();
        self.neighbour.checkpoint().expect("a session beside it goes on");
        let dumped = self.dump(1).expect("the neighbour has a checkpoint");
        for block in &dumped.blocks {
            let file = std::fs::read(self.directory.path().join(&block.file)).expect("a dumped file");
            let image = self.neighbour.image(&block.name).expect("its block");
            assert!(*image == *file, "the neighbour's block {} is damaged", block.name);
        }
        match self.receiver.ask(Request::Status) {
            Ok(Response::Status(status)) => assert_eq!(status.sessions.len(), 1, "{:?}", status.sessions),
            other => panic!("{other:?}"),
        }
        self.receiver.stop_handle().stop();
        let outcome = self.receiver.wait().expect("it ends as it was told");
        assert_eq!(
            outcome.sessions[0].end.as_deref(),
            Some("the receiver was stopped")
        );
    }
}

fn options(backend: BackendKind, channels: u8, identify_deadline: Duration) -> ReceiverOptions {
    ReceiverOptions {
        ram_limit: RamLimit::exactly(192 << 20),
        identify_deadline,
        ..receiver_options(backend, channels)
    }
}
