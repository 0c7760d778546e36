//! Which link belongs to which session.

use super::session_output::{LinkNumber, SessionOutput};
use crate::link::{Hello, Wanted};
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

/// Most guards that are remembered of a session's host which are gone.
const GONE_MAX: usize = 64;

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
        self.is_of_host(other.origin) && self.uuid == other.uuid && self.who == other.who
    }

    fn is_of_host(&self, origin: Origin) -> bool {
        match (self.origin, origin) {
            (Origin::Process(_), Origin::Process(_)) => true,
            (own, other) => own == other,
        }
    }
}

/// The guard of a session that is about to commit was lost while it waited for it, or it is not known which guard is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct GuardIsGone;

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
    /// The newest session when it came.
    newest: u32,
}

impl Waiting {
    /// Whether it may belong to a session of its guest that commits for the first time. One that has begun before a guard that will have the guest
    /// protected is not that guard's.
    fn waits_for(&self, session: u32) -> bool {
        match &self.wish {
            Wish::Call { .. } => true,
            Wish::Guard { hello, .. } => match hello.wants {
                Wanted::Next => session > self.newest,
                Wanted::Running => true,
                Wanted::Session(wanted) => session == wanted,
            },
        }
    }

    fn is_beginning(&self) -> bool {
        matches!(&self.wish, Wish::Guard { hello, .. } if hello.wants == Wanted::Next)
    }
}

/// A session that has not committed yet.
struct Copying {
    session: u32,
    origin: Origin,
    /// Guards of its host that waited for a session when it had begun, and are gone.
    gone: Vec<GuestMarks>,
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
    /// The number of the session that has begun last.
    newest: u32,
    copying: Vec<Copying>,
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
        let oldest = oldest.map(|position| self.waiting.remove(position));
        if let Some(link) = oldest.as_ref().filter(|link| link.is_beginning()) {
            self.guard_is_gone(link);
        }
        oldest.is_some()
    }

    /// A guard is gone that has waited for a session: of those that have begun meanwhile one may be its guest's, and must not commit
    /// without it.
    fn guard_is_gone(&mut self, link: &Waiting) {
        let of_host =
            |copying: &&mut Copying| copying.session > link.newest && link.guest.is_of_host(copying.origin);
        for copying in self.copying.iter_mut().filter(of_host) {
            copying.gone.retain(|gone| *gone != link.guest);
            if copying.gone.len() == GONE_MAX {
                copying.gone.remove(0);
            }
            copying.gone.push(link.guest.clone());
        }
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

    /// A session has begun.
    pub(in crate::receiver) fn session_begins(&self, session: u32, origin: Origin) {
        let mut state = self.lock();
        state.newest = state.newest.max(session);
        state.copying.push(Copying {
            session,
            origin,
            gone: Vec::new(),
        });
    }

    /// A session is about to commit for the first time: its link, if one waits for it, belongs to it from now on.
    ///
    /// # Errors
    /// If its guard is gone, which has waited for it and held nothing yet.
    pub(in crate::receiver) fn session_commits(
        &self,
        identity: &Arc<GuestIdentity>,
        guest: GuestMarks,
        output: &Arc<SessionOutput>,
    ) -> Result<(), GuardIsGone> {
        let session = Session {
            identity: identity.clone(),
            guest,
            output: output.clone(),
        };
        let mut state = self.lock();
        let is_call = |waiting: &Waiting| matches!(waiting.wish, Wish::Call { .. });
        // All calls of this guest, and the newest guard: one that was restarted may come before the end of its old link is noticed.
        let (guest, id) = (&session.guest, identity.session());
        let is_guard = |link: &Waiting| link.guest.is(guest) && !is_call(link) && link.waits_for(id);
        let position = state.copying.iter().position(|one| one.session == id);
        let copying = position.map(|position| state.copying.swap_remove(position));
        let was_guarded = copying.is_some_and(|one| one.gone.iter().any(|gone| gone.is(guest)));
        let guard = state.waiting.iter().rposition(is_guard);
        // Of two guards for guests without a UUID it is not known which one's this is, and its output would be let go by the other's commits.
        let is_doubtful =
            guest.uuid.is_none() && state.waiting.iter().filter(|link| is_guard(link)).count() > 1;
        let guard = guard
            .filter(|_| !is_doubtful)
            .map(|position| state.waiting.remove(position));
        if is_doubtful || (guard.is_none() && was_guarded) {
            return Err(GuardIsGone);
        }
        let calls = state
            .waiting
            .extract_if(.., |link| link.guest.is(guest) && is_call(link));
        calls.chain(guard).for_each(|link| link.wish.grant(&session));
        state.sessions.push(session);
        Ok(())
    }

    /// A session is over.
    pub(in crate::receiver) fn session_ended(&self, id: u32) {
        let mut state = self.lock();
        state.copying.retain(|copying| copying.session != id);
        state.sessions.retain(|session| session.identity.session() != id);
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
    /// The link waits for a session of its guest, with this guard's words. It gets the one that it wants, now or when that commits.
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
        let link = Waiting {
            number: self.number,
            guest,
            wish,
            newest: state.newest,
        };
        let is_wanted = |session: &&Session| {
            session.guest.is(&link.guest)
                && !session.output.has_ended()
                && link.waits_for(session.identity.session())
        };
        match state.sessions.iter().rfind(is_wanted).cloned() {
            Some(session) => link.wish.grant(&session),
            None => state.waiting.push(link),
        }
    }
}

