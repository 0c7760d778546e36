//! Which connections are those of a session's guest: by UUID, or by origin where that is unique.

use crate::disk::DiskError;
use crate::net::Origin;
use crate::receiver::uuid::{Uuid, format_uuid};

/// By what a guest is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) origin: Origin,
    /// None if the session's stream, or the client of a disk, has named none.
    pub(super) uuid: Option<Uuid>,
}

/// How a connection is known to be a session's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MatchedBy {
    Uuid,
    Origin,
}

impl Identity {
    /// How a connection with the identity `other` is known to be of the same guest, if it is.
    fn matches(self, other: Self) -> Option<MatchedBy> {
        match (self.uuid, other.uuid) {
            (Some(one), Some(two)) => (one == two).then_some(MatchedBy::Uuid),
            _ => (self.origin == other.origin).then_some(MatchedBy::Origin),
        }
    }
}

/// A connection that no session has taken.
#[derive(Clone, Debug)]
pub(super) struct Unclaimed {
    pub(super) name: String,
    pub(super) from: String,
    pub(super) identity: Identity,
}

impl Unclaimed {
    fn describe(&self) -> String {
        let uuid = self
            .identity
            .uuid
            .map_or_else(|| "without a UUID".to_owned(), |uuid| format_uuid(&uuid));
        format!("{} (from {}, {uuid})", self.name, self.from)
    }
}

const REMEDY: &str =
    "give each guest a -uuid, switch the capability validate-uuid on, and ask for exports as NAME@UUID";

/// The connections of a session: their positions, and by what they were found. If one of them has its UUID, those without one are
/// another guest's. `rivals` are the origins of the sessions that have not committed yet.
///
/// # Errors
/// If they could be another session's.
pub(super) fn find_own(
    all: &[Unclaimed],
    session: Identity,
    rivals: &[Origin],
) -> Result<(Vec<usize>, MatchedBy), DiskError> {
    let matched_by = |by: MatchedBy| -> Vec<usize> {
        let is_own = |connection: &Unclaimed| session.matches(connection.identity) == Some(by);
        (0..all.len())
            .filter(|position| is_own(&all[*position]))
            .collect()
    };
    let own = matched_by(MatchedBy::Uuid);
    if !own.is_empty() {
        return Ok((own, MatchedBy::Uuid));
    }
    let own = matched_by(MatchedBy::Origin);
    let Some(first) = own.first() else {
        return Ok((own, MatchedBy::Origin));
    };
    if rivals.contains(&session.origin) {
        return Err(DiskError::Ambiguous(format!(
            "disk {} could belong to another session that begins from the same host: {REMEDY}",
            all[*first].name
        )));
    }
    let mut uuids: Vec<Uuid> = own
        .iter()
        .filter_map(|position| all[*position].identity.uuid)
        .collect();
    uuids.sort_unstable();
    uuids.dedup();
    match uuids[..] {
        [] | [_] => Ok((own, MatchedBy::Origin)),
        _ => Err(DiskError::Ambiguous(format!(
            "disks of several guests are connected from the same host, and this session's stream has no UUID: {REMEDY}"
        ))),
    }
}

