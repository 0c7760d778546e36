//! The parts of the command `colo-ring`, as a library for its tests.

pub mod synth;
