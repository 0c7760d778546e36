//! Hostile sessions beside a protected guest of QEMU: it stays protected, and its pauses are what they were without them.
//!
//! `COLO_RING_HOSTILE_SESSIONS` makes a campaign of it, for example 50000; from 5000 on the pauses are compared.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::hostile::attack::{Attack, Attacker};
use colo_ring_tests::lab::{
    Address, Distribution, Guest, Machine, Protection, Qemu, Receiver, ReceiverOptions, TestGuest, Transport,
    experiment_alone,
};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CHANNELS: u8 = 2;

/// Time between checkpoints of the guest, and the checkpoints of the quiet run.
const INTERVAL_MS: u32 = 100;
const QUIET_CHECKPOINTS: usize = 300;

/// Hostile sessions of the sample.
const SAMPLE: u64 = 300;

/// From so many on the pauses are compared.
const COMPARED_FROM: u64 = 5000;

/// How much longer pauses may be at the median.
const RATIO_MAX: f64 = 1.5;

const ATTACKERS: u64 = 2;

/// After each session: they share the machine with the guest here, and their own work must not be what it waits for.
const PACE: Duration = Duration::from_millis(4);

fn wanted() -> u64 {
    std::env::var("COLO_RING_HOSTILE_SESSIONS")
        .map_or(SAMPLE, |text| text.parse().expect("a number of sessions"))
}

#[test]
fn a_guest_stays_protected_among_hostile_sessions() {
    experiment_alone(|lab| {
        let address = Address::free(lab, Transport::Tcp)?;
        let options = ReceiverOptions {
            channels: CHANNELS,
            backend: BackendKind::Uring,
            once: false,
            extra: Vec::new(),
        };
        let mut receiver = Receiver::start(lab, &address, &options)?;
        let guest = TestGuest::random(1000, 16);
        let mut primary = Qemu::start(lab, "primary", &Machine::bare("pc", 64, Guest::Test(guest)))?;
        primary.wait_serial("tick 2 ", HANG_LIMIT)?;
        primary.protect(&address, &Protection::every_ms(INTERVAL_MS, CHANNELS))?;
        let quiet = if wanted() < COMPARED_FROM {
            5
        } else {
            QUIET_CHECKPOINTS
        };
        primary.wait_checkpoints(quiet, HANG_LIMIT)?;
        let before = primary.pauses_us();

        let began = Instant::now();
        let attacks = attack(&address);
        let took = began.elapsed();
        let beside = primary.pauses_us().split_off(before.len());
        println!("{attacks:?} in {:.1} s", took.as_secs_f64());
        compare(&before, &beside);

        let count = primary.checkpoints()?;
        primary.wait_checkpoints(count + 5, HANG_LIMIT)?;
        let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
        saved.assert_equal(&receiver.dump(1, &lab.file("dump"))?.block("pc.ram")?)?;
        primary.check_guest()?;
        let status = receiver.terminate()?;
        assert!(status.code().is_some(), "a signal ended it: {status}");
        Ok(())
    });
}

/// All hostile sessions.
fn attack(address: &Address) -> BTreeMap<Attack, u64> {
    let Address::Tcp(port) = *address else {
        panic!("a TCP address")
    };
    let begun = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let attackers: Vec<_> = (0..ATTACKERS)
            .map(|seed| {
                let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
                let mut attacker = Attacker::new(([127, 0, 0, 1], port).into(), CHANNELS, rng);
                let begun = &begun;
                scope.spawn(move || {
                    while begun.fetch_add(1, Ordering::Relaxed) < wanted() {
                        attacker.attack().expect("the receiver takes connections");
                        std::thread::sleep(PACE);
                    }
                    attacker.attacks
                })
            })
            .collect();
        let mut all = BTreeMap::new();
        for attacker in attackers {
            for (attack, count) in attacker.join().expect("an attacker") {
                *all.entry(attack).or_default() += count;
            }
        }
        all
    })
}

/// The guest's pauses alone, and beside hostile sessions.
fn compare(before: &[u64], beside: &[u64]) {
    let (before, beside) = (Distribution::of_us(before), Distribution::of_us(beside));
    println!("pauses alone:                   {before}");
    println!("pauses beside hostile sessions: {beside}");
    let ratio = |percent| beside.percentile_ms(percent) / before.percentile_ms(percent);
    println!(
        "ratio of p50 {:.2}, of p90 {:.2}, of p99 {:.2}",
        ratio(50),
        ratio(90),
        ratio(99)
    );
    if wanted() >= COMPARED_FROM {
        assert!(
            ratio(50) <= RATIO_MAX && ratio(99) <= RATIO_MAX,
            "over {RATIO_MAX}"
        );
    }
}
