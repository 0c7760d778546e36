//! A real QEMU 11.1 primary, recorded on its way to a secondary: neither side notices, and the file holds the session.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Guest, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, Recorder, TestGuest,
    Transport, experiment, experiment_alone,
};
use colo_ring_tools::streams::Streams;

const CHECKPOINTS_MIN: usize = 15;

/// How many times as long as without the recorder the primary's pause may be at the lower quartile. Without quick acknowledgements
/// or with Nagle's algorithm, on either side, it would be 40 ms more, ten times as long.
const PAUSE_RATIO_MAX: u64 = 5;

/// The two sessions are one after the other, and other processes can slow down one of them: so they are repeated where the
/// ratio does not hold. A delayed acknowledgement is in every one.
const ATTEMPTS: usize = 3;

fn load() -> TestGuest {
    TestGuest::random(2000, 48)
}

fn primary(lab: &Lab) -> Result<Qemu, LabError> {
    let qemu = Qemu::start(lab, "primary", &Machine::bare("pc", 64, Guest::Test(load())))?;
    qemu.wait_serial("tick 2 ", HANG_LIMIT)?;
    Ok(qemu)
}

fn protection(channels: u8) -> Protection {
    Protection::every_ms(150, channels)
}

/// What the recorder says and what its file holds fit the checkpoints that the primary counted.
fn check_recording(recorder: &mut Recorder, channels: u8, checkpoints: usize) -> Result<(), LabError> {
    let report = recorder.wait_report()?;
    println!("{report:#}");
    let count = u64::try_from(checkpoints).expect("a count");
    assert_eq!(report["added"]["checkpoints"], count, "{report:#}");
    assert_eq!(report["recorded"]["connections"], u64::from(channels) + 1);
    let streams = Streams::load(recorder.capture()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(streams.checkpoints.len(), checkpoints, "{:?}", streams.notes);
    Ok(())
}

/// The primary's pause at the lower quartile.
fn pause_us(primary: &mut Qemu) -> u64 {
    let mut pauses = primary.pauses_us();
    pauses.sort_unstable();
    pauses[pauses.len() / 4]
}

fn through_to_the_receiver(channels: u8, transport: Transport) {
    for attempt in 1..=ATTEMPTS {
        let direct_us = directly(channels, transport);
        let recorded_us = recorded(channels, transport);
        println!("the primary's pause: {recorded_us} µs; without the recorder {direct_us} µs");
        if recorded_us <= PAUSE_RATIO_MAX * direct_us {
            break;
        }
        assert!(
            attempt < ATTEMPTS,
            "{recorded_us} µs, without the recorder {direct_us} µs"
        );
    }
}

fn options(channels: u8) -> ReceiverOptions {
    ReceiverOptions {
        channels,
        backend: BackendKind::Uring,
        once: true,
        extra: Vec::new(),
    }
}

/// The primary's pause without the recorder.
fn directly(channels: u8, transport: Transport) -> u64 {
    let mut direct_us = 0;
    experiment_alone(|lab| {
        let back = Address::free(lab, transport)?;
        let mut receiver = Receiver::start(lab, &back, &options(channels))?;
        let mut primary = primary(lab)?;
        primary.protect(&back, &protection(channels))?;
        primary.wait_checkpoints(CHECKPOINTS_MIN, HANG_LIMIT)?;
        direct_us = pause_us(&mut primary);
        drop(primary);
        receiver.wait_exit().map(drop)
    });
    direct_us
}

/// The primary's pause with the recorder, whose file is checked.
fn recorded(channels: u8, transport: Transport) -> u64 {
    let mut recorded_us = 0;
    experiment_alone(|lab| {
        let (front, back) = (Address::free(lab, transport)?, Address::free(lab, transport)?);
        let mut receiver = Receiver::start(lab, &back, &options(channels))?;
        let mut recorder = Recorder::start(lab, &front, &back)?;
        let mut primary = primary(lab)?;
        let saved_to = lab.file("saved.ram");
        let saved = primary.protect_and_stop(&front, &protection(channels), CHECKPOINTS_MIN, &saved_to)?;
        let dump = receiver.dump_only(&lab.file("dump"))?;
        saved.assert_equal(&dump.block("pc.ram")?)?;
        primary.check_guest()?;
        let checkpoints = primary.checkpoints()?;
        assert_eq!(dump.checkpoint(), u64::try_from(checkpoints).expect("a count"));
        recorded_us = pause_us(&mut primary);
        drop(primary);
        receiver.wait_exit()?;
        check_recording(&mut recorder, channels, checkpoints)
    });
    recorded_us
}

#[test]
fn multifd_over_tcp() {
    through_to_the_receiver(4, Transport::Tcp);
}

#[test]
fn plain_over_unix() {
    through_to_the_receiver(0, Transport::Unix);
}

/// QEMU's own secondary is recorded, too.
#[test]
fn to_qemus_own_secondary() {
    const CHANNELS: u8 = 2;
    experiment(|lab| {
        let (front, back) = (
            Address::free(lab, Transport::Tcp)?,
            Address::free(lab, Transport::Tcp)?,
        );
        let machine = Machine::bare("pc", 64, Guest::Test(load()));
        let mut secondary = Qemu::start_incoming(lab, "secondary", &machine)?;
        secondary.be_secondary(&back, CHANNELS)?;
        let mut recorder = Recorder::start(lab, &front, &back)?;
        let mut primary = primary(lab)?;
        primary.protect(&front, &protection(CHANNELS))?;
        primary.wait_checkpoints(CHECKPOINTS_MIN, HANG_LIMIT)?;
        primary.check_guest()?;
        drop(primary);
        drop(secondary);
        let report = recorder.wait_report()?;
        let measured = report["added"]["checkpoints"].as_u64().unwrap_or(0);
        assert!(
            measured >= u64::try_from(CHECKPOINTS_MIN).expect("a count"),
            "{report:#}"
        );
        let streams = Streams::load(recorder.capture()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(streams.checkpoints.len() as u64, measured, "{:?}", streams.notes);
        Ok(())
    });
}
