//! Assembles connections to sessions (spec §2).
//!
//! Nothing on the main channel identifies its guest, and the UUID in the init packets is often zero. What is certain: all
//! connections of a session come to one listener from one origin (an IP address, or a process on a UNIX socket), the
//! multifd channels carry one UUID, and a primary connects its main channel first. Where that is ambiguous, the
//! connections are refused with a remedy, because a guest must never get another guest's pages.

#[cfg(test)]
mod tests;

use crate::net::{Origin, Peer};
use crate::units::ChannelId;
use crate::wire::multifd::Init;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The kind of a connection, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    Main,
    Multifd(Init),
}

/// An accepted connection, in the order of acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Arrival(u64);

/// All connections of a session.
#[derive(Debug)]
pub(super) struct Complete<S> {
    pub(super) main: S,
    /// In the order of their ids.
    pub(super) channels: Vec<S>,
}

/// Connections that wait no longer.
#[derive(Debug)]
pub(super) enum Assembly<S> {
    Complete(Complete<S>),
    Refused(Vec<S>, Refusal),
}

/// Why connections are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("{channel} connected, but only channels 0 to {} are expected: make --channels and the primary's multifd-channels equal", .expected - 1)]
    ChannelTooHigh { channel: ChannelId, expected: u8 },
    #[error(
        "a multifd channel connected, but this receiver is set up for plain migration: switch the capability multifd off on the primary, or start the receiver with --channels as its multifd-channels"
    )]
    Plain,
    #[error("{0} connected twice")]
    Twice(ChannelId),
    #[error(
        "two primaries of one host connect to one listener at the same time, and their main channels cannot be told apart: start them one after the other, or give each a --listen address of its own"
    )]
    Ambiguous,
    #[error("closed by the primary before all connections of its session were here")]
    Gone,
    #[error("{present} of {expected} multifd channels {} within {deadline:?}: is the capability multifd on, and multifd-channels {expected}, on the primary?", if *.main { "and a main channel came" } else { "came, but no main channel," })]
    Deadline {
        main: bool,
        present: usize,
        expected: u8,
        deadline: Duration,
    },
}

struct Set<S> {
    peer: Peer,
    uuid: Option<[u8; 16]>,
    main: Option<S>,
    channels: Vec<Option<S>>,
    since: Instant,
}

/// A connection whose first bytes have not arrived.
struct Unidentified {
    arrival: Arrival,
    peer: Peer,
    since: Instant,
}

struct Waiting<S> {
    arrival: Arrival,
    peer: Peer,
    init: Init,
    connection: S,
    since: Instant,
}

/// Collects connections until sessions are complete. `S` is the connection itself.
pub(super) struct Assembler<S> {
    channels: u8,
    deadline: Duration,
    next: u64,
    /// In the order of acceptance. Any of them may be a main channel.
    unidentified: Vec<Unidentified>,
    waiting: Vec<Waiting<S>>,
    sets: Vec<Set<S>>,
}

impl<S> Assembler<S> {
    pub(super) fn new(channels: u8, deadline: Duration) -> Self {
        Self {
            channels,
            deadline,
            next: 0,
            unidentified: Vec::new(),
            waiting: Vec::new(),
            sets: Vec::new(),
        }
    }

    /// Connections that are not part of a complete session yet.
    pub(super) fn pending(&self) -> usize {
        let in_sets = self
            .sets
            .iter()
            .map(|set| set.channels.iter().flatten().count() + 1)
            .sum::<usize>();
        self.unidentified.len() + self.waiting.len() + in_sets
    }

    /// Those of one origin.
    pub(super) fn pending_of(&self, origin: Origin) -> usize {
        let is_of = |peer: &Peer| peer.origin.group() == origin;
        let unidentified = self.unidentified.iter().filter(|other| is_of(&other.peer));
        let waiting = self.waiting.iter().filter(|channel| is_of(&channel.peer));
        let sets = self.sets.iter().filter(|set| is_of(&set.peer));
        let in_sets: usize = sets.map(|set| set.channels.iter().flatten().count() + 1).sum();
        unidentified.count() + waiting.count() + in_sets
    }

