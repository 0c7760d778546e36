//! Plays one session of a capture as its primary would.
//!
//! The main channel is written by the calling thread in the pieces of the capture, and waits for each answer where
//! the primary did; the packets are written meanwhile by the threads of [`super::sender`]. Nothing else waits.

use super::pace::Pacer;
use super::sender::{Job, Line, PacketSender, SenderCpu};
use crate::net::{Address, ConnectError, Socket};
use crate::primary::{Answer, MainLink, SynthError};
use crate::streams::{Changed, Streams};
use crate::tls::ClientTls;
use colo_ring::host::pin;
use colo_ring::wire::colo::Message;
use colo_ring::wire::return_path::RpMessage;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// A part of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Precopy,
    /// By its position in the capture.
    Checkpoint(usize),
}

/// How a session is played.
#[derive(Clone, Debug)]
pub(super) struct PlayOptions {
    pub address: Address,
    pub tls: Option<ClientTls>,
    /// Threads that write packets.
    pub threads: usize,
    /// Cores for these threads, in turn, and for the main channel. Empty: as the system likes.
    pub cores: Vec<usize>,
    /// Whether the main channel neither holds back what it sends nor delays acknowledgements, as a QEMU's does.
    pub no_stalls: bool,
    /// How long to wait for an answer, or for room in a socket.
    pub patience: Duration,
}

impl PlayOptions {
    fn connect(&self, what: &str) -> Result<Socket, ConnectError> {
        match &self.tls {
            None => Socket::connect(&self.address, what, self.patience),
            Some(tls) => tls.open(&self.address, what, self.patience),
        }
    }
}

/// One checkpoint by the primary's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timing {
    /// Its position in the capture.
    pub checkpoint: usize,
    /// When it ended, since the first connection.
    pub at: Duration,
    /// CHECKPOINT_REQUEST written to REPLY read.
    pub reply: Duration,
    /// VMSTATE_SEND due to RECEIVED read: with what it waited.
    pub received: Duration,
    /// VMSTATE_SEND due to LOADED read.
    pub loaded: Duration,
    /// How long it waited for those before it, past the moment it was due.
    pub waited: Duration,
    /// How late this side was.
    pub own_delay: Duration,
    /// Of `loaded`: what was neither the kernel's nor the secondary's.
    pub own: Duration,
}

impl Timing {
    /// VMSTATE_SEND written to LOADED read.
    pub fn service(&self) -> Duration {
        self.loaded - self.waited
    }
}

/// A session that is being played.
pub(super) struct Player<'a> {
    streams: &'a Streams,
    again: Option<&'a Changed>,
    main: MainLink,
    /// The other channels' sockets once more, to end the threads that wait for them.
    channels: Vec<Socket>,
    threads: Vec<Thread<'a>>,
    started: Instant,
}

struct Thread<'a> {
    jobs: Sender<Job>,
    done: Receiver<Result<Duration, SynthError>>,
    handle: ScopedJoinHandle<'a, SenderCpu>,
}

impl<'a> Player<'a> {
    /// Connects all channels, the main one first, and starts the threads.
    pub fn connect<'env: 'a>(
        scope: &'a Scope<'a, 'env>,
        streams: &'a Streams,
        again: Option<&'a Changed>,
        options: &PlayOptions,
    ) -> Result<Self, SynthError> {
        let started = Instant::now();
        let patience = options.patience;
        let main = options.connect("main channel")?;
        let mut channels = Vec::new();
        let mut groups: Vec<_> = (0..options.threads.min(streams.channels.len()))
            .map(|_| Vec::new())
            .collect();
        for (number, channel) in streams.channels.iter().enumerate() {
            let failed = |source| SynthError::Io {
                what: format!("multifd channel {number}"),
                doing: "starting",
                source,
            };
            let mut socket = options.connect(&format!("multifd channel {number}"))?;
            socket.set_nodelay().map_err(failed)?;
            socket
                .write_parts(&mut [IoSlice::new(channel.init_bytes())])
                .map_err(failed)?;
            channels.push(socket.try_clone().map_err(failed)?);
            let group = number % groups.len();
            groups[group].push(Line::new(number, socket).map_err(failed)?);
        }
        let start = |(number, lines)| {
            let sender = PacketSender {
                streams,
                lines,
                main: main.try_clone()?,
                patience,
            };
            let core = number_of(&options.cores, number);
            Thread::start(scope, number, core, sender)
        };
        let threads: io::Result<_> = groups.into_iter().enumerate().map(start).collect();
        let threads = threads.map_err(|source| SynthError::Io {
            what: "threads".to_owned(),
            doing: "starting",
            source,
        })?;
        // Nagle's algorithm stays on here, as with QEMU, unless that is not what is to be measured.
        let main = if options.no_stalls {
            MainLink::without_stalls(main, patience)?
        } else {
            MainLink::new(main, patience)
        };
        Ok(Self {
            streams,
            again,
            main,
            channels,
            threads,
            started,
        })
    }

