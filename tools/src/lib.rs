//! The parts of the command `colo-ring`, as a library for its tests: one file a subcommand.
#![forbid(unsafe_code)]

mod cli;
pub mod doctor;
pub mod options;
pub mod output;
pub mod synth;

pub use cli::main;
