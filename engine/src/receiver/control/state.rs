//! The state of the control thread and what changes it, but for requests (`requests.rs`).

use super::ControlContext;
use crate::metrics::Summary;
use crate::net::{AcceptError, Accepted};
use crate::receiver::assemble::{Arrival, Assembler, Complete, Identity, Outcome};
use crate::receiver::end::SessionEnd;
use crate::receiver::guest::{ChannelSocket, Guest};
use crate::receiver::identify::{FIRST_LEN, IdentifyError, PENDING_MAX, identify};
use crate::receiver::main_channel::MainChannel;
use crate::receiver::page_channel::{Cores, PageChannel};
use crate::receiver::presence::{FlushPart, Presence};
use crate::receiver::status::SessionStatus;
use crate::receiver::{Event, Outcome as ReceiverOutcome, ReceiverError};
use crate::ring::{BackendKind, Connection, Driver};
use crate::session::SessionLimits;
use crate::units::ChannelId;
use crate::wire::stream::MAIN_MAGIC;
use crate::wire::vmdesc::EndFinder;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How long sessions may take to end when the receiver does.
const END_PATIENCE: Duration = Duration::from_secs(10);

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

/// A session that is running, or whose checkpoint is kept.
pub(super) struct SessionEntry {
    pub(super) guest: Arc<Guest>,
    /// Where its main channel is driven: a position among the plane's cores. None if nobody sends to it.
    pub(super) home_core: Option<usize>,
    /// Its figures, once all connections and presences have left.
    pub(super) summary: Option<Summary>,
    pub(super) suppressed: Option<(u64, Instant)>,
    pub(super) began: Instant,
}

pub(super) type Identified = (Arrival, Accepted, Result<Identity, IdentifyError>);

/// What the control thread knows: connections that are not complete, sessions, and what is reported of past ones.
pub(super) struct ControlState {
    pub(super) context: ControlContext,
    pub(super) assembler: Assembler<Accepted>,
    pub(super) entries: Vec<SessionEntry>,
    /// Sessions that left no checkpoint, and discarded ones.
    pub(super) past: Vec<SessionStatus>,
    /// Reads of first bytes that are under way.
    pub(super) identifying: JoinSet<Identified>,
    pub(super) next: u32,
    pub(super) ended_sessions: u64,
}

impl ControlState {
    pub(super) fn warn(&self, text: String) {
        (self.context.services.warn)(text);
    }

