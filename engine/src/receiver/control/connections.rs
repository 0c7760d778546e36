//! Connections that belong to no session yet, and how sessions begin with them.

use super::limits::{PENDING_MAX, PENDING_OF_ORIGIN_MAX, SILENCE_ALLOWED};
use super::state::{ControlState, Live};
use super::watch::Watch;
use crate::net::{AcceptError, Accepted, DescriptorReserve, Origin};
use crate::rate_limit::RateLimit;
use crate::receiver::Event;
use crate::receiver::assemble::{Arrival, Assembler, Assembly, Complete};
use crate::receiver::attach::{DrivingCores, NewSession, attach};
use crate::receiver::identify::{ConnectionKind, IdentifyError, identify};
use crate::receiver::links;
use crate::ring::{Connection, Driver, Plane, Tenant, Waker};
use crate::session::SessionLimits;
use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinError, JoinSet};

/// Lines of the log about connections that were refused: so many at once, and how soon one more.
const REFUSALS: (u32, Duration) = (200, Duration::from_millis(500));

/// A connection that has said what it is, or the name of one that is closed.
pub(super) type Identified = (
    Arrival,
    Result<(Accepted, ConnectionKind), (String, IdentifyError)>,
);

/// Connections that belong to no session yet.
pub(super) struct Connections {
    assembler: Assembler<Accepted>,
    /// Reads of first bytes that are under way.
    pub(super) identifying: JoinSet<Identified>,
    /// The same, to be closed by.
    silent: HashMap<Arrival, AbortHandle>,
    /// Links to guards.
    links: JoinSet<()>,
    descriptors: DescriptorReserve,
    refusals: RateLimit,
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
        let (burst, every) = REFUSALS;
        Self {
            assembler: Assembler::new(channels, deadline),
            identifying: JoinSet::new(),
            silent: HashMap::new(),
            links: JoinSet::new(),
            descriptors: DescriptorReserve::of_process(),
            refusals: RateLimit::new(burst, every, Instant::now()),
        }
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
            Err(error) => return self.refuse(error.to_string()),
        };
        if let Some(crowd) = self.connections.crowd(&accepted) {
            let has_room = self.make_room(crowd);
            // A descriptor of the reserve is given back, whoever makes room for the next connection.
            if !has_room || matches!(crowd, Crowd::Descriptors) {
                return self.refuse(format!("{}: closed: {}", accepted.from, crowd.reason()));
            }
        }
        let arrival = self.connections.assembler.accepted(accepted.peer, Instant::now());
        let deadline = self.context.options.identify_deadline;
        let task = self.connections.identifying.spawn(async move {
            let Accepted {
                socket,
                is_tcp,
                peer,
                from,
            } = accepted;
            let result = match identify(socket, deadline).await {
                Err(error) => Err((from, error)),
                Ok((socket, kind)) => {
                    let accepted = Accepted {
                        socket,
                        is_tcp,
                        peer,
                        from,
                    };
                    Ok((accepted, kind))
                }
            };
            (arrival, result)
        });
        self.connections.silent.insert(arrival, task);
    }

    /// Closes the oldest connection that has not said what it is, in favour of a new one. False if there is none.
    fn make_room(&mut self, crowd: Crowd) -> bool {
        let oldest = self.connections.assembler.oldest_silent(|origin| match crowd {
            Crowd::OfOrigin(crowded) => origin.group() == crowded,
            Crowd::All | Crowd::Few | Crowd::Descriptors => true,
        });
        let Some(oldest) = oldest else {
            return false;
        };
        self.refuse(format!("a silent connection was closed: {}", crowd.reason()));
        self.close_silent(oldest);
        true
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
        let gone = self.connections.assembler.expel(Accepted::is_gone);
        self.carry_out(gone);
        let assemblies = match result {
            Ok((accepted, ConnectionKind::Link)) => {
                let links = self.context.services.shared().links.clone();
                let (deadline, events) = (
                    self.context.options.identify_deadline,
                    self.context.events.clone(),
                );
                self.connections
                    .links
                    .spawn_local(links::serve(accepted, links, deadline, events));
                while self.connections.links.try_join_next().is_some() {}
                self.connections.assembler.given_up(arrival)
            }
            Ok((accepted, ConnectionKind::Channel(identity))) => {
                let peer = accepted.peer;
                self.connections
                    .assembler
                    .identified(arrival, peer, identity, accepted, Instant::now())
            }
            Err((from, reason)) => {
                self.refuse(format!("{from}: closed: {reason}"));
                self.connections.assembler.given_up(arrival)
            }
        };
        self.carry_out(assemblies);
    }

    /// Closes what has waited too long, and counts up refusals that were not logged.
    pub(super) fn expire_connections(&mut self, now: Instant) {
        let expired = self.connections.assembler.expire(now);
        self.carry_out(expired);
        for arrival in self.connections.assembler.in_the_way(now, SILENCE_ALLOWED) {
            self.refuse(format!(
                "a connection was closed that was silent for {SILENCE_ALLOWED:?}: channels of its origin wait until it says what it is"
            ));
            self.close_silent(arrival);
        }
        if let Some((count, time)) = self.connections.refusals.summary(now) {
            self.warn(format!(
                "{count} more connections were closed within {:.0} s; their lines were left out",
                time.as_secs_f64()
            ));
        }
    }

    /// Warns of a connection that was refused. Strangers can cause any number of them.
    fn refuse(&mut self, text: String) {
        if self.connections.refusals.admits(Instant::now()) {
            self.warn(text);
        }
    }

    fn carry_out(&mut self, assemblies: Vec<Assembly<Accepted>>) {
        for assembly in assemblies {
            match assembly {
                Assembly::Complete(complete) => self.begin(complete),
                Assembly::Refused(connections, refusal) => {
                    let from: Vec<_> = connections.iter().map(|c| c.from.as_str()).collect();
                    self.refuse(format!("{}: closed: {refusal}", from.join(" and ")));
                }
            }
        }
    }

    /// All connections of a session are here: it begins.
    fn begin(&mut self, complete: Complete<Accepted>) {
        if let Err(reason) = self.make_place(&complete.main) {
            return self.refuse(format!("{}: closed: {reason}", complete.main.from));
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
        let now = Instant::now();
        self.live.push(Live {
            session,
            home_core,
            suppressed: None,
            began: now,
            watch: Watch::new(now),
            end_asked: Vec::new(),
        });
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
