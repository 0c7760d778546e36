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
        self.assembler.identified(arrival, PEER, identity, name, self.now)
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
            .identified(arrival, other, channel(1, 0), "c0", now)
            .is_empty()
    );
    assert_eq!(bench.assembler.pending(), 3);
}

#[test]
fn bad_channels_cost_themselves_alone() {
    let mut bench = Bench::new(2);
    bench.come(Identity::Main, "main");
    bench.come(channel(1, 0), "c0");
    assert_eq!(
        refused(&bench.come(channel(1, 0), "again")).1,
        Refusal::Twice(ChannelId(0))
    );
    let (connections, refusal) = refused(&bench.come(channel(1, 2), "high"));
    assert_eq!(
        (connections, refusal.to_string().contains("0 to 1")),
        (vec!["high"], true)
    );
    assert_eq!(complete(&bench.come(channel(1, 1), "c1")), ["main", "c0", "c1"]);
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
        bench.assembler.in_the_way(late, allowed).is_empty(),
        "nothing waits"
    );
    assert!(bench.come(channel(1, 0), "c0").is_empty());
    let _behind = bench.assembler.accepted(PEER, start);
    let other = Peer {
        listener: 1,
        origin: HOST,
    };
    let _elsewhere = bench.assembler.accepted(other, start);
    assert!(bench.assembler.in_the_way(start + allowed, allowed).is_empty());
    assert_eq!(bench.assembler.in_the_way(late, allowed), [first]);
    assert_eq!(bench.assembler.oldest_silent(|_| true), Some(first));
    assert_eq!(complete(&bench.assembler.given_up(first)), ["main", "c0"]);
    assert_eq!(bench.assembler.pending_of(HOST), 2);
}
