//! What a run lacks: RAM in the budget, mappings or threads that the host refuses, or a peer that goes on.

use super::super::rng::Rng;
use super::{STEPS_USUAL, World};
use crate::failpoint::{self, Point};
use crate::receiver::sim::primary::Stage;
use crate::units::PAGE_BYTES;
use std::cell::Cell;
use std::rc::Rc;

/// What the seed of these differs by.
const LACK: u64 = 0x6c61_636b;

/// Pages of a pool, and what a session takes beside its guest's memory.
const POOL_PAGES: usize = 3000;

/// See the module. Its numbers are of its own, so that a seed of a run that lacks nothing stays the run that it was.
pub(super) struct Lack {
    rng: Rng,
    /// The limit of RAM for all guests, where it is short.
    pub(super) ram: Option<u64>,
    /// One in so many mappings is refused.
    mappings: Option<usize>,
    /// One in so many threads for background work is.
    pub(super) threads: Option<usize>,
    /// When a session's peer stands still, until all others have come to their end.
    freeze_at: Option<u64>,
    frozen: Option<usize>,
    refused: Rc<Cell<u64>>,
}

impl Lack {
    /// With guests of so many pages at most.
    pub(super) fn random(seed: u64, is_mortal: bool, guests: usize, pages_max: usize) -> Self {
        let mut rng = Rng::new(seed ^ LACK);
        let mut lack = Self {
            ram: None,
            mappings: None,
            threads: None,
            freeze_at: None,
            frozen: None,
            refused: Rc::default(),
            rng: Rng::new(rng.next()),
        };
        // A receiver that is killed is looked at by one that lacks nothing.
        if is_mortal {
            return lack;
        }
        if rng.one_in(8) {
            lack.ram = Some(rng.range(1, 2 * guests * (pages_max + POOL_PAGES)) as u64 * PAGE_BYTES);
        }
        if rng.one_in(8) {
            lack.mappings = Some(rng.pick(&[2, 8, 30]));
        }
        if rng.one_in(12) {
            lack.threads = Some(rng.pick(&[2, 5]));
        }
        if guests > 1 && rng.one_in(3) {
            lack.freeze_at = Some(rng.any_size(STEPS_USUAL) as u64);
        }
        lack
    }

    /// Whether sessions may end for want of memory.
    pub(super) fn may_lack(&self) -> bool {
        self.ram.is_some() || self.mappings.is_some() || self.threads.is_some()
    }

    /// A source of numbers for something that fails.
    pub(super) fn rng(&mut self) -> Rng {
        Rng::new(self.rng.next())
    }

    /// Mappings fail from now on, or no more.
    pub(super) fn let_mappings_fail(&mut self, fail: bool) {
        let Some(one_in) = self.mappings else { return };
        let (mut rng, refused) = (self.rng(), self.refused.clone());
        if !fail {
            return failpoint::clear(Point::Mapping);
        }
        failpoint::set(Point::Mapping, move || {
            let is_refused = rng.one_in(one_in);
            refused.set(refused.get() + u64::from(is_refused));
            is_refused
        });
    }

    /// Whether nothing comes from this session's primary, because it stands still.
    pub(super) fn is_frozen(&self, session: usize) -> bool {
        self.frozen == Some(session)
    }

    pub(super) fn refused_mappings(&self) -> u64 {
        self.refused.get()
    }
}

impl World {
    /// Whether nothing comes on a connection.
    pub(super) fn is_pipe_frozen(&self, pipe: usize) -> bool {
        let frozen = self.lack.frozen.map(|session| &self.sessions[session]);
        frozen.is_some_and(|session| session.pipes.contains(&pipe))
    }

    /// A session stands still from this step on, if one is to.
    pub(super) fn freeze(&mut self) {
        if self.lack.freeze_at.is_some_and(|at| at <= self.tally.steps) {
            self.lack.freeze_at = None;
            let session = self.lack.rng.below(self.sessions.len());
            self.lack.frozen = Some(session);
            self.tally.frozen += 1;
            self.note(|| format!("session {session} stands still"));
        }
    }

    /// Nothing else goes on: the session that stood still does again. All others have come to their end without it. False if none
    /// stands still.
    ///
    /// # Errors
    /// If another one waits.
    pub(super) fn thaw(&mut self) -> Result<bool, String> {
        let Some(frozen) = self.lack.frozen.take() else {
            return Ok(false);
        };
        for (number, session) in self.sessions.iter().enumerate() {
            if number != frozen && session.must_be_done() && session.primary.stage != Stage::Done {
                return Err(format!(
                    "session {number} is held up by session {frozen}, which stands still: its primary is at {:?}",
                    session.primary.stage
                ));
            }
        }
        self.note(|| format!("session {frozen} goes on"));
        Ok(true)
    }
}
