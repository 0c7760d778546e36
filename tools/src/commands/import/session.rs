//! The connections of a recording, and the capture that they go to.

use super::ImportError;
use super::packets::Segment;
use super::reassembly::Reassembly;
use crate::capture_file::{CaptureWriter, ConnectionId, Direction, EndKind, Event, Totals};
use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

/// Makes the capture once the first connection shows when the session began and which addresses it is between.
pub(super) trait Create<W: Write>:
    FnMut(Duration, String, String) -> Result<CaptureWriter<W>, ImportError>
{
}

impl<W: Write, F: FnMut(Duration, String, String) -> Result<CaptureWriter<W>, ImportError>> Create<W> for F {}

/// Puts segments together to a capture.
pub(super) struct Importer<C, W: Write> {
    port: u16,
    create: C,
    output: Option<Output<W>>,
    /// The newest connection between two ends, by position in `connections`.
    by_ends: HashMap<(SocketAddr, SocketAddr), usize>,
    connections: Vec<Connection>,
    /// Segments of connections that had begun before.
    begun_before: u64,
}

struct Output<W: Write> {
    writer: CaptureWriter<W>,
    zero: Duration,
    last: Duration,
}

struct Connection {
    id: ConnectionId,
    label: String,
    /// Sequence number of the primary's SYN: another one is another connection.
    syn: u32,
    directions: [Reassembly; 2],
    ended: [bool; 2],
}

impl<W: Write> Output<W> {
    fn write(&mut self, at: Duration, event: Event<'_>) -> Result<(), ImportError> {
        // Several processors stamp packets, and not always in the order of the file.
        self.last = self.last.max(at.saturating_sub(self.zero));
        Ok(self.writer.write(self.last, event)?)
    }
}

impl<W: Write, C: Create<W>> Importer<C, W> {
    /// Takes connections to this port.
    pub(super) fn new(port: u16, create: C) -> Self {
        Self {
            port,
            create,
            output: None,
            by_ends: HashMap::new(),
            connections: Vec::new(),
            begun_before: 0,
        }
    }

    /// Takes the next segment of the file.
    pub(super) fn take(&mut self, segment: &Segment<'_>) -> Result<(), ImportError> {
        let direction = if segment.to.port() == self.port {
            Direction::ToSecondary
        } else if segment.from.port() == self.port {
            Direction::ToPrimary
        } else {
            return Ok(());
        };
        let ends = match direction {
            Direction::ToSecondary => (segment.from, segment.to),
            Direction::ToPrimary => (segment.to, segment.from),
        };
        if segment.syn && segment.acknowledged.is_none() && direction == Direction::ToSecondary {
            self.open(ends, segment)?;
        }
        let Some(&position) = self.by_ends.get(&ends) else {
            self.begun_before += 1;
            return Ok(());
        };
        let (Some(connection), Some(output)) = (self.connections.get_mut(position), &mut self.output) else {
            return Ok(());
        };
        if segment.cut > 0 {
            return Err(ImportError::Cut {
                packet: segment.packet,
                cut: segment.cut,
            });
        }
        connection.take(segment, direction, output)
    }

    fn open(&mut self, ends: (SocketAddr, SocketAddr), segment: &Segment<'_>) -> Result<(), ImportError> {
        let known = self
            .by_ends
            .get(&ends)
            .and_then(|position| self.connections.get(*position));
        if known.is_some_and(|connection| connection.syn == segment.sequence) {
            return Ok(());
        }
        let number = self.connections.len();
        let id = u16::try_from(number).map_err(|_| ImportError::TooManyConnections)?;
        let output = match &mut self.output {
            Some(output) => output,
            empty => empty.insert(Output {
                writer: (self.create)(segment.at, ends.0.ip().to_string(), ends.1.to_string())?,
                zero: segment.at,
                last: Duration::ZERO,
            }),
        };
        let connection = Connection {
            id: ConnectionId(id),
            label: ends.0.to_string(),
            syn: segment.sequence,
            directions: Default::default(),
            ended: [false; 2],
        };
        let open = Event::Open {
            connection: connection.id,
            label: &connection.label,
        };
        output.write(segment.at, open)?;
        self.connections.push(connection);
        self.by_ends.insert(ends, number);
        Ok(())
    }

    /// Ends the capture, after `error` or at the end of the file. Returns what it holds, what a reader must know, and what
    /// was missing, if anything was.
    ///
    /// # Errors
    /// If there is no capture, or it cannot be written.
    pub(super) fn finish(
        self,
        error: Option<ImportError>,
    ) -> Result<(Totals, Vec<String>, Option<ImportError>), ImportError> {
        let mut notes = Vec::new();
        if self.begun_before > 0 {
            notes.push(format!(
                "{} packets of connections that had begun before the recording are left out",
                self.begun_before
            ));
        }
        let Some(mut output) = self.output else {
            return Err(error.unwrap_or(ImportError::Nothing(self.port)));
        };
        let error = error.or_else(|| self.connections.iter().find_map(Connection::missing));
        if let Some(error) = &error {
            let (zero, last, text) = (output.zero, output.last, error.to_string());
            output.write(zero + last, Event::Note(&text))?;
        }
        let totals = output.writer.finish()?;
        Ok((totals, notes, error))
    }
}

impl Connection {
    fn take(
        &mut self,
        segment: &Segment<'_>,
        direction: Direction,
        output: &mut Output<impl Write>,
    ) -> Result<(), ImportError> {
        let (this, other) = match direction {
            Direction::ToSecondary => (0, 1),
            Direction::ToPrimary => (1, 0),
        };
        if self.ended[this] {
            return Ok(());
        }
        // A SYN counts as one byte before the first.
        let sequence = segment.sequence.wrapping_add(u32::from(segment.syn));
        if segment.syn {
            self.directions[this].begin(sequence);
        }
        if let Some(acknowledged) = segment.acknowledged {
            // Where the other side's SYN was not seen.
            if direction == Direction::ToSecondary && !segment.syn {
                self.directions[other].begin(acknowledged);
            }
            self.directions[other].acknowledge(acknowledged);
        }
        let connection = self.id;
        self.directions[this].take(sequence, segment.payload, |bytes| {
            let data = Event::Data {
                connection,
                direction,
                bytes,
            };
            output.write(segment.at, data)
        })?;
        if segment.fin {
            self.directions[this].end(sequence, segment.payload.len());
        }
        let how = match (segment.reset, self.directions[this].is_complete()) {
            (true, _) => EndKind::Reset,
            (false, true) => EndKind::Eof,
            (false, false) => return self.check(this),
        };
        self.ended[this] = true;
        let end = Event::End {
            connection,
            direction,
            how,
        };
        output.write(segment.at, end)
    }

    fn check(&self, direction: usize) -> Result<(), ImportError> {
        match self.missing() {
            Some(missing) if self.directions[direction].is_lost() => Err(missing),
            _ => Ok(()),
        }
    }

    /// The bytes that are missing of it.
    fn missing(&self) -> Option<ImportError> {
        let names = ["to the secondary", "to the primary"];
        let missing = self.directions.iter().zip(names).find_map(|(direction, name)| {
            let missing = direction.missing()?;
            Some((name, missing))
        });
        missing.map(|(direction, missing)| ImportError::Missing {
            connection: self.id.0,
            label: self.label.clone(),
            direction,
            begin: missing.start,
            end: missing.end,
        })
    }
}
