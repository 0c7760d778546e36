//! How long an idle primary's guest stands still at a checkpoint: multifd-4 over TCP, 300 ms interval, `colo-ring`
//! and QEMU's own secondary alternately.

use std::time::Duration;

use colo_ring_tests::lab::{Distribution, HostSetting, Lab, LabError, Transport, experiment, host};
use colo_ring_tests::versus::{Cell, Secondary, Shape, StartOptions, pauses_us};

const BLOCKS: usize = 3;
const CHECKPOINTS_PER_BLOCK: usize = 40;
const CHANNELS: u8 = 4;
const P50_MAX_MS: f64 = 5.0;
const P99_MAX_MS: f64 = 12.0;
const INTERVAL: Duration = Duration::from_millis(300);

/// The p99 of 120 values is the second worst of them: two disturbances of a shared host make it. So the whole is measured
/// once more where it does not hold; a receiver that is too slow fails twice.
const ATTEMPTS: usize = 2;

#[test]
fn idle_primary_pauses_for_5_ms_at_the_median_and_12_ms_at_p99() {
    experiment(|lab| {
        let congestion_control = HostSetting::cubic();
        for attempt in 1..=ATTEMPTS {
            let ring = measure(lab, &congestion_control)?;
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
fn measure(lab: &Lab, congestion_control: &HostSetting) -> Result<Distribution, LabError> {
    let (mut ring_us, mut qemu_us) = (Vec::new(), Vec::new());
    let (ring, qemu) = (Secondary::default_ring(), Secondary::own());
    let cell = Cell {
        shape: Shape::new(0, CHANNELS),
        spacing: INTERVAL,
    };
    let start = StartOptions {
        lab,
        transport: Transport::Tcp,
        cores: None,
    };
    for _ in 0..BLOCKS {
        ring_us.extend(pauses_us(&start, &ring, cell, CHECKPOINTS_PER_BLOCK)?.0);
        qemu_us.extend(pauses_us(&start, &qemu, cell, CHECKPOINTS_PER_BLOCK)?.0);
    }
    let (ring, qemu) = (Distribution::of_us(&ring_us), Distribution::of_us(&qemu_us));
    println!("pause of the primary, STOP to RESUME; idle guest, multifd-{CHANNELS}, TCP, 300 ms interval");
    println!("colo-ring:            {ring}");
    println!("QEMU's own secondary: {qemu}");
    println!(
        "ratio of the medians: {:.1}",
        qemu.percentile_ms(50) / ring.percentile_ms(50)
    );
    println!("on {}; congestion control {congestion_control}", host());
    assert!(ring.n() >= 100 && qemu.n() >= 100);
    Ok(ring)
}
