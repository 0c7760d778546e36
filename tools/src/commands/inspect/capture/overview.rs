//! The connections as they are in the file, read record by record.

use super::time_or_dash;
use crate::capture_file::{
    CaptureError, CaptureInfo, CaptureReader, ConnectionId, Direction, EndKind, Event, Record,
};
use crate::output::{printable, table};
use crate::units::nanoseconds;
use schemars::JsonSchema;
use serde::Serialize;
use std::path::Path;

/// Letters of a label that are kept: there may be 65536 connections.
const LABEL_MAX: usize = 120;

/// What is in the file, without a look at what it means.
#[derive(Serialize, JsonSchema)]
pub(super) struct Overview {
    /// What its header says of the recording.
    info: CaptureInfo,
    /// Records in it.
    records: u64,
    /// Its connections.
    connections: Vec<ConnectionOverview>,
    /// Whether the recording was ended in an orderly way.
    finished: bool,
    /// Where it ends early; null if it does not.
    torn: Option<String>,
}

/// A connection of the recording.
#[derive(Serialize, JsonSchema)]
struct ConnectionOverview {
    /// Its number.
    connection: ConnectionId,
    /// The ends of the connection.
    label: String,
    /// When it was opened, since the start of the capture.
    opened_ns: u64,
    /// What the primary sent.
    to_secondary: DirectionOverview,
    /// What the secondary sent.
    to_primary: DirectionOverview,
}

/// One direction of a connection.
#[derive(Default, Serialize, JsonSchema)]
struct DirectionOverview {
    /// Bytes.
    bytes: u64,
    /// Records.
    records: u64,
    /// Its first byte, since the start of the capture; null without one.
    first_ns: Option<u64>,
    /// Its last byte, since the start of the capture; null without one.
    last_ns: Option<u64>,
    /// How it ended; null if it did not.
    end: Option<EndKind>,
}

impl Overview {
    pub(super) fn read(path: &Path) -> Result<Self, CaptureError> {
        let mut reader = CaptureReader::open(path)?;
        let mut overview = Self {
            info: reader.info().clone(),
            records: 0,
            connections: Vec::new(),
            finished: false,
            torn: None,
        };
        while let Some(record) = reader.next()? {
            overview.take(&record);
        }
        overview.torn = reader.is_torn().map(|tear| tear.to_string());
        Ok(overview)
    }

    fn take(&mut self, record: &Record<'_>) {
        self.records += 1;
        let at_ns = nanoseconds(record.at);
        match record.event {
            Event::Open { connection, label } => self.connections.push(ConnectionOverview {
                connection,
                label: label.chars().take(LABEL_MAX).collect(),
                opened_ns: at_ns,
                to_secondary: DirectionOverview::default(),
                to_primary: DirectionOverview::default(),
            }),
            Event::Data {
                connection,
                direction,
                bytes,
            } => {
                if let Some(side) = self.side(connection, direction) {
                    side.bytes += bytes.len() as u64;
                    side.records += 1;
                    side.first_ns.get_or_insert(at_ns);
                    side.last_ns = Some(at_ns);
                }
            }
            Event::End {
                connection,
                direction,
                how,
            } => {
                if let Some(side) = self.side(connection, direction) {
                    side.end = Some(how);
                }
            }
            Event::Note(_) => {}
            Event::Finish(_) => self.finished = true,
        }
    }

    /// The reader has checked that it was opened.
    fn side(&mut self, connection: ConnectionId, direction: Direction) -> Option<&mut DirectionOverview> {
        let connection = self.connections.get_mut(usize::from(connection.0))?;
        Some(match direction {
            Direction::ToSecondary => &mut connection.to_secondary,
            Direction::ToPrimary => &mut connection.to_primary,
        })
    }

    pub(super) fn render(&self) -> String {
        let info = &self.info;
        let or_unknown =
            |side: &Option<String>| side.as_deref().map_or_else(|| "unknown".to_owned(), printable);
        let mut text = format!(
            "a capture ({}), {} records; primary {}, secondary {}\nmachine: {}\noptions: {}\n",
            printable(&info.captured),
            self.records,
            or_unknown(&info.primary),
            or_unknown(&info.secondary),
            printable(&info.machine.to_string()),
            printable(&info.options.to_string()),
        );
        if let Some(torn) = &self.torn {
            text.push_str(&format!("it ends early, {torn}\n"));
        }
        text.push('\n');
        let head = [
            "connection",
            "to secondary",
            "last s",
            "end",
            "to primary",
            "last s",
            "end",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for connection in &self.connections {
            let side = |side: &DirectionOverview| {
                let end = match side.end {
                    None => "open",
                    Some(EndKind::Eof) => "eof",
                    Some(EndKind::Reset) => "reset",
                };
                [side.bytes.to_string(), time_or_dash(side.last_ns), end.to_owned()]
            };
            let mut row = vec![format!(
                "{} {}",
                connection.connection,
                printable(&connection.label)
            )];
            row.extend(side(&connection.to_secondary));
            row.extend(side(&connection.to_primary));
            rows.push(row);
        }
        text.push_str(&table(&rows));
        text
    }
}
