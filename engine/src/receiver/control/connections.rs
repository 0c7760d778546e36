//! Connections that belong to no session yet, and how sessions begin with them.

use super::limits::{NoPlace, PENDING_MAX, PENDING_OF_ORIGIN_MAX, SILENCE_ALLOWED, SILENCE_OF_A_PRIMARY};
use super::state::{ControlState, Live};
use super::watch::Watch;
use crate::net::{AcceptError, Accepted, DescriptorReserve, Origin, Peer};
use crate::receiver::Event;
use crate::receiver::assemble::{Arrival, Assembler, Assembly, Complete, Identity, Silent};
use crate::receiver::attach::{DrivingCores, NewSession, attach};
use crate::receiver::connected::Connected;
use crate::receiver::guest::Arrived;
use crate::receiver::identify::{ConnectionKind, IdentifyError, identify, stream};
use crate::receiver::links;
use crate::receiver::live_session::PrimaryId;
use crate::receiver::refusals::Refused;
use crate::receiver::remark::Remark;
use crate::ring::{Connection, Driver, Plane, Tenant, Waker};
use crate::session::SessionLimits;
use crate::tls;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, TryReserveError};
use std::io;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::task::{AbortHandle, JoinError, JoinSet};

/// Looks at connections, whether they are gone, between two ticks: about a millisecond's work, whatever a flood of connections would
/// cause.
const LOOKS_MAX: u32 = 2048;

/// The same for one origin: as many as a returning primary needs, a few times. A flood from one host takes nothing from another's.
const LOOKS_OF_ORIGIN_MAX: u32 = 512;

/// A connection that has said what it is, or the name of one that is closed.
pub(super) type Identified = (
    Arrival,
    Result<(Connected, ConnectionKind), (String, Origin, IdentifyError)>,
);

/// Connections that belong to no session yet.
pub(super) struct Connections {
    pub(super) assembler: Assembler<Connected>,
    /// Reads of first bytes that are under way.
    pub(super) identifying: JoinSet<Identified>,
    /// The same, to be closed by.
    silent: HashMap<Arrival, AbortHandle>,
    /// Links to guards.
    links: JoinSet<()>,
    descriptors: DescriptorReserve,
    /// Connections that were accepted since the start, by listener.
    accepted: HashMap<usize, u64>,
    /// When silent ones were looked for.
    looked: Instant,
    /// What is left of [`LOOKS_MAX`].
    looks_left: u32,
    /// Looks since the last tick, by origin.
    looks: HashMap<Origin, u32>,
    /// Whether the operator knows that guests without UUIDs are told apart by the order of their connections.
    has_warned_of_order: bool,
}

/// Why a connection has no place.
#[derive(Clone, Copy)]
enum Crowd {
    OfOrigin(Origin),
    All,
    /// Where the limit of descriptors allows few.
    Few,
    /// What is left is the reserve.
    Descriptors,
}

impl Crowd {
    fn reason(self) -> &'static str {
        match self {
            Self::OfOrigin(_) => "too many connections of one origin wait to be identified",
            Self::All => "too many connections wait to be identified",
            Self::Few => {
                "too many connections wait to be identified for this limit of open files; raise `ulimit -n`"
            }
            Self::Descriptors => {
                "too many open files: what is left is for the control socket; raise `ulimit -n`"
            }
        }
    }
}

impl Connections {
    pub(super) fn new(channels: u8, deadline: Duration) -> Self {
        Self {
            assembler: Assembler::new(channels, deadline),
            identifying: JoinSet::new(),
            silent: HashMap::new(),
            links: JoinSet::new(),
            descriptors: DescriptorReserve::of_process(),
            accepted: HashMap::new(),
            looked: Instant::now(),
            looks_left: LOOKS_MAX,
            looks: HashMap::new(),
            has_warned_of_order: false,
        }
    }

    /// Those of this peer that have ended. Of its peer alone: it can be taken for a part of no other's session. Beyond a number of looks,
    /// each of which is a system call, it waits for the next tick: until then a primary that returns may be refused because of what is
    /// left of it, and finds that gone when it tries again.
    fn expel_gone(&mut self, peer: Peer) -> Vec<Assembly<Connected>> {
        let of_origin = self.looks.entry(peer.origin.group()).or_default();
        let may = LOOKS_OF_ORIGIN_MAX
            .saturating_sub(*of_origin)
            .min(self.looks_left);
        let left = Cell::new(may);
        let may_look = || left.replace(left.get().saturating_sub(1)) > 0;
        let is_gone = |other: &Connected| other.peer == peer && may_look() && other.is_gone();
        let gone = self.assembler.expel(is_gone);
        *of_origin += may - left.get();
        self.looks_left -= may - left.get();
        gone
    }

