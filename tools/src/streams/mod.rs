//! A captured session in terms of the protocol: the kind of each connection, where the primary waits for which answer,
//! and where each checkpoint begins and ends on every connection.
//!
//! The engine's own session and wire code finds that from the captured bytes. The whole capture is held in memory, so
//! that replaying it waits only for the secondary. A capture that ends early can be used up to its last complete
//! checkpoint, and [`Streams::notes`] reports that.

mod answers;
mod channel;
mod flow;
mod main_channel;
#[cfg(test)]
pub(crate) mod tests;

pub use answers::{Answers, CheckpointAnswers};
pub use channel::{Channel, InitError, Packet};
pub use flow::{Chunk, Flow};

use crate::capture_file::{CaptureError, CaptureInfo, CaptureReader, ConnectionId, Direction, Event, Record};
use colo_ring::blocks::BlockTable;
use colo_ring::host::Machine;
use colo_ring::session::SessionMethod;
use colo_ring::units::ChannelId;
use colo_ring::wire::codec::Method;
use colo_ring::wire::stream::{MAIN_MAGIC, MULTIFD_MAGIC};
pub(crate) use main_channel::ends_initial_state;
use main_channel::{MainCheckpoint, MainIndex};
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// One captured connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its number in the capture.
    pub id: ConnectionId,
    /// The capture's name for its peer.
    pub label: String,
    /// What the primary sent.
    pub to_secondary: Flow,
    /// What the secondary sent.
    pub to_primary: Flow,
}

impl Connection {
    /// A connection without data.
    pub fn new(id: ConnectionId, label: &str) -> Self {
        Self {
            id,
            label: label.to_owned(),
            to_secondary: Flow::default(),
            to_primary: Flow::default(),
        }
    }
}

/// A captured session.
#[derive(Debug)]
pub struct Streams {
    /// The capture file's description, if it was read from a file.
    pub info: Option<CaptureInfo>,
    /// The main channel.
    pub main: Connection,
    /// The multifd channels, by their numbers. None: plain mode.
    pub channels: Vec<Channel>,
    /// The versioned machine type of the primary.
    pub machine_type: String,
    /// Whether the primary opened the return path, so that PONG and SHUT come before READY.
    pub return_path: bool,
    /// Values of the PONGs that come before READY: the primary reads them there, and waits for none.
    pub pongs: Vec<u32>,
    /// The guest's RAM blocks.
    pub blocks: Arc<BlockTable>,
    /// Precopy.
    pub precopy: Precopy,
    /// The complete checkpoints, in order. May be none.
    pub checkpoints: Vec<Checkpoint>,
    /// What the captured secondary answered.
    pub answers: Answers,
    /// What was left out of the capture, and why.
    pub notes: Vec<String>,
    /// Where writes of the primary end on the main channel, ascending.
    pieces: Vec<usize>,
    /// The main channel's part of each of `checkpoints`.
    on_main: Vec<MainCheckpoint>,
}

/// What comes before the first checkpoint, up to the wait for CHECKPOINT_READY.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Precopy {
    /// On the main channel.
    pub main: Range<usize>,
    /// On each channel, the packets by number.
    pub packets: Vec<Range<usize>>,
}

/// A checkpoint of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// CHECKPOINT_REQUEST on the main channel, after which the primary waits for REPLY.
    pub request: Range<usize>,
    /// VMSTATE_SEND to the last byte of device state, after which it waits for RECEIVED and LOADED.
    pub transfer: Range<usize>,
    /// The device state in it.
    pub device_state: Range<usize>,
    /// On each channel, the packets by number.
    pub packets: Vec<Range<usize>>,
    /// Sync points.
    pub syncs: u64,
    /// Pages with content, on all connections.
    pub pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Bytes that the primary sends for it, on all connections.
    pub bytes: u64,
    /// Those of them that hold the content of pages, compressed or not.
    pub payload_bytes: u64,
    /// When the request came, since the start of the capture.
    pub at: Duration,
}

