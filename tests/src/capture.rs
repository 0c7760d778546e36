//! Captured sessions of older QEMU primaries: raw bytes of every connection, and an index of when they came.
//!
//! They are large and not part of the repository: `COLO_RING_CAPTURES` names the directory that holds them, else
//! `../shared/captures` beside the repository's root is taken.

use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A piece of a captured session, in the order in which it was recorded.
#[derive(Debug, Clone, Copy)]
pub struct Chunk {
    /// The connection.
    pub connection: usize,
    /// Its first byte in the connection's bytes.
    pub begin: usize,
    /// Bytes.
    pub length: usize,
}

/// A captured session: what the primary sent.
#[derive(Debug)]
pub struct Capture {
    /// Bytes of each connection, from the primary to the secondary.
    pub connections: Vec<Vec<u8>>,
    /// The connection that is the main channel.
    pub main: usize,
    /// How they came.
    pub chunks: Vec<Chunk>,
}

#[derive(Deserialize)]
struct IndexLine {
    channel: usize,
    direction: String,
    length: usize,
}

impl Capture {
    /// Unpacks and reads the capture of that name.
    ///
    /// # Panics
    /// If it is not there: a test that needs it cannot pass.
    pub fn read(name: &str) -> Self {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/captures");
        let directory = std::env::var_os("COLO_RING_CAPTURES").map_or(beside, PathBuf::from);
        let archive = directory.join(format!("{name}.tar.zst"));
        assert!(
            archive.exists(),
            "{} is missing: set COLO_RING_CAPTURES to the directory of the captured sessions",
            archive.display()
        );
        let unpacked = std::env::temp_dir().join(format!("colo-ring-capture-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&unpacked).expect("a directory to unpack to");
        let tar = Command::new("tar")
            .arg("--zstd")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&unpacked)
            .status();
        assert!(
            tar.expect("tar is installed").success(),
            "unpacking {}",
            archive.display()
        );
        let capture = Self::read_directory(&unpacked.join(name));
        std::fs::remove_dir_all(&unpacked).expect("what was unpacked can be removed");
        capture
    }

    fn read_directory(directory: &Path) -> Self {
        let index = std::fs::read_to_string(directory.join("index.jsonl")).expect("an index");
        let mut connections: Vec<Vec<u8>> = Vec::new();
        let mut taken: Vec<usize> = Vec::new();
        let mut chunks = Vec::new();
        for line in index.lines() {
            let line: IndexLine = serde_json::from_str(line).expect("an index line");
            while connections.len() <= line.channel {
                let file = directory.join(format!("conn{}.p2s.bin", connections.len()));
                connections.push(std::fs::read(file).expect("a connection's bytes"));
                taken.push(0);
            }
            if line.direction == "p2s" && line.length > 0 {
                let begin = taken[line.channel];
                taken[line.channel] += line.length;
                chunks.push(Chunk {
                    connection: line.channel,
                    begin,
                    length: line.length,
                });
            }
        }
        let all = connections
            .iter()
            .zip(&taken)
            .all(|(bytes, taken)| bytes.len() == *taken);
        assert!(all, "the index covers every byte");
        let main = connections
            .iter()
            .position(|bytes| bytes.starts_with(b"QEVM"))
            .expect("a main channel");
        Self {
            connections,
            main,
            chunks,
        }
    }
}
