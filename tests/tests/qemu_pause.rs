//! How long an idle primary's guest stands still at a checkpoint: multifd-4 over TCP, 300 ms interval, `colo-ring`
//! and QEMU's own secondary alternately.

use std::time::Duration;

use colo_ring_tests::lab::{
    Address, Backend, Distribution, Guest, HostSetting, Lab, LabError, Machine, Protection, Qemu, Receiver,
    ReceiverOptions, TestGuest, Transport, experiment, host,
};

const BLOCKS: usize = 3;
const CHECKPOINTS_PER_BLOCK: usize = 40;
const CHANNELS: u8 = 4;
const P50_MAX_MS: f64 = 5.0;
const P99_MAX_MS: f64 = 12.0;
const LIMIT: Duration = Duration::from_secs(60);

/// The p99 of 120 values is the second worst of them: two disturbances of a shared host make it. So the whole is measured
/// once more where it does not hold; a receiver that is too slow fails twice.
const ATTEMPTS: usize = 2;

#[test]
fn idle_primary_pauses_for_5_ms_at_the_median_and_12_ms_at_p99() {
    experiment(|lab| {
        let congestion_control = HostSetting::cubic();
        for attempt in 1..=ATTEMPTS {
            let ring = measure(lab, attempt, &congestion_control)?;
            let holds = ring.percentile_ms(50) <= P50_MAX_MS && ring.percentile_ms(99) <= P99_MAX_MS;
            if holds {
                break;
            }
            assert!(
                attempt < ATTEMPTS,
                "colo-ring, limits {P50_MAX_MS} and {P99_MAX_MS} ms: {ring}"
            );
            println!("over the limits; once more");
        }
        Ok(())
    });
}

/// Both secondaries in turn; prints both distributions and returns colo-ring's.
fn measure(lab: &Lab, attempt: usize, congestion_control: &HostSetting) -> Result<Distribution, LabError> {
    let (mut ring_us, mut qemu_us) = (Vec::new(), Vec::new());
    for block in attempt * BLOCKS..(attempt + 1) * BLOCKS {
        ring_us.extend(pauses_with_receiver(lab, block)?);
        qemu_us.extend(pauses_with_own_secondary(lab, block)?);
    }
    let (ring, qemu) = (Distribution::of_us(&ring_us), Distribution::of_us(&qemu_us));
    println!("pause of the primary, STOP to RESUME; idle guest, multifd-{CHANNELS}, TCP, 300 ms interval");
    println!("colo-ring (uring):    {ring}");
    println!("QEMU's own secondary: {qemu}");
    println!(
        "ratio of the medians: {:.1}",
        qemu.percentile_ms(50) / ring.percentile_ms(50)
    );
    println!("on {}; congestion control {congestion_control}", host());
    assert!(ring.n() >= 100 && qemu.n() >= 100);
    Ok(ring)
}

fn machine() -> Machine {
    Machine::bare("pc", 512, Guest::Test(TestGuest::idle()))
}

fn pauses_with_receiver(lab: &Lab, block: usize) -> Result<Vec<u64>, LabError> {
    let address = Address::free(lab, Transport::Tcp)?;
    let options = ReceiverOptions {
        channels: CHANNELS,
        backend: Backend::Uring,
        once: true,
        extra: Vec::new(),
    };
    let _receiver = Receiver::start(lab, &address, &options)?;
    pauses_of_primary(lab, &format!("ring{block}"), &address)
}

fn pauses_with_own_secondary(lab: &Lab, block: usize) -> Result<Vec<u64>, LabError> {
    let address = Address::free(lab, Transport::Tcp)?;
    let mut secondary = Qemu::start_incoming(lab, &format!("secondary{block}"), &machine())?;
    secondary.be_secondary(&address, CHANNELS)?;
    pauses_of_primary(lab, &format!("own{block}"), &address)
}

fn pauses_of_primary(lab: &Lab, name: &str, address: &Address) -> Result<Vec<u64>, LabError> {
    let mut primary = Qemu::start(lab, name, &machine())?;
    primary.wait_serial("tick 2 ", LIMIT)?;
    let protection = Protection {
        channels: CHANNELS,
        checkpoint_delay_ms: 300,
        zero_page_detection: None,
    };
    primary.protect(address, &protection)?;
    primary.wait_checkpoints(CHECKPOINTS_PER_BLOCK, LIMIT)?;
    Ok(primary.pauses_us())
}
