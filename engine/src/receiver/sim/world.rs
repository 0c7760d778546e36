//! Everything of one run, and its steps.

use super::primary::{Kind, Primary, Stage};
use super::rng::Rng;
use super::session::SimSession;
use super::{FIRST_LEN, Tally};
use crate::metrics::SampleQueue;
use crate::receiver::budget::Budget;
use crate::receiver::end::SessionEnd;
use crate::receiver::guest::{Connection, Guest, MakeStore, Memory, Surroundings};
use crate::receiver::helper::Helper;
use crate::receiver::main_channel::MainChannel;
use crate::receiver::page_channel::{Cores, PageChannel};
use crate::ring::ReceiveStyle;
use crate::ring::sim::{Net, Network, Registered, SimCore, StreamEnd, Wire};
use crate::session::SessionLimits;
use crate::store::{CacheKind, CommitMode, CopyMethod, Flusher, Grain, HugePages, Store, StoreOptions};
use crate::units::ChannelId;
use crate::wire::stream::MAIN_MAGIC;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Every way to make a store.
const STORES: [(CacheKind, CommitMode); 4] = [
    (CacheKind::Mirror, CommitMode::Sync),
    (CacheKind::Mirror, CommitMode::Deferred),
    (CacheKind::Pool { max: None }, CommitMode::Sync),
    (CacheKind::Pool { max: None }, CommitMode::Deferred),
];

/// Steps after which a run has gone astray: none came near.
const STEPS_MAX: u64 = 1_000_000;

/// Steps that many runs have.
const STEPS_USUAL: usize = 3000;

/// Failed tries to find something to do at random, after which everything is looked at.
const TRIES: usize = 24;

/// Most pages of a guest, and most bytes of a piece in which they come: not so many small ones that few runs fit a minute.
const SIZES: [(usize, usize); 7] = [
    (8, 200),
    (40, 2000),
    (150, 20_000),
    (8, 1 << 20),
    (40, 1 << 20),
    (150, 1 << 20),
    (500, 1 << 20),
];

type Job = Box<dyn FnOnce() + Send>;

/// What is done to a session, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
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
    /// The operator stops it.
    Stop,
}

const FAULTS: [Fault; 7] = [
    Fault::Cut,
    Fault::Reset,
    Fault::Kill,
    Fault::Rubbish,
    Fault::Intrude,
    Fault::Intrude,
    Fault::Stop,
];

pub(super) struct World {
    rng: Rng,
    trace: bool,
    tally: Tally,
    net: Net,
    cores: Vec<SimCore>,
    sessions: Vec<SimSession>,
    around: Arc<Surroundings>,
    /// What is to be done apart: guests' memory to be made.
    jobs: Arc<Mutex<Vec<Job>>>,
    budgets: [Arc<Budget>; 2],
    /// Wires whose bytes wait for now.
    stalled: Vec<bool>,
    /// Steps before which something is done to a session.
    faults: Vec<(u64, usize, Fault)>,
    dump_at: Option<u64>,
    wait_all: bool,
    /// In how many tries a core does work that can wait.
    laziness: usize,
    /// Nothing was found to do at random.
    is_idle: bool,
    /// In how many steps somebody asks for the checkpoint while it is being flushed, once: that ends the flush.
    flush_looks: usize,
    /// Most bytes that arrive, or are received, in one step.
    piece_bytes: usize,
}

impl World {
    pub(super) fn new(seed: u64, trace: bool) -> Self {
        let rng = &mut Rng::new(seed);
        let threads = rng.one_in(4);
        let kinds: Vec<Kind> = (0..if rng.one_in(4) { 2 } else { 1 })
            .map(|_| Kind::random(rng))
            .collect();
        let connections: usize = kinds.iter().map(|kind| kind.channels + 1).sum();
        // A thread for each connection is a core that drives nothing else.
        let cores = if threads { connections } else { rng.range(1, 3) };
        let registered = match threads {
            true => Registered::No,
            false => rng.pick(&[
                Registered::No,
                Registered::Yes,
                Registered::Yes,
                Registered::Refused,
            ]),
        };
        let net = Network::new(cores, registered);
        let jobs = Arc::new(Mutex::new(Vec::new()));
        let (pages_max, piece_bytes) = rng.pick(&SIZES);
        let no_memory = rng.one_in(20);
        let ram = if no_memory { 4095 } else { 1 << 30 };
        let budgets = [("ram", ram), ("device state", 1 << 30)];
        let budgets = budgets.map(|(name, bytes)| Arc::new(Budget::new(bytes, name)));
        let around = surroundings(rng, cores, &jobs, &budgets);
        let mut world = Self {
            cores: SimCore::all(&net, cores, &around.warn).expect("eventfds"),
            stalled: vec![false; connections],
            faults: Vec::new(),
            dump_at: rng.one_in(16).then(|| rng.any_size(STEPS_USUAL) as u64),
            wait_all: rng.one_in(2),
            laziness: rng.pick(&[1, 20]),
            is_idle: false,
            flush_looks: rng.pick(&[4, 100]),
            piece_bytes,
            rng: Rng::new(rng.next()),
            trace,
            tally: Tally::default(),
            net,
            sessions: Vec::new(),
            around,
            jobs,
            budgets,
        };
        let style = if threads {
            ReceiveStyle::THREADS
        } else {
            ReceiveStyle {
                spread_from_pages: world.rng.pick(&[1, 3, 10, u64::MAX]),
                ..ReceiveStyle::RING
            }
        };
        for kind in kinds {
            world.begin(kind, style, pages_max, no_memory);
            if world.rng.one_in(2) {
                let fault = world.rng.pick(&FAULTS);
                let at = world.rng.any_size(STEPS_USUAL) as u64;
                world.faults.push((at, world.sessions.len() - 1, fault));
            }
        }
        world.note(|| format!("{cores} cores, {style:?}, {registered:?} buffers registered"));
        world
    }