/// What an operator must know of an attribution that may be wrong: disks that were taken by the address of their host alone, and
/// connected ones that were not taken.
pub(super) fn doubts(
    session: u32,
    identity: Identity,
    all: &[Unclaimed],
    own: &[usize],
    by: MatchedBy,
) -> Vec<String> {
    let list = |connections: Vec<&Unclaimed>| -> Option<String> {
        let described: Vec<_> = connections.iter().map(|one| one.describe()).collect();
        (!described.is_empty()).then(|| described.join(", "))
    };
    let is_guess = by == MatchedBy::Origin && matches!(identity.origin, Origin::Host(_));
    let taken = own.iter().filter(|_| is_guess).map(|position| &all[*position]);
    let taken = list(taken.collect()).map(|taken| {
        format!(
            "session {session} took {taken} by its host's address alone, because the stream and the connection do not both carry a \
             UUID. That is right only while no other guest of that host without a UUID is protected: {REMEDY}"
        )
    });
    // Another UUID is another guest's, unless this one's disks are missing altogether.
    let is_others = |one: &Unclaimed| {
        !own.is_empty() && matches!((one.identity.uuid, identity.uuid), (Some(one), Some(own)) if one != own)
    };
    let left = (0..all.len()).filter(|position| !own.contains(position));
    let left = left.map(|position| &all[position]).filter(|one| !is_others(one));
    let left = list(left.collect()).map(|left| {
        format!(
            "session {session} did not take {left}. If that is a disk of its guest, its base runs ahead of the memory: end the protection, \
             and {REMEDY}"
        )
    });
    taken.into_iter().chain(left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    const A: Uuid = [1; 16];
    const B: Uuid = [2; 16];

    fn host(last: u8) -> Origin {
        Origin::Host(IpAddr::from([192, 0, 2, last]))
    }

    fn identity(origin: Origin, uuid: Option<Uuid>) -> Identity {
        Identity { origin, uuid }
    }

    fn disk(name: &str, origin: Origin, uuid: Option<Uuid>) -> Unclaimed {
        Unclaimed {
            name: name.to_owned(),
            from: "192.0.2.1:50000".to_owned(),
            identity: identity(origin, uuid),
        }
    }

    /// What is taken, by name, and the warnings.
    fn taken(all: &[Unclaimed], session: Identity) -> (Vec<&str>, Vec<String>) {
        let (own, by) = find_own(all, session, &[]).unwrap();
        let doubts = doubts(7, session, all, &own, by);
        (own.iter().map(|at| all[*at].name.as_str()).collect(), doubts)
    }

    #[test]
    fn a_guest_with_a_uuid_takes_no_disk_without_one_of_its_host() {
        let all = [disk("a", host(1), Some(A)), disk("b", host(1), None)];
        let (names, doubts) = taken(&all, identity(host(1), Some(A)));
        assert_eq!(names, ["a"]);
        // It could be the same guest's all the same.
        assert!(
            doubts.len() == 1
                && doubts[0].starts_with("session 7 did not take b (from 192.0.2.1:50000, without a UUID)"),
            "{doubts:?}"
        );
        // Also if the session's other disks come from elsewhere.
        let all = [disk("a", host(2), Some(A)), disk("b", host(1), None)];
        assert_eq!(taken(&all, identity(host(1), Some(A))).0, ["a"]);
    }

    #[test]
    fn disks_taken_by_the_address_alone_are_reported() {
        let all = [disk("a", host(1), None), disk("b", host(1), None)];
        let (names, doubts) = taken(&all, identity(host(1), None));
        assert_eq!(names, ["a", "b"]);
        assert!(
            doubts.len() == 1 && doubts[0].contains("took a (from") && doubts[0].contains("b (from"),
            "{doubts:?}"
        );
        // A process on a UNIX socket is one guest.
        let process = Origin::Process(41);
        let all = [disk("a", process, None)];
        let (names, doubts) = taken(&all, identity(process, None));
        assert_eq!((names, doubts), (vec!["a"], Vec::new()));
    }

    #[test]
    fn disks_that_are_not_taken_are_reported() {
        let uuid = Some(A);
        let behind_a_proxy = [disk("a", host(9), None)];
        let (names, doubts) = taken(&behind_a_proxy, identity(host(1), None));
        assert!(
            names.is_empty() && doubts[0].contains("did not take a"),
            "{doubts:?}"
        );
        // Another guest's, which says so.
        let all = [disk("a", host(1), uuid), disk("b", host(1), Some(B))];
        assert_eq!(taken(&all, identity(host(1), uuid)), (vec!["a"], Vec::new()));
        // Unless none is this guest's.
        assert_eq!(taken(&all[1..], identity(host(1), uuid)).1.len(), 1);
    }

    #[test]
    fn what_could_be_several_guests_is_refused() {
        let all = [disk("a", host(1), None)];
        let session = identity(host(1), None);
        assert!(find_own(&all, session, &[host(1)]).is_err());
        assert!(find_own(&all, session, &[host(2)]).is_ok());
        let all = [disk("a", host(1), Some(A)), disk("b", host(1), Some(B))];
        assert!(find_own(&all, session, &[]).is_err());
        // By UUID it does not matter who else begins.
        assert!(find_own(&all, identity(host(1), Some(A)), &[host(1)]).is_ok());
    }
}
