//! Which guest a session is of: what its connections say, and what it is called.
//!
//! A session's guest is known from its beginning by the listener and the host, with multifd by its UUID, and from its first commit by
//! what its stream says. It has the name that the operator's rules give it; else that of its guard or of `colo-ring protect`; else
//! its UUID is its name. One without any of them has the number of its session alone.

use super::assemble::Who;
use super::guest_rules::{GuestRule, GuestRules, NotAllowed};
use super::names::{GuestName, GuestUuid, Marks};
use crate::net::{ListenAddress, Origin};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

/// A session as messages call it: by its number, and by the operator's name for its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionTitle {
    /// Its number in this receiver.
    pub session: u32,
    /// What the operator calls its guest.
    pub name: Option<GuestName>,
    /// Its guest's UUID, which is too long for a line.
    #[serde(default)]
    pub uuid: Option<GuestUuid>,
}

impl From<u32> for SessionTitle {
    fn from(session: u32) -> Self {
        Self {
            session,
            name: None,
            uuid: None,
        }
    }
}

impl fmt::Display for SessionTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{} ({name})", self.session),
            None => write!(f, "{}", self.session),
        }
    }
}

/// The operator's name for a guest.
#[derive(Debug, Default)]
struct Named {
    by_rule: Option<GuestName>,
    by_guard: Option<GuestName>,
}

/// What is known of a session's guest.
#[derive(Debug)]
pub(super) struct GuestIdentity {
    session: u32,
    /// Where its main channel came from.
    pub(super) peer: String,
    /// The address that it came to; none of a session from before this was written down.
    pub(super) listener: Option<String>,
    /// What rules look at; none of a session of which that was not written down.
    marks: Option<([ListenAddress; 2], Origin)>,
    uuid: OnceLock<GuestUuid>,
    named: Mutex<Named>,
}

/// What an earlier receiver has written down of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StoredGuest {
    pub(super) peer: String,
    pub(super) listener: Option<String>,
    pub(super) uuid: Option<GuestUuid>,
    pub(super) name: Option<GuestName>,
}

impl GuestIdentity {
    /// Of a recovered session.
    pub(super) fn recovered(session: u32, stored: StoredGuest) -> Self {
        let listener = stored.listener.as_ref().and_then(|text| text.parse().ok());
        let marks = listener
            .zip(host_of(&stored.peer))
            .map(|(listener, host): (ListenAddress, _)| ([listener.clone(), listener], Origin::Host(host)));
        Self {
            session,
            peer: stored.peer,
            listener: stored.listener,
            marks,
            uuid: stored.uuid.map_or_else(OnceLock::new, OnceLock::from),
            named: Mutex::new(Named {
                by_rule: None,
                by_guard: stored.name,
            }),
        }
    }

