//! What all forwarded connections share: the recording, the measurement, and what is known of each.

use super::delay::{Delays, Passed};
use super::payload::MethodSearch;
use super::recorder::Recorder;
use crate::capture_file::{ConnectionId, Direction, EndKind};
use crate::net::Address;
use crate::output::tell;
use colo_ring::wire::codec::Method;
use colo_ring::wire::stream::{ChannelKind, StreamHeader, classify};
use schemars::JsonSchema;
use serde::Serialize;
use std::cell::RefCell;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// More than a stream's header and configuration have.
const HEADER_MAX: usize = 2048;

/// For a stream with its guest's UUID.
const DISKS_ARE_NOT_HERE: &str = "the stream has its guest's UUID, as `colo-ring protect` asks for where disks are mirrored to \
     the receiver: what the guest writes to disks does not pass here, so it is not in the recording";

/// How far the end was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// Not at all.
    Record,
    /// End the recording; connections go on.
    StopRecording,
    /// Close the connections, too.
    Cut,
}

/// What a connection turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A main channel.
    Main,
    /// A multifd channel.
    Multifd,
    /// Something else, or encrypted, or silent.
    Unknown,
}

/// A connection, for the report.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Connection {
    /// Its number in the capture.
    pub connection: ConnectionId,
    /// The primary's end.
    pub from: String,
    /// What it is.
    pub kind: Kind,
    /// Bytes forwarded to the secondary.
    pub bytes_to_secondary: u64,
    /// Bytes forwarded to the primary.
    pub bytes_to_primary: u64,
    /// How its pages are compressed; null before its first payload, and where it is no multifd channel.
    pub compression: Option<Method>,
    /// How each direction ended, the one to the secondary first; null while it goes on.
    pub ends: [Option<EndKind>; 2],
    /// Its first bytes, until its kind is known.
    #[serde(skip)]
    first: Vec<u8>,
    /// The stream's header as far as it has come; none once it is known, or is none.
    #[serde(skip)]
    header: Option<Vec<u8>>,
    /// Looks for `compression`; none once that is over.
    #[serde(skip)]
    search: Option<MethodSearch>,
}

/// Progress, for another thread to show.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes to the secondary.
    pub to_secondary: AtomicU64,
    /// Checkpoints.
    pub checkpoints: AtomicU64,
}

/// The session, on the thread that forwards.
pub(super) struct Session {
    pub(super) to: Address,
    /// Whether sockets are waited for with io_uring.
    pub(super) uring: bool,
    pub(super) recorder: Recorder,
    pub(super) delays: RefCell<Delays>,
    pub(super) connections: RefCell<Vec<Connection>>,
    pub(super) progress: Arc<Progress>,
}

impl Session {
    /// A number for a new connection; none if there have been as many as a capture takes.
    pub(super) fn open(&self, from: &str) -> Option<ConnectionId> {
        let mut connections = self.connections.borrow_mut();
        let Ok(number) = u16::try_from(connections.len()) else {
            tell(&format!(
                "warning: {from}: refused: a capture takes 65536 connections"
            ));
            return None;
        };
        let connection = ConnectionId(number);
        connections.push(Connection {
            connection,
            from: from.to_owned(),
            kind: Kind::Unknown,
            bytes_to_secondary: 0,
            bytes_to_primary: 0,
            compression: None,
            ends: [None; 2],
            first: Vec::new(),
            header: Some(Vec::new()),
            search: Some(MethodSearch::default()),
        });
        self.recorder.open(connection, from.to_owned());
        Some(connection)
    }

    /// Bytes have gone through.
    pub(super) fn passed(
        &self,
        connection: ConnectionId,
        direction: Direction,
        bytes: Vec<u8>,
        read_at: Instant,
        forwarded_at: Instant,
    ) {
        let count = bytes.len() as u64;
        let mut delays = self.delays.borrow_mut();
        let mut is_found_named = false;
        self.with(connection, |connection| match direction {
            Direction::ToSecondary => {
                connection.bytes_to_secondary += count;
                if connection.is_found_main(&bytes) {
                    delays.found_main(connection.connection);
                }
                is_found_named = connection.is_found_named(&bytes);
                connection.look_for_method(&bytes);
            }
            Direction::ToPrimary => connection.bytes_to_primary += count,
        });
        if is_found_named {
            tell(&format!("warning: {DISKS_ARE_NOT_HERE}"));
            self.recorder.note(DISKS_ARE_NOT_HERE.to_owned());
        }
        delays.passed(&Passed {
            connection,
            direction,
            bytes: &bytes,
            read_at,
            forwarded_at,
        });
        if direction == Direction::ToSecondary {
            self.progress.to_secondary.fetch_add(count, Ordering::Relaxed);
        }
        self.progress
            .checkpoints
            .store(delays.checkpoints(), Ordering::Relaxed);
        // READY itself is waited for: it belongs to what came before.
        self.recorder.data(read_at, connection, direction, bytes);
        if delays.is_protected() {
            self.recorder.guest_is_protected();
        }
    }

