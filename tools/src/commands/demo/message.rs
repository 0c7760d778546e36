//! What the demo has to say.

use super::DemoArgs;
use super::variant::{AS_QEMU, DEFAULT, FLOOR};
use crate::comparison::{Comparison, Row, headline};
use colo_ring::metrics::display_nanoseconds;
use colo_ring::text::mebibytes;
use colo_ring::units::PAGE_BYTES;

/// What a checkpoint is.
pub(super) const EXPLANATION: &str = "A COLO primary stops its guest many times a second, sends the secondary the pages that the guest has \
     changed and the state of its devices, and lets it run on when the secondary answers that it has loaded them. That is a checkpoint: \
     the guest can be resumed from it elsewhere. `loaded` is the time from the first byte to that answer. The guest stands still for \
     that long, so it is what the guest feels.";

/// What is in the table.
pub(super) const LEGEND: &str = "with epoll: for hosts without io_uring. QEMU's way: a thread a channel, and the copying inside of the \
     guest's pause; QEMU also loads the devices then, which is not measured here. sink: keeps nothing, the floor of the transport. \
     CPU: of the secondary's threads for a checkpoint. memory: held for the guest.";

/// The result in one sentence, with the figures that matter and their interval.
pub(super) fn sentence(comparison: &Comparison, args: &DemoArgs) -> String {
    let row = |name| comparison.row("loaded", name);
    let changed = format!(
        "With {} pages changed ({})",
        args.pages,
        mebibytes(args.pages.saturating_mul(PAGE_BYTES))
    );
    let measured = comparison.first("loaded");
    let Some(own) = row(DEFAULT).or(measured) else {
        return "Nothing was measured.".to_owned();
    };
    let mut text = format!(
        "{changed} the guest stands still for {} at the median and {} at p99 with {}",
        display_nanoseconds(own.p50_ns),
        display_nanoseconds(own.p99_ns),
        own.run
    );
    if let Some(qemu) = row(AS_QEMU) {
        text.push_str(&format!(
            ", for {} and {} with QEMU's way of receiving{}",
            display_nanoseconds(qemu.p50_ns),
            display_nanoseconds(qemu.p99_ns),
            ratio(own)
        ));
    }
    match row(FLOOR) {
        Some(floor) => text.push_str(&format!(
            "; the transport alone takes {}.",
            display_nanoseconds(floor.p50_ns)
        )),
        None => text.push('.'),
    }
    text
}

fn ratio(own: &Row) -> String {
    let Some(ratios) = own.ratios else {
        return String::new();
    };
    format!(": median {}", headline::in_words(&ratios.p50))
}
