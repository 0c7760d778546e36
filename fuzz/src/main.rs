//! All targets as one program for libFuzzer: `COLO_RING_FUZZ` names the target. `scripts/fuzz` runs it.

#![no_main]

use colo_ring_fuzz::{TARGETS, Target};
use std::sync::OnceLock;

static TARGET: OnceLock<Target> = OnceLock::new();

fn named() -> Target {
    let name = std::env::var("COLO_RING_FUZZ").unwrap_or_default();
    let target = TARGETS.iter().find(|(target, _)| *target == name);
    target
        .unwrap_or_else(|| panic!("COLO_RING_FUZZ names no target: {name:?}"))
        .1
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    TARGET.get_or_init(named)(input);
});
