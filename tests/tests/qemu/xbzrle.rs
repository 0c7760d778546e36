//! Unmodified QEMU 11 primaries that send deltas (XBZRLE): what the receiver holds is, bit for bit, the RAM that the
//! primary saves of itself, in both caches and commit modes.

use colo_ring::ring::BackendKind;
use colo_ring_tests::HANG_LIMIT;
use colo_ring_tests::lab::{
    Address, Guest, Lab, LabError, Machine, Protection, Qemu, Receiver, ReceiverOptions, TestGuest,
    Transport, check_test_guest_image, experiment,
};

const CHECKPOINTS_MIN: usize = 20;
const MEMORY_MIB: u32 = 384;
const PAGE_BYTES: u64 = 4096;

/// Pages and bytes that the receiver's only session has received, zero pages not counted.
fn received(receiver: &Receiver) -> Result<(u64, u64), LabError> {
    let status = receiver.status()?;
    let session = &status["sessions"][0];
    let number = |key: &str| session[key].as_u64().expect("the status has it");
    Ok((number("pages"), number("bytes")))
}

fn body(lab: &Lab, backend: BackendKind, cache: &str, commit: &str) -> Result<(), LabError> {
    // The pages that it writes change as a whole. Its table of generations changes by a word for each of them: for a large
    // region that is many pages, which QEMU's cache of 64 MiB holds.
    let load = TestGuest::random(500, 320);
    let address = Address::free(lab, Transport::Tcp)?;
    let options = ReceiverOptions {
        channels: 0,
        backend,
        once: true,
        extra: ["--cache", cache, "--commit", commit].map(str::to_owned).to_vec(),
    };
    let mut receiver = Receiver::start(lab, &address, &options)?;
    let mut primary = Qemu::start(
        lab,
        "primary",
        &Machine::bare("pc", MEMORY_MIB, Guest::Test(load.clone())),
    )?;
    primary.wait_serial("tick 2 ", HANG_LIMIT)?;
    primary.enable(&["xbzrle"])?;
    let protection = Protection {
        channels: 0,
        checkpoint_delay_ms: 150,
        zero_page_detection: None,
        compression: None,
    };
    primary.protect(&address, &protection)?;
    // By then the table has been sent whole.
    primary.wait_checkpoints(CHECKPOINTS_MIN / 2, HANG_LIMIT)?;
    let (pages_before, bytes_before) = received(&receiver)?;
    primary.wait_checkpoints(CHECKPOINTS_MIN, HANG_LIMIT)?;
    let (pages, bytes) = received(&receiver)?;
    let (pages, bytes) = (pages - pages_before, bytes - bytes_before);
    assert!(pages > 0, "nothing was received");
    assert!(
        bytes * 10 < pages * PAGE_BYTES * 9,
        "{bytes} bytes for {pages} pages: these are no deltas"
    );
    let running = receiver.dump_only(&lab.file("running"))?;
    check_test_guest_image(&running.block("pc.ram")?, &load)?;
    let saved = primary.commit_stopped(&lab.file("saved.ram"))?;
    let stopped = receiver.dump_only(&lab.file("stopped"))?;
    saved.assert_equal(&stopped.block("pc.ram")?)?;
    primary.check_guest()?;
    drop(primary);
    receiver.wait_exit()?;
    Ok(())
}

macro_rules! cases {
    ($($name:ident: $backend:ident, $cache:expr, $commit:expr;)*) => {
        $(#[test]
        fn $name() {
            experiment(|lab| body(lab, BackendKind::$backend, $cache, $commit));
        })*
    };
}

cases! {
    pool_deferred:   Uring,   "pool",   "deferred";
    pool_sync:       Epoll,   "pool",   "sync";
    mirror_deferred: Threads, "mirror", "deferred";
    mirror_sync:     Uring,   "mirror", "sync";
}