    pub(super) fn take_recovered(&mut self) {
        let (guests, next) = std::mem::take(&mut self.context.recovered);
        self.next = next;
        for guest in guests {
            self.entries.push(SessionEntry {
                summary: Some(self.context.recorder.session(guest.id)),
                suppressed: None,
                began: Instant::now(),
                guest,
                home_core: None,
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
        let outcomes = match result {
            Ok(identity) => {
                let peer = accepted.peer;
                self.assembler
                    .identified(arrival, peer, identity, accepted, Instant::now())
            }
            Err(reason) => {
                self.warn(format!("{}: closed: {reason}", accepted.from));
                self.assembler.given_up(arrival)
            }
        };
        self.carry_out(outcomes);
    }

    fn carry_out(&mut self, outcomes: Vec<Outcome<Accepted>>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Complete(complete) => self.begin(complete),
                Outcome::Refused(connections, refusal) => {
                    let from: Vec<_> = connections.iter().map(|c| c.from.as_str()).collect();
                    self.warn(format!("{}: closed: {refusal}", from.join(" and ")));
                }
            }
        }
    }

    /// All connections of a session are here: it begins.
    fn begin(&mut self, complete: Complete<Accepted>) {
        if self.entries.len() >= SESSIONS_MAX {
            return self.warn(format!(
                "{}: closed: {SESSIONS_MAX} sessions are running or kept, and no more are taken; `colo-ring discard` \
                 gives up the checkpoint of an ended one",
                complete.main.from
            ));
        }
        let id = self.next;
        self.next += 1;
        let plane = &self.context.plane;
        let first = self.quietest_core();
        // The channels share the core of the main channel, and go to others while it falls behind; a thread of its own for
        // each of them is what the backend `threads` is.
        let main_driver = plane.driver(first);
        let drivers: Vec<Driver> = (0..complete.channels.len())
            .map(|_| plane.driver(first))
            .collect();
        let helpers: Vec<Driver> = (1..plane.driving_cores())
            .map(|n| plane.driver(first + n))
            .collect();
        let (peer, is_tcp) = (complete.main.from.clone(), complete.main.is_tcp);
        let connect = |accepted: Accepted, driver: &Driver| ChannelSocket {
            socket: accepted.socket,
            waker: driver.waker.clone(),
        };
        let main = connect(complete.main, &main_driver);
        let channels = complete.channels.into_iter().zip(&drivers);
        let channels = channels
            .map(|(channel, driver)| connect(channel, driver))
            .collect();
        let wakers = helpers.iter().map(|helper| helper.waker.clone()).collect();
        let services = self.context.services.clone();
        let guest = Guest::new(id, peer.clone(), services, main, channels, wakers);
        (self.context.events)(Event::Began { session: id, peer });
        let attached = |done: std::io::Result<()>| {
            if let Err(error) = done {
                guest.finish(SessionEnd::NoMemory(format!("no thread for a channel: {error}")));
            }
        };
        let main = Presence::new(guest.clone(), FlushPart::Main);
        attached(plane.admit(&main_driver, main));
        for driver in &helpers {
            let presence = Presence::new(guest.clone(), FlushPart::Help);
            attached(plane.admit(driver, presence));
        }
        for (driver, connection) in self.connections(&guest, is_tcp, &main_driver, &drivers) {
            attached(plane.attach(driver, connection));
        }
        self.entries.push(SessionEntry {
            guest,
            home_core: Some(first),
            summary: None,
            suppressed: None,
            began: Instant::now(),
        });
    }

    /// The core that is home to the fewest running guests: the first such in the order that was asked for.
    fn quietest_core(&self) -> usize {
        let running = self.entries.iter().filter(|entry| entry.summary.is_none());
        let homes: Vec<_> = running.filter_map(|entry| entry.home_core).collect();
        quietest(self.context.options.cores.len(), &homes)
    }

    /// What drives the guest's connections, with where: the main channel first.
    fn connections<'a>(
        &self,
        guest: &Arc<Guest>,
        is_tcp: bool,
        main_driver: &'a Driver,
        drivers: &'a [Driver],
    ) -> Vec<(&'a Driver, Box<dyn Connection>)> {
        let options = &self.context.options;
        let style = options.backend.style();
        let limits = SessionLimits {
            channels: options.channels,
            ram_limit_bytes: options.ram_limit_bytes,
        };
        let threads = options.backend == BackendKind::Threads;
        // A shard for every thread that receives: a core's, or a connection's own.
        let shard = |driver: &Driver, own: usize| if threads { own } else { driver.core() };
        let first_bytes: &[u8; FIRST_LEN] = &MAIN_MAGIC;
        let main = MainChannel::new(
            guest.clone(),
            limits,
            shard(main_driver, 0),
            style,
            is_tcp,
            first_bytes,
        );
        let mut connections: Vec<(&Driver, Box<dyn Connection>)> = vec![(main_driver, Box::new(main))];
        for (driver, channel) in drivers.iter().zip(0..options.channels) {
            let shard = shard(driver, usize::from(channel) + 1);
            let home = driver.core();
            let away = (home + usize::from(channel)) % options.cores.len();
            let channel = ChannelId(channel);
            let channel = PageChannel::new(guest.clone(), channel, shard, style, Cores { home, away });
            connections.push((driver, Box::new(channel)));
        }
        connections
    }

    /// Looks for sessions whose connections and presences have all left: nothing writes to their memory any more.
    pub(super) fn reap_ended_sessions(&mut self) {
        while let Some(position) = self
            .entries
            .iter()
            .position(|e| e.summary.is_none() && e.guest.is_over())
        {
            self.context.recorder.drain(&self.context.services.samples);
            let entry = &mut self.entries[position];
            let guest = entry.guest.clone();
            entry.summary = Some(self.context.recorder.end_session(guest.id));
            let status = self.status_of(&self.entries[position]);
            (self.context.events)(Event::Ended(Box::new(status.clone())));
            if guest.end().is_some_and(SessionEnd::may_hold_the_only_copy) {
                self.keep_the_only_copy(guest.id);
            } else {
                self.ended_sessions += 1;
            }
            let checkpoint = guest.committed().and_then(|committed| committed.checkpoint());
            match (checkpoint, guest.store()) {
                (Some(_), Some(store)) => {
                    let store = store.clone();
                    // Not here: giving a large guest's cache back takes seconds.
                    tokio::task::spawn_blocking(move || store.drop_uncommitted());
                }
                (Some(_), None) => {}
                (None, _) => {
                    let entry = self.forget(position, status);
                    tokio::task::spawn_blocking(move || drop(entry));
                }
            }
        }
    }

