//! The state of the control thread and what changes it, but for requests (`requests.rs`).

use super::ControlContext;
use crate::net::{AcceptError, Accepted};
use crate::receiver::assemble::{Arrival, Assembler, Assembly, Complete};
use crate::receiver::attach::{DrivingCores, NewSession, attach};
use crate::receiver::end::SessionEnd;
use crate::receiver::identify::{ConnectionKind, IdentifyError, PENDING_MAX, identify};
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use crate::receiver::links;
use crate::receiver::live_session::LiveSession;
use crate::receiver::status::SessionStatus;
use crate::receiver::{Event, Outcome, ReceiverError};
use crate::ring::{Connection, Driver, Plane, Tenant, Waker};
use crate::session::SessionLimits;
use crate::wire::vmdesc::EndFinder;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How long sessions may take to end when the receiver does.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a primary may be silent after what looks like device state without vmdesc.
const SUPPRESSED_AFTER: Duration = Duration::from_secs(5);

/// How long a session may be without its block list. A primary sends it as soon as it has all connections; from then
/// on nothing is too slow, since its guest may be idle.
const BLOCK_LIST_WITHIN: Duration = Duration::from_secs(60);

/// Most sessions at a time: running ones, and ended ones whose checkpoint is kept. More are refused, since each takes
/// descriptors, threads and memory that nothing else limits.
const SESSIONS_MAX: usize = 256;

/// Ended sessions without a checkpoint that stay in reports.
const ENDED_KEPT: usize = 1024;

/// A session whose connections and tenants are not all dropped.
pub(super) struct Live {
    pub(super) session: Arc<LiveSession>,
    /// The core that drives its main channel: a position among the plane's cores.
    home_core: usize,
    suppressed: Option<(u64, Instant)>,
    began: Instant,
}

/// A session that has ended and left a checkpoint.
pub(super) struct Kept {
    pub(super) checkpoint: Arc<KeptCheckpoint>,
    /// As the session was at its end.
    status: SessionStatus,
}

pub(super) type Identified = (Arrival, Accepted, Result<ConnectionKind, IdentifyError>);

/// What the control thread knows: connections that are not complete, sessions, and what is reported of past ones.
pub(super) struct ControlState {
    pub(super) context: ControlContext,
    pub(super) assembler: Assembler<Accepted>,
    pub(super) live: Vec<Live>,
    pub(super) kept: Vec<Kept>,
    /// Sessions that left no checkpoint, and discarded ones.
    pub(super) past: Vec<SessionStatus>,
    /// Reads of first bytes that are under way.
    pub(super) identifying: JoinSet<Identified>,
    pub(super) next: u32,
    pub(super) ended_sessions: u64,
    /// Links to guards.
    pub(super) links: JoinSet<()>,
    /// Memory of ended sessions that is being released.
    pub(super) releasing: JoinSet<()>,
}

impl ControlState {
    pub(super) fn warn(&self, text: String) {
        self.context.services.warn(text);
    }

    /// Since the receiver's start.
    pub(super) fn uptime(&self) -> Duration {
        self.context.services.shared().started.elapsed()
    }

    pub(super) fn take_recovered(&mut self) {
        let (recovered, next) = std::mem::take(&mut self.context.recovered);
        self.next = next;
        for checkpoint in recovered {
            let summary = self.context.recorder.session(checkpoint.session);
            self.kept.push(Kept {
                status: SessionStatus::recovered(&checkpoint, summary, self.uptime()),
                checkpoint: Arc::new(checkpoint),
            });
        }
    }