    /// What rules look at; none if that was not written down.
    fn with_marks<T>(&self, look: impl FnOnce(Marks<'_>) -> T) -> Option<T> {
        let (listeners, origin) = self.marks.as_ref()?;
        Some(look(Marks {
            listeners: listeners.each_ref(),
            origin: *origin,
            uuid: self.uuid(),
        }))
    }

    fn named(&self) -> MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn session(&self) -> u32 {
        self.session
    }

    pub(super) fn uuid(&self) -> Option<GuestUuid> {
        self.uuid.get().copied()
    }

    fn has_uuid(&self, uuid: GuestUuid) {
        // Set once: a stream and its channels that differ end their session.
        let _ = self.uuid.set(uuid);
    }

    /// The operator's name for it.
    fn operators_name(&self) -> Option<GuestName> {
        let named = self.named();
        named.by_rule.as_ref().or(named.by_guard.as_ref()).cloned()
    }

    /// Its name: none if its session has only a number.
    pub(super) fn name(&self) -> Option<GuestName> {
        let by_uuid = || self.uuid().map(GuestName::of_uuid);
        self.operators_name().or_else(by_uuid)
    }

    pub(super) fn title(&self) -> SessionTitle {
        SessionTitle {
            session: self.session,
            name: self.operators_name(),
            uuid: self.uuid(),
        }
    }

    /// Its guard, or `colo-ring protect`, calls it so. A rule of this receiver has the last word.
    pub(super) fn is_called(&self, name: GuestName) {
        self.named().by_guard = Some(name);
    }

    /// For the receiver after this one.
    pub(super) fn stored(&self) -> StoredGuest {
        StoredGuest {
            peer: self.peer.clone(),
            listener: self.listener.clone(),
            uuid: self.uuid(),
            name: self.operators_name(),
        }
    }

    /// Its host; none of a process of this one.
    fn host(&self) -> Option<IpAddr> {
        host_of(&self.peer)
    }

    /// Whether both are the same guest beyond doubt: of one host, and with one UUID, and not with two names of the operator's. A name alone
    /// proves nothing: one rule may name all guests of a network.
    pub(super) fn is_same_guest(&self, other: &Self) -> bool {
        let is_one_host = match (self.host(), other.host()) {
            (None, None) => self.listener.is_some() && self.listener == other.listener,
            (own, other) => own == other,
        };
        let names = (self.operators_name(), other.operators_name());
        is_one_host
            && self.uuid().is_some()
            && self.uuid() == other.uuid()
            && match names {
                (Some(one), Some(another)) => one == another,
                _ => true,
            }
    }

    /// Whether a rule of this receiver names it.
    pub(super) fn has_rule(&self) -> bool {
        self.named().by_rule.is_some()
    }

    /// Whether a rule of this receiver calls it so.
    pub(super) fn is_named_by_rule(&self, text: &str) -> bool {
        let named = self.named();
        named.by_rule.as_ref().is_some_and(|name| name.as_str() == text)
    }

    /// Whether an operator means it by this text: its name or its UUID.
    pub(super) fn is_meant_by(&self, text: &str) -> bool {
        let is_name = self.operators_name().is_some_and(|name| name.as_str() == text);
        let uuid: Option<GuestUuid> = text.parse().ok();
        is_name || uuid.is_some() && uuid == self.uuid()
    }
}

/// The host of a peer; none of a process of this one.
fn host_of(peer: &str) -> Option<IpAddr> {
    let peer: SocketAddr = peer.parse().ok()?;
    Some(peer.ip().to_canonical())
}

/// What connections say of a guest at its session's beginning.
pub(super) struct Arrived<'a> {
    pub(super) session: u32,
    pub(super) peer: String,
    /// As it was given, and with its real port.
    pub(super) listeners: [&'a ListenAddress; 2],
    pub(super) origin: Origin,
    pub(super) uuid: Option<[u8; 16]>,
}

/// All guests of a receiver, and the operator's rules for them.
#[derive(Debug, Default)]
pub(super) struct Guests {
    rules: RwLock<GuestRules>,
    /// By their sessions' numbers. Those that are gone go when another begins.
    known: Mutex<BTreeMap<u32, Weak<GuestIdentity>>>,
}

impl Guests {
    pub(super) fn new(rules: GuestRules) -> Self {
        Self {
            rules: RwLock::new(rules),
            known: Mutex::default(),
        }
    }