    /// A guest that may live nowhere else is never given up without a word, not even by `once`.
    fn keep_the_only_copy(&self, id: u32) {
        let goes_on = match self.context.options.once {
            true => ". This receiver goes on in spite of --once",
            false => "",
        };
        self.warn(format!(
            "session {id} is kept until `colo-ring failover --session {id}` starts its guest here or `colo-ring discard` \
             gives it up{goes_on}"
        ));
    }

    /// Takes a session off the book; its figures stay for the report. Its memory goes with the entry.
    pub(super) fn forget(&mut self, position: usize, status: SessionStatus) -> SessionEntry {
        if self.past.len() == ENDED_KEPT {
            self.past.remove(0);
        }
        self.past.push(status);
        self.entries.remove(position)
    }

    pub(super) fn status_of(&self, entry: &SessionEntry) -> SessionStatus {
        let id = entry.guest.id;
        let summary = entry
            .summary
            .clone()
            .unwrap_or_else(|| self.context.recorder.session(id));
        SessionStatus::of(&entry.guest, summary)
    }

    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        let outcomes = self.assembler.expire(now);
        self.carry_out(outcomes);
        self.context.recorder.drain(&self.context.services.samples);
        for entry in &mut self.entries {
            if !entry.guest.memory_asked.load(Ordering::Relaxed) && now - entry.began > BLOCK_LIST_WITHIN {
                entry.guest.finish(SessionEnd::Silent(BLOCK_LIST_WITHIN));
            }
            let position = entry.guest.suppressed_at.load(Ordering::Relaxed);
            match entry.suppressed {
                _ if position == 0 => entry.suppressed = None,
                Some((same, since)) if same == position => {
                    if now - since > SUPPRESSED_AFTER {
                        entry
                            .guest
                            .finish(SessionEnd::Suppressed(EndFinder::suppressed()));
                    }
                }
                _ => entry.suppressed = Some((position, now)),
            }
        }
    }

    /// Appends to the interval logs. A full disk costs measurements, never a session.
    pub(super) fn log_interval(&mut self) {
        self.context.recorder.drain(&self.context.services.samples);
        if let Err(error) = self
            .context
            .recorder
            .write_interval(self.context.services.started.elapsed())
        {
            self.warn(error.to_string());
        }
    }

    /// Ends all sessions and waits until they are over.
    pub(super) async fn end_all(&mut self, changed: &Notify) {
        self.identifying.abort_all();
        for entry in &self.entries {
            entry.guest.finish(SessionEnd::Stopped);
        }
        let all_over = async {
            while self.entries.iter().any(|entry| !entry.guest.is_over()) {
                changed.notified().await;
            }
        };
        // Connections of a ring that has failed never leave.
        if tokio::time::timeout(END_PATIENCE, all_over).await.is_err() {
            self.warn(format!("some connections did not end within {END_PATIENCE:?}"));
        }
        self.reap_ended_sessions();
    }

    /// What is kept in the RAM directory stays there for the next receiver.
    fn leave(&self, guest: &Guest) {
        if !guest.is_over() {
            return;
        }
        let is_kept = match guest.store() {
            Some(store) => store.keep_files(),
            None => guest.committed().is_some_and(|committed| committed.keep_files()),
        };
        if is_kept && let Some(directory) = &self.context.options.store.ram_dir {
            let (id, directory) = (guest.id, directory.display());
            (self.context.events)(Event::Note(format!(
                "session {id}: its last checkpoint stays in {directory}; a receiver with this --ram-dir offers it again"
            )));
        }
    }

    pub(super) fn close(mut self) -> Result<ReceiverOutcome, ReceiverError> {
        let entries = std::mem::take(&mut self.entries);
        let mut sessions = std::mem::take(&mut self.past);
        sessions.extend(entries.iter().map(|entry| self.status_of(entry)));
        sessions.sort_by_key(|session| session.session);
        entries.iter().for_each(|entry| self.leave(&entry.guest));
        drop(entries);
        self.context.plane.stop();
        let report = self
            .context
            .recorder
            .finish(self.context.services.started.elapsed())?;
        Ok(ReceiverOutcome { sessions, report })
    }
}

/// The first of the cores that fewest of these homes are at.
fn quietest(cores: usize, homes: &[usize]) -> usize {
    let guests = |core: &usize| homes.iter().filter(|home| *home == core).count();
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