    pub(super) fn accept(&mut self, accepted: Result<Accepted, AcceptError>) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => return self.warn(error.to_string()),
        };
        if self.assembler.pending() >= PENDING_MAX {
            return self.warn(format!(
                "{}: closed: too many connections wait to be identified",
                accepted.from
            ));
        }
        let arrival = self.assembler.accepted(accepted.peer);
        let deadline = self.context.options.identify_deadline;
        self.identifying.spawn(async move {
            let result = identify(&accepted, deadline).await;
            (arrival, accepted, result)
        });
    }

    pub(super) fn identify(&mut self, (arrival, accepted, result): Identified) {
        let gone = self.assembler.expel(Accepted::is_gone);
        self.carry_out(gone);
        let assemblies = match result {
            Ok(ConnectionKind::Link) => {
                let links = self.context.services.shared().links.clone();
                let (deadline, events) = (
                    self.context.options.identify_deadline,
                    self.context.events.clone(),
                );
                self.links
                    .spawn_local(links::serve(accepted, links, deadline, events));
                while self.links.try_join_next().is_some() {}
                self.assembler.given_up(arrival)
            }
            Ok(ConnectionKind::Channel(identity)) => {
                let peer = accepted.peer;
                self.assembler
                    .identified(arrival, peer, identity, accepted, Instant::now())
            }
            Err(reason) => {
                self.warn(format!("{}: closed: {reason}", accepted.from));
                self.assembler.given_up(arrival)
            }
        };
        self.carry_out(assemblies);
    }

    fn carry_out(&mut self, assemblies: Vec<Assembly<Accepted>>) {
        for assembly in assemblies {
            match assembly {
                Assembly::Complete(complete) => self.begin(complete),
                Assembly::Refused(connections, refusal) => {
                    let from: Vec<_> = connections.iter().map(|c| c.from.as_str()).collect();
                    self.warn(format!("{}: closed: {refusal}", from.join(" and ")));
                }
            }
        }
    }

    /// All connections of a session are here: it begins.
    fn begin(&mut self, complete: Complete<Accepted>) {
        if self.live.len() + self.kept.len() >= SESSIONS_MAX {
            return self.warn(format!(
                "{}: closed: {SESSIONS_MAX} sessions are running or kept, which is the limit; `colo-ring discard` \
                 gives up the checkpoint of an ended one",
                complete.main.from
            ));
        }
        let id = self.next;
        self.next += 1;
        let Complete { main, channels } = complete;
        let options = &self.context.options;
        let home_core = self.quietest_core();
        let new = NewSession {
            id,
            peer: main.from,
            origin: main.peer.origin,
            is_tcp: main.is_tcp,
            main: main.socket,
            channels: channels.into_iter().map(|channel| channel.socket).collect(),
            limits: SessionLimits {
                channels: options.channels,
                ram_limit_bytes: options.ram_limit_bytes,
            },
            style: options.backend.style(),
            home_core,
        };
        (self.context.events)(Event::Began {
            session: id,
            peer: new.peer.clone(),
        });
        if let Some(disks) = &self.context.disks {
            disks.session_began(id, new.origin);
        }
        let session = attach(new, self.context.services.clone(), &self.context.plane);
        self.live.push(Live {
            session,
            home_core,
            suppressed: None,
            began: Instant::now(),
        });
    }

    /// The core that is the home core of the fewest live sessions: the first such in the order that was asked for.
    fn quietest_core(&self) -> usize {
        let home_cores: Vec<_> = self.live.iter().map(|live| live.home_core).collect();
        quietest(self.context.options.cores.len(), &home_cores)
    }

    /// Takes the sessions whose connections and tenants are all dropped off the live ones: nothing writes to their memory any more
    /// but what a failed core has leaked with it.
    pub(super) fn reap_ended_sessions(&mut self) {
        while let Some(position) = self.live.iter().position(|live| live.session.is_over()) {
            let session = self.live.remove(position).session;
            if let Some(disks) = &self.context.disks {
                disks.session_ended(session.id);
            }
            self.context.services.shared().links.session_ended(session.id);
            // What they have not committed is not needed any more, and applying what is goes on.
            let disks = session.disks().cloned().unwrap_or_default();
            disks.end_session();
            self.context
                .recorder
                .drain(&self.context.services.shared().samples);
            let summary = self.context.recorder.end_session(session.id);
            let status = SessionStatus::of(&session, summary);
            (self.context.events)(Event::Ended(Box::new(status.clone())));
            if session.end().is_some_and(SessionEnd::may_hold_the_only_copy) {
                self.keep_the_only_copy(session.id);
            } else {
                self.ended_sessions += 1;
            }
            let store = session.store().cloned();
            // In the background: releasing a large guest's cache takes seconds.
            match session
                .checkpoint()
                .filter(|checkpoint| checkpoint.number().is_some())
            {
                Some(checkpoint) => {
                    let checkpoint = checkpoint.clone();
                    self.kept.push(Kept { checkpoint, status });
                    // With the session: its memory is credited to the budget when it is free, and never freed here.
                    self.releasing.spawn_blocking(move || {
                        if let Some(store) = store {
                            store.drop_uncommitted();
                        }
                        // A base that cannot be written keeps its log, and says so when it is needed.
                        let _ = disks.drain();
                        drop(session);
                    });
                }
                None => {
                    self.remember(status);
                    self.releasing.spawn_blocking(move || {
                        drop(store);
                        drop(disks);
                        drop(session);
                    });
                }
            }
        }
        // Those that have finished.
        while self.releasing.try_join_next().is_some() {}
    }

    /// A guest that may exist nowhere else is kept until the operator decides, also with `once`.
    fn keep_the_only_copy(&self, id: u32) {
        let goes_on = match self.context.options.once {
            true => ". This receiver keeps running although it was started with --once",
            false => "",
        };
        self.warn(format!(
            "session {id} is kept until `colo-ring failover --session {id}` starts its guest here or `colo-ring discard` \
             gives it up{goes_on}"
        ));
    }

    /// The figures of a session that is gone stay for the report.
    fn remember(&mut self, status: SessionStatus) {
        if self.past.len() == ENDED_KEPT {
            self.past.remove(0);
        }
        self.past.push(status);
    }

    pub(super) fn kept(&self, session: u32) -> Option<&Kept> {
        self.kept.iter().find(|kept| kept.checkpoint.session == session)
    }

    /// Takes a session's checkpoint out, to be released.
    pub(super) fn take_kept(&mut self, session: u32) -> Option<Kept> {
        let position = self
            .kept
            .iter()
            .position(|kept| kept.checkpoint.session == session)?;
        let kept = self.kept.remove(position);
        self.remember(self.status_of_kept(&kept));
        Some(kept)
    }

    pub(super) fn status_of(&self, session: &LiveSession) -> SessionStatus {
        SessionStatus::of(session, self.context.recorder.session(session.id))
    }

    pub(super) fn status_of_kept(&self, kept: &Kept) -> SessionStatus {
        kept.status.clone().with(&kept.checkpoint, self.uptime())
    }

    /// Live sessions and kept checkpoints, by their numbers.
    pub(super) fn session_statuses(&self) -> Vec<SessionStatus> {
        let kept = self.kept.iter().map(|kept| self.status_of_kept(kept));
        let live = self.live.iter().map(|live| self.status_of(&live.session));
        let mut statuses: Vec<_> = kept.chain(live).collect();
        statuses.sort_by_key(|status| status.session);
        statuses
    }

    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        let assemblies = self.assembler.expire(now);
        self.carry_out(assemblies);
        self.context
            .recorder
            .drain(&self.context.services.shared().samples);
        for live in &mut self.live {
            if !live.session.memory_asked.load(Ordering::Relaxed) && now - live.began > BLOCK_LIST_WITHIN {
                live.session.finish(SessionEnd::Silent(BLOCK_LIST_WITHIN));
            }
            let position = live.session.suppressed_at.load(Ordering::Relaxed);
            match live.suppressed {
                _ if position == 0 => live.suppressed = None,
                Some((same, since)) if same == position => {
                    if now - since > SUPPRESSED_AFTER {
                        live.session
                            .finish(SessionEnd::Suppressed(EndFinder::suppressed()));
                    }
                }
                _ => live.suppressed = Some((position, now)),
            }
        }
    }

    /// Appends to the interval logs. A full disk costs measurements, never a session.
    pub(super) fn log_interval(&mut self) {
        self.context
            .recorder
            .drain(&self.context.services.shared().samples);
        if let Err(error) = self
            .context
            .recorder
            .write_interval(self.context.services.shared().started.elapsed())
        {
            self.warn(error.to_string());
        }
    }

    /// Ends all sessions and waits until they are over.
    pub(super) async fn end_all(&mut self, changed: &Notify) {
        self.identifying.abort_all();
        for live in &self.live {
            live.session.finish(SessionEnd::Stopped);
        }
        let all_over = async {
            while self.live.iter().any(|live| !live.session.is_over()) {
                changed.notified().await;
            }
        };
        // A core may hang.
        if tokio::time::timeout(END_TIMEOUT, all_over).await.is_err() {
            self.warn(format!("some connections did not end within {END_TIMEOUT:?}"));
        }
        self.reap_ended_sessions();
    }

    /// Keeps a checkpoint's files in the RAM directory for the next receiver.
    fn keep_files(&self, checkpoint: &KeptCheckpoint) {
        if checkpoint.image.keep_files() {
            checkpoint.disks.keep_files();
        } else {
            return;
        }
        if let Some(directory) = &self.context.options.store.ram_dir {
            let (session, directory) = (checkpoint.session, directory.display());
            (self.context.events)(Event::Note(format!(
                "session {session}: its last checkpoint stays in {directory}; a receiver with this --ram-dir offers it \
                 again"
            )));
        }
    }

    /// Ends the receiver, when its sessions have ended.
    pub(super) async fn close(mut self) -> Result<Outcome, ReceiverError> {
        drop(self.context.disk_server.take());
        // Only then are checkpoints whole in their images.
        while self.releasing.join_next().await.is_some() {}
        let mut sessions = std::mem::take(&mut self.past);
        sessions.append(&mut self.session_statuses());
        sessions.sort_by_key(|session| session.session);
        self.kept
            .iter()
            .for_each(|kept| self.keep_files(&kept.checkpoint));
        self.kept.clear();
        self.live.clear();
        let uptime = self.uptime();
        self.context.plane.stop();
        drop(self.context.workers);
        let report = self.context.recorder.finish(uptime)?;
        Ok(Outcome { sessions, report })
    }
}

