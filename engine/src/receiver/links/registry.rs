//! Which link belongs to which session.

use super::session_output::{LinkNumber, SessionOutput};
use crate::link::Hello;
use crate::net::Origin;
use crate::receiver::assemble::Who;
use crate::receiver::guest::GuestIdentity;
use crate::receiver::names::GuestName;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Most links at a time.
const LINKS_MAX: usize = 256;

/// Most of them of one origin: those of a stranger must not keep out the guards of other hosts, each of which holds its guest's output until
/// it is linked again.
const LINKS_OF_ORIGIN_MAX: usize = 64;

/// A session that a link was bound to.
pub(in crate::receiver) struct Bound {
    pub(in crate::receiver) guest: Arc<GuestIdentity>,
    pub(in crate::receiver) output: Arc<SessionOutput>,
    pub(in crate::receiver) link: LinkNumber,
}

/// A guest, as its stream or its guard describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct GuestMarks {
    pub(in crate::receiver) uuid: Option<[u8; 16]>,
    pub(in crate::receiver) origin: Origin,
    /// Whose certificate it has, with TLS: a guard's is its primary's.
    pub(in crate::receiver) who: Who,
}

impl GuestMarks {
    /// Whether both are the same guest: of one host, where the guard is beside the primary, and by the UUID. Of guests without one,
    /// a host may have one.
    fn is(&self, other: &Self) -> bool {
        let is_one_host = match (self.origin, other.origin) {
            (Origin::Process(_), Origin::Process(_)) => true,
            (own, other) => own == other,
        };
        is_one_host && self.uuid == other.uuid && self.who == other.who
    }
}

/// What a link waits for a session with.
enum Wish {
    /// A guard, which is bound to it.
    Guard {
        hello: Hello,
        name: GuestName,
        bound: mpsc::UnboundedSender<Bound>,
    },
    /// A call, which names the guest; the answer is the name that the receiver uses.
    Call {
        name: Option<GuestName>,
        called: oneshot::Sender<Arc<GuestIdentity>>,
    },
}

/// A link that no session has.
struct Waiting {
    number: u64,
    guest: GuestMarks,
    wish: Wish,
}

/// A session that has begun to commit.
#[derive(Clone)]
struct Session {
    identity: Arc<GuestIdentity>,
    guest: GuestMarks,
    output: Arc<SessionOutput>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// Of each link, its origin.
    links: Vec<Origin>,
    waiting: Vec<Waiting>,
    sessions: Vec<Session>,
}

impl State {
    /// Gives up the link that has waited longest for a session, of the origin that has most of those: its task finds that nobody can bind it
    /// any more. False if none waits.
    fn make_room(&mut self) -> bool {
        let mut crowds: HashMap<Origin, usize> = HashMap::new();
        for link in &self.waiting {
            *crowds.entry(link.guest.origin.group()).or_default() += 1;
        }
        let most = crowds.values().copied().max();
        let is_of_most = |link: &Waiting| crowds.get(&link.guest.origin.group()).copied() == most;
        let oldest = self.waiting.iter().position(is_of_most);
        oldest.map(|position| self.waiting.remove(position)).is_some()
    }
}

/// All links and the sessions that they may belong to. Used by the control thread, and by cores at a session's first commit.
#[derive(Default)]
pub(in crate::receiver) struct Links {
    state: Mutex<State>,
}

/// The right to one of the links, given back when it is dropped.
pub(in crate::receiver) struct LinkTicket {
    links: Arc<Links>,
    number: u64,
    origin: Origin,
}

impl Links {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guard has connected; none if there are too many of its origin, or of all, none of which waits for a session.
    pub(in crate::receiver) fn connected(self: &Arc<Self>, origin: Origin) -> Option<LinkTicket> {
        let origin = origin.group();
        let mut state = self.lock();
        let of_origin = state.links.iter().filter(|other| **other == origin).count();
        let has_room =
            of_origin < LINKS_OF_ORIGIN_MAX && (state.links.len() < LINKS_MAX || state.make_room());
        if !has_room {
            return None;
        }
        state.links.push(origin);
        state.next += 1;
        Some(LinkTicket {
            links: self.clone(),
            number: state.next,
            origin,
        })
    }

    /// A session is about to commit for the first time: its link, if one waits for it, belongs to it from now on.
    pub(in crate::receiver) fn session_commits(
        &self,
        identity: &Arc<GuestIdentity>,
        guest: GuestMarks,
        output: &Arc<SessionOutput>,
    ) {
        let session = Session {
            identity: identity.clone(),
            guest,
            output: output.clone(),
        };
        let mut state = self.lock();
        let is_call = |waiting: &Waiting| matches!(waiting.wish, Wish::Call { .. });
        // All calls of this guest, and the newest guard: one that was restarted may come before the end of its old link is noticed.
        let guest = &session.guest;
        let is_guard = |link: &Waiting| link.guest.is(guest) && !is_call(link);
        let guard = state.waiting.iter().rposition(is_guard);
        let guard = guard.map(|position| state.waiting.remove(position));
        let calls = state
            .waiting
            .extract_if(.., |link| link.guest.is(guest) && is_call(link));
        calls.chain(guard).for_each(|link| link.wish.grant(&session));
        state.sessions.push(session);
    }