/// Why a capture cannot be used.
#[derive(Debug, Error)]
pub enum StreamsError {
    /// The file is damaged or not a capture.
    #[error(transparent)]
    File(#[from] CaptureError),
    /// It cannot be held in memory.
    #[error(
        "the capture has more than {limit_bytes} bytes: half of this machine's memory, and it is held there whole"
    )]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// No connection is a main channel.
    #[error(
        "no connection of the capture is a migration's main channel: none begins with \"QEVM\" ({0} connections). \
         With TLS the capture must be taken where the session is in clear"
    )]
    NoMain(usize),
    /// More than one connection is.
    #[error("the capture holds {0} sessions (main channels on {1:?}); capture one session at a time")]
    ManyMains(usize, Vec<ConnectionId>),
    /// A connection's init packet is wrong.
    #[error("connection {connection}: {reason}")]
    Init {
        /// The connection.
        connection: ConnectionId,
        /// What is wrong.
        reason: InitError,
    },
    /// Channels are missing or duplicated.
    #[error(
        "the multifd channels are numbered {0:?}: they must be 0 to N-1, each once; was the capture begun late?"
    )]
    Channels(Vec<u8>),
    /// It ends in precopy, or does not hold a session.
    #[error("the capture has no complete precopy, so that it cannot be played: {0}")]
    NoPrecopy(String),
    /// Its checkpoints cannot be played again in the same session.
    #[error(
        "the checkpoints cannot be played again within a session: {0}; play at most those that the capture has, and \
         whole sessions again with --repeat"
    )]
    NotRepeatable(&'static str),
    /// An error in this program.
    #[error("{0}: this is a bug of colo-ring")]
    Internal(&'static str),
}

impl Streams {
    /// Reads a capture file and finds its session.
    ///
    /// # Errors
    /// See [`StreamsError`].
    pub fn load(path: &Path) -> Result<Self, StreamsError> {
        Self::read(CaptureReader::open(path)?)
    }

    /// Reads a capture and finds its session.
    ///
    /// # Errors
    /// See [`StreamsError`].
    pub fn read<R: Read + Seek>(mut reader: CaptureReader<R>) -> Result<Self, StreamsError> {
        let limit_bytes = Machine::read().memory_bytes / 2;
        let mut connections = Vec::new();
        let (mut notes, mut bytes_read) = (Vec::new(), 0);
        while let Some(record) = reader.next()? {
            if let Event::Data { bytes, .. } = record.event {
                bytes_read += bytes.len() as u64;
                if bytes_read > limit_bytes {
                    return Err(StreamsError::TooLarge { limit_bytes });
                }
            }
            take(&mut connections, &mut notes, &record);
        }
        notes.extend(
            reader
                .is_torn()
                .map(|tear| format!("the file ends early, {tear}")),
        );
        let mut streams = Self::new(connections)?;
        notes.append(&mut streams.notes);
        streams.notes = notes;
        streams.info = Some(reader.info().clone());
        Ok(streams)
    }

    /// Finds the session in these connections.
    ///
    /// # Errors
    /// See [`StreamsError`].
    pub fn new(connections: Vec<Connection>) -> Result<Self, StreamsError> {
        let mut notes = Vec::new();
        let (main, channels) = sort_connections(connections, &mut notes)?;
        let count = u8::try_from(channels.len())
            .map_err(|_| StreamsError::Channels(channels.iter().map(|channel| channel.id().0).collect()))?;
        let index = MainIndex::read(&main.to_secondary, count);
        notes.extend(index.stopped.iter().cloned());
        notes.extend(
            channels
                .iter()
                .filter_map(|channel| channel.stopped().map(str::to_owned)),
        );
        let syncs = channels.iter().map(Channel::syncs).min().unwrap_or(u64::MAX);
        let (ready, blocks) = match (index.ready, index.blocks) {
            (Some(ready), Some(blocks)) if ready.markers <= syncs => (ready, blocks),
            (Some(ready), Some(_)) => {
                let missing = format!("{} syncs on main, {syncs} on a channel", ready.markers);
                notes.push(missing);
                return Err(StreamsError::NoPrecopy(notes.join("; ")));
            }
            _ => return Err(StreamsError::NoPrecopy(notes.join("; "))),
        };
        let precopy = Precopy {
            main: 0..ready.position,
            packets: channels
                .iter()
                .map(|channel| channel.between(0, ready.markers))
                .collect(),
        };
        let answers = Answers::read(&main.to_primary, index.return_path);
        let mut streams = Self {
            info: None,
            main,
            channels,
            machine_type: index.machine_type,
            return_path: index.return_path,
            pongs: index.pongs,
            blocks,
            precopy,
            checkpoints: Vec::new(),
            answers,
            notes,
            pieces: index.pieces,
            on_main: index.checkpoints,
        };
        streams.put_checkpoints_together(ready.markers, syncs);
        Ok(streams)
    }

    /// Collects the checkpoints that are complete on all connections.
    fn put_checkpoints_together(&mut self, mut markers: u64, syncs: u64) {
        let whole = self
            .on_main
            .partition_point(|checkpoint| checkpoint.markers <= syncs);
        if whole < self.on_main.len() {
            self.notes.push(format!(
                "checkpoint {} is complete on the main channel, but not on all others",
                whole + 1
            ));
            self.on_main.truncate(whole);
        }
        for on_main in &self.on_main {
            let between = |channel: &Channel| channel.between(markers, on_main.markers);
            let packets: Vec<_> = self.channels.iter().map(between).collect();
            let mut checkpoint = Checkpoint {
                request: on_main.request.clone(),
                transfer: on_main.transfer.clone(),
                device_state: on_main.device_state..on_main.transfer.end,
                packets,
                syncs: on_main.markers - markers,
                pages: on_main.pages,
                zero_pages: on_main.zero_pages,
                payload_bytes: on_main.payload_bytes,
                bytes: (on_main.request.len() + on_main.transfer.len()) as u64,
                at: self
                    .main
                    .to_secondary
                    .at(on_main.request.start)
                    .unwrap_or_default(),
            };
            for (channel, numbers) in self.channels.iter().zip(&checkpoint.packets) {
                for number in numbers.clone() {
                    let packet = channel.packets()[number];
                    checkpoint.pages += u64::from(packet.normal);
                    checkpoint.zero_pages += u64::from(packet.zero);
                    checkpoint.bytes += channel.packet_bytes(number).len() as u64;
                    checkpoint.payload_bytes += channel.payload(number).len() as u64;
                }
            }
            markers = on_main.markers;
            self.checkpoints.push(checkpoint);
        }
    }

    /// The pieces in which the primary writes a part of the main channel.
    pub fn pieces(&self, part: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let first = self.pieces.partition_point(|end| *end <= part.start);
        let last = self.pieces.partition_point(|end| *end < part.end);
        let ends = self.pieces[first..last].iter().copied().chain([part.end]);
        let mut begin = part.start;
        ends.map(move |end| std::mem::replace(&mut begin, end)..end)
            .filter(|piece| !piece.is_empty())
    }

    /// How pages are compressed; `None` if no channel carries a page with content.
    pub fn method(&self) -> Option<Method> {
        self.channels.iter().find_map(Channel::method)
    }

    /// How the session makes its pages smaller, as far as it shows: the method of the multifd channels, `xbzrle`, or
    /// `none`.
    pub fn compression(&self) -> &'static str {
        let has_deltas = self.on_main.iter().any(|checkpoint| checkpoint.has_deltas);
        match self.method() {
            Some(method) => method.name(),
            None if has_deltas => "xbzrle",
            None => Method::None.name(),
        }
    }

    /// When precopy began, since the start of the capture.
    pub fn began(&self) -> Duration {
        self.main.to_secondary.at(0).unwrap_or_default()
    }

    /// When the primary's guest resumed after precopy: READY, or the byte before it if the capture has no answer.
    pub fn ready_at(&self) -> Duration {
        let last = self.main.to_secondary.at(self.precopy.main.end - 1);
        self.answers.ready.or(last).unwrap_or_default()
    }

    /// What differs when all checkpoints are replayed after the last one: a record with CONTINUE refers to the block of the
    /// last page record, which is then another one. Returns the checkpoint whose transfer differs, if there is one.
    ///
    /// # Errors
    /// If they cannot be played again.
    pub fn again(&self) -> Result<Option<Changed>, StreamsError> {
        if self.on_main.is_empty() {
            return Err(StreamsError::NotRepeatable("the capture has none"));
        }
        if !matches!(self.method(), None | Some(Method::None)) {
            return Err(StreamsError::NotRepeatable(
                "their pages are compressed, in one stream for the whole session",
            ));
        }
        if self.on_main.iter().any(|checkpoint| checkpoint.has_deltas) {
            return Err(StreamsError::NotRepeatable(
                "they have XBZRLE pages, which change what was sent before",
            ));
        }
        let last = self.on_main.last().and_then(|checkpoint| checkpoint.last_block);
        let mut with_pages = self.on_main.iter().enumerate();
        let Some((number, first)) =
            with_pages.find_map(|(number, checkpoint)| Some((number, checkpoint.first_page?)))
        else {
            return Ok(None);
        };
        if !first.continues || last == Some(first.block) {
            return Ok(None);
        }
        let transfer = &self.on_main[number].transfer;
        let bytes = self.main.to_secondary.bytes();
        let (bytes, longer) = main_channel::with_block_named(bytes, transfer, &first, &self.blocks)?;
        let moved = |end: usize| if end > first.position { end + longer } else { end } - transfer.start;
        let pieces = self
            .pieces(transfer)
            .map(|piece| moved(piece.start)..moved(piece.end))
            .collect();
        Ok(Some(Changed {
            checkpoint: number,
            bytes,
            pieces,
        }))
    }
}