impl DrivingCores for Plane {
    type Driver = Driver;

    fn cores(&self) -> usize {
        self.options().cores.len()
    }

    fn driving_cores(&self) -> usize {
        self.driving_cores()
    }

    fn driver(&self, core: usize, _connection: usize) -> Driver {
        self.driver(core)
    }

    fn core(&self, driver: &Driver) -> usize {
        driver.core()
    }

    fn waker(&self, driver: &Driver) -> Waker {
        driver.waker.clone()
    }

    fn admit(&self, driver: &Driver, tenant: Box<dyn Tenant>) -> io::Result<()> {
        self.admit(driver, tenant)
    }

    fn attach(&self, driver: &Driver, connection: Box<dyn Connection>) -> io::Result<()> {
        self.attach(driver, connection)
    }
}

/// The first of the cores that the fewest sessions have as their home core.
fn quietest(cores: usize, home_cores: &[usize]) -> usize {
    let guests = |core: &usize| home_cores.iter().filter(|home| *home == core).count();
    (0..cores).min_by_key(guests).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::quietest;

    #[test]
    fn guests_go_where_fewest_are_and_first_to_the_first() {
        assert_eq!(quietest(1, &[0, 0]), 0);
        assert_eq!(quietest(3, &[]), 0);
        assert_eq!(quietest(3, &[0]), 1);
        assert_eq!(quietest(3, &[0, 1, 2]), 0);
        assert_eq!(quietest(3, &[0, 2, 0, 2]), 1);
    }
}
