//! Everything of one run, and its steps.

mod connect;
mod disk_plan;
mod faults;
mod lack;
mod services;
mod slow_flush;
mod steps;
mod workers;

use super::Tally;
use super::death::Death;
use super::disks::DiskStep;
use super::hostile::{self, Hostility};
use super::primary::{Kind, Stage};
use super::rng::Rng;
use super::session::SimSession;
use super::stranger::Strangers;
use crate::budget::Budget;
use crate::failpoint;
use crate::receiver::guest_memory::Budgets;
use crate::receiver::services::Services;
use crate::ring::sim::{Net, Network, Registered, SimCore, StreamEnd};
use crate::ring::{OffloadThreshold, ReceiveStyle};
use disk_plan::DiskPlan;
use faults::{FAULTS, Fault};
use lack::Lack;
use services::{Jobs, LASTING_STORES, STORES, SimServices, services};
use std::sync::{Arc, Mutex, PoisonError};
use workers::SimWorker;

/// Steps after which a run has gone astray: none came near.
const STEPS_MAX: u64 = 1_000_000;

/// Steps that many runs have.
const STEPS_USUAL: usize = 3000;

/// What the seed of the ways to write device states differs by.
const STATES: u64 = 0x7374_6174_6573;

/// Most pages of a main channel that one turn applies: one after a receive and one for each of two wake-ups of what one of them
/// may do.
const RECORDS_A_TURN: u64 = 3 * 64;

/// In how many turns a core takes a step of a flush, once, where a page is to come during one.
const HASTENED_FLUSH_TURNS: usize = 300;

/// What the seed of the control thread differs by.
const CONTROL: u64 = 0x0063_6f6e_7472_6f6c;

/// What the seed of the guards differs by.
const GUARDS: u64 = 0x6775_6172_6473;

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

pub(super) struct World {
    rng: Rng,
    trace: bool,
    tally: Tally,
    net: Net,
    cores: Vec<SimCore>,
    workers: Vec<SimWorker>,
    /// Each core stands for a thread that drives one connection.
    is_threads: bool,
    sessions: Vec<SimSession>,
    services: Arc<SimServices>,
    /// Background work: guests' memory to be made, pools to be resized.
    jobs: Jobs,
    budgets: Budgets,
    /// ControlInputs whose bytes wait for now.
    stalled: Vec<bool>,
    /// Steps before which something is done to a session.
    faults: Vec<(u64, usize, Fault)>,
    dump_at: Option<u64>,
    disks: DiskPlan,
    /// For the guards, of its own: a seed of guests without one stays the run that it was.
    guards: Rng,
    strangers: Strangers,
    /// For the control thread, of its own as well.
    control: Rng,
    /// In how many tries it looks at the listener's queue.
    control_laziness: usize,
    death: Option<Death>,
    lack: Lack,
    wait_all: bool,
    /// In how many tries a core does work that can wait.
    laziness: usize,
    /// In how many tries a worker does a part of its work.
    workers_laziness: usize,
    /// In how many turns a core takes a step of a flush, once.
    flush_turns: usize,
    /// Nothing was found to do at random.
    is_idle: bool,
    /// In one of how many steps the checkpoint is read while its flush is in progress, which ends the flush.
    flush_looks: usize,
    /// Most bytes that arrive, or are received, in one step.
    piece_bytes: usize,
}

fn ignore_warnings() -> Arc<dyn Fn(String) + Send + Sync> {
    Arc::new(|_| {})
}

