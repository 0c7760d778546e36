//! Captures that are whole, cut at every byte, damaged at every byte, foreign, hostile and growing.

mod damage;
mod round_trip;

use super::*;
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

fn info() -> CaptureInfo {
    CaptureInfo {
        primary: Some("made up".to_owned()),
        channels: Some(2),
        ..CaptureInfo::now("test", serde_json::json!({"seed": 1}))
    }
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
