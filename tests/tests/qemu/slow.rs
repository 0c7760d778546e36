//! Whose time slow checkpoints of a real primary are: what the flight recorder says of them, beside what the primary's own events say.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Guest, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, TestGuest, Transport,
    experiment, experiment_alone,
};
use serde_json::Value;

const CHANNELS: u8 = 4;

/// 16 MiB a second into 64 MiB, with a checkpoint every 25 ms.
const PAGES_PER_SECOND: u32 = 4096;
const REGION_MIB: u32 = 64;
const INTERVAL_MS: u32 = 25;

/// Pauses of the primary in microseconds, and the receiver's report of its slowest checkpoints.
fn protect(
    lab: &colo_ring_tests::lab::Lab,
    checkpoints: usize,
    top: usize,
) -> Result<(Vec<u64>, Value), LabError> {
    let address = Address::free(lab, Transport::Tcp)?;
    let options = ReceiverOptions {
        channels: CHANNELS,
        backend: BackendKind::Uring,
        once: false,
        extra: Vec::new(),
    };
    let receiver = Receiver::start(lab, &address, &options)?;
    let guest = TestGuest {
        fill: true,
        ..TestGuest::random(PAGES_PER_SECOND, REGION_MIB)
    };
    let machine = Machine::bare("pc", 128, Guest::Test(guest));
    let mut primary = Qemu::start(lab, "primary", &machine)?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    primary.protect(&address, &Protection::every_ms(INTERVAL_MS, CHANNELS))?;
    primary.wait_checkpoints(checkpoints, HANG_LIMIT)?;
    let report = receiver.slow(top)?;
    Ok((primary.pauses_us(), report))
}

/// The recorder has every checkpoint of a QEMU, and its parts add up.
#[test]
fn every_checkpoint_of_a_primary_is_recorded() {
    experiment(|lab| {
        let (pauses, report) = protect(lab, 40, 10)?;
        let recorded = report["checkpoints"].as_u64().unwrap();
        assert!(
            recorded >= 38 && recorded <= pauses.len() as u64 + 3,
            "{recorded}, {}",
            pauses.len()
        );
        for slow in report["slowest"].as_array().unwrap() {
            let split = slow["split"].as_object().unwrap();
            let sum: u64 = split.values().map(|part| part.as_u64().unwrap()).sum();
            assert_eq!(sum, slow["duration_ns"].as_u64().unwrap(), "{slow:#}");
            let record = &slow["record"];
            assert!(
                record["first_byte_ns"].is_u64() && record["last_sync_ns"].is_u64(),
                "{record:#}"
            );
            let channels = record["channels"].as_array().unwrap();
            assert_eq!(channels.len(), usize::from(CHANNELS), "{record:#}");
            let moments = |key: &str| {
                channels
                    .iter()
                    .map(|bytes| bytes[key].as_u64().unwrap())
                    .collect::<Vec<_>>()
            };
            let (first, last) = (moments("first_byte_ns"), moments("last_byte_ns"));
            assert_eq!(first.iter().min().copied(), record["first_byte_ns"].as_u64());
            assert_eq!(first.iter().max().copied(), record["last_begin_ns"].as_u64());
            assert_eq!(last.iter().max().copied(), record["last_byte_ns"].as_u64());
        }
        Ok(())
    });
}

/// A measurement: `scripts/measure slow`.
#[test]
#[ignore = "a measurement that needs the machine for itself"]
fn where_outliers_come_from() {
    experiment_alone(|lab| {
        for round in 1..=3 {
            let (mut pauses, report) = protect(lab, 800, 20)?;
            pauses.sort_unstable();
            let ms = |position: usize| pauses[position] as f64 / 1000.0;
            let last = pauses.len() - 1;
            println!(
                "round {round}: the primary's pauses: p50 {:.2} ms, p99 {:.2} ms, the longest {:.2}, {:.2}, {:.2} ms",
                ms(last / 2),
                ms(last * 99 / 100),
                ms(last - 2),
                ms(last - 1),
                ms(last)
            );
            for key in ["usual", "of_slowest"] {
                println!("{key}: {}", report[key]);
            }
            for slow in report["slowest"].as_array().unwrap() {
                println!(
                    "{} {} {} {}",
                    slow["duration_ns"], slow["whose"], slow["what"], slow["record"]
                );
            }
        }
        Ok(())
    });
}