/// A transfer on the main channel whose bytes are not those of the capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Position of the checkpoint among all.
    pub checkpoint: usize,
    /// The transfer's bytes.
    pub bytes: Vec<u8>,
    /// The pieces in which they are written.
    pub pieces: Vec<Range<usize>>,
}

/// Adds a record to its connection. The reader has checked that the connection was opened.
fn take(connections: &mut Vec<Connection>, notes: &mut Vec<String>, record: &Record<'_>) {
    match record.event {
        Event::Open { connection, label } => connections.push(Connection::new(connection, label)),
        Event::Data {
            connection,
            direction,
            bytes,
        } => {
            if let Some(connection) = connections.get_mut(usize::from(connection.0)) {
                let flow = match direction {
                    Direction::ToSecondary => &mut connection.to_secondary,
                    Direction::ToPrimary => &mut connection.to_primary,
                };
                flow.push(record.at, bytes);
            }
        }
        Event::Note(note) => notes.push(format!("the recorder noted: {note}")),
        // How a connection ended does not matter: its bytes show what is complete.
        Event::End { .. } | Event::Finish(_) => {}
    }
}

/// Separates the main channel and the multifd channels, sorted, from other connections.
fn sort_connections(
    connections: Vec<Connection>,
    notes: &mut Vec<String>,
) -> Result<(Connection, Vec<Channel>), StreamsError> {
    let count = connections.len();
    let (mut mains, mut channels) = (Vec::new(), Vec::new());
    let method = SessionMethod::default();
    for connection in connections {
        let (number, bytes) = (connection.id, connection.to_secondary.bytes());
        if bytes.starts_with(&MAIN_MAGIC) {
            mains.push(connection);
        } else if bytes.starts_with(&MULTIFD_MAGIC) {
            let channel = Channel::new(connection, &method);
            channels.push(channel.map_err(|reason| StreamsError::Init {
                connection: number,
                reason,
            })?);
        } else {
            notes.push(format!(
                "connection {number} ({} bytes) is no part of a migration and is left out",
                bytes.len()
            ));
        }
    }
    let numbers: Vec<_> = mains.iter().map(|main| main.id).collect();
    let (Some(main), true) = (mains.pop(), mains.is_empty()) else {
        return Err(match numbers.len() {
            0 => StreamsError::NoMain(count),
            many => StreamsError::ManyMains(many, numbers),
        });
    };
    channels.sort_by_key(Channel::id);
    let numbered = channels.iter().enumerate();
    if numbered
        .clone()
        .any(|(position, channel)| u8::try_from(position).map(ChannelId) != Ok(channel.id()))
    {
        let ids = channels.iter().map(|channel| channel.id().0).collect();
        return Err(StreamsError::Channels(ids));
    }
    Ok((main, channels))
}
