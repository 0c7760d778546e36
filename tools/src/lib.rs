//! The parts of the command `colo-ring`, as a library for its tests: one file a subcommand.
#![forbid(unsafe_code)]

pub mod capture;
pub mod capture_file;
mod cli;
pub mod compare;
mod control;
pub mod demo;
pub mod doctor;
pub mod failover;
pub mod hlog;
pub mod import;
pub mod inspect;
mod on_loss;
pub mod options;
pub mod output;
pub mod protect;
pub mod qmp;
pub mod receive;
pub mod replay;
pub mod run_file;
mod signals;
pub mod sink;
pub mod status;
pub mod streams;
pub mod synth;

pub use cli::main;
