use super::*;
use crate::net::Origin;
use std::net::IpAddr;

const HOST: Origin = Origin::Host(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
const PEER: Peer = Peer {
    listener: 0,
    origin: HOST,
};

struct Bench {
    assembler: Assembler<&'static str>,
    now: Instant,
}

impl Bench {
    fn new(channels: u8) -> Self {
        Self {
            assembler: Assembler::new(channels, Duration::from_secs(10)),
            now: Instant::now(),
        }
    }

    fn say(
        &mut self,
        arrival: Arrival,
        identity: Identity,
        name: &'static str,
    ) -> Vec<Assembly<&'static str>> {
        self.assembler
            .identified(arrival, (PEER, None), identity, name, self.now)
    }

    fn come(&mut self, identity: Identity, name: &'static str) -> Vec<Assembly<&'static str>> {
        let arrival = self.assembler.accepted(PEER, Instant::now());
        self.say(arrival, identity, name)
    }
}

fn channel(uuid: u8, id: u8) -> Identity {
    Identity::Multifd(Init {
        uuid: [uuid; 16],
        channel: ChannelId(id),
    })
}

fn complete(outcomes: &[Assembly<&'static str>]) -> Vec<&'static str> {
    match outcomes {
        [Assembly::Complete(complete)] => [&[complete.main], &complete.channels[..]].concat(),
        other => panic!("{other:?}"),
    }
}

fn refused(outcomes: &[Assembly<&'static str>]) -> (Vec<&'static str>, Refusal) {
    match outcomes {
        [Assembly::Refused(connections, refusal)] => (connections.clone(), refusal.clone()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_order_of_arrival_makes_the_session() {
    let parts = [
        (Identity::Main, "main"),
        (channel(7, 0), "c0"),
        (channel(7, 1), "c1"),
    ];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut bench = Bench::new(2);
        assert!(bench.come(parts[order[0]].0, parts[order[0]].1).is_empty());
        assert!(bench.come(parts[order[1]].0, parts[order[1]].1).is_empty());
        let outcomes = bench.come(parts[order[2]].0, parts[order[2]].1);
        assert_eq!(complete(&outcomes), ["main", "c0", "c1"], "{order:?}");
        assert_eq!(bench.assembler.pending(), 0);
    }
}

#[test]
fn a_primary_that_died_while_it_connected_is_not_in_its_own_way() {
    let mut bench = Bench::new(1);
    bench.come(Identity::Main, "main");
    let (connections, refusal) = refused(&bench.assembler.expel(|name| *name == "main"));
    assert_eq!((connections, refusal), (vec!["main"], Refusal::Gone));
    bench.come(Identity::Main, "again");
    assert!(bench.assembler.expel(|name| *name == "main").is_empty());
    assert_eq!(complete(&bench.come(channel(7, 0), "c0")), ["again", "c0"]);
}

#[test]
fn plain_mode_needs_the_main_channel_alone() {
    let mut bench = Bench::new(0);
    assert_eq!(complete(&bench.come(Identity::Main, "main")), ["main"]);
    assert_eq!(
        refused(&bench.come(channel(0, 0), "c0")),
        (vec!["c0"], Refusal::Plain)
    );
}

#[test]
fn a_channel_waits_for_an_older_silent_connection() {
    let mut bench = Bench::new(1);
    // Two primaries: the first main channel has spoken, the second has not when its channel does.
    bench.come(Identity::Main, "main a");
    let main_b = bench.assembler.accepted(PEER, Instant::now());
    assert!(bench.come(channel(2, 0), "b0").is_empty());
    // Now both main channels are there and one channel: it could belong to either.
    let (connections, refusal) = refused(&bench.say(main_b, Identity::Main, "main b"));
    assert_eq!(refusal, Refusal::Ambiguous);
    assert_eq!(connections.len(), 3);
}

#[test]
fn a_silent_stranger_only_delays() {
    let mut bench = Bench::new(1);
    let stranger = bench.assembler.accepted(PEER, Instant::now());
    bench.come(Identity::Main, "main");
    assert!(bench.come(channel(1, 0), "c0").is_empty());
    assert_eq!(complete(&bench.assembler.given_up(stranger)), ["main", "c0"]);
}

#[test]
fn primaries_one_after_the_other_do_not_mix() {
    let mut bench = Bench::new(1);
    bench.come(Identity::Main, "main a");
    assert_eq!(complete(&bench.come(channel(1, 0), "a0")), ["main a", "a0"]);
    bench.come(Identity::Main, "main b");
    assert_eq!(complete(&bench.come(channel(2, 0), "b0")), ["main b", "b0"]);
}

#[test]
fn other_hosts_and_listeners_are_other_sessions() {
    let mut bench = Bench::new(1);
    bench.come(Identity::Main, "main a");
    let other = Peer {
        listener: 1,
        origin: HOST,
    };
    let arrival = bench.assembler.accepted(other, Instant::now());
    let now = bench.now;
    assert!(
        bench
            .assembler
            .identified(arrival, (other, None), channel(1, 0), "c0", now)
            .is_empty()
    );
    assert_eq!(bench.assembler.pending(), 2);
}

/// One of them is a stranger's, and nothing says which.
#[test]
fn a_channel_that_comes_twice_costs_its_set() {
    let mut bench = Bench::new(2);
    bench.come(Identity::Main, "main");
    bench.come(channel(1, 0), "stranger");
    let (connections, refusal) = refused(&bench.come(channel(1, 0), "c0"));
    assert_eq!(
        (connections, refusal),
        (vec!["main", "stranger", "c0"], Refusal::Twice(ChannelId(0)))
    );
    assert_eq!(bench.assembler.pending(), 0);
    // What comes later of the same set does not wait: the primary's writes to it would.
    assert_eq!(
        refused(&bench.come(channel(1, 1), "c1")),
        (vec!["c1"], Refusal::Twice(ChannelId(0)))
    );
    // Another guest's may come before its main channel.
    assert!(bench.come(channel(2, 0), "other").is_empty());
    bench.assembler.expel(|name| *name == "other");
    // The primary connects again.
    bench.come(Identity::Main, "main again");
    bench.come(channel(1, 0), "c0 again");
    assert_eq!(
        complete(&bench.come(channel(1, 1), "c1 again")),
        ["main again", "c0 again", "c1 again"]
    );
}

/// A session with the others would lack that channel's pages.
#[test]
fn a_channel_too_many_costs_its_set() {
    for order in [[0, 1, 2], [0, 2, 1], [2, 0, 1]] {
        let mut bench = Bench::new(1);
        let main = bench.assembler.accepted(PEER, bench.now);
        let parts = [
            (Identity::Main, "main"),
            (channel(1, 0), "c0"),
            (channel(1, 1), "high"),
        ];
        let mut outcomes = Vec::new();
        for (identity, name) in order.map(|part| parts[part]) {
            outcomes.append(&mut match identity {
                Identity::Main => bench.say(main, identity, name),
                Identity::Multifd(_) => bench.come(identity, name),
            });
            // The main channel alone is no session, and neither is it with what came before.
            if outcomes
                .iter()
                .any(|outcome| matches!(outcome, Assembly::Complete(_)))
            {
                break;
            }
        }
        let [Assembly::Refused(connections, refusal), later @ ..] = &outcomes[..] else {
            // Then the session began before the channel came, which contradicts it.
            assert_eq!((complete(&outcomes), order), (vec!["main", "c0"], [0, 1, 2]));
            continue;
        };
        assert!(
            connections.contains(&"main") && connections.contains(&"high"),
            "{order:?}"
        );
        assert!(refusal.to_string().contains("0 to 0"), "{refusal}");
        if !later.is_empty() {
            assert_eq!(refused(later).0, ["c0"]);
        }
        // For as long as a set may take.
        assert_eq!(refused(&bench.come(channel(1, 0), "late")).0, ["late"]);
        bench.now += Duration::from_secs(11);
        assert!(bench.assembler.expire(bench.now).is_empty());
        assert!(bench.come(channel(1, 0), "later").is_empty());
    }
}

/// What is left of a migration that was cancelled is in nobody's way, and costs the next one nothing.
#[test]
fn a_channel_that_is_gone_leaves_its_set() {
    let mut bench = Bench::new(2);
    bench.come(channel(8, 0), "late");
    bench.come(Identity::Main, "main");
    let (connections, refusal) = refused(&bench.assembler.expel(|name| *name == "late"));
    assert_eq!((connections, refusal), (vec!["late"], Refusal::Gone));
    bench.come(channel(1, 0), "c0");
    assert_eq!(complete(&bench.come(channel(1, 1), "c1")), ["main", "c0", "c1"]);
}

#[test]
fn what_a_session_waits_for_before_it_commits_is_known() {
    let mut bench = Bench::new(1);
    bench.come(Identity::Main, "main");
    bench.come(channel(0, 0), "c0");
    let silent = bench.assembler.accepted(PEER, bench.now);
    let asked = bench.assembler.next_arrival();
    let _later = bench.assembler.accepted(PEER, bench.now);
    let other = Peer {
        listener: 1,
        origin: HOST,
    };
    assert!(bench.assembler.has_unidentified(PEER, asked));
    assert!(!bench.assembler.has_unidentified(other, asked));
    let late = bench.now + Duration::from_secs(4);
    let awaited = |peer, arrival| peer == PEER && arrival < asked;
    let in_the_way = bench.assembler.in_the_way(late, Duration::from_secs(3), awaited);
    assert_eq!(in_the_way, [silent]);
    assert!(bench.assembler.may_be_of_next(PEER, asked));
    bench.assembler.given_up(silent);
    assert!(!bench.assembler.has_unidentified(PEER, asked));
    assert!(!bench.assembler.may_be_of_next(PEER, asked));
}

#[test]
fn incomplete_sessions_expire() {
    let mut bench = Bench::new(4);
    bench.come(Identity::Main, "main");
    bench.come(channel(1, 3), "c3");
    assert!(
        bench
            .assembler
            .expire(bench.now + Duration::from_secs(9))
            .is_empty()
    );
    let (connections, refusal) = refused(&bench.assembler.expire(bench.now + Duration::from_secs(11)));
    assert_eq!(connections, ["main", "c3"]);
    assert!(
        refusal
            .to_string()
            .starts_with("1 of 4 multifd channels and a main channel came within 10s")
    );
    assert_eq!(bench.assembler.pending(), 0);
}

/// Neither one that nothing waits for, nor one that came later, nor one of another origin.
#[test]
fn a_silent_connection_is_in_the_way_of_channels_behind_it() {
    let mut bench = Bench::new(1);
    let (start, allowed) = (bench.now, Duration::from_secs(3));
    let first = bench.assembler.accepted(PEER, start);
    bench.come(Identity::Main, "main");
    let late = start + Duration::from_secs(4);
    assert!(
        bench.assembler.in_the_way(late, allowed, |_, _| false).is_empty(),
        "nothing waits"
    );
    assert!(bench.come(channel(1, 0), "c0").is_empty());
    let _behind = bench.assembler.accepted(PEER, start);
    let other = Peer {
        listener: 1,
        origin: HOST,
    };
    let _elsewhere = bench.assembler.accepted(other, start);
    assert!(
        bench
            .assembler
            .in_the_way(start + allowed, allowed, |_, _| false)
            .is_empty()
    );
    assert_eq!(bench.assembler.in_the_way(late, allowed, |_, _| false), [first]);
    let oldest = bench.assembler.oldest_silent(|_| true);
    assert_eq!(oldest.map(|silent| silent.arrival), Some(first));
    assert_eq!(complete(&bench.assembler.given_up(first)), ["main", "c0"]);
    assert_eq!(bench.assembler.pending_of(HOST), 2);
}

/// A guest's connections are the oldest, and few: those of the flood go, and they are counted.
#[test]
fn of_silent_connections_the_oldest_of_the_most_crowded_origin_goes() {
    let peer = |host: u8| Peer {
        listener: 0,
        origin: Origin::Host(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, host))),
    };
    let mut bench = Bench::new(2);
    let _guests = [1; 2].map(|host| bench.assembler.accepted(peer(host), bench.now));
    let flood = [2; 3].map(|host| bench.assembler.accepted(peer(host), bench.now));
    let silent = bench.assembler.oldest_silent(|_| true).unwrap();
    assert_eq!((silent.arrival, silent.of_origin), (flood[0], 3));
    let is_guests = |origin: Origin| origin == peer(1).origin;
    assert_eq!(bench.assembler.oldest_silent(is_guests).unwrap().of_origin, 2);
    assert!(bench.assembler.oldest_silent(|_| false).is_none());
}

/// Two hosts hold all places with what is never complete: a third finds one, and what it has begun stays.
#[test]
fn the_oldest_of_the_most_crowded_origin_makes_room() {
    let peer = |host: u8| Peer {
        listener: 0,
        origin: Origin::Host(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, host))),
    };
    let mut bench = Bench::new(2);
    let mut come = |host: u8, identity, name, seconds: u64| {
        let arrival = bench.assembler.accepted(peer(host), bench.now);
        let at = bench.now + Duration::from_secs(seconds);
        let outcomes = bench
            .assembler
            .identified(arrival, (peer(host), None), identity, name, at);
        assert!(outcomes.is_empty(), "{outcomes:?}");
    };
    // The guest's are the oldest.
    come(3, Identity::Main, "guest's main", 0);
    come(3, channel(9, 0), "guest's channel", 0);
    for (uuid, name) in [(1, "first"), (2, "second"), (3, "third"), (4, "fourth")] {
        come(1, channel(uuid, 0), name, u64::from(uuid));
    }
    come(2, channel(5, 0), "other", 1);
    come(2, channel(5, 1), "other's second", 9);
    let evicted = |bench: &mut Bench| match bench.assembler.evict(0, |_| true) {
        Some(Assembly::Refused(connections, Refusal::Crowded)) => connections,
        other => panic!("{other:?}"),
    };
    assert_eq!(evicted(&mut bench), ["first"]);
    // What follows of it finds no set.
    let outcomes = {
        let arrival = bench.assembler.accepted(peer(1), bench.now);
        bench
            .assembler
            .identified(arrival, (peer(1), None), channel(1, 1), "late", bench.now)
    };
    assert_eq!(refused(&outcomes), (vec!["late"], Refusal::Crowded));
    // As many as a session has are no crowd.
    assert!(bench.assembler.evict(3, |_| true).is_none());
    // Of one origin alone, whatever others have.
    let of_second = |origin: Origin| origin == peer(2).origin;
    let Some(Assembly::Refused(connections, _)) = bench.assembler.evict(0, of_second) else {
        panic!("it has two");
    };
    assert_eq!(connections, ["other", "other's second"]);
    assert!(bench.assembler.evict(0, of_second).is_none());
    assert_eq!(evicted(&mut bench), ["second"]);
    assert_eq!(bench.assembler.pending(), 4);
}

/// An identity with this name.
fn who(name: &str) -> Who {
    Some(Arc::new(tls::Identity::named(name)))
}

impl Bench {
    fn come_as(
        &mut self,
        name: &str,
        identity: Identity,
        connection: &'static str,
    ) -> Vec<Assembly<&'static str>> {
        let arrival = self.assembler.accepted(PEER, Instant::now());
        self.assembler
            .identified(arrival, (PEER, who(name)), identity, connection, self.now)
    }
}

#[test]
fn all_channels_of_a_session_have_one_identity() {
    let mut bench = Bench::new(2);
    assert!(bench.come_as("a", Identity::Main, "main").is_empty());
    assert!(bench.come_as("a", channel(1, 0), "c0").is_empty());
    let (connections, refusal) = refused(&bench.come_as("b", channel(1, 1), "other"));
    assert_eq!(connections, ["main", "c0", "other"]);
    let text = refusal.to_string();
    assert!(text.contains("channel 1 has the certificate of CN=b"), "{text}");
    assert!(text.contains("that of CN=a"), "{text}");
    // The rest of the set is refused for the same reason, and the primary may try again.
    assert_eq!(refused(&bench.come_as("a", channel(1, 1), "late")).1, refusal);
    assert!(bench.come_as("a", Identity::Main, "main").is_empty());
    assert!(bench.come_as("a", channel(1, 0), "c0").is_empty());
    assert_eq!(
        complete(&bench.come_as("a", channel(1, 1), "c1")),
        ["main", "c0", "c1"]
    );
}

#[test]
fn a_main_channel_of_another_identity_than_its_channels_is_refused_with_them() {
    let mut bench = Bench::new(1);
    assert!(bench.come_as("a", channel(1, 0), "c0").is_empty());
    let (connections, refusal) = refused(&bench.come_as("b", Identity::Main, "main"));
    assert_eq!(connections, ["c0", "main"]);
    assert!(matches!(refusal, Refusal::OtherIdentity { .. }));
}

#[test]
fn identities_tell_two_primaries_of_one_host_apart() {
    let mut bench = Bench::new(1);
    assert!(bench.come_as("a", Identity::Main, "main-a").is_empty());
    assert!(bench.come_as("b", Identity::Main, "main-b").is_empty());
    assert_eq!(
        complete(&bench.come_as("b", channel(0, 0), "b0")),
        ["main-b", "b0"]
    );
    assert_eq!(
        complete(&bench.come_as("a", channel(0, 0), "a0")),
        ["main-a", "a0"]
    );
}