    /// One direction has ended.
    pub(super) fn ended(&self, connection: ConnectionId, direction: Direction, how: EndKind) {
        self.with(connection, |connection| {
            connection.ends[direction.index()] = Some(how)
        });
        self.recorder.end(connection, direction, how);
    }

    /// The secondary could not be connected to, so the connection was reset.
    pub(super) fn refused(&self, connection: ConnectionId, error: &io::Error) {
        let text = format!(
            "connection {connection} was reset: no connection to {}: {error}; is the secondary listening there?",
            self.to
        );
        tell(&format!("warning: {text}"));
        self.recorder.note(text);
        for direction in Direction::ALL {
            self.ended(connection, direction, EndKind::Reset);
        }
    }

    /// Whether a primary has been here.
    pub(super) fn had_primary(&self) -> bool {
        let connections = self.connections.borrow();
        connections.iter().any(|connection| connection.kind == Kind::Main)
    }

    fn with(&self, connection: ConnectionId, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = self.connections.borrow_mut().get_mut(usize::from(connection.0)) {
            change(connection);
        }
    }
}

impl Connection {
    /// Looks at its first bytes. Whether they make it a main channel just now.
    fn is_found_main(&mut self, bytes: &[u8]) -> bool {
        let missing = 4 - self.first.len();
        if missing == 0 {
            return false;
        }
        self.first.extend_from_slice(&bytes[..missing.min(bytes.len())]);
        let Ok(first) = <[u8; 4]>::try_from(&self.first[..]) else {
            return false;
        };
        self.kind = match classify(first) {
            Ok(ChannelKind::Main) => Kind::Main,
            Ok(ChannelKind::Multifd) => Kind::Multifd,
            Err(_) => Kind::Unknown,
        };
        self.kind == Kind::Main
    }

    /// Looks for the first payload of a multifd channel.
    fn look_for_method(&mut self, bytes: &[u8]) {
        if let Some(search) = &mut self.search
            && let ControlFlow::Break(method) = search.look(bytes)
        {
            self.search = None;
            self.compression = method;
        }
    }

    /// Looks for a stream's header. Whether it is complete just now, and has the guest's UUID.
    fn is_found_named(&mut self, bytes: &[u8]) -> bool {
        let Some(header) = &mut self.header else {
            return false;
        };
        let room = HEADER_MAX - header.len();
        header.extend_from_slice(&bytes[..room.min(bytes.len())]);
        let parsed = StreamHeader::parse(header);
        if parsed == Ok(None) && header.len() < HEADER_MAX {
            return false;
        }
        self.header = None;
        matches!(parsed, Ok(Some((StreamHeader { uuid: Some(_), .. }, _))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a connection with these bytes, which come one by one, is found to name its guest.
    fn times_named(bytes: &[u8]) -> usize {
        let mut connection = Connection {
            connection: ConnectionId(0),
            from: String::new(),
            kind: Kind::Unknown,
            bytes_to_secondary: 0,
            bytes_to_primary: 0,
            compression: None,
            ends: [None; 2],
            first: Vec::new(),
            header: Some(Vec::new()),
            search: Some(MethodSearch::default()),
        };
        let found = bytes.chunks(1).filter(|byte| connection.is_found_named(byte));
        found.count()
    }

    #[test]
    fn a_stream_that_names_its_guest_is_found() {
        for (uuid, times) in [(None, 0), (Some([7; 16]), 1)] {
            let header = StreamHeader {
                machine_type: "pc-q35-11.1".to_owned(),
                target_page_bits: true,
                capabilities: false,
                uuid,
            };
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            bytes.extend([0; 100]);
            assert_eq!(times_named(&bytes), times);
        }
        assert_eq!(times_named(&[0; 2 * HEADER_MAX]), 0);
        // A header that never ends.
        let endless = [b"QEVM\0\0\0\x03\x07".as_slice(), &[0xff; 2 * HEADER_MAX]].concat();
        assert_eq!(times_named(&endless), 0);
    }
}
