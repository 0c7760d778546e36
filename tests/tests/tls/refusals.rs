//! Who may not connect, and handshakes that come to nothing.

use crate::Running;
use colo_ring::ring::BackendKind;
use colo_ring::units::ChannelId;
use colo_ring::wire::multifd::Init;
use colo_ring_tests::hostile::{HostilePrimary, Link, header};
use colo_ring_tests::tls::{Authority, Client, address, options};
use std::io::Write;
use std::time::{Duration, Instant};

fn init(id: u8) -> Vec<u8> {
    let channel = ChannelId(id);
    let uuid = [7; 16];
    Init { uuid, channel }.encode().to_vec()
}

#[test]
fn certificates_that_are_not_accepted() {
    let authority = Authority::new();
    authority.make(&["primary", "revoked"]);
    authority.make(&["--days", "0", "primary", "expired"]);
    authority.make(&["receiver", "server"]);
    authority.make(&["revoke", "revoked"]);
    let foreign = Authority::new();
    let allowed = [
        "CN=primary,O=colo-ring laboratory",
        "expired",
        "server",
        "revoked",
    ];
    authority.make(&["primary", "other"]);
    let mut running = Running::start(options(
        BackendKind::Uring,
        1,
        authority.credentials(true, &allowed),
    ));
    let to = address(&running.receiver);
    // Without one: a directory with the CA alone.
    std::fs::create_dir(authority.directory("none")).expect("a directory");
    let ca = authority.directory("ca").join("ca-cert.pem");
    let copy = |to: &str| std::fs::copy(&ca, authority.directory(to).join("ca-cert.pem")).expect("a copy");
    copy("none");
    // A CA that this receiver does not know, to a receiver that it knows.
    let stranger = foreign.directory("primary");
    std::fs::create_dir(authority.directory("foreign")).expect("a directory");
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(stranger.join(file), authority.directory("foreign").join(file)).expect("a copy");
    }
    copy("foreign");
    for (name, says) in [
        ("none", "it presented no certificate: give its tls-creds-x509"),
        ("expired", "its certificate is refused: it has expired"),
        ("revoked", "its certificate is refused: it is revoked"),
        (
            "foreign",
            "its certificate is refused: ca-cert.pem did not sign it",
        ),
        (
            "other",
            "its certificate is that of CN=other,O=colo-ring laboratory, which --tls-allow does not name",
        ),
    ] {
        let mut client = Client::connect(to, authority.client(name));
        // With TLS 1.3 the client is done before it knows.
        let shaken = client.shake();
        client.send(&header());
        running.warned(says);
        let told = client.end();
        println!("{name}: {shaken:?}, {told:?}");
        // Limits of lines are by origin: here all have one.
        let _ = told;
    }
    // That it is allowed by name.
    let mut primary = Client::connect(to, authority.client("primary"));
    primary.shake().expect("a handshake");
    primary.send(&init(0));
    let mut main = Client::connect(to, authority.client("primary"));
    main.shake().expect("a handshake");
    main.send(&header());
    running.began();
    running.stop();
}

#[test]
fn anyone_may_connect_where_the_operator_wants_it() {
    let authority = Authority::new();
    std::fs::create_dir(authority.directory("none")).expect("a directory");
    let ca = authority.directory("ca").join("ca-cert.pem");
    std::fs::copy(ca, authority.directory("none").join("ca-cert.pem")).expect("a copy");
    let mut running = Running::start(options(BackendKind::Uring, 1, authority.credentials(false, &[])));
    let through = authority.front("none", address(&running.receiver));
    let mut primary = HostilePrimary::protected(through.socket_address().expect("TCP"), 1);
    running.began();
    assert_eq!(running.status().sessions[0].identity, None);
    assert!(running.status().sessions[0].tls.is_some());
    primary.checkpoint(&[(0, 5, 0x55)]);
    running.stop();
}

#[test]
fn channels_of_one_session_with_two_identities() {
    let authority = Authority::new();
    authority.make(&["primary", "other"]);
    let mut running = Running::start(options(BackendKind::Uring, 2, authority.credentials(true, &[])));
    let to = address(&running.receiver);
    let connect = |name: &str, bytes: &[u8]| {
        let mut client = Client::connect(to, authority.client(name));
        client.shake().expect("a handshake");
        client.send(bytes);
        client
    };
    let mut main = connect("primary", &header());
    let mut first = connect("primary", &init(0));
    let mut second = connect("other", &init(1));
    let said = running.warned("all channels of a primary must have one identity");
    // In whatever order they were identified: one of them is named, with both identities.
    assert!(said.contains("CN=other") && said.contains("CN=primary"), "{said}");
    for client in [&mut main, &mut first, &mut second] {
        client.end();
    }
    // Then it may come again.
    let through = authority.front("primary", to);
    let _primary = HostilePrimary::protected(through.socket_address().expect("TCP"), 2);
    running.began();
    running.stop();
}

#[test]
fn plaintext_and_tls_where_the_other_is_expected() {
    let authority = Authority::new();
    let mut secured = Running::start(options(BackendKind::Uring, 2, authority.credentials(true, &[])));
    let to = address(&secured.receiver);
    for (first, says) in [
        (
            header(),
            "a main channel without TLS, and this receiver has --tls",
        ),
        (
            init(1),
            "multifd channel 1 without TLS, and this receiver has --tls",
        ),
        (
            colo_ring::link::PREFACE.to_vec(),
            "a guard's link without TLS, and this receiver has --tls",
        ),
        (b"HELO and more".to_vec(), "begins with \"HELO\""),
        (vec![22, 3, 1, 0xff, 0xff, 1, 1], "a TLS record of 65535 bytes"),
    ] {
        let mut plain = Link::connect(to);
        plain.send(&first);
        secured.warned(says);
        assert!(plain.is_closed(), "{says}");
    }
    secured.stop();
    let mut open = Running::start(colo_ring_tests::receiver_options(BackendKind::Uring, 2));
    let mut client = Client::connect(address(&open.receiver), authority.client("primary"));
    assert!(client.shake().is_err());
    open.warned("but TLS: start the receiver with --tls, or unset the parameter tls-creds");
    open.stop();
}

#[test]
fn handshakes_that_never_end() {
    let authority = Authority::new();
    let deadline = Duration::from_secs(2);
    let mut running = Running::start(colo_ring::receiver::ReceiverOptions {
        identify_deadline: deadline,
        ..options(BackendKind::Uring, 1, authority.credentials(true, &[]))
    });
    let to = address(&running.receiver);
    let says = format!("its TLS handshake, and what identifies it, did not come within {deadline:?}");
    // Silent; silent behind its first message; silent behind the handshake; and a byte now and then.
    let mut silent = Client::connect(to, authority.client("primary"));
    let mut half = Client::connect(to, authority.client("primary"));
    let hello = half.records(&[]);
    half.send_raw(&hello);
    let mut shaken = Client::connect(to, authority.client("primary"));
    shaken.shake().expect("a handshake");
    let mut slow = Client::connect(to, authority.client("primary"));
    let since = Instant::now();
    for byte in &slow.records(&[]) {
        if slow.socket.write_all(&[*byte]).is_err() || since.elapsed() > 4 * deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for client in [&mut silent, &mut half, &mut shaken, &mut slow] {
        running.warned(&says);
        client.end();
    }
    // Beside them a session begins.
    let through = authority.front("primary", to);
    let _primary = HostilePrimary::protected(through.socket_address().expect("TCP"), 1);
    running.began();
    running.stop();
}
