//! Peers that make no sense, on every socket.

use super::{ATTACK_PACE, Soak, count};
use colo_ring_tests::hostile::attack::Attacker;
use colo_ring_tests::nbd::{greet, option};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Hostile sessions.
pub fn attack(soak: &Soak, rng: Xoshiro256PlusPlus) {
    let mut attacker = Attacker::new(soak.address(), super::CHANNELS, rng);
    while soak.goes_on() {
        attacker.attack().expect("the receiver takes connections");
        count(&soak.counts.attacks);
        std::thread::sleep(ATTACK_PACE);
    }
}

/// Clients of the control socket that say something wrong, or nothing.
pub fn babble(soak: &Soak, mut rng: Xoshiro256PlusPlus) {
    let mut silent = Vec::new();
    while soak.goes_on() {
        let mut client = UnixStream::connect(soak.receiver.control_path()).expect("the control socket");
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a timeout");
        let mut random = vec![0; rng.random_range(1..300)];
        rng.fill_bytes(&mut random);
        let choices: [&[u8]; 6] = [
            b"{\"command\":\"dump\",\"session\":0,\"directory\":\"relative\"}\n",
            b"{\"command\":\"claim\",\"session\":4294967295,\"force\":true,\"retry\":true}\n",
            b"{\"command\":\"restore\",\"session\":1,\"to\":\"unix:\",\"shared\":null,\"keep\":null}\n",
            b"{\"command\":\"discard\",\"session\":-1}\n",
            b"",
            &random,
        ];
        // It may be closed: then a later one is.
        let _ = client.write_all(choices.choose(&mut rng).expect("some"));
        let _ = client.read(&mut [0; 500]);
        count(&soak.counts.babble);
        silent.push(client);
        // More than there may be.
        if silent.len() > 20 {
            silent.clear();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Clients of disks that are none.
pub fn disturb_disks(soak: &Soak, mut rng: Xoshiro256PlusPlus) {
    let address = soak.receiver.disk_address();
    let address = address
        .strip_prefix("tcp:")
        .and_then(|address| address.parse().ok())
        .expect("an address");
    while soak.goes_on() {
        let mut client = greet(address).expect("it serves disks");
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a timeout");
        let mut random = vec![0; rng.random_range(1..200)];
        rng.fill_bytes(&mut random);
        for _ in 0..rng.random_range(1..5) {
            let number = rng.random_range(0..12);
            let bytes = match rng.random_range(0..3) {
                0 => option(number, &random),
                1 => option(3, b""),
                _ => random.clone(),
            };
            // The server may have closed already.
            let _ = client.write_all(&bytes);
            let _ = client.read(&mut [0; 500]);
        }
        count(&soak.counts.disk_clients);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An operator who looks at the status now and then.
pub fn look(soak: &Soak, _: Xoshiro256PlusPlus) {
    while soak.goes_on() {
        soak.sessions();
        std::thread::sleep(Duration::from_millis(300));
    }
}
