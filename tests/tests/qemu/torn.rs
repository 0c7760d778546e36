//! A checkpoint that is still on its way cannot be seen: whatever moment the primary is frozen at, a dump is the memory
//! of the last complete checkpoint.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use std::time::Duration;

use colo_ring_tests::lab::{
    Address, Guest, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, TestGuest,
    Transport, check_test_guest_image, experiment,
};

const CHANNELS: u8 = 4;
const FREEZES: u32 = 8;
/// So many of the freezes must have hit a checkpoint before its commit, or the test has shown nothing.
const UNCOMMITTED_MIN: u32 = 3;

#[test]
fn uring_never_shows_a_torn_checkpoint() {
    experiment(|lab| body(lab, BackendKind::Uring));
}

#[test]
fn epoll_never_shows_a_torn_checkpoint() {
    experiment(|lab| body(lab, BackendKind::Epoll));
}

#[test]
fn threads_never_shows_a_torn_checkpoint() {
    experiment(|lab| body(lab, BackendKind::Threads));
}

fn body(lab: &Lab, backend: BackendKind) -> Result<(), LabError> {
    // More than 40 MiB a checkpoint, so that the transfer is most of the pause.
    let load = TestGuest::random(40_000, 96);
    let address = Address::free(lab, Transport::Tcp)?;
    let options = ReceiverOptions {
        channels: CHANNELS,
        backend,
        once: true,
        extra: Vec::new(),
    };
    let receiver = Receiver::start(lab, &address, &options)?;
    let mut primary = Qemu::start(
        lab,
        "primary",
        &Machine::bare("pc", 128, Guest::Test(load.clone())),
    )?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    let protection = Protection::every_ms(400, CHANNELS);
    primary.protect(&address, &protection)?;
    primary.wait_checkpoints(4, HANG_LIMIT)?;
    let pause_us = *primary.pauses_us().iter().min().expect("four checkpoints");

    let mut uncommitted = 0;
    for freeze in 0..FREEZES {
        let before = primary.checkpoints()?;
        primary.wait_checkpoints(before + 1, HANG_LIMIT)?;
        primary.wait_paused(HANG_LIMIT)?;
        // At another part of the pause every time.
        std::thread::sleep(Duration::from_micros(pause_us) * freeze / FREEZES);
        primary.freeze()?;
        let complete = u64::try_from(primary.checkpoints()?).expect("a count");
        let out = lab.file(&format!("frozen{freeze}"));
        let dump = receiver.dump_only(&out)?;
        // The receiver may have committed one that the frozen primary has not heard of.
        assert!(
            (complete..=complete + 1).contains(&dump.checkpoint()),
            "{} of {complete}",
            dump.checkpoint()
        );
        uncommitted += u32::from(dump.checkpoint() == complete);
        check_test_guest_image(&dump.block("pc.ram")?, &load)?;
        // A failure to remove it costs disk space only.
        let _ = std::fs::remove_dir_all(&out);
        primary.thaw()?;
    }
    assert!(
        uncommitted >= UNCOMMITTED_MIN,
        "only {uncommitted} freezes came before the commit"
    );
    primary.check_guest()
}
