//! Captured sessions of older QEMU primaries: raw bytes of every connection, and an index of when they came.
//!
//! They are large and not part of the repository: `COLO_RING_CAPTURES` names the directory that holds them, else
//! `../shared/captures` beside the repository's root is taken.

use colo_ring_tools::capture_file::{
    CaptureInfo, CaptureWriter, Compression, ConnectionId, Direction, Event,
};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

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
    t_ns: u64,
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
        unpacked(name, Self::read_directory)
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

/// Unpacks the capture of that name for as long as `read` takes.
fn unpacked<T>(name: &str, read: impl FnOnce(&Path) -> T) -> T {
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
    let result = read(&unpacked.join(name));
    std::fs::remove_dir_all(&unpacked).expect("what was unpacked can be removed");
    result
}

/// Writes the capture of that name as a capture file.
///
/// # Panics
/// If it is not there or cannot be written.
pub fn write_capture_file(name: &str, path: &Path) {
    unpacked(name, |directory| {
        let info = CaptureInfo::now("prototype", serde_json::Value::Null);
        let mut writer = CaptureWriter::create(path, &info, Compression::None).expect("a new file");
        let index = std::fs::read_to_string(directory.join("index.jsonl")).expect("an index");
        let read = |connection: usize, direction: &str| {
            let file = directory.join(format!("conn{connection}.{direction}.bin"));
            std::fs::read(file).expect("a connection's bytes")
        };
        let mut bytes: Vec<[Vec<u8>; 2]> = Vec::new();
        let mut taken: Vec<[usize; 2]> = Vec::new();
        for line in index.lines() {
            let line: IndexLine = serde_json::from_str(line).expect("an index line");
            let connection = ConnectionId(u16::try_from(line.channel).expect("few connections"));
            let direction = match line.direction.as_str() {
                "open" => {
                    bytes.push(["p2s", "s2p"].map(|direction| read(line.channel, direction)));
                    taken.push([0; 2]);
                    let event = Event::Open {
                        connection,
                        label: "",
                    };
                    writer
                        .write(Duration::from_nanos(line.t_ns), event)
                        .expect("written");
                    continue;
                }
                "p2s" => Direction::ToSecondary,
                "s2p" => Direction::ToPrimary,
                _ => continue,
            };
            let begin = &mut taken[line.channel][direction.index()];
            let end = *begin + line.length;
            let bytes = &bytes[line.channel][direction.index()][std::mem::replace(begin, end)..end];
            let event = Event::Data {
                connection,
                direction,
                bytes,
            };
            writer
                .write(Duration::from_nanos(line.t_ns), event)
                .expect("written");
        }
        writer.finish().expect("finished");
    });
}