impl Drop for World {
    fn drop(&mut self) {
        // What a run that failed has left to do holds its guests, and these hold where it is kept.
        let jobs = std::mem::take(&mut *self.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        drop(jobs);
    }
}

fn registered(rng: &mut Rng, is_threads: bool) -> Registered {
    match is_threads {
        true => Registered::No,
        false => rng.pick(&[
            Registered::No,
            Registered::Yes,
            Registered::Yes,
            Registered::Refused,
        ]),
    }
}

fn budgets(bytes: u64) -> Budgets {
    Budgets {
        memory: Arc::new(Budget::new(bytes, "memory")),
        mappings: Arc::new(Budget::of_mappings(1 << 16)),
    }
}

impl World {
    /// With `is_mortal` the receiver is killed a few times, and what it leaves is looked at.
    pub(super) fn new(seed: u64, trace: bool, is_mortal: bool) -> Self {
        let rng = &mut Rng::new(seed);
        let is_threads = rng.one_in(4);
        let kinds: Vec<Kind> = (0..if rng.one_in(4) { 2 } else { 1 })
            .map(|_| Kind::random(rng))
            .collect();
        let (mut hostile, hostile_kinds) = match is_mortal {
            true => (Rng::new(seed), Vec::new()),
            false => hostile::kinds(seed),
        };
        let all_kinds = kinds.iter().chain(&hostile_kinds);
        let connections: usize = all_kinds.map(|kind| kind.channels + 1).sum();
        // A thread for each connection is a core that drives nothing else.
        let cores = if is_threads {
            connections
        } else {
            rng.pick(&[1, 2, 2, 3])
        };
        let registered = registered(rng, is_threads);
        let net = Network::new(cores, registered);
        let jobs = Arc::new(Mutex::new(Vec::new()));
        let (pages_max, piece_bytes) = rng.pick(&SIZES);
        let no_memory = rng.one_in(20);
        let mut lack = Lack::random(seed, is_mortal, kinds.len() + hostile_kinds.len(), pages_max);
        let budgets = budgets(if no_memory {
            4095
        } else {
            lack.ram.unwrap_or(1 << 30)
        });
        let death = is_mortal.then(|| Death::new(rng.next()));
        let store = match death {
            None => rng.pick(&STORES),
            Some(_) => rng.pick(&LASTING_STORES),
        };
        let ram_dir = death.as_ref().map(|death| death.directory().to_owned());
        let disks = DiskPlan::random(seed, ram_dir.as_deref());
        let workers = workers::some(rng, is_threads, cores);
        let shards = cores + workers.shards();
        let may_lack = no_memory || lack.may_lack();
        // Some or all device states are written to their files by another thread.
        let inline_state_bytes = Rng::new(seed ^ STATES).pick(&[0, 200, usize::MAX]);
        let services = services(
            rng,
            store,
            ram_dir,
            workers,
            shards,
            &jobs,
            &budgets,
            inline_state_bytes,
        );
        services.refuse_threads(lack.threads.map(|one_in| (lack.rng(), one_in)));
        let mut control = Rng::new(seed ^ CONTROL);
        let mut world = Self {
            workers: SimWorker::all(&services.shared().workers),
            cores: SimCore::all(&net, cores, &ignore_warnings()).expect("eventfds"),
            stalled: vec![false; connections],
            faults: Vec::new(),
            dump_at: rng.one_in(8).then(|| rng.any_size(STEPS_USUAL) as u64),
            wait_all: rng.one_in(2),
            laziness: rng.pick(&[1, 20]),
            // Busy with other guests' packets, workers let several of a channel's wait.
            workers_laziness: rng.pick(&[1, 30]),
            flush_turns: rng.pick(&[1, 10, 40, 100]),
            is_idle: false,
            flush_looks: rng.pick(&[4, 100]),
            piece_bytes,
            disks,
            guards: Rng::new(seed ^ GUARDS),
            strangers: Strangers::of(seed, is_mortal),
            control_laziness: control.pick(&[1, 1, 200]),
            control,
            death,
            lack,
            rng: Rng::new(rng.next()),
            trace,
            tally: Tally::default(),
            net,
            is_threads,
            sessions: Vec::new(),
            services,
            jobs,
            budgets,
        };
        let style = world.style();
        for kind in kinds {
            world.plan_fault();
            world.begin(kind, style, pages_max, may_lack, None);
        }
        for kind in hostile_kinds {
            let hostility = Hostility::new(&mut hostile);
            world.begin(kind, style, pages_max, may_lack, Some(hostility));
            world.tally.hostile += 1;
        }
        world.note(|| format!("{store:?}, {cores} cores, {style:?}, {registered:?} buffers registered"));
        world
    }

