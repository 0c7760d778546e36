//! A guest whose rule names identities has no other: none of its sessions, channels and guards.

use crate::Running;
use colo_ring::link::{Hello, LINK_VERSION, PREFACE, ToReceiver, Wanted};
use colo_ring::receiver::{GuestRule, GuestRules, NameRule, ReceiverOptions};
use colo_ring::ring::BackendKind;
use colo_ring::tls::Allowed;
use colo_ring::units::ChannelId;
use colo_ring::wire::multifd::Init;
use colo_ring_tests::hostile::{HostilePrimary, header};
use colo_ring_tests::tls::{Authority, Client, address, options};
use colo_ring_tools::primary::{SynthOptions, SynthPrimary, Version};
use std::time::Duration;

const OWN: &str = "CN=primary,O=colo-ring laboratory";
const UUID: [u8; 16] = [7; 16];
const REFUSED: &str = "CN=other,O=colo-ring laboratory is not allowed for the guest web3";

/// A CA that has signed `primary`, which may be web3, and `other`.
fn authority() -> Authority {
    let authority = Authority::new();
    authority.make(&["primary", "other"]);
    authority
}

/// Where web3 is recognised by this, and has the identity of `primary`.
fn receiver(authority: &Authority, channels: u8, condition: &str) -> Running {
    let name: NameRule = format!("web3,{condition}").parse().expect("a rule");
    let rule = GuestRule {
        allowed: Allowed::new(vec![OWN.to_owned()]),
        ..name.into()
    };
    Running::start(ReceiverOptions {
        guests: GuestRules::new(vec![rule], &[]).expect("a rule"),
        ..options(BackendKind::Uring, channels, authority.credentials(true, &[]))
    })
}

const BY_UUID: &str = "uuid=07070707-0707-0707-0707-070707070707";

fn guest(uuid: [u8; 16]) -> SynthOptions {
    SynthOptions {
        ram_bytes: 4 << 20,
        channels: 2,
        uuid,
        ..SynthOptions::new(Version::V11_1)
    }
}

#[test]
fn a_session_with_another_identity_does_not_begin() {
    let authority = authority();
    let mut running = receiver(&authority, 2, BY_UUID);
    let [own, other] = ["primary", "other"].map(|name| authority.front(name, address(&running.receiver)));
    let refused = SynthOptions {
        // Its main channel would wait for the channels that are refused.
        patience: Duration::from_secs(2),
        ..guest(UUID)
    };
    assert!(SynthPrimary::connect(other.address(), &refused).is_err());
    running.warned(REFUSED);
    assert!(running.status().sessions.is_empty());
    let mut primary = SynthPrimary::connect(own.address(), &guest(UUID)).expect("a session");
    primary.checkpoint().expect("a checkpoint");
    // Another guest has the rule's identities as well as any.
    let mut another = SynthPrimary::connect(other.address(), &guest([8; 16])).expect("a session");
    another.checkpoint().expect("a checkpoint");
    let status = running.status();
    let names: Vec<_> = status
        .sessions
        .iter()
        .map(|session| session.guest.as_deref())
        .collect();
    assert_eq!(
        names,
        [Some("web3"), Some("08080808-0808-0808-0808-080808080808")]
    );
    running.stop();
}

#[test]
fn a_listener_and_a_host_are_as_good_as_a_uuid() {
    let authority = authority();
    let mut running = receiver(&authority, 0, "peer=127.0.0.1");
    let [own, other] = ["primary", "other"].map(|name| authority.front(name, address(&running.receiver)));
    let to = other.socket_address().expect("TCP");
    let mut refused = HostilePrimary::connect(to, 0);
    refused.main.send(&header());
    running.warned(REFUSED);
    assert!(refused.main.is_closed());
    let _primary = HostilePrimary::protected(own.socket_address().expect("TCP"), 0);
    running.began();
    running.stop();
}

/// It is refused alone: what the guest's own channels are is not in doubt.
#[test]
fn a_channel_with_another_identity_is_refused_alone() {
    let authority = authority();
    let mut running = receiver(&authority, 2, BY_UUID);
    let to = address(&running.receiver);
    let connect = |name: &str, bytes: &[u8]| {
        let mut client = Client::connect(to, authority.client(name));
        client.shake().expect("a handshake");
        client.send(bytes);
        client
    };
    let init = |id: u8| {
        let channel = ChannelId(id);
        Init { uuid: UUID, channel }.encode().to_vec()
    };
    let _main = connect("primary", &header());
    let _first = connect("primary", &init(0));
    let mut other = connect("other", &init(1));
    running.warned(REFUSED);
    other.end();
    let _second = connect("primary", &init(1));
    running.began();
    running.stop();
}

/// In plain mode the guest's UUID comes with the stream. Nothing was committed before.
#[test]
fn a_uuid_that_comes_with_the_stream_is_checked_before_the_first_commit() {
    let authority = authority();
    let mut running = receiver(&authority, 0, BY_UUID);
    for (name, may) in [("other", false), ("primary", true)] {
        let through = authority.front(name, address(&running.receiver));
        let mut primary = HostilePrimary::connect(through.socket_address().expect("TCP"), 0);
        let mut parts = primary.precopy_parts();
        let uuid = [&[5, 18], &b"configuration/uuid"[..], &[0, 0, 0, 1], &UUID].concat();
        assert_eq!(parts[0].1, header());
        parts[0].1.extend(uuid);
        for (_, bytes) in parts {
            primary.main.send(&bytes);
        }
        let session = running.began();
        if may {
            primary
                .main
                .expect(&colo_ring_tests::hostile::answers_to_precopy());
            primary.checkpoint(&[(0, 5, 0x55)]);
            let status = running.status();
            let status = status.sessions.iter().find(|status| status.session == session);
            assert_eq!(status.expect("it runs").guest.as_deref(), Some("web3"));
        } else {
            let end = running.ended();
            assert!(
                end.end.as_deref().is_some_and(|end| end.contains(REFUSED)),
                "{:?}",
                end.end
            );
            assert_eq!(end.checkpoint, None);
            // Nothing of it is kept.
            assert!(running.status().sessions.is_empty());
        }
    }
    running.stop();
}

#[test]
fn a_guard_with_another_identity_does_not_take_the_name() {
    let authority = authority();
    let mut running = receiver(&authority, 2, BY_UUID);
    let hello = ToReceiver::Hello(Hello {
        version: LINK_VERSION,
        name: "web3".to_owned(),
        uuid: None,
        timeout_ms: 1000,
        wants: Wanted::Next,
    });
    let line = serde_json::to_string(&hello).expect("JSON") + "\n";
    let mut guard = Client::connect(address(&running.receiver), authority.client("other"));
    guard.shake().expect("a handshake");
    guard.send(&[&PREFACE[..], line.as_bytes()].concat());
    let said = running.warned(REFUSED);
    assert!(said.starts_with("the guard of web3 at "), "{said}");
    guard.end();
    running.stop();
}