    fn rules(&self) -> RwLockReadGuard<'_, GuestRules> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other rules, for sessions that begin from now on. One that runs keeps its name.
    pub(super) fn set_rules(&self, rules: GuestRules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// Whether connections with these marks may have this identity.
    ///
    /// # Errors
    /// If they are of a guest whose rule names others.
    pub(super) fn check_arrival(&self, marks: &Marks<'_>, who: &Who) -> Result<(), NotAllowed> {
        self.rules().check_identity(marks, who.as_deref())
    }

    /// The same of a session, all of whose marks are known.
    ///
    /// # Errors
    /// As of [`Self::check_arrival`].
    pub(super) fn check_identity(&self, identity: &GuestIdentity, who: &Who) -> Result<(), NotAllowed> {
        identity
            .with_marks(|marks| self.rules().check_identity(&marks, who.as_deref()))
            .unwrap_or(Ok(()))
    }

    /// Whether a peer may call its guest so.
    ///
    /// # Errors
    /// If a rule of that name names other identities.
    pub(super) fn check_claim(&self, name: &GuestName, who: &Who) -> Result<(), NotAllowed> {
        self.rules().check_claim(name, who.as_deref())
    }

    /// How long this guest may send nothing in its first copy, where that is not as for all.
    pub(super) fn precopy_deadline(&self, identity: &GuestIdentity) -> Option<Duration> {
        let deadline = |rule: &GuestRule| rule.precopy_deadline;
        identity.with_marks(|marks| self.rules().rule(&marks).and_then(deadline))?
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<GuestIdentity>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session has arrived.
    pub(super) fn arrived(&self, arrived: Arrived<'_>) -> Arc<GuestIdentity> {
        let [_, listener] = arrived.listeners;
        let identity = Arc::new(GuestIdentity {
            session: arrived.session,
            peer: arrived.peer,
            listener: Some(listener.to_string()),
            marks: Some((arrived.listeners.map(Clone::clone), arrived.origin)),
            uuid: OnceLock::new(),
            named: Mutex::default(),
        });
        if let Some(uuid) = arrived.uuid.and_then(GuestUuid::new) {
            identity.has_uuid(uuid);
        }
        self.add(&identity);
        identity
    }

    /// A session is known from now on.
    pub(super) fn add(&self, identity: &Arc<GuestIdentity>) {
        self.name_by_rule(identity);
        let mut known = self.known();
        known.retain(|_, identity| identity.strong_count() > 0);
        known.insert(identity.session, Arc::downgrade(identity));
    }

    /// A guest's UUID, if it is one, is known: another rule may match now.
    pub(super) fn has_uuid(&self, identity: &GuestIdentity, uuid: Option<[u8; 16]>) {
        if let Some(uuid) = uuid.and_then(GuestUuid::new) {
            identity.has_uuid(uuid);
        }
        self.name_by_rule(identity);
    }

    fn name_by_rule(&self, identity: &GuestIdentity) {
        let name = |marks: Marks<'_>| self.rules().rule(&marks).map(|rule| rule.name.name.clone());
        if let Some(name) = identity.with_marks(name) {
            identity.named().by_rule = name;
        }
    }

    /// How messages call a session.
    pub(super) fn title(&self, session: u32) -> SessionTitle {
        let identity = self.known().get(&session).and_then(Weak::upgrade);
        identity.map_or_else(|| session.into(), |identity| identity.title())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::receiver::names::NameRule;

    const UUID: [u8; 16] = [7; 16];

    fn guests(rules: &[&str]) -> Guests {
        let rules = rules
            .iter()
            .map(|rule| rule.parse::<NameRule>().unwrap().into())
            .collect();
        Guests::new(GuestRules::new(rules, &[]).unwrap())
    }

    fn arrive(guests: &Guests, session: u32, host: &str, uuid: Option<[u8; 16]>) -> Arc<GuestIdentity> {
        let listener = "tcp:0.0.0.0:4444".parse().unwrap();
        guests.arrived(Arrived {
            session,
            peer: format!("{host}:5000"),
            listeners: [&listener, &listener],
            origin: Origin::Host(host.parse().unwrap()),
            uuid,
        })
    }

    #[test]
    fn a_rule_is_before_the_guard_and_the_guard_before_the_uuid() {
        let guests = guests(&["web3,peer=192.0.2.7"]);
        let shown = |guest: &GuestIdentity| (guest.title().to_string(), guest.name().map(String::from));
        let one = arrive(&guests, 1, "192.0.2.7", None);
        one.is_called("other".parse().unwrap());
        assert_eq!(shown(&one), ("1 (web3)".to_owned(), Some("web3".to_owned())));
        let two = arrive(&guests, 2, "192.0.2.8", Some(UUID));
        let uuid = "07070707-0707-0707-0707-070707070707";
        assert_eq!(shown(&two), ("2".to_owned(), Some(uuid.to_owned())));
        two.is_called("db".parse().unwrap());
        assert_eq!(shown(&two), ("2 (db)".to_owned(), Some("db".to_owned())));
        assert!(one.has_rule() && !two.has_rule());
        assert!(two.is_meant_by("db") && two.is_meant_by(uuid) && !two.is_meant_by("2"));
        let three = arrive(&guests, 3, "192.0.2.8", Some([0; 16]));
        assert_eq!(shown(&three), ("3".to_owned(), None));
        assert_eq!(guests.title(2).to_string(), "2 (db)");
        drop(two);
        assert_eq!(guests.title(2).to_string(), "2");
    }

    #[test]
    fn a_uuid_that_comes_late_finds_its_rule() {
        let guests = guests(&["web3,uuid=07070707-0707-0707-0707-070707070707"]);
        let guest = arrive(&guests, 1, "192.0.2.7", None);
        assert_eq!(guest.name(), None);
        guests.has_uuid(&guest, Some(UUID));
        assert_eq!(guest.title().to_string(), "1 (web3)");
    }

    #[test]
    fn rules_name_recovered_guests_and_a_claimed_name_is_told_from_theirs() {
        let guests = guests(&["web3,peer=192.0.2.7"]);
        let stored = |host: &str| StoredGuest {
            peer: format!("{host}:5000"),
            listener: Some("tcp:0.0.0.0:4444".to_owned()),
            uuid: None,
            name: Some("web3".parse().unwrap()),
        };
        let own = Arc::new(GuestIdentity::recovered(1, stored("192.0.2.7")));
        let strange = Arc::new(GuestIdentity::recovered(2, stored("192.0.2.8")));
        guests.add(&own);
        guests.add(&strange);
        assert!(own.is_meant_by("web3") && strange.is_meant_by("web3"));
        assert!(own.is_named_by_rule("web3") && !strange.is_named_by_rule("web3"));
    }

    #[test]
    fn only_a_guest_that_is_the_same_beyond_doubt_is() {
        let guests = guests(&[]);
        let guest = |session, host: &str, uuid, name: Option<&str>| {
            let guest = arrive(&guests, session, host, uuid);
            name.into_iter()
                .for_each(|name| guest.is_called(name.parse().unwrap()));
            guest
        };
        let known = guest(1, "192.0.2.7", Some(UUID), None);
        assert!(known.is_same_guest(&guest(2, "192.0.2.7", Some(UUID), Some("web3"))));
        assert!(!known.is_same_guest(&guest(2, "192.0.2.8", Some(UUID), None)));
        assert!(!known.is_same_guest(&guest(2, "192.0.2.7", Some([8; 16]), None)));
        assert!(!known.is_same_guest(&guest(2, "192.0.2.7", None, None)));
        let nameless = guest(1, "192.0.2.7", None, None);
        assert!(!nameless.is_same_guest(&guest(2, "192.0.2.7", None, None)));
        let web = guest(1, "192.0.2.7", Some(UUID), Some("web3"));
        assert!(!web.is_same_guest(&guest(2, "192.0.2.7", None, Some("web3"))));
        let of_rule = |session| guest(session, "192.0.2.7", None, Some("lab"));
        assert!(!of_rule(1).is_same_guest(&of_rule(2)));
        // Two machines with one disk image, and one UUID.
        assert!(!web.is_same_guest(&guest(2, "192.0.2.7", Some(UUID), Some("web4"))));
        // What was recovered, over TCP and over a UNIX socket.
        let stored = web.stored();
        let recovered = GuestIdentity::recovered(9, stored.clone());
        assert!(recovered.is_same_guest(&web) && recovered.name() == web.name());
        let process = |number: u32, listener: Option<&str>| {
            let stored = StoredGuest {
                peer: format!("unix:/run/web3, process {number}"),
                listener: listener.map(str::to_owned),
                ..stored.clone()
            };
            GuestIdentity::recovered(number, stored)
        };
        let local = process(1, Some("unix:/run/web3"));
        assert!(local.is_same_guest(&process(2, Some("unix:/run/web3"))));
        assert!(!local.is_same_guest(&process(2, Some("unix:/run/web4"))));
        assert!(!process(1, None).is_same_guest(&process(2, None)));
    }
}