    fn style(&mut self) -> ReceiveStyle {
        if self.is_threads {
            return ReceiveStyle::THREADS;
        }
        ReceiveStyle {
            bulk_from_pages: self.rng.pick(&[0, 1, 5, u64::MAX]),
            offload: OffloadThreshold {
                from_pages: self.rng.pick(&[1, 1, 3, u64::MAX]),
                from_queued: self.rng.pick(&[0, 0, 1, 5000]),
            },
            ..ReceiveStyle::RING
        }
    }

    /// Chooses what is done to the session that begins next, if anything.
    fn plan_fault(&mut self) {
        if self.rng.one_in(2) {
            return;
        }
        let fault = self.rng.pick(&FAULTS);
        let mut latest = STEPS_USUAL;
        if fault == Fault::Hasten {
            // It is for the time between a request and the end of a flush, which few runs have for long.
            latest = STEPS_USUAL / 10;
            self.flush_turns = HASTENED_FLUSH_TURNS;
        }
        let at = self.rng.any_size(latest) as u64;
        self.faults.push((at, self.sessions.len(), fault));
    }

    pub(super) fn steps(&self) -> u64 {
        self.tally.steps
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>6} {}", self.tally.steps, text());
        }
    }

    /// Takes steps to the end.
    pub(super) fn run(&mut self) -> Result<Tally, String> {
        while self.step()? {}
        for (number, session) in self.sessions.iter().enumerate() {
            if session.must_be_done() && session.primary.stage != Stage::Done {
                return Err(format!(
                    "session {number} is stuck: the primary is at {:?}",
                    session.primary.stage
                ));
            }
        }
        self.note(|| "the primaries close their connections".to_owned());
        for pipe in &mut self.net.borrow_mut().pipes {
            if pipe.end == StreamEnd::Open {
                pipe.end = StreamEnd::Eof;
            }
        }
        while self.step()? {}
        self.close()?;
        self.tally.moves = self.net.borrow().moves;
        self.tally.refused = self.lack.refused_mappings() + self.services.refused_threads();
        Ok(self.tally.clone())
    }

    /// All is over: nothing may be held any more.
    fn close(&mut self) -> Result<(), String> {
        for (number, mut session) in std::mem::take(&mut self.sessions).into_iter().enumerate() {
            if !session.is_over {
                return Err(format!("session {number} does not end when its connections do"));
            }
            session.check(&self.net.borrow())?;
            self.tally.untouched += u64::from(session.must_be_done());
            self.tally.commits += session.commits();
            self.tally.seen += session.guard.as_ref().map_or(0, |guard| guard.seen);
            *self.tally.ends.entry(session.end()).or_default() += 1;
            let live = Arc::downgrade(&session.live);
            let store = session.live.store().map(Arc::downgrade);
            drop(session);
            if live.strong_count() > 0 || store.is_some_and(|store| store.strong_count() > 0) {
                return Err(format!("session {number} is still referenced"));
            }
        }
        if self.workers.iter().any(SimWorker::is_working) || self.services.shared().workers.have_work() {
            return Err("a worker still has a packet".to_owned());
        }
        if !self.cores.iter().all(SimCore::is_empty) {
            return Err("a core still has a connection or a tenant".to_owned());
        }
        let outstanding = self.net.borrow().outstanding();
        if outstanding != (0, 0, 0) {
            return Err(format!(
                "{outstanding:?} receives, completions and buffers are left"
            ));
        }
        for budget in self.budgets.all() {
            if budget.used() > 0 {
                return Err(format!("{} of a budget are never given back", budget.used()));
            }
        }
        Ok(())
    }

    /// One step, if there is any to take, and the question whether all is well after it.
    fn step(&mut self) -> Result<bool, String> {
        if self.tally.steps > STEPS_MAX {
            return Err("this run has no end".to_owned());
        }
        let before: Vec<u64> = self.sessions.iter().map(SimSession::commits).collect();
        failpoint::may_be_killed();
        self.lurk();
        self.break_something()?;
        self.freeze();
        let which = self.rng.below(self.sessions.len());
        let flushes = self.sessions[which].is_flushing();
        if self.rng.one_in(if flushes { self.flush_looks } else { 300 }) {
            self.note(|| format!("session {which} is looked at as by a failover"));
            self.sessions[which].recover()?;
        }
        self.disk_step()?;
        self.guard_step()?;
        self.lack.let_mappings_fail(true);
        let acted = self.act();
        self.lack.let_mappings_fail(false);
        if !acted? && !self.thaw()? {
            return Ok(false);
        }
        if let Some(budget) = self
            .budgets
            .all()
            .into_iter()
            .find(|budget| budget.used() > budget.limit())
        {
            return Err(format!(
                "{} of a budget of {} are taken",
                budget.used(),
                budget.limit()
            ));
        }
        self.tally.steps += 1;
        while let Some(sample) = self.services.shared().samples.pop() {
            self.sessions[usize::try_from(sample.session).expect("few")].measured(&sample)?;
        }
        for session in &mut self.sessions {
            session.check(&self.net.borrow())?;
            session.finish_if_over()?;
        }
        self.check_after_kill(&before)?;
        Ok(true)
    }

    /// In some runs, the receiver is killed in the middle of a commit or soon after it.
    fn lurk(&self) {
        if let Some(death) = &self.death {
            let net = &self.net.borrow();
            if self.sessions.iter().any(|session| session.commits_soon(net)) {
                death.lurk(20, 20);
            }
        }
    }

    /// What the guests' disks do in this step.
    fn disk_step(&mut self) -> Result<(), String> {
        let rng = &mut self.disks.rng;
        let which = rng.below(self.sessions.len());
        if self.lack.is_frozen(which) {
            return Ok(());
        }
        let session = &mut self.sessions[which];
        let is_committed = session.commits() == session.primary.snapshots.len() as u64;
        let Some(disks) = session.disks.as_mut().filter(|_| session.live.end().is_none()) else {
            return Ok(());
        };
        let mut step = DiskStep::Nothing;
        if let Some((at, fault)) = self.disks.fault
            && at <= self.tally.steps
        {
            step = disks.break_one(rng, fault, is_committed)?;
            if step == DiskStep::Lost {
                self.disks.fault = None;
            }
        } else if rng.one_in(3) {
            step = disks.run(rng, session.primary.stage);
            self.tally.disk_writes += u64::from(step == DiskStep::Done);
        } else if rng.one_in(8) {
            if let Some(death) = &self.death {
                death.lurk(4, 10);
            }
            self.tally.applied += u64::from(disks.apply(rng));
        }
        session.is_touched |= step == DiskStep::Lost;
        Ok(())
    }

    /// What a guest's guard does in this step.
    fn guard_step(&mut self) -> Result<(), String> {
        let which = self.guards.below(self.sessions.len());
        if self.lack.is_frozen(which) {
            return Ok(());
        }
        let session = &mut self.sessions[which];
        let (stage, state) = (session.primary.stage, session.primary.snapshots.len());
        let committed = usize::try_from(session.commits()).expect("few");
        if let Some(guard) = &mut session.guard {
            guard.step(&mut self.guards, stage, state, committed)?;
        }
        Ok(())
    }

    /// Nothing else goes on: whether a message of a link does.
    fn links_go_on(&mut self) -> Result<bool, String> {
        for (number, session) in self.sessions.iter_mut().enumerate() {
            if let Some(guard) = session.guard.as_mut().filter(|_| !self.lack.is_frozen(number))
                && (guard.go_on(&mut self.guards)? || guard.keep_ends())
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// If the receiver was killed in this step, before which so many states were committed: what does the next one find?
    fn check_after_kill(&mut self, before: &[u64]) -> Result<(), String> {
        let Some(files) = self.death.as_mut().and_then(Death::take_files) else {
            return Ok(());
        };
        self.tally.kills += 1;
        self.note(|| "the receiver was killed in this step".to_owned());
        for (session, before) in self.sessions.iter().zip(before) {
            let found = session.found(files.path(), *before);
            found.map_err(|error| format!("after a kill: {error}"))?;
        }
        Ok(())
    }
}
