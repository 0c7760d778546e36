//! Which link belongs to which session.

use super::session_output::{LinkNumber, SessionOutput};
use crate::link::Hello;
use crate::net::Origin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Most links at a time.
const LINKS_MAX: usize = 256;

/// A session that a link was bound to.
pub(in crate::receiver) struct Bound {
    pub(in crate::receiver) session: u32,
    pub(in crate::receiver) output: Arc<SessionOutput>,
    pub(in crate::receiver) link: LinkNumber,
}

/// A guest, as its stream or its guard describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct Guest {
    pub(in crate::receiver) uuid: Option<[u8; 16]>,
    pub(in crate::receiver) origin: Origin,
}

impl Guest {
    /// Whether both are the same guest: of one host, where the guard is beside the primary, and by the UUID. Of guests without one,
    /// a host may have one.
    fn is(self, other: Self) -> bool {
        let is_one_host = match (self.origin, other.origin) {
            (Origin::Process(_), Origin::Process(_)) => true,
            (own, other) => own == other,
        };
        is_one_host && self.uuid == other.uuid
    }
}

/// A link that no session has.
struct Waiting {
    number: u64,
    guest: Guest,
    hello: Hello,
    bound: mpsc::UnboundedSender<Bound>,
}

/// A session that has begun to commit.
struct Session {
    id: u32,
    guest: Guest,
    output: Arc<SessionOutput>,
}

#[derive(Default)]
struct State {
    next: u64,
    links: usize,
    waiting: Vec<Waiting>,
    sessions: Vec<Session>,
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
}

impl Links {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guard has connected; none if there are too many.
    pub(in crate::receiver) fn connected(self: &Arc<Self>) -> Option<LinkTicket> {
        let mut state = self.lock();
        if state.links == LINKS_MAX {
            return None;
        }
        state.links += 1;
        state.next += 1;
        Some(LinkTicket {
            links: self.clone(),
            number: state.next,
        })
    }

    /// A session is about to commit for the first time: its link, if one waits for it, belongs to it from now on.
    pub(in crate::receiver) fn session_commits(&self, id: u32, guest: Guest, output: &Arc<SessionOutput>) {
        let mut state = self.lock();
        // The newest: a guard that was restarted may come before the end of its old link is noticed.
        if let Some(position) = state.waiting.iter().rposition(|link| link.guest.is(guest)) {
            state.waiting.remove(position).bind(id, output);
        }
        state.sessions.push(Session {
            id,
            guest,
            output: output.clone(),
        });
    }

    /// A session is over.
    pub(in crate::receiver) fn session_ended(&self, id: u32) {
        self.lock().sessions.retain(|session| session.id != id);
    }
}

impl Waiting {
    fn bind(self, session: u32, output: &Arc<SessionOutput>) {
        let link = output.attach(&self.hello);
        let bound = Bound {
            session,
            output: output.clone(),
            link,
        };
        if self.bound.send(bound).is_err() {
            // Its task has just ended.
            output.detach(link);
        }
    }
}

impl LinkTicket {
    /// The link waits for a session of its guest. It gets the newest that runs already; else the next.
    pub(in crate::receiver) fn wait(&self, guest: Guest, hello: Hello, bound: mpsc::UnboundedSender<Bound>) {
        let mut state = self.links.lock();
        let waiting = Waiting {
            number: self.number,
            guest,
            hello,
            bound,
        };
        let is_running = |session: &&Session| session.guest.is(guest) && !session.output.has_ended();
        let running = state.sessions.iter().rfind(is_running);
        match running.map(|session| (session.id, session.output.clone())) {
            Some((id, output)) => waiting.bind(id, &output),
            None => state.waiting.push(waiting),
        }
    }
}

impl Drop for LinkTicket {
    fn drop(&mut self) {
        let mut state = self.links.lock();
        state.links -= 1;
        state.waiting.retain(|link| link.number != self.number);
    }
}
