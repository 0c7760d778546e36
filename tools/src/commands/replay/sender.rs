//! The multifd channels' side of a replay: threads that write packets, each for a group of channels.
//!
//! A thread writes to its channels in turn, a packet in one write as the primary does, never waiting for one channel
//! while another takes bytes. Its waiting times are separated: time in `write` and in `poll` is the kernel's and the
//! secondary's, all other time from the moment the packets were due is this side's own.

use super::player::Part;
use crate::net::Socket;
use crate::primary::SynthError;
use crate::streams::Streams;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// A request to a thread to write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub part: Part,
    /// When it was due.
    pub due: Instant,
    /// With the pace of the capture: the moment at which its precopy begins.
    pub paced_from: Option<Instant>,
}

/// Processor time of the threads that write packets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SenderCpu {
    pub user: Duration,
    pub system: Duration,
}

/// One channel of a thread.
pub(super) struct Line {
    /// Position among the channels.
    pub channel: usize,
    pub socket: Socket,
    /// The packet that is written next, the one behind the last, and how much of the next is written.
    next: usize,
    end: usize,
    written: usize,
    /// Whether the socket has sent all that was written.
    is_sent: bool,
}

impl Line {
    /// Makes a connected socket, whose init packet is written, a channel's line.
    ///
    /// # Errors
    /// If its mode cannot be set.
    pub fn new(channel: usize, socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking()?;
        Ok(Self {
            channel,
            socket,
            next: 0,
            end: 0,
            written: 0,
            is_sent: true,
        })
    }

    fn is_done(&self) -> bool {
        self.next == self.end && self.is_sent
    }
}

/// A thread's state.
pub(super) struct PacketSender<'a> {
    pub streams: &'a Streams,
    pub lines: Vec<Line>,
    /// The main channel: shut down when this side fails, so that no reader waits there for an answer.
    pub main: Socket,
    pub patience: Duration,
}

impl PacketSender<'_> {
    /// Does jobs until there are none any more, or one fails. Each is answered by the time that was this side's own.
    pub fn run(mut self, jobs: &Receiver<Job>, done: &Sender<Result<Duration, SynthError>>) -> SenderCpu {
        while let Ok(job) = jobs.recv() {
            let written = self.write(&job);
            let failed = written.is_err();
            let is_unheard = done.send(written).is_err();
            if failed {
                self.main.shutdown();
            }
            if is_unheard || failed {
                break;
            }
        }
        cpu()
    }

    fn write(&mut self, job: &Job) -> Result<Duration, SynthError> {
        let parts = match job.part {
            Part::Precopy => &self.streams.precopy.packets,
            Part::Checkpoint(number) => &self.streams.checkpoints[number].packets,
        };
        for line in &mut self.lines {
            let packets = &parts[line.channel];
            (line.next, line.end, line.written) = (packets.start, packets.end, 0);
        }
        let mut not_own = Duration::ZERO;
        loop {
            let mut earliest = None::<Instant>;
            let (mut progress, mut blocked) = (false, false);
            for line in self.lines.iter_mut().filter(|line| !line.is_done()) {
                let paced_from = job.paced_from.filter(|_| line.is_sent);
                let wait = paced_from.and_then(|from| not_yet(self.streams, line, from));
                if let Some(due) = wait {
                    earliest = Some(earliest.map_or(due, |earliest| earliest.min(due)));
                    continue;
                }
                let begin = Instant::now();
                let wrote = write_some(self.streams, line)?;
                not_own += begin.elapsed();
                progress |= wrote;
                blocked |= !wrote;
            }
            if self.lines.iter().all(Line::is_done) {
                return Ok(job.due.elapsed().saturating_sub(not_own));
            }
            if !progress {
                let begin = Instant::now();
                self.wait(blocked, earliest)?;
                not_own += begin.elapsed();
            }
        }
    }

    /// Waits until a channel takes bytes, or the next packet is due.
    fn wait(&self, blocked: bool, due: Option<Instant>) -> Result<(), SynthError> {
        let until_due = due.map(|due| due.saturating_duration_since(Instant::now()));
        if !blocked {
            std::thread::sleep(until_due.unwrap_or_default());
            return Ok(());
        }
        let waiting = self.lines.iter().filter(|line| !line.is_done());
        let mut descriptors: Vec<_> = waiting
            .map(|line| PollFd::new(line.socket.as_fd(), PollFlags::POLLOUT))
            .collect();
        let limit = until_due.unwrap_or(self.patience).min(self.patience);
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut descriptors, timeout) {
            Ok(0) if until_due.is_none() => {
                let source = io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the secondary has read nothing for {:?}", self.patience),
                );
                let line = self.lines.iter().find(|line| !line.is_done());
                Err(failed(line.map_or(0, |line| line.channel), source))
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(failed(0, errno.into())),
        }
    }
}

/// When the line's next packet is due, if that is later than now.
fn not_yet(streams: &Streams, line: &Line, paced_from: Instant) -> Option<Instant> {
    let channel = &streams.channels[line.channel];
    let last = channel.packets()[line.next].end - 1;
    let at = channel.connection.to_secondary.at(last)?;
    let due = paced_from + at.saturating_sub(streams.began());
    (due > Instant::now()).then_some(due)
}

/// Sends what was written, or else writes of the line's next packet what there is room for. Returns whether there was any.
fn write_some(streams: &Streams, line: &mut Line) -> Result<bool, SynthError> {
    let wrote = match line.is_sent {
        true => write_packet(streams, line),
        false => line.socket.flush().map(|()| line.is_sent = true),
    };
    match wrote {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock => Ok(false),
            io::ErrorKind::Interrupted => Ok(true),
            _ => Err(failed(line.channel, error)),
        },
    }
}

fn write_packet(streams: &Streams, line: &mut Line) -> io::Result<()> {
    let packet = streams.channels[line.channel].packet_bytes(line.next);
    let written = line.socket.write(&packet[line.written..])?;
    if written == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    line.is_sent = false;
    line.written += written;
    if line.written == packet.len() {
        (line.next, line.written) = (line.next + 1, 0);
    }
    Ok(())
}

pub(super) fn failed(channel: usize, source: io::Error) -> SynthError {
    SynthError::Io {
        what: format!("multifd channel {channel}"),
        doing: "sending a packet",
        source,
    }
}

/// What the calling thread has used of a processor.
fn cpu() -> SenderCpu {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else {
        return SenderCpu::default();
    };
    let duration = |time: nix::sys::time::TimeVal| {
        let microseconds = time.tv_sec() * 1_000_000 + time.tv_usec();
        Duration::from_micros(u64::try_from(microseconds).unwrap_or(0))
    };
    SenderCpu {
        user: duration(usage.user_time()),
        system: duration(usage.system_time()),
    }
}
