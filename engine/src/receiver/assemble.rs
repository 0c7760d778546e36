//! Assembles connections to sessions (spec §2).
//!
//! Nothing on the main channel identifies its guest, and the UUID in the init packets is often zero. What is certain: all
//! connections of a session come to one listener from one origin (an IP address, or a process on a UNIX socket), with TLS they have one
//! identity, the multifd channels carry one UUID, and a primary connects its main channel first. Where that is ambiguous, the
//! connections are refused with a remedy, all of the set, because a guest must never get another guest's pages: a channel number
//! that comes twice, or that no channel should have, says that one of them is a stranger's, but not which.

#[cfg(test)]
mod tests;

use crate::net::{Origin, Peer};
use crate::tls;
use crate::units::ChannelId;
use crate::wire::multifd::Init;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The kind of a connection, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    Main,
    Multifd(Init),
}

/// What its certificate says of a connection; none without one.
pub(super) type Who = Option<Arc<tls::Identity>>;

/// An accepted connection, in the order of acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Arrival(u64);

/// All connections of a session.
#[derive(Debug)]
pub(super) struct Complete<S> {
    pub(super) main: S,
    pub(super) main_arrival: Arrival,
    /// In the order of their ids.
    pub(super) channels: Vec<S>,
    /// What their init packets say; none in plain mode.
    pub(super) uuid: Option<[u8; 16]>,
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
    #[error(
        "{0} connected twice, so it is not known which of the two has the guest's pages: let only the primary connect to this port"
    )]
    Twice(ChannelId),
    #[error(
        "two primaries of one host connect to one listener at the same time, and their main channels cannot be told apart: start them one after the other, or give each a --listen address of its own"
    )]
    Ambiguous,
    #[error(
        "the {what} has the certificate of {its}, and what is here of its session that of {others}: all channels of a primary must have one \
         identity"
    )]
    OtherIdentity {
        what: String,
        its: String,
        others: String,
    },
    #[error(
        "too many connections wait for the rest of their session, most of them from this origin: the oldest make room"
    )]
    Crowded,
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
    /// All of its connections.
    who: Who,
    /// Of its channels; none without one.
    uuid: Option<[u8; 16]>,
    main: Option<(Arrival, S)>,
    channels: Vec<Option<S>>,
    since: Instant,
}

/// A connection whose first bytes have not arrived.
pub(super) struct Silent {
    pub(super) arrival: Arrival,
    /// When it was accepted.
    pub(super) since: Instant,
    /// How many such its origin has.
    pub(super) of_origin: usize,
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
    who: Who,
    init: Init,
    connection: S,
    since: Instant,
}

/// A set that was refused for one of its channels. Others of it may still be on their way, and would wait for a main channel that has
/// gone, while their primary blocks in its writes to them.
struct Remembered {
    peer: Peer,
    uuid: [u8; 16],
    refusal: Refusal,
    since: Instant,
}

/// How many refusals are remembered: a peer can bring about as many as it likes.
const REMEMBERED_MAX: usize = 64;