    /// Plays precopy and waits for READY. With `paced`, nothing is sent earlier than in the capture.
    pub fn precopy(&mut self, paced: bool) -> Result<(), SynthError> {
        let paced_from = paced.then_some(self.started);
        self.start_part(Part::Precopy, paced_from);
        let streams = self.streams;
        let flow = &streams.main.to_secondary;
        for piece in streams.pieces(&streams.precopy.main) {
            if let (Some(from), Some(at)) = (paced_from, flow.at(piece.end - 1)) {
                let due = from + at.saturating_sub(streams.began());
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            self.write(&flow.bytes()[piece])?;
        }
        for value in &streams.pongs {
            self.expect(RpMessage::Pong(*value))?;
        }
        if streams.return_path {
            self.expect(RpMessage::Shut(0))?;
        }
        self.expect(Message::CheckpointReady)?;
        self.end_part().map(drop)
    }

    /// Time since the first connection.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes a checkpoint when it is due.
    pub fn checkpoint(
        &mut self,
        number: usize,
        is_again: bool,
        pacer: &mut Pacer,
    ) -> Result<Timing, SynthError> {
        let streams = self.streams;
        let checkpoint = &streams.checkpoints[number];
        let bytes = streams.main.to_secondary.bytes();
        let due = pacer.next(self.elapsed());
        std::thread::sleep(due.saturating_sub(self.elapsed()));

        let begin = self.elapsed();
        let own_delay = pacer.begin(begin);
        self.write(&bytes[checkpoint.request.clone()])?;
        self.expect(Message::CheckpointReply)?;
        let replied = self.elapsed();

        let sent = Instant::now();
        let changed = self
            .again
            .filter(|changed| is_again && changed.checkpoint == number);
        let own = match changed {
            Some(changed) => self.transfer(number, &changed.bytes, changed.pieces.iter().cloned(), sent)?,
            None => self.transfer(number, bytes, streams.pieces(&checkpoint.transfer), sent)?,
        };
        self.expect(Message::VmstateReceived)?;
        let received = sent.elapsed();
        self.expect(Message::VmstateLoaded)?;
        let loaded = sent.elapsed();
        let at = self.elapsed();
        let waited = pacer.end(at);
        let own = own + self.end_part()?;
        Ok(Timing {
            checkpoint: number,
            at,
            reply: replied - begin,
            received: received + waited,
            loaded: loaded + waited,
            waited,
            own_delay,
            own: own.min(loaded),
        })
    }

    /// Writes VMSTATE_SEND, notifies the threads, and writes the rest. Returns the time that was not spent in writes.
    fn transfer(
        &mut self,
        number: usize,
        bytes: &[u8],
        mut pieces: impl Iterator<Item = Range<usize>>,
        sent: Instant,
    ) -> Result<Duration, SynthError> {
        let send = pieces.next().unwrap_or_default();
        let mut not_own = self.timed_write(&bytes[send])?;
        self.start_part(Part::Checkpoint(number), None);
        for piece in pieces {
            not_own += self.timed_write(&bytes[piece])?;
        }
        Ok(sent.elapsed().saturating_sub(not_own))
    }

    fn timed_write(&mut self, bytes: &[u8]) -> Result<Duration, SynthError> {
        let begin = Instant::now();
        self.write(bytes)?;
        Ok(begin.elapsed())
    }

    fn start_part(&mut self, part: Part, paced_from: Option<Instant>) {
        let due = Instant::now();
        let job = Job {
            part,
            due,
            paced_from,
        };
        // A thread that has ended has failed before; its reason is found when the part ends.
        for thread in &self.threads {
            let _ = thread.jobs.send(job);
        }
    }

    /// All packets of the part are written: returns the longest own time of the threads.
    fn end_part(&mut self) -> Result<Duration, SynthError> {
        let mut longest = Duration::ZERO;
        for thread in &self.threads {
            match thread.done.recv() {
                Ok(own) => longest = longest.max(own?),
                Err(mpsc::RecvError) => {
                    let source = io::Error::other("its thread ended early");
                    return Err(super::sender::failed(0, source));
                }
            }
        }
        Ok(longest)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SynthError> {
        let written = self.main.write(bytes);
        written.map_err(|error| self.reason(error))
    }

    fn expect<T: Answer>(&mut self, expected: T) -> Result<(), SynthError> {
        let answered = self.main.expect(expected);
        answered.map_err(|error| self.reason(error))
    }

    /// A channel that failed shuts the main channel down: then it is the reason.
    fn reason(&self, error: SynthError) -> SynthError {
        let failed = self
            .threads
            .iter()
            .find_map(|thread| thread.done.try_recv().ok()?.err());
        failed.unwrap_or(error)
    }

    /// Ends the session as a primary that is killed does, at any time, and returns what the threads used.
    pub fn close(self) -> SenderCpu {
        self.main.shutdown();
        self.channels.iter().for_each(Socket::shutdown);
        let mut total = SenderCpu::default();
        for thread in self.threads {
            drop(thread.jobs);
            let used = thread
                .handle
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            total.user += used.user;
            total.system += used.system;
        }
        total
    }
}

impl<'a> Thread<'a> {
    fn start<'env: 'a>(
        scope: &'a Scope<'a, 'env>,
        number: usize,
        core: Option<usize>,
        sender: PacketSender<'a>,
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let (report, done) = mpsc::channel();
        let run = move || {
            // Checked when the options were read.
            let _ = core.map(|core| pin(&[core]));
            sender.run(&queue, &report)
        };
        let builder = std::thread::Builder::new().name(format!("replay-{number}"));
        let handle = builder.spawn_scoped(scope, run)?;
        Ok(Self { jobs, done, handle })
    }
}

fn number_of(cores: &[usize], thread: usize) -> Option<usize> {
    let position = thread.checked_rem(cores.len())?;
    cores.get(position).copied()
}
