//! Sessions are admitted to their first commit when no connection is left that could contradict their channels: see
//! [`crate::receiver::admission`].

use super::limits::SILENCE_ALLOWED;
use super::state::{ControlState, Live};
use crate::net::{Listener, Peer, QUEUE_MAX};
use crate::receiver::assemble::{Arrival, Who};
use crate::receiver::end::SessionEnd;
use crate::receiver::guest_rules::NotAllowed;
use crate::receiver::names::{GuestUuid, Marks};
use crate::wire::multifd::Init;
use std::rc::Rc;
use std::time::Instant;

/// What a session that has asked for its admission waits for.
#[derive(Clone, Copy, Debug)]
pub(in crate::receiver) enum Pending {
    /// The listener's queue: it was seen empty, or as many of its connections were accepted as it holds, so that all that were in it
    /// are, even if it is never seen empty because strangers keep filling it.
    Queue { until_accepted: u64 },
    /// Connections of its peer before this one, which are not identified. Later ones are not its primary's.
    Before(Arrival),
}

impl ControlState {
    /// Admits sessions that have asked for it and have nothing left to wait for. `none_accepted`: no task that accepts has a
    /// connection in hand.
    pub(super) fn admit_sessions(&mut self, listeners: &[Rc<Listener>], none_accepted: bool) {
        let connections = &self.connections;
        for live in &mut self.live {
            if !live.session.admission.is_asked() {
                continue;
            }
            let accepted = connections.accepted_at(live.peer.listener);
            let pending = live.admission.get_or_insert(Pending::Queue {
                until_accepted: accepted + QUEUE_MAX,
            });
            if let Pending::Queue { until_accepted } = *pending {
                let is_empty = none_accepted && !listeners[live.peer.listener].has_waiting();
                if !is_empty && accepted < until_accepted {
                    continue;
                }
                *pending = Pending::Before(connections.assembler.next_arrival());
            }
            if let Pending::Before(arrival) = *pending
                && !connections.assembler.has_unidentified(live.peer, arrival)
            {
                live.session.admission.admit();
                live.session.wake_main();
            }
        }
    }

    /// Refuses a session whose channels are contradicted by another one, which was accepted after its main channel and before it
    /// asked for its admission. A primary connects its main channel first, and all others before it sends a page.
    pub(super) fn refuse_contradicted(&self, arrival: Arrival, (peer, who): (Peer, &Who), init: Init) {
        // Guests without UUIDs cannot be told apart: it may be one of the next guest, whose main channel is here.
        let is_of_next = init.uuid == [0; 16] && self.connections.assembler.may_be_of_next(peer, arrival);
        let can_have_it = |live: &&Live| {
            let in_time =
                live.main_arrival < arrival && live.admission.is_none_or(|pending| pending.includes(arrival));
            live.peer == peer && in_time && live.session.who() == *who && live.session.may_have(init.uuid)
        };
        // The newest: to an older one it would have come before that one's successor.
        let Some(live) = self.live.iter().rev().find(can_have_it).filter(|_| !is_of_next) else {
            return;
        };
        let channel = init.channel;
        if live.session.admission.refuse(channel) {
            live.session.finish(SessionEnd::Contradicted { channel });
        }
    }

    /// Whether connections of this peer, for a guest with this UUID, may have this identity.
    ///
    /// # Errors
    /// If the guest's rule names others.
    pub(super) fn check_identity(
        &self,
        peer: Peer,
        uuid: Option<[u8; 16]>,
        who: &Who,
    ) -> Result<(), NotAllowed> {
        let given = &self.context.options.listen[peer.listener];
        let marks = Marks {
            listeners: [given, self.listeners[peer.listener].address()],
            origin: peer.origin,
            uuid: uuid.and_then(GuestUuid::new),
        };
        self.context.services.shared().guests.check_arrival(&marks, who)
    }

    /// Connections that have been silent for too long, where channels or a session wait for them.
    pub(super) fn connections_in_the_way(&self, now: Instant) -> Vec<Arrival> {
        let awaited = |peer: Peer, arrival: Arrival| {
            self.live.iter().any(|live| match live.admission {
                Some(Pending::Before(before)) if live.session.admission.is_asked() => {
                    live.peer == peer && arrival < before
                }
                _ => false,
            })
        };
        self.connections
            .assembler
            .in_the_way(now, SILENCE_ALLOWED, awaited)
    }
}

impl Pending {
    fn includes(self, arrival: Arrival) -> bool {
        match self {
            Self::Queue { .. } => true,
            Self::Before(before) => arrival < before,
        }
    }
}
