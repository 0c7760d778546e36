//! Long runs of one receiver. scripts/soak runs them for hours; the tests are short samples.

mod memory;
mod mixed;
