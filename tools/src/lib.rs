//! The command `colo-ring` as a library: `commands` has one file or folder a subcommand, everything beside it is what they
//! share, and what tests and benches use.

pub mod capture_file;
mod cli;
pub mod commands;
pub mod comparison;
mod configuration;
mod control;
mod cores;
pub mod flight;
mod guest_disks;
pub mod hlog;
pub mod html_page;
mod json_schema;
mod log;
mod metrics_server;
pub mod nbd;
pub mod net;
pub mod options;
pub mod output;
mod own_program;
pub mod page_compression;
pub mod primary;
pub mod qmp;
pub mod run_file;
mod service;
mod session_text;
mod signals;
mod stderr;
pub mod streams;
#[cfg(test)]
mod test_status;
pub mod tls;
mod units;

pub use cli::{command_line, main};
pub use json_schema::json_schemas;
