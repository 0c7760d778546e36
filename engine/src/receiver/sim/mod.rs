//! A deterministic simulation of the receiver: the real connections, sessions, core loops and stores, driven by a model
//! primary over a model network. No thread, no clock, no socket that carries a page: **a seed is a run**.
//!
//! ```text
//!  Primary ──bytes──► Pipe ··any fragmentation, order, delay, end··► SimBackend ► Core ► MainChannel, PageChannel ► Store
//!     ▲  snapshots                                                                              │ answers
//!     └──────────────────────────── a socket pair for each connection, read by the primary ◄───┘
//! ```
//!
//! A [`World`] takes one step after the other, each chosen by the seed: some bytes arrive, a receive gets some of them, a
//! core takes a turn, a worker decodes a packet, the primary goes on, memory is made, something breaks. After every step it asks:
//!
//! * Is the committed checkpoint one that the primary has sent whole, all of which is here?
//! * Is it the last one acknowledged, or one behind it whose acknowledgement is on its way?
//! * Is the image, page by page, that checkpoint's memory, and the device state its device state?
//!
//! The guests are small, so in some runs a core takes a step of a flush only now and then: with large guests, the primary asks
//! for the next checkpoint long before the flush of the last one has finished.
//!
//! Now and then, most of all while a flush is under way, it asks as a failover does ([`crate::store::CheckpointView`]) or
//! dumps to files.
//!
//! In some runs the receiver is killed, at any step, and between any two stores of a commit or a flush: what is in its RAM
//! directory then is given to the real recovery, and what that finds must be the last committed checkpoint, or the one being
//! committed, page by page. (The run itself goes on, so that it may be killed again.)
//!
//! Some guests have put the end of a device state into a buffer of their device (`primary.rs`), and in some sessions a channel is a
//! stranger's (`stranger.rs`): neither may be committed.
//!
//! At the end: did everything that was not broken come to its end, and is nothing held any more: no connection, no posted
//! receive, no registered buffer, no memory, no budget?
//!
//! Some guests have disks (`disks.rs`), which they write while they run. What is committed of a disk must be what the guest had written
//! when the checkpoint of its memory was taken, also after a kill and after the end of the session.
//!
//! Some guests have a guard (`guard.rs`), which holds what they send. Nothing that the world has seen may be missing in the committed
//! checkpoint, however late the guard's messages are, and if its link is lost.
//!
//! What is not simulated: the backends' own system calls, the threads of a flush, commits between the passes of a dump, a
//! connection's way to its session, deadlines. Orders between threads are loom's.
//!
//! `scripts/simulate` runs it for as long as one likes.

mod death;
mod disks;
mod guard;
mod hostile;
mod memory;
mod primary;
mod rng;
mod session;
mod stranger;
mod tests;
mod world;

use crate::canary::{self, Canary};
use crate::failpoint::{self, Point};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

/// What a run did: shows whether runs do enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    steps: u64,
    sessions: u64,
    /// Sessions that were left alone and came to their end.
    untouched: u64,
    /// Sessions of hostile primaries.
    hostile: u64,
    /// Mappings and threads that were refused.
    refused: u64,
    /// Sessions that stood still until the others had come to their end.
    frozen: u64,
    commits: u64,
    bytes: u64,
    dumps: u64,
    /// Sessions that were refused because of a stranger among their channels.
    strangers: u64,
    /// Ends of device states that were none.
    false_ends: u64,
    /// Times that a channel went on at another core.
    moves: u64,
    /// Packets that workers decoded.
    decoded: u64,
    /// Writes to disks, and logs that were applied.
    disk_writes: u64,
    applied: u64,
    /// Frames of guests with a guard that the world has seen.
    seen: u64,
    /// Times that the receiver was killed.
    kills: u64,
    /// Sessions by how they ended.
    ends: BTreeMap<&'static str, u64>,
    /// Follows from every step: two runs are equal if theirs are.
    digest: u64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.steps += other.steps;
        self.sessions += other.sessions;
        self.untouched += other.untouched;
        self.hostile += other.hostile;
        self.refused += other.refused;
        self.frozen += other.frozen;
        self.commits += other.commits;
        self.bytes += other.bytes;
        self.dumps += other.dumps;
        self.strangers += other.strangers;
        self.false_ends += other.false_ends;
        self.moves += other.moves;
        self.decoded += other.decoded;
        self.disk_writes += other.disk_writes;
        self.applied += other.applied;
        self.seen += other.seen;
        self.kills += other.kills;
        for (end, count) in &other.ends {
            *self.ends.entry(end).or_default() += count;
        }
        self.digest ^= other.digest;
    }
}

/// How a seed is run.
#[derive(Clone, Copy, Default)]
struct How {
    /// Tell every step.
    trace: bool,
    /// Break a promise.
    canary: Option<Canary>,
    /// Kill the receiver a few times, at any instant, and look at what the next one finds.
    is_mortal: bool,
}

/// Runs one seed.
///
/// # Errors
/// What was wrong, and after which step.
fn run(seed: u64, how: How) -> Result<Tally, String> {
    let How {
        trace,
        canary,
        is_mortal,
    } = how;
    canary::set(canary);
    let done = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, trace, is_mortal);
        let done = world.run();
        done.map_err(|error| format!("step {}: {error}", world.steps()))
    }));
    canary::set(None);
    failpoint::clear(Point::Kill);
    failpoint::clear(Point::Mapping);
    done.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(format!("a panic: {}", text.unwrap_or("without a message")))
    })
}
