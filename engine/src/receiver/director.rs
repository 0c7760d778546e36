//! The control thread: puts connections together to sessions, starts them, watches their ends, answers questions and
//! writes the measurements down. It is never on a page's way.

mod answers;

use super::assemble::{Arrival, Assembler, Complete, Identity, Outcome};
use super::budget::Budget;
use super::control::Said;
use super::end::SessionEnd;
use super::guest::{Connection, Guest, Surroundings};
use super::helper::Helper;
use super::identify::{FIRST_LEN, PENDING_MAX, identify};
use super::main_channel::MainChannel;
use super::page_channel::{Cores, PageChannel};
use super::status::SessionStatus;
use super::{Event, Events, Outcome as ReceiverOutcome, ReceiverError, ReceiverOptions};
use crate::host::Placement;
use crate::metrics::{Recorder, Summary};
use crate::net::{Accepted, Listener};
use crate::ring::{BackendKind, Driver, Endpoint, Plane};
use crate::session::SessionLimits;
use crate::units::ChannelId;
use crate::wire::stream::MAIN_MAGIC;
use crate::wire::vmdesc::EndFinder;
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// How often deadlines are looked at and samples taken.
const TICK: Duration = Duration::from_millis(200);

/// How long sessions may take to end when the receiver does.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Length of an interval in the interval logs.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

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

/// What the receiver was started with and what it has made of it.
pub(super) struct Director {
    pub(super) options: ReceiverOptions,
    pub(super) placement: Placement,
    pub(super) around: Arc<Surroundings>,
    pub(super) plane: Plane,
    pub(super) budget: Arc<Budget>,
    pub(super) recorder: Recorder,
    pub(super) events: Arc<Events>,
    /// Sessions of earlier receivers, and the first number that none of them has.
    pub(super) recovered: (Vec<Arc<Guest>>, u32),
}

/// The wires to the control thread.
pub(super) struct Wires {
    pub(super) said: mpsc::Receiver<Said>,
    pub(super) changed: Arc<Notify>,
    pub(super) stop: Arc<Notify>,
}

/// A session in the director's book.
struct Entry {
    guest: Arc<Guest>,
    /// Where its main channel is driven: a position among the plane's cores. None if nobody sends to it.
    home: Option<usize>,
    /// Its figures, once all endpoints have left.
    summary: Option<Summary>,
    suppressed: Option<(u64, Instant)>,
    began: Instant,
}

type Identified = (Arrival, Rc<Accepted>, Result<Identity, String>);

/// The book of a running receiver.
struct Book {
    director: Director,
    /// Whether the control thread waits with io_uring.
    uring: bool,
    assembler: Assembler<Accepted>,
    entries: Vec<Entry>,
    /// Sessions that left no checkpoint, and discarded ones.
    past: Vec<SessionStatus>,
    unidentified: Vec<std::rc::Weak<Accepted>>,
    tell_identified: mpsc::Sender<Identified>,
    next: u32,
    ended_sessions: u64,
}

/// Runs until it is told to stop, or, with `once`, until the first session has ended.
pub(super) async fn direct(
    director: Director,
    uring: bool,
    listeners: Vec<Rc<Listener>>,
    mut wires: Wires,
) -> Result<ReceiverOutcome, ReceiverError> {
    let (tell_accepted, mut accepted) = mpsc::channel(64);
    let (tell_identified, mut identified) = mpsc::channel(64);
    let accepting: Vec<_> = (listeners.iter().enumerate())
        .map(|(position, listener)| {
            let listener = listener
                .clone()
                .accept_all(position, uring, tell_accepted.clone());
            tokio::task::spawn_local(listener)
        })
        .collect();
    let assembler = Assembler::new(director.options.channels, director.options.identify_deadline);
    let mut book = Book {
        director,
        uring,
        assembler,
        entries: Vec::new(),
        past: Vec::new(),
        unidentified: Vec::new(),
        tell_identified,
        next: 1,
        ended_sessions: 0,
    };
    book.take_recovered();
    let mut tick = tokio::time::interval(TICK);
    let mut interval = tokio::time::interval(LOG_INTERVAL);
    loop {
        tokio::select! {
            Some(connection) = accepted.recv() => book.accept(connection),
            Some(result) = identified.recv() => book.identify(result),
            Some(said) = wires.said.recv() => book.hear(said, &listeners),
            () = wires.changed.notified() => book.settle(),
            _ = tick.tick() => book.tick(),
            _ = interval.tick() => book.log_interval(),
            () = wires.stop.notified() => break,
        }
        if book.director.options.once && book.ended_sessions > 0 {
            break;
        }
    }
    // Tasks first: a socket that is shut down may stay readable without ever giving a connection.
    accepting.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::task::yield_now().await;
    listeners.iter().for_each(|listener| listener.close());
    book.end_all(&wires.changed).await;
    book.close()
}