    /// A session is over.
    pub(in crate::receiver) fn session_ended(&self, id: u32) {
        self.lock()
            .sessions
            .retain(|session| session.identity.session() != id);
    }
}

impl Wish {
    fn grant(self, session: &Session) {
        match self {
            Self::Guard { hello, name, bound } => {
                session.identity.is_called(name);
                let link = session.output.attach(&hello);
                let is_there = bound.send(Bound {
                    guest: session.identity.clone(),
                    output: session.output.clone(),
                    link,
                });
                if is_there.is_err() {
                    // Its task has just ended.
                    session.output.detach(link);
                }
            }
            Self::Call { name, called } => {
                if let Some(name) = name {
                    session.identity.is_called(name);
                }
                // Its caller may be gone; the name stays.
                drop(called.send(session.identity.clone()));
            }
        }
    }
}

impl LinkTicket {
    /// The link waits for a session of its guest, with this guard's words. It gets the newest that runs already; else the next.
    pub(in crate::receiver) fn wait(
        &self,
        guest: GuestMarks,
        (hello, name): (Hello, GuestName),
        bound: mpsc::UnboundedSender<Bound>,
    ) {
        self.wait_with(guest, Wish::Guard { hello, name, bound });
    }

    /// The same for a call.
    pub(in crate::receiver) fn call(
        &self,
        guest: GuestMarks,
        name: Option<GuestName>,
        called: oneshot::Sender<Arc<GuestIdentity>>,
    ) {
        self.wait_with(guest, Wish::Call { name, called });
    }

    fn wait_with(&self, guest: GuestMarks, wish: Wish) {
        let mut state = self.links.lock();
        let is_running = |session: &&Session| session.guest.is(&guest) && !session.output.has_ended();
        match state.sessions.iter().rfind(is_running).cloned() {
            Some(session) => wish.grant(&session),
            None => state.waiting.push(Waiting {
                number: self.number,
                guest,
                wish,
            }),
        }
    }
}

impl Drop for LinkTicket {
    fn drop(&mut self) {
        let mut state = self.links.lock();
        if let Some(position) = state.links.iter().position(|origin| *origin == self.origin) {
            state.links.swap_remove(position);
        }
        state.waiting.retain(|link| link.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;
    use tokio::sync::oneshot::error::TryRecvError;

    #[test]
    fn links_of_one_host_leave_room_for_those_of_others() {
        let host = |last: u8| Origin::Host(IpAddr::from([192, 0, 2, last]));
        let links = Arc::<Links>::default();
        let connect = |last| links.connected(host(last));
        let mut of_stranger: Vec<_> = (0..LINKS_OF_ORIGIN_MAX).map(|_| connect(1)).collect();
        assert!(of_stranger.iter().all(Option::is_some) && connect(1).is_none());
        let of_guard = connect(2);
        assert!(of_guard.is_some());
        // One that has ended makes room for another of its origin.
        of_stranger.pop();
        of_stranger.push(connect(1));
        assert!(of_stranger.iter().all(Option::is_some) && connect(1).is_none());
        drop((of_stranger, of_guard));
        assert!(links.lock().links.is_empty());
    }

    /// Four hosts have all links, for guests that there are not: a guard of a fifth finds a place.
    #[test]
    fn the_link_that_has_waited_longest_makes_room() {
        let host = |last: u8| Origin::Host(IpAddr::from([192, 0, 2, last]));
        let links = Arc::<Links>::default();
        let wait = |last: u8| {
            let ticket = links.connected(host(last))?;
            let (sender, called) = oneshot::channel();
            let marks = GuestMarks {
                who: None,
                uuid: Some([last; 16]),
                origin: host(last),
            };
            ticket.call(marks, None, sender);
            Some((ticket, called))
        };
        let guard = wait(9).unwrap();
        let crowd: Vec<_> = (1..5)
            .flat_map(|last| (0..LINKS_OF_ORIGIN_MAX).map(move |_| last))
            .collect();
        let mut crowd: Vec<_> = crowd.into_iter().map(|last| wait(last).unwrap()).collect();
        let mut next = wait(8).unwrap();
        let is_given_up =
            |called: &mut oneshot::Receiver<_>| matches!(called.try_recv(), Err(TryRecvError::Closed));
        let (mut called, own) = (guard.1, &mut next.1);
        assert!(!is_given_up(&mut called) && !is_given_up(own), "they are few");
        let given_up = crowd
            .iter_mut()
            .filter_map(|(_, called)| is_given_up(called).then_some(()));
        assert_eq!(
            given_up.count(),
            2,
            "one for the guard that came first, as it has all places but one"
        );
    }
}
