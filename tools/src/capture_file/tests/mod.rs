//! Captures that are whole, cut at every byte, damaged at every byte, foreign, hostile and growing.

mod damage;
mod round_trip;

use super::*;
use colo_ring::host::Machine;
use std::io::Cursor;

/// An event that owns what it has.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Open(u16, String),
    Data(u16, Direction, Vec<u8>),
    End(u16, Direction, EndKind),
    Note(String),
    Finish(Totals),
}

impl Owned {
    fn event(&self) -> Event<'_> {
        match self {
            Self::Open(connection, label) => Event::Open {
                connection: ConnectionId(*connection),
                label,
            },
            Self::Data(connection, direction, bytes) => Event::Data {
                connection: ConnectionId(*connection),
                direction: *direction,
                bytes,
            },
            Self::End(connection, direction, how) => Event::End {
                connection: ConnectionId(*connection),
                direction: *direction,
                how: *how,
            },
            Self::Note(text) => Event::Note(text),
            Self::Finish(totals) => Event::Finish(*totals),
        }
    }

    fn of(event: Event<'_>) -> Self {
        match event {
            Event::Open { connection, label } => Self::Open(connection.0, label.to_owned()),
            Event::Data {
                connection,
                direction,
                bytes,
            } => Self::Data(connection.0, direction, bytes.to_vec()),
            Event::End {
                connection,
                direction,
                how,
            } => Self::End(connection.0, direction, how),
            Event::Note(text) => Self::Note(text.to_owned()),
            Event::Finish(totals) => Self::Finish(totals),
        }
    }
}

/// The same on every machine and at every time, so that a file's bytes follow from its events.
fn info() -> CaptureInfo {
    CaptureInfo {
        captured: "test".to_owned(),
        created_unix_ns: 1_700_000_000_000_000_000,
        primary: Some("made up".to_owned()),
        secondary: None,
        channels: Some(2),
        options: serde_json::json!({"seed": 1}),
        machine: Machine {
            cpu_model: "made up".to_owned(),
            cores_online: 4,
            cores_allowed: 2,
            kernel: "6.1".to_owned(),
            memory_bytes: 1 << 33,
            congestion_control: "cubic".to_owned(),
        },
    }
}

/// Where each block of a file begins, and where the file ends.
fn blocks(file: &[u8]) -> Vec<usize> {
    let length =
        |at: usize| usize::try_from(u32::from_le_bytes(file[at..at + 4].try_into().unwrap())).unwrap();
    let mut at = 16 + length(12) + 4;
    let mut begins = vec![at];
    while at < file.len() {
        at += block::HEADER_LEN + length(at + 4);
        begins.push(at);
    }
    begins
}

/// The same file in version 1.
fn as_version_1(file: &[u8]) -> Vec<u8> {
    let mut old = file.to_vec();
    let begins = blocks(file);
    old[8] = 1;
    let mut seal = |from: usize, to: usize| {
        let checksum = crc32c::crc32c(&old[from..to]);
        old[to..to + 4].copy_from_slice(&checksum.to_le_bytes());
    };
    seal(0, begins[0] - 4);
    for begin in &begins[..begins.len() - 1] {
        seal(*begin, begin + block::HEADER_LEN - 4);
    }
    old
}

/// Events at 0, 1, 2 … µs, each in a block of its own where `blocks` says so.
fn write(events: &[Owned], compression: Compression, blocks: bool) -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = CaptureWriter::new(&mut file, &info(), compression).unwrap();
    for (event, at) in events.iter().zip(0..) {
        writer.write(Duration::from_micros(at), event.event()).unwrap();
        if blocks {
            writer.flush().unwrap();
        }
    }
    writer.finish().unwrap();
    file
}

/// What was read, where it ended early, and the error that ended it.
struct Read {
    records: Vec<(Duration, Owned)>,
    tear: Option<Tear>,
    error: Option<CaptureError>,
}

impl Read {
    fn events(&self) -> Vec<Owned> {
        self.records.iter().map(|(_, event)| event.clone()).collect()
    }
}

fn read(file: &[u8]) -> Result<Read, CaptureError> {
    let mut reader = CaptureReader::new(Cursor::new(file))?;
    let mut records = Vec::new();
    let error = loop {
        match reader.next() {
            Ok(Some(record)) => records.push((record.at, Owned::of(record.event))),
            Ok(None) => break None,
            Err(error) => {
                let again = reader.next().unwrap_err();
                assert_eq!(error.to_string(), again.to_string(), "an error stays");
                break Some(error);
            }
        }
    };
    Ok(Read {
        records,
        tear: reader.is_torn(),
        error,
    })
}

/// A small session: two connections, both directions, text that compresses.
fn session() -> Vec<Owned> {
    use Direction::{ToPrimary, ToSecondary};
    vec![
        Owned::Open(0, "192.0.2.1:5000".to_owned()),
        Owned::Data(0, ToSecondary, b"QEVM".to_vec()),
        Owned::Open(1, "192.0.2.1:5001".to_owned()),
        Owned::Data(1, ToSecondary, b"page".repeat(40)),
        Owned::Note("the secondary took its time".to_owned()),
        Owned::Data(0, ToPrimary, vec![0; 4]),
        Owned::End(1, ToSecondary, EndKind::Eof),
        Owned::End(1, ToPrimary, EndKind::Eof),
        Owned::End(0, ToSecondary, EndKind::Reset),
    ]
}