    /// A connection was accepted.
    pub(super) fn accepted(&mut self, peer: Peer, now: Instant) -> Arrival {
        let arrival = Arrival(self.next);
        self.next += 1;
        self.unidentified.push(Unidentified {
            arrival,
            peer,
            since: now,
        });
        arrival
    }

    /// The oldest connection of these origins whose first bytes have not arrived.
    pub(super) fn oldest_silent(&self, is_of: impl Fn(Origin) -> bool) -> Option<Arrival> {
        let mut silent = self.unidentified.iter();
        silent
            .find(|other| is_of(other.peer.origin))
            .map(|other| other.arrival)
    }

    /// Connections that have been silent for longer than `allowed` and that channels wait for.
    pub(super) fn in_the_way(&self, now: Instant, allowed: Duration) -> Vec<Arrival> {
        let is_late = |other: &&Unidentified| now.saturating_duration_since(other.since) > allowed;
        let waits_for = |other: &&Unidentified| {
            let mut waiting = self.waiting.iter();
            waiting.any(|channel| channel.peer == other.peer && other.arrival < channel.arrival)
        };
        let late = self.unidentified.iter().filter(is_late).filter(waits_for);
        late.map(|other| other.arrival).collect()
    }

    /// An accepted connection will not be identified.
    pub(super) fn given_up(&mut self, arrival: Arrival) -> Vec<Assembly<S>> {
        self.unidentified.retain(|other| other.arrival != arrival);
        self.place_waiting()
    }

    /// An accepted connection was identified.
    pub(super) fn identified(
        &mut self,
        arrival: Arrival,
        peer: Peer,
        identity: Identity,
        connection: S,
        now: Instant,
    ) -> Vec<Assembly<S>> {
        self.unidentified.retain(|other| other.arrival != arrival);
        let mut outcomes = Vec::new();
        match identity {
            Identity::Main => outcomes.extend(self.add_main(peer, connection, now)),
            Identity::Multifd(_) if self.channels == 0 => {
                outcomes.push(Assembly::Refused(vec![connection], Refusal::Plain));
            }
            Identity::Multifd(Init { channel, .. }) if channel.0 >= self.channels => {
                let refusal = Refusal::ChannelTooHigh {
                    channel,
                    expected: self.channels,
                };
                outcomes.push(Assembly::Refused(vec![connection], refusal));
            }
            Identity::Multifd(init) => {
                self.waiting.push(Waiting {
                    arrival,
                    peer,
                    init,
                    connection,
                    since: now,
                });
                self.waiting.sort_by_key(|channel| channel.arrival);
            }
        }
        outcomes.append(&mut self.place_waiting());
        outcomes
    }