impl Book {
    fn warn(&self, text: String) {
        (self.director.around.warn)(text);
    }

    fn take_recovered(&mut self) {
        let (guests, next) = std::mem::take(&mut self.director.recovered);
        self.next = next;
        for guest in guests {
            self.entries.push(Entry {
                summary: Some(self.director.recorder.session(guest.id)),
                suppressed: None,
                began: Instant::now(),
                guest,
                home: None,
            });
        }
    }

    fn accept(&mut self, accepted: Result<Accepted, String>) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(text) => return self.warn(text),
        };
        if self.assembler.pending() >= PENDING_MAX {
            return self.warn(format!(
                "{}: closed: too many connections wait to be identified",
                accepted.from
            ));
        }
        let arrival = self.assembler.accepted(accepted.peer);
        let accepted = Rc::new(accepted);
        self.unidentified.retain(|weak| weak.strong_count() > 0);
        self.unidentified.push(Rc::downgrade(&accepted));
        let (tell, uring) = (self.tell_identified.clone(), self.uring);
        let deadline = self.director.options.identify_deadline;
        tokio::task::spawn_local(async move {
            let result = identify(&accepted, uring, deadline).await;
            // Only at the receiver's end nobody listens.
            let _ = tell.send((arrival, accepted, result)).await;
        });
    }

    fn identify(&mut self, (arrival, accepted, result): Identified) {
        let gone = self.assembler.expel(Accepted::is_gone);
        self.carry_out(gone);
        let outcomes = match (result, Rc::try_unwrap(accepted)) {
            (Ok(identity), Ok(accepted)) => {
                let peer = accepted.peer;
                self.assembler
                    .identified(arrival, peer, identity, accepted, Instant::now())
            }
            (Ok(_), Err(accepted)) => {
                self.warn(format!("{}: closed while it was identified", accepted.from));
                self.assembler.given_up(arrival)
            }
            (Err(reason), Ok(accepted)) => {
                self.warn(format!("{}: closed: {reason}", accepted.from));
                self.assembler.given_up(arrival)
            }
            (Err(_), Err(_)) => self.assembler.given_up(arrival),
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
        let plane = &self.director.plane;
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
        let connect = |accepted: Accepted, driver: &Driver| Connection {
            socket: accepted.socket,
            waker: driver.waker.clone(),
        };
        let main = connect(complete.main, &main_driver);
        let channels = complete.channels.into_iter().zip(&drivers);
        let channels = channels
            .map(|(channel, driver)| connect(channel, driver))
            .collect();
        let wakers = helpers.iter().map(|helper| helper.waker.clone()).collect();
        let around = self.director.around.clone();
        let guest = Guest::new(id, peer.clone(), around, main, channels, wakers);
        (self.director.events)(Event::Began { session: id, peer });
        let mut endpoints = self.endpoints(&guest, is_tcp, &main_driver, &drivers);
        for driver in &helpers {
            endpoints.push((driver, Box::new(Helper::new(guest.clone()))));
        }
        for (driver, endpoint) in endpoints {
            if let Err(error) = plane.attach(driver, endpoint) {
                guest.finish(SessionEnd::NoMemory(format!("no thread for a channel: {error}")));
            }
        }
        self.entries.push(Entry {
            guest,
            home: Some(first),
            summary: None,
            suppressed: None,
            began: Instant::now(),
        });
    }

    /// The core that is home to the fewest running guests: the first such in the order that was asked for.
    fn quietest_core(&self) -> usize {
        let running = self.entries.iter().filter(|entry| entry.summary.is_none());
        let homes: Vec<_> = running.filter_map(|entry| entry.home).collect();
        quietest(self.director.options.cores.len(), &homes)
    }

    /// What drives the guest's connections, with where: the main channel first.
    fn endpoints<'a>(
        &self,
        guest: &Arc<Guest>,
        is_tcp: bool,
        main_driver: &'a Driver,
        drivers: &'a [Driver],
    ) -> Vec<(&'a Driver, Box<dyn Endpoint>)> {
        let options = &self.director.options;
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
        let mut endpoints: Vec<(&Driver, Box<dyn Endpoint>)> = vec![(main_driver, Box::new(main))];
        for (driver, channel) in drivers.iter().zip(0..options.channels) {
            let shard = shard(driver, usize::from(channel) + 1);
            let home = driver.core();
            let away = (home + usize::from(channel)) % options.cores.len();
            let channel = ChannelId(channel);
            let channel = PageChannel::new(guest.clone(), channel, shard, style, Cores { home, away });
            endpoints.push((driver, Box::new(channel)));
        }
        endpoints
    }

    /// Looks for sessions whose endpoints have all left: nothing writes to their memory any more.
    fn settle(&mut self) {
        while let Some(position) = self
            .entries
            .iter()
            .position(|e| e.summary.is_none() && e.guest.is_over())
        {
            self.director.recorder.drain(&self.director.around.samples);
            let entry = &mut self.entries[position];
            let guest = entry.guest.clone();
            entry.summary = Some(self.director.recorder.end_session(guest.id));
            let status = self.status_of(&self.entries[position]);
            (self.director.events)(Event::Ended(Box::new(status.clone())));
            if guest.end().is_some_and(SessionEnd::may_hold_the_only_copy) {
                self.keep_the_only_copy(guest.id);
            } else {
                self.ended_sessions += 1;
            }
            match guest.store().filter(|store| store.committed().is_some()) {
                Some(store) => {
                    let store = store.clone();
                    // Not here: giving a large guest's cache back takes seconds.
                    tokio::task::spawn_blocking(move || store.drop_uncommitted());
                }
                None => {
                    let entry = self.forget(position, status);
                    tokio::task::spawn_blocking(move || drop(entry));
                }
            }
        }
    }

    /// A guest that may live nowhere else is never given up without a word, not even by `once`.
    fn keep_the_only_copy(&self, id: u32) {
        let goes_on = match self.director.options.once {
            true => ". This receiver goes on in spite of --once",
            false => "",
        };
        self.warn(format!(
            "session {id} is kept until `colo-ring failover --session {id}` starts its guest here or `colo-ring discard` \
             gives it up{goes_on}"
        ));
    }

    /// Takes a session off the book; its figures stay for the report. Its memory goes with the entry.
    fn forget(&mut self, position: usize, status: SessionStatus) -> Entry {
        if self.past.len() == ENDED_KEPT {
            self.past.remove(0);
        }
        self.past.push(status);
        self.entries.remove(position)
    }

    fn status_of(&self, entry: &Entry) -> SessionStatus {
        let id = entry.guest.id;
        let summary = entry
            .summary
            .clone()
            .unwrap_or_else(|| self.director.recorder.session(id));
        SessionStatus::of(&entry.guest, summary)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let outcomes = self.assembler.expire(now);
        self.carry_out(outcomes);
        self.director.recorder.drain(&self.director.around.samples);
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
    fn log_interval(&mut self) {
        self.director.recorder.drain(&self.director.around.samples);
        if let Err(error) = self
            .director
            .recorder
            .write_interval(self.director.around.started.elapsed())
        {
            self.warn(error.to_string());
        }
    }

    /// Ends all sessions and waits until they are over.
    async fn end_all(&mut self, changed: &Notify) {
        for accepted in self.unidentified.iter().filter_map(std::rc::Weak::upgrade) {
            let _ = shutdown(accepted.socket.as_raw_fd(), Shutdown::Both);
        }
        for entry in &self.entries {
            entry.guest.finish(SessionEnd::Stopped);
        }
        let all_over = async {
            while self.entries.iter().any(|entry| !entry.guest.is_over()) {
                changed.notified().await;
            }
        };
        // Endpoints of a ring that has failed never leave.
        if tokio::time::timeout(END_PATIENCE, all_over).await.is_err() {
            self.warn(format!("some connections did not end within {END_PATIENCE:?}"));
        }
        self.settle();
    }

    /// What is kept in the RAM directory stays there for the next receiver.
    fn leave(&self, guest: &Guest) {
        let Some(store) = guest.store().filter(|_| guest.is_over()) else {
            return;
        };
        if store.keep_files()
            && let Some(directory) = &self.director.options.store.ram_dir
        {
            let (id, directory) = (guest.id, directory.display());
            (self.director.events)(Event::Note(format!(
                "session {id}: its last checkpoint stays in {directory}; a receiver with this --ram-dir offers it again"
            )));
        }
    }

    fn close(mut self) -> Result<ReceiverOutcome, ReceiverError> {
        let entries = std::mem::take(&mut self.entries);
        let mut sessions = std::mem::take(&mut self.past);
        sessions.extend(entries.iter().map(|entry| self.status_of(entry)));
        sessions.sort_by_key(|session| session.session);
        entries.iter().for_each(|entry| self.leave(&entry.guest));
        drop(entries);
        self.director.plane.stop();
        let report = self
            .director
            .recorder
            .finish(self.director.around.started.elapsed())?;
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