    /// Connections that a listener has accepted since the start.
    pub(super) fn accepted_at(&self, listener: usize) -> u64 {
        self.accepted.get(&listener).copied().unwrap_or(0)
    }

    /// Whether there is no place for one more.
    fn crowd(&self, accepted: &Accepted) -> Option<Crowd> {
        let origin = accepted.peer.origin.group();
        match () {
            () if self.descriptors.has(&accepted.socket) => Some(Crowd::Descriptors),
            () if self.assembler.pending() >= PENDING_MAX => Some(Crowd::All),
            () if self.assembler.pending() >= self.descriptors.strangers_max() => Some(Crowd::Few),
            () if self.assembler.pending_of(origin) >= PENDING_OF_ORIGIN_MAX => Some(Crowd::OfOrigin(origin)),
            () => None,
        }
    }
}

impl ControlState {
    pub(super) fn accept(&mut self, accepted: Result<Accepted, AcceptError>) {
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => return self.context.refusals.warn_of_all(error.to_string()),
        };
        *self
            .connections
            .accepted
            .entry(accepted.peer.listener)
            .or_default() += 1;
        if let Some(crowd) = self.connections.crowd(&accepted) {
            let has_room = self.make_room(crowd);
            // A descriptor of the reserve is given back, whoever makes room for the next connection.
            if !has_room || matches!(crowd, Crowd::Descriptors) {
                return self.refuse(&accepted, Refused::Client, &crowd.reason());
            }
        }
        let arrival = self.connections.assembler.accepted(accepted.peer, Instant::now());
        let deadline = self.context.options.identify_deadline;
        let handshakes = self
            .context
            .handshakes
            .as_ref()
            .map(|thread| thread.handshakes().clone());
        let task = self.connections.identifying.spawn(async move {
            let Accepted {
                socket,
                is_tcp,
                peer,
                from,
            } = accepted;
            let identified = match handshakes {
                None => identify(socket, deadline).await,
                Some(handshakes) => handshakes.identify(socket, deadline).await,
            };
            let result = match identified {
                Err(error) => Err((from, peer.origin, error)),
                Ok(identified) => {
                    let accepted = Accepted {
                        socket: identified.socket,
                        is_tcp,
                        peer,
                        from,
                    };
                    let tls = identified.tls;
                    Ok((Connected { accepted, tls }, identified.kind))
                }
            };
            (arrival, result)
        });
        self.connections.silent.insert(arrival, task);
    }

    /// Closes a connection in favour of a new one. First of all one that has not said what it is, the oldest of the origin that has most; not
    /// if that has just come, as a guest's would. Then what has waited longest for the rest of its session, where an origin has more of
    /// that than a session has connections and than any has silent ones, and then whatever there is. False if there is nothing.
    fn make_room(&mut self, crowd: Crowd) -> bool {
        let is_meant = |origin: Origin| match crowd {
            Crowd::OfOrigin(crowded) => origin.group() == crowded,
            Crowd::All | Crowd::Few | Crowd::Descriptors => true,
        };
        let of_session = usize::from(self.context.options.channels) + 1;
        let silent = self.connections.assembler.oldest_silent(is_meant);
        let is_new = |silent: &Silent| silent.since.elapsed() < SILENCE_OF_A_PRIMARY;
        let more_than = silent
            .as_ref()
            .map_or(0, |silent| silent.of_origin)
            .max(of_session);
        if silent.as_ref().is_none_or(is_new)
            && let Some(evicted) = self.connections.assembler.evict(more_than, is_meant)
        {
            self.carry_out(vec![evicted]);
            return true;
        }
        if let Some(silent) = silent {
            let refusals = &self.context.refusals;
            refusals.warn_of_all(format!("a silent connection was closed: {}", crowd.reason()));
            self.close_silent(silent.arrival);
            return true;
        }
        let evicted = self.connections.assembler.evict(0, is_meant);
        let has_room = evicted.is_some();
        self.carry_out(evicted.into_iter().collect());
        has_room
    }

    fn close_silent(&mut self, arrival: Arrival) {
        if let Some(task) = self.connections.silent.remove(&arrival) {
            // It owns the socket.
            task.abort();
        }
        let assemblies = self.connections.assembler.given_up(arrival);
        self.carry_out(assemblies);
    }

    pub(super) fn identify(&mut self, result: Result<Identified, JoinError>) {
        // One that was closed to make room.
        let Ok((arrival, result)) = result else {
            return;
        };
        if self.connections.silent.remove(&arrival).is_none() {
            // The same, which was identified at that moment.
            return;
        }
        if let Ok((accepted, _)) = &result {
            let gone = self.connections.expel_gone(accepted.peer);
            self.carry_out(gone);
        }
        let assemblies = match result {
            Ok((connected, ConnectionKind::Link)) => {
                let who = connected.identity();
                let accepted = match self.relay_link(connected) {
                    Ok(accepted) => accepted,
                    Err((from, origin, error)) => {
                        let why = format!("closed: {error}");
                        self.context.refusals.warn(origin, Refused::Client, &from, &why);
                        let assemblies = self.connections.assembler.given_up(arrival);
                        return self.carry_out(assemblies);
                    }
                };
                let shared = self.context.services.shared();
                let (links, guests) = (shared.links.clone(), shared.guests.clone());
                let deadline = self.context.options.identify_deadline;
                let refusals = self.context.refusals.clone();
                self.connections.links.spawn_local(links::serve(
                    (accepted, who),
                    (links, guests),
                    deadline,
                    refusals,
                ));
                while self.connections.links.try_join_next().is_some() {}
                self.connections.assembler.given_up(arrival)
            }
            Ok((accepted, ConnectionKind::Channel(identity))) => {
                let peer = accepted.peer;
                let who = accepted.identity();
                if let Identity::Multifd(init) = identity {
                    // Before it can contradict those that are the guest's own.
                    if let Err(not_allowed) = self.check_identity(peer, Some(init.uuid), &who) {
                        self.refuse(&accepted, Refused::Client, &not_allowed);
                        let assemblies = self.connections.assembler.given_up(arrival);
                        return self.carry_out(assemblies);
                    }
                    self.refuse_contradicted(arrival, (peer, &who), init);
                }
                self.connections.assembler.identified(
                    arrival,
                    (peer, who),
                    identity,
                    accepted,
                    Instant::now(),
                )
            }
            Err((from, origin, reason)) => {
                let refusals = &self.context.refusals;
                let refused = match reason.is_of_a_client() {
                    true => Refused::Client,
                    false => Refused::Stranger,
                };
                refusals.warn(origin, refused, &from, &format!("closed: {reason}"));
                self.connections.assembler.given_up(arrival)
            }
        };
        self.carry_out(assemblies);
    }

    /// The plain end of a guard's link, whose records a task of this thread opens: it is served here as any other.
    ///
    /// # Errors
    /// If there is no socket for it.
    fn relay_link(&mut self, connected: Connected) -> Result<Accepted, (String, Origin, io::Error)> {
        let Connected { accepted, tls } = connected;
        let Some(secured) = tls else {
            return Ok(accepted);
        };
        let (from, origin) = (accepted.from.clone(), accepted.peer.origin);
        let relay = || {
            let secured_socket = stream(accepted.socket)?;
            if accepted.is_tcp {
                secured_socket.set_nodelay(true)?;
            }
            let (plain, ours) = UnixStream::pair()?;
            let plain = plain.into_std()?;
            Ok::<_, io::Error>((plain.into(), tls::relay(secured_socket, secured, ours)))
        };
        let (socket, relayed) = relay().map_err(|error| (from, origin, error))?;
        self.connections.links.spawn_local(relayed);
        Ok(Accepted {
            socket,
            is_tcp: false,
            peer: accepted.peer,
            from: accepted.from,
        })
    }

    /// Closes what has waited too long, and counts up refusals that were not logged.
    pub(super) fn expire_connections(&mut self, now: Instant) {
        self.connections.looks_left = LOOKS_MAX;
        self.connections.looks.clear();
        let expired = self.connections.assembler.expire(now);
        self.carry_out(expired);
        // After a pause of this thread, what connections have said meanwhile is not read yet.
        let looked = std::mem::replace(&mut self.connections.looked, now);
        let was_paused = now.saturating_duration_since(looked) > SILENCE_ALLOWED / 2;
        let silent = match was_paused {
            true => Vec::new(),
            false => self.connections_in_the_way(now),
        };
        for arrival in silent {
            self.context.refusals.warn_of_all(format!(
                "a connection was closed that was silent for {SILENCE_ALLOWED:?}: channels of its origin wait until it says what it is"
            ));
            self.close_silent(arrival);
        }
        self.context.refusals.count_up(now);
    }

    /// Warns of a connection that was refused.
    fn refuse(&self, accepted: &Accepted, refused: Refused, reason: &impl std::fmt::Display) {
        let (origin, why) = (accepted.peer.origin, format!("closed: {reason}"));
        self.context.refusals.warn(origin, refused, &accepted.from, &why);
    }

    fn carry_out(&mut self, assemblies: Vec<Assembly<Connected>>) {
        for assembly in assemblies {
            match assembly {
                Assembly::Complete(complete) => self.begin(complete),
                Assembly::Refused(connections, refusal) => {
                    let from: Vec<_> = connections.iter().map(|c| c.from.as_str()).collect();
                    if let Some(first) = connections.first() {
                        let (origin, why) = (first.peer.origin, format!("closed: {refusal}"));
                        let refusals = &self.context.refusals;
                        refusals.warn(origin, Refused::Client, &from.join(" and "), &why);
                    }
                }
            }
        }
    }

    /// All connections of a session are here: it begins.
    fn begin(&mut self, complete: Complete<Connected>) {
        let who = complete.main.identity();
        if let Err(not_allowed) = self.check_identity(complete.main.peer, complete.uuid, &who) {
            return self.refuse(&complete.main, Refused::Client, &not_allowed);
        }
        let (lease, main_buffer) = match self.make_place(&complete.main) {
            Ok(place) => place,
            Err(reason) => {
                if let Some(lack) = reason.lack() {
                    self.end_standing_first_copies(complete.main.peer.origin, lack);
                }
                return self.refuse(&complete.main, Refused::Client, &reason);
            }
        };
        let Complete {
            main,
            channels,
            main_arrival,
            uuid,
        } = complete;
        let tls = main.tls.as_ref().map(|tls| tls.about.clone());
        let Accepted {
            socket,
            is_tcp,
            peer,
            from,
        } = main.accepted;
        let channels = channels.into_iter().map(|channel| {
            let tls = channel.tls.map(tls::Receiving::new).transpose()?;
            Ok((channel.accepted.socket, tls))
        });
        let received = main.tls.map(tls::Receiving::new).transpose();
        let received =
            received.and_then(|main| Ok((main, channels.collect::<Result<Vec<_>, TryReserveError>>()?)));
        let (main_tls, channels) = match received {
            Ok(received) => received,
            Err(error) => {
                let reason = format!("closed: {}", NoPlace::from(error));
                return self
                    .context
                    .refusals
                    .warn(peer.origin, Refused::Client, &from, &reason);
            }
        };
        let id = self.next_number();
        let options = &self.context.options;
        let home_core = self.quietest_core();
        let (given, origin) = (&options.listen[peer.listener], peer.origin);
        let guest = self.context.services.shared().guests.arrived(Arrived {
            session: id,
            peer: from,
            listeners: [given, self.listeners[peer.listener].address()],
            origin,
            uuid,
        });
        let new = NewSession {
            id,
            primary: PrimaryId {
                guest: guest.clone(),
                origin,
                channels_uuid: uuid,
                tls,
            },
            is_tcp,
            main: (socket, main_tls),
            main_buffer,
            lease,
            channels,
            limits: SessionLimits {
                channels: options.channels,
                device_state_max_bytes: options.device_state_max_bytes,
            },
            style: options.backend.style(),
            home_core,
        };
        let title = guest.title();
        (self.context.events)(Event::Began {
            session: title.clone(),
            peer: guest.peer.clone(),
            listener: guest.listener.clone().unwrap_or_default(),
        });
        let is_by_order = uuid == Some([0; 16]) && self.connections.assembler.has_others(peer);
        // Once: strangers can cause that, too.
        if is_by_order && !std::mem::replace(&mut self.connections.has_warned_of_order, true) {
            let text = format!(
                "session {id}: its guest has no UUID, and other connections of its host wait: their order alone says which channels are \
                 its own. Give each guest one (QEMU's -uuid)"
            );
            self.warn(Remark::of(&title, text));
        }
        if let Some(disks) = &self.context.disks {
            disks.session_began(id, new.primary.origin);
        }
        let session = attach(new, self.context.services.clone(), &self.context.plane);
        let now = Instant::now();
        self.live.push(Live {
            session,
            home_core,
            suppressed: None,
            silent_until: None,
            peer,
            main_arrival,
            admission: None,
            began: now,
            watch: Watch::new(now),
            has_replaced: false,
            end_asked: Vec::new(),
            discard_asked: Vec::new(),
        });
    }

    fn next_number(&mut self) -> u32 {
        let live = self.live.iter().map(|live| live.session.id);
        let kept = self.kept.iter().map(|kept| kept.checkpoint.session);
        let used: BTreeSet<u32> = live.chain(kept).collect();
        self.context.numbers.take(|number| used.contains(&number))
    }

    /// The core that is the home core of the fewest live sessions: the first such in the order that was asked for.
    fn quietest_core(&self) -> usize {
        let home_cores: Vec<_> = self.live.iter().map(|live| live.home_core).collect();
        quietest(self.context.options.cores.len(), &home_cores)
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

    fn waker(&self, driver: &Driver, guest: u64) -> Waker {
        driver.waker(guest)
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
