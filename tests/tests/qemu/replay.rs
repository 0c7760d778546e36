//! A real QEMU 11.1 primary's session, recorded, then played without it: a fresh receiver comes to hold the same, bit
//! for bit, and a fresh QEMU takes it for its primary.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::schema;
use std::fs;
use std::path::PathBuf;

use colo_ring_tests::command::run;
use colo_ring_tests::lab::{
    Address, Dump, Guest, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, Recorder,
    TestGuest, Transport, experiment,
};
use serde_json::Value;

const CHECKPOINTS_MIN: usize = 10;

fn machine() -> Machine {
    Machine::bare("pc", 64, Guest::Test(TestGuest::random(4000, 48)))
}

fn receiver(lab: &Lab, channels: u8) -> Result<(Address, Receiver), LabError> {
    let address = Address::free(lab, Transport::Tcp)?;
    let options = ReceiverOptions {
        channels,
        backend: BackendKind::Uring,
        once: false,
        extra: Vec::new(),
    };
    let receiver = Receiver::start(lab, &address, &options)?;
    Ok((address, receiver))
}

/// A recorded session.
struct Recorded {
    capture: PathBuf,
    /// What the receiver held at its end.
    held: Dump,
    checkpoints: u64,
}

fn recorded(lab: &Lab, channels: u8) -> Result<Recorded, LabError> {
    let (back, live) = receiver(lab, channels)?;
    let front = Address::free(lab, Transport::Tcp)?;
    let mut recorder = Recorder::start(lab, &front, &back)?;
    let mut primary = Qemu::start(lab, "primary", &machine())?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    let saved_to = lab.file("saved.ram");
    let saved = primary.protect_and_stop(
        &front,
        &Protection::every_ms(150, channels),
        CHECKPOINTS_MIN,
        &saved_to,
    )?;
    let held = live.dump_only(&lab.file("live"))?;
    saved.assert_equal(&held.block("pc.ram")?)?;
    drop(primary);
    recorder.wait_report()?;
    Ok(Recorded {
        capture: recorder.capture().to_owned(),
        checkpoints: held.checkpoint(),
        held,
    })
}

/// Plays the session and returns the report.
fn replay(recorded: &Recorded, address: &Address, more: &[&str]) -> Value {
    let capture = recorded.capture.to_str().expect("UTF-8");
    let output = run(&[&["replay", capture, "--to", &address.to_string(), "--json"], more].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    schema::document(&output.stdout)
}

fn assert_same(one: &Dump, other: &Dump) -> Result<(), LabError> {
    for name in ["pc.ram", "pc.bios", "pc.rom"] {
        let read = |dump: &Dump| Ok::<_, LabError>(fs::read(dump.block(name)?).expect("a dumped file"));
        assert!(read(one)? == read(other)?, "block {name} differs");
    }
    assert!(
        one.device_state()? == other.device_state()?,
        "the device state differs"
    );
    assert_eq!(one.machine(), other.machine());
    Ok(())
}

fn into_a_fresh_receiver(channels: u8) {
    experiment(|lab| {
        let recorded = recorded(lab, channels)?;
        for (name, pace, passes) in [
            ("original", &["--pace", "original"], 1),
            ("again", &["--pace", "max"], 2),
        ] {
            let (address, receiver) = receiver(lab, channels)?;
            let report = replay(
                &recorded,
                &address,
                &[&pace[..], &["--loop", &passes.to_string()]].concat(),
            );
            assert_eq!(report["checkpoints"], recorded.checkpoints * passes);
            let dump = receiver.dump_only(&lab.file(name))?;
            assert_eq!(dump.checkpoint(), recorded.checkpoints * passes);
            assert_same(&recorded.held, &dump)?;
        }
        Ok(())
    });
}

#[test]
fn multifd_into_a_fresh_receiver() {
    into_a_fresh_receiver(4);
}

#[test]
fn plain_into_a_fresh_receiver() {
    into_a_fresh_receiver(0);
}

/// QEMU's own secondary answers it as it answers its primary.
fn into_a_fresh_qemu(channels: u8) {
    experiment(|lab| {
        let recorded = recorded(lab, channels)?;
        let mut secondary = Qemu::start_incoming(lab, "secondary", &machine())?;
        let address = Address::free(lab, Transport::Tcp)?;
        secondary.be_secondary(&address, channels)?;
        let pid = secondary.pid().to_string();
        let wanted = recorded.checkpoints + recorded.checkpoints / 2;
        let report = replay(
            &recorded,
            &address,
            &[
                "--interval",
                "120",
                "--checkpoints",
                &wanted.to_string(),
                "--pid",
                &pid,
            ],
        );
        println!("{report:#}");
        assert_eq!(report["checkpoints"], wanted);
        assert_eq!(report["phases"]["loaded"]["count"], wanted);
        // It loads devices in every checkpoint, and it holds the guest's memory twice.
        assert!(report["secondary"]["cpu_ns"].as_u64().expect("a number") > 0);
        assert!(report["secondary"]["rss_bytes_max"].as_u64().expect("a number") > 64 << 20);
        Ok(())
    });
}

#[test]
fn multifd_into_a_fresh_qemu() {
    into_a_fresh_qemu(4);
}

#[test]
fn plain_into_a_fresh_qemu() {
    into_a_fresh_qemu(0);
}