    pub(super) fn steps(&self) -> u64 {
        self.tally.steps
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>6} {}", self.tally.steps, text());
        }
    }

    /// A primary connects all its channels.
    fn begin(&mut self, kind: Kind, style: ReceiveStyle, pages_max: usize, no_memory: bool) {
        self.note(|| format!("session {}: {kind:?}", self.sessions.len()));
        let primary = Primary::new(&mut self.rng, kind, pages_max);
        let first_wire = self.net.borrow().wires.len();
        let threads = style == ReceiveStyle::THREADS;
        let first_core = if threads {
            first_wire
        } else {
            self.rng.below(self.cores.len())
        };
        let mut peers = Vec::new();
        let mut connections = Vec::new();
        let mut drivers = Vec::new();
        for connection in 0..=kind.channels {
            let pair = socketpair(
                AddressFamily::Unix,
                SockType::Stream,
                None,
                SockFlag::SOCK_CLOEXEC,
            );
            let (socket, peer) = pair.expect("two descriptors");
            self.net.borrow_mut().wires.push(Wire::new(socket.as_raw_fd()));
            peers.push(peer);
            // Channels are at home where the main channel is, but for the backend that has a thread for each.
            let beside = if threads { connection } else { 0 };
            let core = (first_core + beside) % self.cores.len();
            drivers.push(core);
            let waker = self.cores[core].waker();
            connections.push(Connection { socket, waker });
        }
        let main = connections.remove(0);
        let id = u32::try_from(self.sessions.len()).expect("few");
        let helpers: Vec<usize> = if threads {
            Vec::new()
        } else {
            (0..self.cores.len()).filter(|core| *core != first_core).collect()
        };
        let wakers = helpers.iter().map(|core| self.cores[*core].waker()).collect();
        let guest = Guest::new(id, "model".into(), self.around.clone(), main, connections, wakers);
        for core in helpers {
            self.cores[core].attach(Box::new(Helper::new(guest.clone())));
        }
        let channels = u8::try_from(kind.channels).expect("few");
        let limits = SessionLimits {
            channels,
            ram_limit_bytes: 1 << 40,
        };
        let first = MAIN_MAGIC.first_chunk::<FIRST_LEN>().expect("four bytes");
        let main = MainChannel::new(guest.clone(), limits, drivers[0], style, false, first);
        self.cores[drivers[0]].attach(Box::new(main));
        for (channel, core) in (0..channels).zip(&drivers[1..]) {
            let beside = if threads { 0 } else { usize::from(channel) };
            let cores = Cores {
                home: *core,
                away: (core + beside) % self.cores.len(),
            };
            let channel = PageChannel::new(guest.clone(), ChannelId(channel), *core, style, cores);
            self.cores[*core].attach(Box::new(channel));
        }
        let wires = first_wire..first_wire + kind.channels + 1;
        self.sessions
            .push(SimSession::new(guest, primary, peers, wires, no_memory));
        self.tally.sessions += 1;
    }

    /// Takes steps to the end.
    pub(super) fn run(&mut self) -> Result<Tally, String> {
        while self.step()? {}
        for (number, session) in self.sessions.iter().enumerate() {
            if !session.is_touched && session.primary.stage != Stage::Done {
                return Err(format!(
                    "session {number} is stuck: the primary is at {:?}",
                    session.primary.stage
                ));
            }
        }
        self.note(|| "the primaries close their connections".to_owned());
        for wire in &mut self.net.borrow_mut().wires {
            if wire.end == StreamEnd::Open {
                wire.end = StreamEnd::Eof;
            }
        }
        while self.step()? {}
        self.close()?;
        Ok(self.tally.clone())
    }

    /// All is over: nothing may be held any more.
    fn close(&mut self) -> Result<(), String> {
        for (number, mut session) in std::mem::take(&mut self.sessions).into_iter().enumerate() {
            if !session.is_over {
                return Err(format!("session {number} does not end when its connections do"));
            }
            session.check(&self.net.borrow())?;
            self.tally.untouched += u64::from(!session.is_touched);
            self.tally.commits += session.commits();
            *self.tally.ends.entry(session.end()).or_default() += 1;
            let guest = Arc::downgrade(&session.guest);
            let store = session.guest.store().map(Arc::downgrade);
            drop(session);
            if guest.strong_count() > 0 || store.is_some_and(|store| store.strong_count() > 0) {
                return Err(format!("somebody still holds session {number}"));
            }
        }
        if !self.cores.iter().all(SimCore::is_empty) {
            return Err("a core still drives an endpoint".to_owned());
        }
        let held = self.net.borrow().held();
        if held != (0, 0, 0) {
            return Err(format!("{held:?} receives, completions and buffers are left"));
        }
        for budget in &self.budgets {
            if budget.held() > 0 {
                return Err(format!(
                    "{} bytes of a budget are never given back",
                    budget.held()
                ));
            }
        }
        Ok(())
    }

    /// One step, if there is any to take, and the question whether all is well after it.
    fn step(&mut self) -> Result<bool, String> {
        if self.tally.steps > STEPS_MAX {
            return Err("this run has no end".to_owned());
        }
        self.break_something()?;
        let which = self.rng.below(self.sessions.len());
        let flushes = self.sessions[which].is_flushing();
        if self.rng.one_in(if flushes { self.flush_looks } else { 300 }) {
            self.note(|| format!("session {which} is looked at as by a failover"));
            self.sessions[which].recover()?;
        }
        if !self.act()? {
            return Ok(false);
        }
        self.tally.steps += 1;
        while let Some(sample) = self.around.samples.pop() {
            self.sessions[usize::try_from(sample.session).expect("few")].measured(&sample)?;
        }
        for session in &mut self.sessions {
            session.check(&self.net.borrow())?;
            session.settle()?;
        }
        Ok(true)
    }

    /// Does something, anything that can be done; false if there is nothing.
    fn act(&mut self) -> Result<bool, String> {
        if self.rng.one_in(50) {
            let wire = self.rng.below(self.stalled.len());
            self.stalled[wire] = !self.stalled[wire];
        }
        self.is_idle = false;
        for _ in 0..TRIES {
            let what = self.rng.below(12);
            let which = self.rng.next();
            if self.try_one(what, which)? {
                return Ok(true);
            }
        }
        self.stalled.fill(false);
        self.is_idle = true;
        for what in [0, 3, 7, 9, 11] {
            for which in 0..self.stalled.len().max(self.cores.len()) {
                if self.try_one(what, which as u64)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Tries to do something of a kind, to the one that `which` says; whether it was done.
    fn try_one(&mut self, what: usize, which: u64) -> Result<bool, String> {
        let one_of = |count: usize| usize::try_from(which % count as u64).expect("below a usize");
        let done = match what {
            0..3 => self.arrive(one_of(self.stalled.len())),
            3..7 => self.receive(one_of(self.stalled.len())),
            7..9 => self.turn(one_of(self.cores.len()))?,
            9..11 => self.go_on(one_of(self.sessions.len()))?,
            _ => self.do_job(),
        };
        if done {
            self.tally.digest = (self.tally.digest ^ which ^ what as u64).wrapping_mul(0x100_0000_01b3);
        }
        Ok(done)
    }

    fn arrive(&mut self, wire: usize) -> bool {
        if self.stalled[wire] || !self.net.borrow().wires[wire].is_under_way() {
            return false;
        }
        let bytes = self.rng.any_size(self.piece_bytes);
        let bytes = self.net.borrow_mut().wires[wire].arrive(bytes);
        self.tally.bytes += bytes as u64;
        self.note(|| format!("wire {wire}: {bytes} bytes arrive"));
        bytes > 0
    }

    fn receive(&mut self, wire: usize) -> bool {
        let bytes = self.rng.any_size(self.piece_bytes);
        let eager = !self.wait_all || self.rng.one_in(200);
        let net = &mut *self.net.borrow_mut();
        if !net.wires[wire].is_ready() {
            return false;
        }
        let before = net.wires[wire].taken;
        let done = net.receive(wire, bytes, eager);
        let taken = net.wires[wire].taken;
        self.note(|| format!("wire {wire}: {} bytes are received, to {taken}", taken - before));
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
        self.cores[core].turn().map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// The primary hears answers, or does what comes next.
    fn go_on(&mut self, number: usize) -> Result<bool, String> {
        let session = &mut self.sessions[number];
        let before = session.primary.stage;
        let heard = session
            .hear()
            .map_err(|error| format!("session {number}: {error}"))?;
        let acts = !heard && session.may_act(&self.net.borrow());
        if acts {
            session.primary.act(&mut self.rng);
            session.send(&mut self.net.borrow_mut());
        }
        let after = self.sessions[number].primary.stage;
        if heard || acts {
            self.note(|| format!("session {number}: the primary goes from {before:?} to {after:?}"));
        }
        Ok(heard || acts)
    }

    /// Makes a guest's memory.
    fn do_job(&mut self) -> bool {
        let job = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(job) = job else { return false };
        self.note(|| "memory is made".to_owned());
        job();
        true
    }

    /// What happens to a session at this step, if anything.
    fn break_something(&mut self) -> Result<(), String> {
        let now = self.tally.steps;
        while let Some(position) = self.faults.iter().position(|(at, ..)| *at <= now) {
            let (_, session, fault) = self.faults.swap_remove(position);
            if fault == Fault::Intrude && !self.intrude(session) {
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
            let directory = super::tests::scratch();
            let dumped = session.dump(&directory);
            drop(std::fs::remove_dir_all(&directory));
            dumped?;
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
            Fault::Intrude => {}
            Fault::Stop => session.guest.finish(SessionEnd::Stopped),
        }
    }

    /// Lets a channel bring a page that it should not; false if now is no time for it.
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
        let wire = &mut self.net.borrow_mut().wires[session.wires.start + connection];
        let under_way = wire.sent.len() - wire.arrived;
        wire.cut(wire.arrived + self.rng.below(under_way + 1), end);
        session.genuine[connection] = session.genuine[connection].min(wire.sent.len());
    }

    /// Puts rubbish where a packet, a record or a message begins that is under way, and ends the connection behind it.
    fn spoil(&mut self, number: usize, connection: usize) {
        let session = &mut self.sessions[number];
        let wire = &mut self.net.borrow_mut().wires[session.wires.start + connection];
        let starts = &session.primary.streams[connection].starts;
        let (arrived, sent) = (wire.arrived, wire.sent.len());
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
        wire.cut(at, StreamEnd::Eof);
        wire.sent.resize(at + self.rng.any_size(3000), 0xff);
        session.genuine[connection] = session.genuine[connection].min(at);
    }
}

/// What the guests' parts are given to work with, without a thread.
fn surroundings(
    rng: &mut Rng,
    shards: usize,
    jobs: &Arc<Mutex<Vec<Job>>>,
    budgets: &[Arc<Budget>; 2],
) -> Arc<Surroundings> {
    let (cache, commit) = rng.pick(&STORES);
    let options = StoreOptions {
        hugepages: HugePages::Off,
        ram_dir: None,
        cache,
        commit,
        shards,
        // With two homes, whether or not this host has a second node.
        nodes: match shards.is_multiple_of(2) {
            true => (0..shards).map(|shard| shard % 2).collect(),
            false => Vec::new(),
        },
        running_guest: None,
    };
    let method = rng.pick(&[CopyMethod::NonTemporal, CopyMethod::Memcpy]);
    let grain = Grain {
        mirror_slab_pages: rng.pick(&[16, 64, 256]),
        pool_slab_extents: Some(rng.pick(&[1, 2, 5])),
    };
    let jobs = jobs.clone();
    Arc::new(Surroundings {
        started: Instant::now(),
        samples: Arc::new(SampleQueue::with_capacity(4)),
        flusher: Arc::new(Flusher::new(method, 0, &[]).expect("no helpers, no error")),
        make_store: store_maker(options, grain, budgets.clone()),
        run_apart: Arc::new(move |job| {
            jobs.lock().unwrap_or_else(PoisonError::into_inner).push(job);
            Ok(())
        }),
        notify: Arc::new(|| {}),
        warn: Arc::new(|_| {}),
    })
}

fn store_maker(options: StoreOptions, grain: Grain, budgets: [Arc<Budget>; 2]) -> Arc<MakeStore> {
    Arc::new(move |_, table| {
        let [ram, device_state] = &budgets;
        let ram = ram.take(table.total_bytes())?;
        let device_state = device_state.take(0)?;
        let made = Store::with_grain(table, "sim", &options, grain);
        let (store, _) = made.map_err(|error| error.to_string())?;
        Ok(Memory {
            store: Arc::new(store),
            _ram: ram,
            device_state,
            fallbacks: Vec::new(),
        })
    })
}
