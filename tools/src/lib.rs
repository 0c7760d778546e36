//! The command `colo-ring` as a library: `commands` has one file or folder a subcommand, everything beside it is what they
//! share, and what tests and benches use.

pub mod capture_file;
mod cli;
pub mod commands;
pub mod comparison;
mod control;
mod cores;
mod guest_disks;
pub mod hlog;
pub mod html_page;
pub mod nbd;
pub mod net;
pub mod options;
pub mod output;
pub mod page_compression;
pub mod primary;
pub mod qmp;
pub mod run_file;
mod session_text;
mod signals;
mod stderr;
pub mod streams;
mod units;

pub use cli::main;
