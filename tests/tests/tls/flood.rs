//! Very many handshakes at once.

use crate::Running;
use colo_ring::ring::BackendKind;
use colo_ring_tests::tls::{Authority, Client, address, options};
use colo_ring_tools::primary::{Distribution, SynthOptions, SynthPrimary, Version};
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

/// More than there are places for connections that have not said what they are.
const HANDSHAKES: usize = 1100;

#[test]
fn a_protected_guest_goes_on_beside_very_many_handshakes() {
    let authority = Authority::new();
    let mut running = Running::start(options(BackendKind::Uring, 2, authority.credentials(true, &[])));
    let to = address(&running.receiver);
    let through = authority.front("primary", to);
    let shape = SynthOptions {
        ram_bytes: 2 << 20,
        channels: 2,
        dirty_pages: Distribution::Fixed(40),
        interval: Duration::ZERO,
        ..SynthOptions::new(Version::V11_1)
    };
    let mut guest = SynthPrimary::connect(through.address(), &shape).expect("a session");
    running.began();
    let config = authority.client("primary");
    let hello = Client::connect(to, config.clone()).records(&[]);
    // Those that stand still behind their first message, and those that go on.
    let mut standing = Vec::new();
    let whole = std::thread::scope(|scope| {
        let whole = scope.spawn(|| {
            (0..HANDSHAKES / 10)
                .filter(|_| Client::connect(to, config.clone()).shake().is_ok())
                .count()
        });
        for _ in 0..HANDSHAKES {
            let mut socket = TcpStream::connect(to).expect("the receiver listens");
            // It may have made room already.
            let _ = socket.write_all(&hello);
            standing.push(socket);
            if standing.len() % 100 == 0 {
                guest.checkpoint().expect("a session beside it goes on");
                running.status();
            }
        }
        whole.join().expect("a client")
    });
    println!(
        "{whole} of {} whole handshakes beside {HANDSHAKES} that stand still",
        HANDSHAKES / 10
    );
    assert!(whole > 0);
    guest.checkpoint().expect("a session beside it goes on");
    drop(standing);
    guest.checkpoint().expect("a session beside it goes on");
    assert_eq!(running.status().sessions.len(), 1);
    running.stop();
}
