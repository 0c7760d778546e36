//! How long an idle primary's guest is paused at a checkpoint: multifd-4 over TCP, 300 ms interval, `colo-ring`
//! and QEMU's own secondary alternately.

use colo_ring::host;
use std::time::Duration;

use colo_ring_benches::versus::{Cell, Secondary, Shape, StartOptions, pauses_us};
use colo_ring_tests::lab::{Distribution, HostSetting, Lab, LabError, Transport, experiment_alone};

const BLOCKS: usize = 3;
const CHECKPOINTS_PER_BLOCK: usize = 40;
const CHANNELS: u8 = 4;
const INTERVAL: Duration = Duration::from_millis(300);

/// The most that the median of the pauses may be of QEMU's own: its two delayed acknowledgements make 80 ms of 88, and
/// one of them would be a half.
const P50_SHARE_MAX: f64 = 0.2;

/// The same for the 99th percentile.
const P99_SHARE_MAX: f64 = 0.4;

/// The p99 of 120 values is the second worst of them: two disturbances of a shared host make it. So the whole is measured
/// again where it does not hold; a receiver that is too slow fails every time.
const ATTEMPTS: usize = 3;

#[test]
fn an_idle_primary_pauses_for_a_fifth_of_what_qemus_own_secondary_takes() {
    experiment_alone(|lab| {
        let congestion_control = HostSetting::cubic();
        for attempt in 1..=ATTEMPTS {
            let (ring, qemu) = measure(lab, &congestion_control)?;
            let share = |percentile| ring.percentile_ms(percentile) / qemu.percentile_ms(percentile);
            if share(50) <= P50_SHARE_MAX && share(99) <= P99_SHARE_MAX {
                break;
            }
            assert!(
                attempt < ATTEMPTS,
                "over {P50_SHARE_MAX} of QEMU's own at p50, or {P99_SHARE_MAX} at p99: {ring}; QEMU's own: {qemu}"
            );
            println!("over the limits; once more");
        }
        Ok(())
    });
}

/// Both secondaries in turn; prints both distributions and returns them, colo-ring's first.
fn measure(lab: &Lab, congestion_control: &HostSetting) -> Result<(Distribution, Distribution), LabError> {
    let (mut ring_us, mut qemu_us) = (Vec::new(), Vec::new());
    let (ring, qemu) = (Secondary::default_ring(), Secondary::own());
    let cell = Cell {
        shape: Shape::new(0, CHANNELS),
        spacing: INTERVAL,
    };
    let start = StartOptions {
        authority: None,
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
    println!(
        "on {}; congestion control {congestion_control}",
        host::Machine::read()
    );
    assert!(ring.n() >= 100 && qemu.n() >= 100);
    Ok((ring, qemu))
}