/// Collects connections until sessions are complete. `S` is the connection itself.
pub(super) struct Assembler<S> {
    channels: u8,
    deadline: Duration,
    next: u64,
    /// In the order of acceptance. Any of them may be a main channel.
    unidentified: Vec<Unidentified>,
    waiting: Vec<Waiting<S>>,
    sets: Vec<Set<S>>,
    /// The oldest first; for as long as a set may take.
    refused: VecDeque<Remembered>,
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
            refused: VecDeque::with_capacity(REMEMBERED_MAX),
        }
    }

    /// Connections that are not part of a complete session yet.
    pub(super) fn pending(&self) -> usize {
        let in_sets = self.sets.iter().map(Set::present).sum::<usize>();
        self.unidentified.len() + self.waiting.len() + in_sets
    }

    /// Those of one origin.
    pub(super) fn pending_of(&self, origin: Origin) -> usize {
        let is_of = |peer: &Peer| peer.origin.group() == origin;
        let unidentified = self.unidentified.iter().filter(|other| is_of(&other.peer));
        let waiting = self.waiting.iter().filter(|channel| is_of(&channel.peer));
        let sets = self.sets.iter().filter(|set| is_of(&set.peer));
        let in_sets: usize = sets.map(Set::present).sum();
        unidentified.count() + waiting.count() + in_sets
    }

    /// Whether connections of that peer wait.
    pub(super) fn has_others(&self, peer: Peer) -> bool {
        let unidentified = self.unidentified.iter().map(|other| other.peer);
        let waiting = self.waiting.iter().map(|channel| channel.peer);
        let sets = self.sets.iter().map(|set| set.peer);
        unidentified.chain(waiting).chain(sets).any(|other| other == peer)
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

    /// Of the connections whose first bytes have not arrived, the oldest: of that of these origins which has most of them.
    pub(super) fn oldest_silent(&self, is_meant: impl Fn(Origin) -> bool) -> Option<Silent> {
        let meant = || {
            self.unidentified
                .iter()
                .filter(|other| is_meant(other.peer.origin))
        };
        let mut crowds: HashMap<Origin, usize> = HashMap::new();
        for other in meant() {
            *crowds.entry(other.peer.origin.group()).or_default() += 1;
        }
        let most = crowds.values().copied().max()?;
        let oldest = meant().find(|other| crowds.get(&other.peer.origin.group()) == Some(&most))?;
        Some(Silent {
            arrival: oldest.arrival,
            since: oldest.since,
            of_origin: most,
        })
    }

    /// Refuses what has waited longest for the rest of its session, of the origin of which most does: a set with all of its connections,
    /// or a channel. None if of none of the origins that are meant more than so many connections wait.
    pub(super) fn evict(
        &mut self,
        more_than: usize,
        is_meant: impl Fn(Origin) -> bool,
    ) -> Option<Assembly<S>> {
        let mut crowds: HashMap<Origin, usize> = HashMap::new();
        let sets = self.sets.iter().map(|set| (set.peer, set.present()));
        let waiting = self.waiting.iter().map(|channel| (channel.peer, 1));
        for (peer, connections) in sets.chain(waiting).filter(|(peer, _)| is_meant(peer.origin)) {
            *crowds.entry(peer.origin.group()).or_default() += connections;
        }
        let most = crowds.into_iter().max_by_key(|(_, connections)| *connections);
        let (crowded, _) = most.filter(|(_, connections)| *connections > more_than)?;
        let is_of = |peer: &Peer| peer.origin.group() == crowded;
        let sets = self.sets.iter().enumerate();
        let set = sets
            .filter(|(_, set)| is_of(&set.peer))
            .min_by_key(|(_, set)| set.since);
        let waiting = self.waiting.iter().enumerate();
        let channel = waiting
            .filter(|(_, channel)| is_of(&channel.peer))
            .min_by_key(|(_, channel)| channel.since);
        let connections = match (set, channel) {
            (Some((at, set)), channel) if channel.is_none_or(|(_, channel)| set.since <= channel.since) => {
                let set = self.sets.remove(at);
                if let Some(uuid) = set.uuid {
                    self.remember(set.peer, uuid, &Refusal::Crowded, set.since);
                }
                set.connections()
            }
            (_, Some((at, _))) => vec![self.waiting.remove(at).connection],
            _ => return None,
        };
        Some(Assembly::Refused(connections, Refusal::Crowded))
    }

    /// What the next connection will be.
    pub(super) fn next_arrival(&self) -> Arrival {
        Arrival(self.next)
    }

    /// Whether a connection of that peer, before this one, has not said what it is.
    pub(super) fn has_unidentified(&self, peer: Peer, before: Arrival) -> bool {
        let mut unidentified = self.unidentified.iter();
        unidentified.any(|other| other.peer == peer && other.arrival < before)
    }

    /// Whether a channel without UUID can be one of a session that has not begun: its main channel is here, or may be.
    pub(super) fn may_be_of_next(&self, peer: Peer, channel: Arrival) -> bool {
        let mut sets = self.sets.iter();
        sets.any(|set| set.peer == peer && set.main.is_some()) || self.has_unidentified(peer, channel)
    }

    /// Connections that have been silent for longer than `allowed` and that channels wait for, or what `is_awaited` says.
    pub(super) fn in_the_way(
        &self,
        now: Instant,
        allowed: Duration,
        is_awaited: impl Fn(Peer, Arrival) -> bool,
    ) -> Vec<Arrival> {
        let is_late = |other: &&Unidentified| now.saturating_duration_since(other.since) > allowed;
        let waits_for = |other: &&Unidentified| {
            let mut waiting = self.waiting.iter();
            waiting.any(|channel| channel.peer == other.peer && other.arrival < channel.arrival)
                || is_awaited(other.peer, other.arrival)
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
        (peer, who): (Peer, Who),
        identity: Identity,
        connection: S,
        now: Instant,
    ) -> Vec<Assembly<S>> {
        self.unidentified.retain(|other| other.arrival != arrival);
        let mut outcomes = Vec::new();
        match identity {
            Identity::Main => outcomes.extend(self.add_main(arrival, (peer, who), connection, now)),
            Identity::Multifd(_) if self.channels == 0 => {
                outcomes.push(Assembly::Refused(vec![connection], Refusal::Plain));
            }
            Identity::Multifd(init) => {
                self.waiting.push(Waiting {
                    arrival,
                    peer,
                    who,
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
        self.refused.retain(|set| !late(set.since));
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

    /// Refuses what has ended while it waited: its primary died while it connected, and may already be back. With a main channel,
    /// all of its set; a channel alone otherwise, as it may be left of a migration that was cancelled.
    pub(super) fn expel(&mut self, is_gone: impl Fn(&S) -> bool) -> Vec<Assembly<S>> {
        let mut gone: Vec<Vec<S>> = Vec::new();
        let died = self
            .sets
            .extract_if(.., |set| set.main.as_ref().is_some_and(|(_, main)| is_gone(main)));
        gone.extend(died.map(Set::connections));
        for set in &mut self.sets {
            let channels = set.channels.iter_mut();
            gone.extend(channels.filter_map(|place| Some(vec![place.take_if(|channel| is_gone(channel))?])));
            if set.channels.iter().all(Option::is_none) {
                set.uuid = None;
            }
        }
        self.sets.retain(|set| !set.is_empty());
        let waiting = self
            .waiting
            .extract_if(.., |channel| is_gone(&channel.connection));
        gone.extend(waiting.map(|channel| vec![channel.connection]));
        gone.into_iter()
            .map(|connections| Assembly::Refused(connections, Refusal::Gone))
            .collect()
    }

    /// Whether a connection may be of a set: of its peer, and of the same identity, where a set of that is there.
    fn may_have(&self, peer: Peer, who: &Who) -> impl Fn(&Set<S>) -> bool + use<S> {
        let mut sets = self.sets.iter();
        let is_known = sets.any(|set| set.peer == peer && set.who == *who);
        let who = who.clone();
        move |set| set.peer == peer && (!is_known || set.who == who)
    }

    /// Refuses a connection, and the set that it seems to be of, if their identities differ.
    fn refuse_other(
        &mut self,
        position: usize,
        what: String,
        who: &Who,
        connection: S,
    ) -> Result<S, Assembly<S>> {
        let set = &self.sets[position];
        if set.who == *who {
            return Ok(connection);
        }
        let name = |who: &Who| {
            let name = who.as_ref().map(ToString::to_string);
            name.unwrap_or_else(|| "nobody".to_owned())
        };
        let refusal = Refusal::OtherIdentity {
            what,
            its: name(who),
            others: name(&set.who),
        };
        if let Some(uuid) = set.uuid {
            self.remember(set.peer, uuid, &refusal, set.since);
        }
        let mut connections = self.sets.remove(position).connections();
        connections.push(connection);
        Err(Assembly::Refused(connections, refusal))
    }

    fn add_main(
        &mut self,
        arrival: Arrival,
        (peer, who): (Peer, Who),
        connection: S,
        now: Instant,
    ) -> Option<Assembly<S>> {
        let may_have = self.may_have(peer, &who);
        let mut without_main = (0..self.sets.len())
            .filter(|&position| may_have(&self.sets[position]) && self.sets[position].main.is_none());
        match (without_main.next(), without_main.next()) {
            (Some(position), None) => {
                let connection =
                    match self.refuse_other(position, "main channel".to_owned(), &who, connection) {
                        Ok(connection) => connection,
                        Err(refused) => return Some(refused),
                    };
                self.sets[position].main = Some((arrival, connection));
                self.take_if_complete(position)
            }
            (None, _) => {
                let channels = (0..self.channels).map(|_| None).collect();
                self.sets.push(Set {
                    peer,
                    who,
                    uuid: None,
                    main: Some((arrival, connection)),
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
            who,
            init,
            connection,
            since,
            ..
        } = channel;
        let of_peer = self.may_have(peer, &who);
        let known = self
            .sets
            .iter()
            .position(|set| of_peer(set) && set.uuid == Some(init.uuid));
        let mut unnamed =
            (0..self.sets.len()).filter(|&n| of_peer(&self.sets[n]) && self.sets[n].uuid.is_none());
        let position = match (known, unnamed.next(), unnamed.next()) {
            (Some(known), ..) => known,
            (None, Some(one), None) => one,
            (None, None, _) if init.channel.0 >= self.channels => {
                let refusal = self.too_high(init.channel);
                self.remember(peer, init.uuid, &refusal, since);
                return Some(Assembly::Refused(vec![connection], refusal));
            }
            (None, None, _) => {
                if let Some(refusal) = self.remembered(peer, init.uuid) {
                    return Some(Assembly::Refused(vec![connection], refusal));
                }
                let channels = (0..self.channels).map(|_| None).collect();
                self.sets.push(Set {
                    peer,
                    who: who.clone(),
                    uuid: None,
                    main: None,
                    channels,
                    since,
                });
                self.sets.len() - 1
            }
            (None, Some(_), Some(_)) => return Some(self.refuse_ambiguous(peer, connection)),
        };
        let what = init.channel.to_string();
        let connection = match self.refuse_other(position, what, &who, connection) {
            Ok(connection) => connection,
            Err(refused) => return Some(refused),
        };
        let set = &mut self.sets[position];
        set.uuid = Some(init.uuid);
        let refusal = match set.channels.get_mut(usize::from(init.channel.0)) {
            Some(place @ None) => {
                *place = Some(connection);
                return self.take_if_complete(position);
            }
            Some(Some(_)) => Refusal::Twice(init.channel),
            None => self.too_high(init.channel),
        };
        self.remember(peer, init.uuid, &refusal, since);
        let mut connections = self.sets.remove(position).connections();
        connections.push(connection);
        Some(Assembly::Refused(connections, refusal))
    }

    fn remember(&mut self, peer: Peer, uuid: [u8; 16], refusal: &Refusal, since: Instant) {
        if self.remembered(peer, uuid).is_some() {
            return;
        }
        if self.refused.len() == REMEMBERED_MAX {
            self.refused.pop_front();
        }
        self.refused.push_back(Remembered {
            peer,
            uuid,
            refusal: refusal.clone(),
            since,
        });
    }

    /// Why the set of this channel was refused a moment ago. A primary that tries again connects its main channel first.
    fn remembered(&self, peer: Peer, uuid: [u8; 16]) -> Option<Refusal> {
        let mut refused = self.refused.iter();
        refused
            .find(|set| set.peer == peer && set.uuid == uuid)
            .map(|set| set.refusal.clone())
    }

    fn too_high(&self, channel: ChannelId) -> Refusal {
        Refusal::ChannelTooHigh {
            channel,
            expected: self.channels,
        }
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
        let uuid = set.uuid;
        set.main.map(|(main_arrival, main)| {
            Assembly::Complete(Complete {
                main,
                main_arrival,
                channels,
                uuid,
            })
        })
    }
}

impl<S> Set<S> {
    /// How many connections it has.
    fn present(&self) -> usize {
        self.channels.iter().flatten().count() + usize::from(self.main.is_some())
    }

    fn is_empty(&self) -> bool {
        self.main.is_none() && self.channels.iter().all(Option::is_none)
    }

    fn connections(self) -> Vec<S> {
        self.main
            .into_iter()
            .map(|(_, main)| main)
            .chain(self.channels.into_iter().flatten())
            .collect()
    }
}
