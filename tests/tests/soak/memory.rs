//! Many checkpoints of changing sizes through the real receiver: the memory that it takes is flat, and what it holds at the
//! end is the primary's memory.

use colo_ring_tests::command::{RunningReceiver, guest, wrapped};
use colo_ring_tools::primary::{Distribution, Pattern, SynthOptions, SynthPrimary};

/// Checkpoints of the soak; `COLO_RING_SOAK` asks for more.
const CHECKPOINTS: u64 = 10_000;

/// Checkpoints of a part, after each of which memory is looked at.
const PART: u64 = 500;

/// By how much memory may have grown from the first half to the second: what an allocator keeps, not what leaks. One
/// page a checkpoint would be ten times as much.
const GROWTH_MAX: u64 = 4 << 20;

#[test]
fn memory_is_flat_over_ten_thousand_checkpoints() {
    let wanted = std::env::var("COLO_RING_SOAK").map_or(CHECKPOINTS, |text| text.parse().expect("a number"));
    let parts = wanted.div_ceil(PART);
    let receiver = RunningReceiver::start(wrapped(&[]), &[]);
    let options = SynthOptions {
        ram_bytes: 32 << 20,
        // Most are small; now and then one changes most of the guest.
        dirty_pages: Distribution::LogNormal {
            median: 40,
            sigma: 1.6,
        },
        pattern: Pattern::Random,
        ..guest()
    };
    let mut primary = SynthPrimary::connect(receiver.address(), &options).expect("precopy");
    let mut sizes = Vec::new();
    for part in 0..parts {
        for _ in 0..PART {
            primary.checkpoint().expect("a checkpoint");
        }
        let pool = receiver.protected()["pool_bytes"]
            .as_u64()
            .expect("it has a pool");
        sizes.push((receiver.resident_bytes(), pool));
        eprintln!(
            "{} checkpoints: {:?} bytes resident, in the pool",
            (part + 1) * PART,
            sizes.last()
        );
    }
    let (first, second) = sizes.split_at(sizes.len() / 2);
    let most = |half: &[(u64, u64)]| half.iter().map(|(resident, _)| *resident).max().expect("some");
    assert!(
        most(second) <= most(first) + GROWTH_MAX,
        "{} bytes in the first half, {} in the second",
        most(first),
        most(second)
    );
    let session = receiver.protected();
    receiver.check_dump(&primary, &session, parts * PART);
    primary.close().expect("its end");
}
