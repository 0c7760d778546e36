//! What can be done in a step: bytes arrive, are received, a core takes a turn, a primary goes on.

use super::{RECORDS_A_TURN, TRIES, World};
use crate::receiver::end::SessionEnd;
use crate::receiver::silence::Answer;
use crate::receiver::sim::session::SimSession;
use crate::receiver::sim::stranger::Stranger;
use std::sync::PoisonError;

impl World {
    /// Does something, anything that can be done; false if there is nothing.
    pub(super) fn act(&mut self) -> Result<bool, String> {
        if self.rng.one_in(50) {
            let pipe = self.rng.below(self.stalled.len());
            self.stalled[pipe] = !self.stalled[pipe];
        }
        self.is_idle = false;
        for _ in 0..TRIES {
            let what = self.rng.below(14);
            let which = self.rng.next();
            if self.try_one(what, which)? {
                return Ok(true);
            }
        }
        self.stalled.fill(false);
        self.is_idle = true;
        for what in [0, 3, 7, 9, 11, 12] {
            for which in 0..self.stalled.len().max(self.cores.len()).max(self.workers.len()) {
                if self.try_one(what, which as u64)? {
                    return Ok(true);
                }
            }
        }
        self.links_go_on()
    }

    /// Tries to do something of a kind, to the one that `which` says; whether it was done.
    fn try_one(&mut self, what: usize, which: u64) -> Result<bool, String> {
        let one_of = |count: usize| usize::try_from(which % count as u64).expect("below a usize");
        let done = match what {
            0..3 => self.arrive(one_of(self.stalled.len())),
            3..7 => self.receive(one_of(self.stalled.len())),
            7..9 => self.turn(one_of(self.cores.len()))?,
            9..11 => self.go_on(one_of(self.sessions.len()))?,
            11 => self.do_job() || self.control(),
            _ if self.workers.is_empty() => false,
            _ if !self.is_idle && !self.rng.one_in(self.workers_laziness) => false,
            _ => self.work(one_of(self.workers.len())),
        };
        if done {
            self.tally.digest = (self.tally.digest ^ which ^ what as u64).wrapping_mul(0x100_0000_01b3);
        }
        Ok(done)
    }

    fn arrive(&mut self, pipe: usize) -> bool {
        if self.stalled[pipe] || self.is_pipe_frozen(pipe) || !self.net.borrow().pipes[pipe].is_under_way() {
            return false;
        }
        let bytes = self.rng.any_size(self.piece_bytes);
        let bytes = self.net.borrow_mut().pipes[pipe].arrive(bytes);
        self.tally.bytes += bytes as u64;
        self.note(|| format!("pipe {pipe}: {bytes} bytes arrive"));
        bytes > 0
    }

    fn receive(&mut self, pipe: usize) -> bool {
        let bytes = self.rng.any_size(self.piece_bytes);
        let eager = !self.wait_all || self.rng.one_in(200);
        let net = &mut *self.net.borrow_mut();
        if !net.pipes[pipe].is_ready() {
            return false;
        }
        let before = net.pipes[pipe].taken;
        let done = net.receive(pipe, bytes, eager);
        let taken = net.pipes[pipe].taken;
        self.note(|| format!("pipe {pipe}: {} bytes are received, to {taken}", taken - before));
        done
    }

    fn turn(&mut self, core: usize) -> Result<bool, String> {
        let called = self.net.borrow().is_ready(core) || self.cores[core].is_woken();
        // Work that can wait does, where other guests keep the core from it.
        let waits = !self.is_idle && !self.rng.one_in(self.laziness);
        if !called && (waits || !self.cores[core].is_busy()) {
            return Ok(false);
        }
        self.note(|| format!("core {core} takes a turn"));
        let records = |session: &SimSession| session.main_channel_pages();
        let before: Vec<_> = self.sessions.iter().map(records).collect();
        self.cores[core].turn().map_err(|error| error.to_string())?;
        for (session, before) in self.sessions.iter().zip(before) {
            let pages = session.main_channel_pages() - before;
            if pages > RECORDS_A_TURN {
                return Err(format!(
                    "a turn applied {pages} pages of one guest's main channel"
                ));
            }
        }
        Ok(true)
    }

    /// The primary reads answers, or does what comes next.
    fn go_on(&mut self, number: usize) -> Result<bool, String> {
        if self.lack.is_frozen(number) {
            return Ok(false);
        }
        let session = &mut self.sessions[number];
        let before = session.primary.stage;
        let answered = session
            .read_answers()
            .map_err(|error| format!("session {number}: {error}"))?;
        if let Some(hostility) = session.hostility.as_mut().filter(|_| !answered)
            && hostility.is_hasty()
        {
            session.primary.ignore_answers();
        }
        let acts = !answered && session.may_act(&self.net.borrow());
        if acts {
            session.primary.act(&mut self.rng);
            if let Some(disks) = &mut session.disks {
                disks.take_snapshot(session.primary.snapshots.len());
            }
            session.send(&mut self.net.borrow_mut());
        }
        let after = self.sessions[number].primary.stage;
        if answered || acts {
            self.note(|| format!("session {number}: the primary goes from {before:?} to {after:?}"));
        }
        Ok(answered || acts)
    }

    /// What the control thread does. It may come late to the connections that wait in the listener's queue.
    fn control(&mut self) -> bool {
        let is_late = !self.is_idle && !self.control.one_in(self.control_laziness);
        self.decide_silence() || (!is_late && self.admit())
    }

    /// Allows a session that asks for it to commit for the first time.
    fn admit(&mut self) -> bool {
        let mut asking = self
            .sessions
            .iter()
            .filter(|session| session.live.admission.is_asked());
        let Some(session) = asking.next() else {
            return false;
        };
        if let Some(Stranger(channel)) = session.stranger {
            self.tally.strangers += u64::from(session.live.admission.refuse(channel));
            session.live.finish(SessionEnd::Contradicted { channel });
            self.note(|| "a session is refused".to_owned());
            return true;
        }
        session.live.admission.admit();
        session.live.wake_main();
        self.note(|| "a session is admitted".to_owned());
        true
    }

    /// Looks whether more follows what looks like the end of a device state. Time enough has passed when nothing is under way.
    fn decide_silence(&mut self) -> bool {
        for session in &self.sessions {
            let Some(question) = session.live.silence.asked() else {
                continue;
            };
            let pipe = &mut self.net.borrow_mut().pipes[session.pipes.start];
            let has_more = pipe.has_ended() || pipe.arrived > pipe.taken || pipe.is_filling();
            if !has_more && pipe.is_under_way() {
                continue;
            }
            self.tally.false_ends += u64::from(has_more);
            let answer = match has_more {
                true => Answer::Broken,
                false => Answer::Silent,
            };
            session.live.silence.decide(question, answer);
            session.live.wake_main();
            return true;
        }
        false
    }

    /// Makes a guest's memory.
    fn do_job(&mut self) -> bool {
        let job = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(job) = job else { return false };
        self.note(|| "memory is made".to_owned());
        job();
        true
    }
}
