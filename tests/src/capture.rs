//! Captured sessions of older QEMU primaries, from `tests/captures`: what is in them stands in the README there.
//! `COLO_RING_CAPTURES` names another directory with files of the same names.

use colo_ring_tools::capture_file::{CaptureReader, Direction, Event};
use std::path::{Path, PathBuf};

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

impl Capture {
    /// Reads the capture of that name.
    ///
    /// # Panics
    /// If it is missing or damaged: a test that needs it cannot pass.
    pub fn read(name: &str) -> Self {
        Self::load(&capture_file(name))
    }

    /// Reads a capture file.
    ///
    /// # Panics
    /// As of [`Capture::read`].
    pub fn load(file: &Path) -> Self {
        let mut reader = CaptureReader::open(file).expect("a capture file");
        let mut connections: Vec<Vec<u8>> = Vec::new();
        let mut chunks = Vec::new();
        while let Some(record) = reader.next().expect("an undamaged capture") {
            match record.event {
                Event::Open { .. } => connections.push(Vec::new()),
                Event::Data {
                    connection,
                    direction: Direction::ToSecondary,
                    bytes,
                } => {
                    let connection = usize::from(connection.0);
                    chunks.push(Chunk {
                        connection,
                        begin: connections[connection].len(),
                        length: bytes.len(),
                    });
                    connections[connection].extend_from_slice(bytes);
                }
                _ => {}
            }
        }
        assert!(reader.is_torn().is_none(), "{} is not complete", file.display());
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

/// The capture file of that name.
pub fn capture_file(name: &str) -> PathBuf {
    let in_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("captures");
    let directory = std::env::var_os("COLO_RING_CAPTURES").map_or(in_tree, PathBuf::from);
    directory.join(format!("{name}.cap"))
}