    /// Refuses what has waited too long.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Assembly<S>> {
        let (deadline, expected) = (self.deadline, self.channels);
        let late = |since: Instant| now.saturating_duration_since(since) > deadline;
        let sets = self.sets.extract_if(.., |set| late(set.since)).map(|set| {
            let present = set.channels.iter().flatten().count();
            let refusal = Refusal::Deadline {
                main: set.main.is_some(),
                present,
                expected,
                deadline,
            };
            Assembly::Refused(set.connections(), refusal)
        });
        let mut outcomes: Vec<_> = sets.collect();
        outcomes.extend(
            self.waiting
                .extract_if(.., |channel| late(channel.since))
                .map(|channel| {
                    let refusal = Refusal::Deadline {
                        main: false,
                        present: 1,
                        expected,
                        deadline,
                    };
                    Assembly::Refused(vec![channel.connection], refusal)
                }),
        );
        outcomes
    }

    /// Refuses what has ended while it waited: its primary died while it connected, and may already be back.
    pub(super) fn expel(&mut self, is_gone: impl Fn(&S) -> bool) -> Vec<Assembly<S>> {
        let sets = self.sets.extract_if(.., |set| {
            let mut connections = set.main.iter().chain(set.channels.iter().flatten());
            connections.any(&is_gone)
        });
        let waiting = self
            .waiting
            .extract_if(.., |channel| is_gone(&channel.connection));
        sets.map(Set::connections)
            .chain(waiting.map(|channel| vec![channel.connection]))
            .map(|connections| Assembly::Refused(connections, Refusal::Gone))
            .collect()
    }

    fn add_main(&mut self, peer: Peer, connection: S, now: Instant) -> Option<Assembly<S>> {
        let mut without_main = (0..self.sets.len())
            .filter(|&position| self.sets[position].peer == peer && self.sets[position].main.is_none());
        match (without_main.next(), without_main.next()) {
            (Some(position), None) => {
                self.sets[position].main = Some(connection);
                self.take_if_complete(position)
            }
            (None, _) => {
                let channels = (0..self.channels).map(|_| None).collect();
                self.sets.push(Set {
                    peer,
                    uuid: None,
                    main: Some(connection),
                    channels,
                    since: now,
                });
                self.take_if_complete(self.sets.len() - 1)
            }
            (Some(_), Some(_)) => Some(self.refuse_ambiguous(peer, connection)),
        }
    }

    /// Places channels, oldest first, until one has to wait.
    fn place_waiting(&mut self) -> Vec<Assembly<S>> {
        let mut outcomes = Vec::new();
        let mut position = 0;
        while position < self.waiting.len() {
            let channel = &self.waiting[position];
            let known = self
                .sets
                .iter()
                .any(|set| set.peer == channel.peer && set.uuid == Some(channel.init.uuid));
            // An earlier connection that is not identified may be the main channel of the same guest.
            let older = self
                .unidentified
                .iter()
                .any(|other| other.arrival < channel.arrival && other.peer == channel.peer);
            if !known && older {
                position += 1;
                continue;
            }
            let channel = self.waiting.remove(position);
            outcomes.extend(self.add_channel(channel));
        }
        outcomes
    }

    fn add_channel(&mut self, channel: Waiting<S>) -> Option<Assembly<S>> {
        let Waiting {
            peer,
            init,
            connection,
            since,
            ..
        } = channel;
        let of_peer = |set: &Set<S>| set.peer == peer;
        let known = self
            .sets
            .iter()
            .position(|set| of_peer(set) && set.uuid == Some(init.uuid));
        let mut unnamed =
            (0..self.sets.len()).filter(|&n| of_peer(&self.sets[n]) && self.sets[n].uuid.is_none());
        let position = match (known, unnamed.next(), unnamed.next()) {
            (Some(known), ..) => known,
            (None, Some(one), None) => one,
            (None, None, _) => {
                let channels = (0..self.channels).map(|_| None).collect();
                self.sets.push(Set {
                    peer,
                    uuid: None,
                    main: None,
                    channels,
                    since,
                });
                self.sets.len() - 1
            }
            (None, Some(_), Some(_)) => return Some(self.refuse_ambiguous(peer, connection)),
        };
        let set = &mut self.sets[position];
        set.uuid = Some(init.uuid);
        let place = &mut set.channels[usize::from(init.channel.0)];
        if place.is_some() {
            return Some(Assembly::Refused(vec![connection], Refusal::Twice(init.channel)));
        }
        *place = Some(connection);
        self.take_if_complete(position)
    }

    fn refuse_ambiguous(&mut self, peer: Peer, connection: S) -> Assembly<S> {
        let involved = |set: &mut Set<S>| set.peer == peer && (set.main.is_none() || set.uuid.is_none());
        let mut connections: Vec<S> = self
            .sets
            .extract_if(.., involved)
            .flat_map(|set| set.connections())
            .collect();
        connections.push(connection);
        Assembly::Refused(connections, Refusal::Ambiguous)
    }

    fn take_if_complete(&mut self, position: usize) -> Option<Assembly<S>> {
        let set = &self.sets[position];
        if set.main.is_none() || set.channels.iter().any(Option::is_none) {
            return None;
        }
        let set = self.sets.remove(position);
        let channels = set.channels.into_iter().flatten().collect();
        set.main
            .map(|main| Assembly::Complete(Complete { main, channels }))
    }
}

impl<S> Set<S> {
    fn connections(self) -> Vec<S> {
        self.main
            .into_iter()
            .chain(self.channels.into_iter().flatten())
            .collect()
    }
}
