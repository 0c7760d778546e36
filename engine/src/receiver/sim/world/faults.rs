//! Faults of sessions, and requests to them.

use super::super::primary::Stage;
use super::World;
use crate::receiver::end::SessionEnd;
use crate::ring::sim::StreamEnd;
use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;

/// What is done to a session, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// One connection ends in an orderly way, somewhere in what is under way.
    Cut,
    /// One connection is reset, or its host has vanished.
    Reset,
    /// The primary dies.
    Kill,
    /// One connection brings rubbish.
    Rubbish,
    /// A channel brings a page after the last sync of a checkpoint.
    Intrude,
    /// A channel brings a page before the answer to a request.
    Hasten,
    /// The operator stops it.
    Stop,
}

pub(super) const FAULTS: [Fault; 10] = [
    Fault::Cut,
    Fault::Reset,
    Fault::Kill,
    Fault::Rubbish,
    Fault::Intrude,
    Fault::Intrude,
    Fault::Hasten,
    Fault::Hasten,
    Fault::Hasten,
    Fault::Stop,
];

fn is_intrusion(fault: Fault) -> bool {
    matches!(fault, Fault::Intrude | Fault::Hasten)
}

impl World {
    /// What happens to a session at this step, if anything.
    pub(super) fn break_something(&mut self) -> Result<(), String> {
        let now = self.tally.steps;
        while let Some(position) = self.faults.iter().position(|(at, ..)| *at <= now) {
            let (_, session, fault) = self.faults.swap_remove(position);
            if !self.may_happen(session, fault) || (is_intrusion(fault) && !self.intrude(session)) {
                self.faults.push((now + 1, session, fault));
                break;
            }
            self.fault(session, fault);
        }
        if self.dump_at.is_some_and(|at| at <= now)
            && let Some(session) = self.sessions.iter().find(|session| session.is_committed())
        {
            self.dump_at = None;
            self.tally.dumps += 1;
            self.note(|| "a dump".to_owned());
            let directory = super::super::tests::scratch();
            session.dump(directory.path())?;
        }
        Ok(())
    }

    fn fault(&mut self, number: usize, fault: Fault) {
        let session = &mut self.sessions[number];
        session.is_touched = true;
        let connection = self.rng.below(session.peers.len());
        self.tally.digest ^= fault as u64 + 1;
        if self.trace {
            println!(
                "{:>6} session {number}, connection {connection}: {fault:?}",
                self.tally.steps
            );
        }
        match fault {
            Fault::Cut => self.cut(number, connection, StreamEnd::Eof),
            Fault::Reset => {
                let errno = self
                    .rng
                    .pick(&[Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EHOSTUNREACH]);
                self.cut(number, connection, StreamEnd::Error(errno));
            }
            Fault::Kill => {
                let count = session.peers.len();
                // It reads no answer any more; ours may still find the connection open.
                if self.rng.one_in(2) {
                    let _ = shutdown(session.peers[0].as_raw_fd(), Shutdown::Read);
                }
                for connection in 0..count {
                    self.cut(number, connection, StreamEnd::Eof);
                }
            }
            Fault::Rubbish => self.spoil(number, connection),
            // It has done it already.
            Fault::Intrude | Fault::Hasten => {}
            Fault::Stop => session.live.finish(SessionEnd::Stopped),
        }
    }

    /// Whether now is the time for it.
    fn may_happen(&mut self, number: usize, fault: Fault) -> bool {
        let session = &self.sessions[number];
        match (fault, session.primary.stage) {
            (Fault::Intrude, stage) => matches!(stage, Stage::WaitReady | Stage::WaitLoaded),
            // Most of the time while the request waits for the end of a flush; the first request never finds one in progress.
            (Fault::Hasten, Stage::WaitReply) => {
                let waits = session.is_flushing() && session.is_main_channel_empty(&self.net.borrow());
                waits || self.rng.one_in(if session.is_flushing() { 20 } else { 100 })
            }
            (Fault::Hasten, _) => false,
            _ => true,
        }
    }

    /// Lets a channel bring a page that it should not; false if there is no channel.
    fn intrude(&mut self, number: usize) -> bool {
        let session = &mut self.sessions[number];
        let intruder = session.primary.intrude(&mut self.rng);
        session.send(&mut self.net.borrow_mut());
        session.intruder = intruder;
        session.intruder.is_some()
    }

    /// Ends a connection somewhere in what is under way on it.
    fn cut(&mut self, number: usize, connection: usize, end: StreamEnd) {
        let session = &mut self.sessions[number];
        let pipe = &mut self.net.borrow_mut().pipes[session.pipes.start + connection];
        let under_way = pipe.sent.len() - pipe.arrived;
        pipe.cut(pipe.arrived + self.rng.below(under_way + 1), end);
        session.genuine[connection] = session.genuine[connection].min(pipe.sent.len());
    }

    /// Puts rubbish where a packet, a record or a message begins that is under way, and ends the connection behind it.
    fn spoil(&mut self, number: usize, connection: usize) {
        let session = &mut self.sessions[number];
        let pipe = &mut self.net.borrow_mut().pipes[session.pipes.start + connection];
        let starts = &session.primary.streams[connection].starts;
        let (arrived, sent) = (pipe.arrived, pipe.sent.len());
        let possible: Vec<usize> = starts
            .iter()
            .copied()
            .filter(|at| (arrived..sent).contains(at))
            .collect();
        let at = if possible.is_empty() {
            sent
        } else {
            self.rng.pick(&possible)
        };
        pipe.cut(at, StreamEnd::Eof);
        pipe.sent.resize(at + self.rng.any_size(3000), 0xff);
        session.genuine[connection] = session.genuine[connection].min(at);
    }
}