impl Drop for LinkTicket {
    fn drop(&mut self) {
        let mut state = self.links.lock();
        if let Some(position) = state.links.iter().position(|origin| *origin == self.origin) {
            state.links.swap_remove(position);
        }
        let own = state.waiting.iter().position(|link| link.number == self.number);
        let own = own.map(|position| state.waiting.remove(position));
        if let Some(link) = own.filter(Waiting::is_beginning) {
            state.guard_is_gone(&link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::receiver::guest::StoredGuest;
    use crate::ring::{Semaphore, Waker};
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

    const HOST: Origin = Origin::Host(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)));

    fn marks(uuid: Option<u8>) -> GuestMarks {
        GuestMarks {
            who: None,
            uuid: uuid.map(|byte| [byte; 16]),
            origin: HOST,
        }
    }

    type Link = (LinkTicket, mpsc::UnboundedReceiver<Bound>);

    fn guard(links: &Arc<Links>, uuid: Option<u8>, wants: Wanted) -> Link {
        let ticket = links.connected(HOST).unwrap();
        let (sender, bound) = mpsc::unbounded_channel();
        let hello = Hello {
            version: crate::link::LINK_VERSION,
            name: "web3".to_owned(),
            uuid: None,
            timeout_ms: 1000,
            wants,
        };
        ticket.wait(marks(uuid), (hello, "web3".parse().unwrap()), sender);
        (ticket, bound)
    }

    fn bound_to(link: &mut Link) -> Option<u32> {
        link.1.try_recv().ok().map(|bound| bound.guest.session())
    }

    fn commits(links: &Links, session: u32, uuid: Option<u8>) -> Result<(), GuardIsGone> {
        let identity = GuestIdentity::recovered(session, StoredGuest::default());
        let waker = Waker::Thread(Arc::new(Semaphore::default()));
        links.session_commits(
            &Arc::new(identity),
            marks(uuid),
            &Arc::new(SessionOutput::new(waker)),
        )
    }

    /// The receiver has not seen that the primary of an older session is lost, whose guard has the guest protected again.
    #[test]
    fn a_guard_gets_the_session_that_it_begins() {
        let links = Arc::<Links>::default();
        links.session_begins(1, HOST);
        let mut first = guard(&links, Some(7), Wanted::Running);
        assert_eq!(commits(&links, 1, Some(7)), Ok(()));
        assert_eq!(bound_to(&mut first), Some(1));
        let mut again = guard(&links, Some(7), Wanted::Next);
        assert_eq!(bound_to(&mut again), None);
        // One that had begun before the guard came is not its own either.
        links.session_begins(2, HOST);
        let mut late = guard(&links, Some(7), Wanted::Next);
        assert_eq!(commits(&links, 2, Some(7)), Ok(()));
        assert_eq!((bound_to(&mut again), bound_to(&mut late)), (Some(2), None));
        links.session_begins(3, HOST);
        assert_eq!(commits(&links, 3, Some(7)), Ok(()));
        assert_eq!(bound_to(&mut late), Some(3));
        // A link that was lost comes back to its own session, and to no other.
        let mut relinked = guard(&links, Some(7), Wanted::Session(2));
        assert_eq!(bound_to(&mut relinked), Some(2));
        let mut of_none = guard(&links, Some(7), Wanted::Session(9));
        assert_eq!(bound_to(&mut of_none), None);
    }

    /// Nothing would hold the guest's output.
    #[test]
    fn a_session_whose_guard_is_lost_in_its_first_copy_does_not_commit() {
        let links = Arc::<Links>::default();
        drop(guard(&links, Some(7), Wanted::Next));
        links.session_begins(1, HOST);
        assert_eq!(commits(&links, 1, Some(7)), Ok(()), "it is of another attempt");
        let lost = guard(&links, Some(7), Wanted::Next);
        links.session_begins(2, HOST);
        links.session_begins(3, HOST);
        drop(lost);
        assert_eq!(commits(&links, 2, Some(8)), Ok(()), "another guest");
        assert_eq!(commits(&links, 3, Some(7)), Err(GuardIsGone));
        assert!(links.lock().copying.is_empty());
    }

    #[test]
    fn guards_of_guests_without_a_uuid_are_not_mixed_up() {
        let links = Arc::<Links>::default();
        let mut both = [(); 2].map(|()| guard(&links, None, Wanted::Next));
        links.session_begins(1, HOST);
        assert_eq!(commits(&links, 1, None), Err(GuardIsGone));
        assert!(both.iter_mut().all(|link| bound_to(link).is_none()));
        let [first, mut other] = both;
        drop(first);
        links.session_begins(2, HOST);
        assert_eq!(commits(&links, 2, None), Ok(()));
        assert_eq!(bound_to(&mut other), Some(2));
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
