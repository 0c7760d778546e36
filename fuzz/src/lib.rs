//! What the targets do with an input. The test `fuzz_corpus` of the tools does the same with the corpora.
//!
//! Several inputs in one (the channels of a session, the files of a directory) are [pieces].

mod directory;
mod files;
mod pages;
pub mod pieces;
mod session;

pub use directory::{DISK_FILES, RAM_FILES};

/// Takes an input, and returns how much of it was valid: pages, messages, records, steps of a handshake.
pub type Target = fn(&[u8]) -> usize;

/// The targets by their names.
pub const TARGETS: [(&str, Target); 15] = [
    ("capture", files::capture),
    ("channel", session::channel),
    ("control", colo_ring::receiver::fuzz::control),
    ("disk_log", directory::disk_log),
    ("hlog", files::hlog),
    ("link", colo_ring::receiver::fuzz::link),
    ("nbd", nbd),
    ("page_deflate", pages::page_deflate),
    ("pcap", colo_ring_tools::commands::import::fuzz),
    ("ram_dir", directory::ram_dir),
    ("run_file", files::run_file),
    ("session", session::session),
    ("xbzrle", pages::delta),
    ("zlib", pages::zlib),
    ("zstd", pages::zstd),
];

/// What a client of a disk sends: the handshake, and requests behind it.
fn nbd(input: &[u8]) -> usize {
    let (steps, requests) = colo_ring::nbd::fuzz(input);
    steps + requests
}
