//! Records as bytes.

use super::{ConnectionId, DATA_MAX, Direction, EndKind, Event, Record, RecordError, TEXT_MAX, Totals};
use std::time::Duration;

/// Bytes of a record before its content.
pub(super) const HEADER_LEN: usize = 20;

/// Bytes of the header that its checksum covers, together with the content.
const CHECKED_LEN: usize = 16;

const OPEN: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const NOTE: u8 = 4;
const FINISH: u8 = 5;

const TOTALS_LEN: usize = 32;

/// The fields of a header that differ by kind.
struct Fields {
    kind: u8,
    direction: u8,
    connection: u16,
}

/// Appends a record. Its content must be within the format's limits.
pub(super) fn encode(out: &mut Vec<u8>, record: &Record<'_>) {
    let fields = |kind, connection: ConnectionId, direction: u8| Fields {
        kind,
        direction,
        connection: connection.0,
    };
    let none = ConnectionId(0);
    match record.event {
        Event::Open { connection, label } => {
            append(out, &fields(OPEN, connection, 0), record.at, label.as_bytes());
        }
        Event::Data {
            connection,
            direction,
            bytes,
        } => append(out, &fields(DATA, connection, code(direction)), record.at, bytes),
        Event::End {
            connection,
            direction,
            how,
        } => {
            let how = match how {
                EndKind::Eof => 0,
                EndKind::Reset => 1,
            };
            append(out, &fields(END, connection, code(direction)), record.at, &[how]);
        }
        Event::Note(text) => append(out, &fields(NOTE, none, 0), record.at, text.as_bytes()),
        Event::Finish(totals) => append(out, &fields(FINISH, none, 0), record.at, &encode_totals(totals)),
    }
}

fn code(direction: Direction) -> u8 {
    match direction {
        Direction::ToSecondary => 0,
        Direction::ToPrimary => 1,
    }
}

fn append(out: &mut Vec<u8>, fields: &Fields, at: Duration, content: &[u8]) {
    let length = u32::try_from(content.len()).expect("content within the format's limits");
    // 584 years.
    let at_ns = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
    let begin = out.len();
    out.extend_from_slice(&[fields.kind, fields.direction]);
    out.extend_from_slice(&fields.connection.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&at_ns.to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&out[begin..]), content);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(content);
}

fn encode_totals(totals: Totals) -> [u8; TOTALS_LEN] {
    let mut bytes = [0; TOTALS_LEN];
    let numbers = [
        totals.records,
        totals.connections,
        totals.bytes_to_secondary,
        totals.bytes_to_primary,
    ];
    for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn decode_totals(content: &[u8]) -> Option<Totals> {
    let content: &[u8; TOTALS_LEN] = content.try_into().ok()?;
    let (numbers, _) = content.as_chunks::<8>();
    let number = |place: usize| u64::from_le_bytes(numbers[place]);
    Some(Totals {
        records: number(0),
        connections: number(1),
        bytes_to_secondary: number(2),
        bytes_to_primary: number(3),
    })
}

/// Reads the record at the start of `input`, and how many bytes it takes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn decode(input: &[u8]) -> Result<(Record<'_>, usize), RecordError> {
    let left = input.len();
    let header = input.split_first_chunk::<HEADER_LEN>();
    let (header, rest) = header.ok_or(RecordError::Header { left })?;
    let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let content = usize::try_from(length).ok().and_then(|length| rest.get(..length));
    let content = content.ok_or(RecordError::Content { left, length })?;
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&header[..CHECKED_LEN]), content);
    if checksum.to_le_bytes() != header[CHECKED_LEN..] {
        return Err(RecordError::Checksum);
    }
    let at = u64::from_le_bytes([
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
    ]);
    let record = Record {
        at: Duration::from_nanos(at),
        event: event(header, content)?,
    };
    Ok((record, HEADER_LEN + content.len()))
}

fn event<'a>(header: &[u8; HEADER_LEN], content: &'a [u8]) -> Result<Event<'a>, RecordError> {
    let connection = ConnectionId(u16::from_le_bytes([header[2], header[3]]));
    let direction = || match header[1] {
        0 => Ok(Direction::ToSecondary),
        1 => Ok(Direction::ToPrimary),
        other => Err(RecordError::Direction(other)),
    };
    match header[0] {
        OPEN => Ok(Event::Open {
            connection,
            label: text(content)?,
        }),
        DATA if content.len() > DATA_MAX => Err(RecordError::DataLength(content.len())),
        DATA => Ok(Event::Data {
            connection,
            direction: direction()?,
            bytes: content,
        }),
        END => Ok(Event::End {
            connection,
            direction: direction()?,
            how: match content {
                [0] => EndKind::Eof,
                [1] => EndKind::Reset,
                _ => return Err(RecordError::EndLength(content.len())),
            },
        }),
        NOTE => text(content).map(Event::Note),
        FINISH => decode_totals(content)
            .map(Event::Finish)
            .ok_or(RecordError::TotalsLength(content.len())),
        other => Err(RecordError::Kind(other)),
    }
}

fn text(content: &[u8]) -> Result<&str, RecordError> {
    if content.len() > TEXT_MAX {
        return Err(RecordError::TextLength(content.len()));
    }
    Ok(str::from_utf8(content)?)
}
