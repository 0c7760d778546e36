//! The primary's connections: opening them, and the main channel with its buffer.

use super::SynthError;
use super::recording::{RecordedConnection, Recording};
use crate::net::{Address, Socket};
use colo_ring::wire::Parsed;
use colo_ring::wire::colo::Message;
use colo_ring::wire::return_path::RpMessage;
use std::fmt::Debug;
use std::io::{self, IoSlice, Read};
use std::time::Duration;

/// Where a session goes.
pub(super) enum Destination<'a> {
    Secondary(&'a Address),
    Recording(&'a Recording),
}

impl Destination<'_> {
    /// Opens one channel: see [`Socket::connect`].
    pub(super) fn open(&self, what: &str, patience: Duration) -> Result<Line, SynthError> {
        match self {
            Self::Secondary(address) => Ok(Line::Live(Socket::connect(address, what, patience)?)),
            Self::Recording(recording) => recording.open(what).map(Line::Recorded),
        }
    }
}

/// A connected channel, or what takes its place.
#[derive(Debug)]
pub(super) enum Line {
    Live(Socket),
    Recorded(RecordedConnection),
}

impl Line {
    /// Switches Nagle's algorithm off where there is one.
    pub(super) fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Live(socket) => socket.set_nodelay(),
            Self::Recorded(_) => Ok(()),
        }
    }

    /// Ends a connection in both directions.
    pub(super) fn shutdown(&self) {
        if let Self::Live(socket) = self {
            socket.shutdown();
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Live(socket) => socket.read(buffer),
            Self::Recorded(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Has what comes next acknowledged at once, where anything is acknowledged.
    fn quick_ack(&self) {
        if let Self::Live(socket) = self {
            socket.quick_ack();
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Live(socket) => Self::Live(socket.try_clone()?),
            Self::Recorded(connection) => Self::Recorded(connection.clone()),
        })
    }

    /// Writes all of `parts`, in as few calls as the system allows.
    pub(super) fn write_parts(&mut self, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        match self {
            Self::Live(socket) => socket.write_parts(parts),
            Self::Recorded(connection) => connection.send(parts),
        }
    }
}

/// What a secondary says on the main channel.
pub(crate) trait Answer: PartialEq + Debug + Copy {
    fn parse(input: &[u8]) -> Parsed<Self>;
    fn encode(self, out: &mut Vec<u8>);
}

impl Answer for Message {
    fn parse(input: &[u8]) -> Parsed<Self> {
        Self::parse(input)
    }

    fn encode(self, out: &mut Vec<u8>) {
        Self::encode(self, out);
    }
}

impl Answer for RpMessage {
    fn parse(input: &[u8]) -> Parsed<Self> {
        Self::parse(input)
    }

    fn encode(self, out: &mut Vec<u8>) {
        Self::encode(self, out);
    }
}

/// Bytes that QEMU's main channel collects before it writes them of its own accord.
const BUFFER_BYTES: usize = 32 << 10;

/// The main channel. Nagle's algorithm stays on, as with QEMU: what a secondary does about it is part of the measurement.
#[derive(Debug)]
pub(crate) struct MainLink {
    line: Line,
    patience: Duration,
    /// Encoded, not yet written. Encoders append here.
    pub(super) out: Vec<u8>,
    /// Read, not yet taken.
    answers: Vec<u8>,
    /// Bytes written so far.
    written: u64,
    acknowledges_at_once: bool,
}

impl MainLink {
    /// Over a connected socket.
    pub(crate) fn new(socket: Socket, patience: Duration) -> Self {
        Self::over(Line::Live(socket), patience)
    }

    pub(super) fn over(line: Line, patience: Duration) -> Self {
        Self {
            line,
            patience,
            out: Vec::with_capacity(2 * BUFFER_BYTES),
            answers: Vec::new(),
            written: 0,
            acknowledges_at_once: false,
        }
    }

    /// A main channel that holds nothing back and acknowledges at once, as no QEMU's does.
    pub(crate) fn without_stalls(socket: Socket, patience: Duration) -> Result<Self, SynthError> {
        socket
            .set_nodelay()
            .map_err(|source| io_error("starting", source))?;
        Ok(Self {
            acknowledges_at_once: true,
            ..Self::new(socket, patience)
        })
    }

    /// Ends the connection in both directions.
    pub(crate) fn shutdown(&self) {
        self.line.shutdown();
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Writes what is buffered.
    pub(crate) fn flush(&mut self) -> Result<(), SynthError> {
        let mut out = std::mem::take(&mut self.out);
        let written = self.write(&out);
        out.clear();
        self.out = out;
        written
    }

    /// Writes these bytes, without those that are buffered.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SynthError> {
        self.written += bytes.len() as u64;
        let written = self.line.write_parts(&mut [IoSlice::new(bytes)]);
        written.map_err(|source| io_error("writing", source))
    }

    /// Writes what is buffered if it is much: between records.
    pub(crate) fn flush_if_full(&mut self) -> Result<(), SynthError> {
        if self.out.len() < BUFFER_BYTES {
            return Ok(());
        }
        self.flush()
    }

    /// Waits for the answer `expected`; a recording takes it as given.
    pub(crate) fn expect<T: Answer>(&mut self, expected: T) -> Result<(), SynthError> {
        if let Line::Recorded(connection) = &self.line {
            let mut answer = Vec::new();
            expected.encode(&mut answer);
            return Ok(connection.answer(&answer)?);
        }
        loop {
            let unexpected = |seen: String| SynthError::Unexpected {
                expected: format!("{expected:?}"),
                seen,
            };
            match T::parse(&self.answers) {
                Ok(Some((seen, consumed))) if seen == expected => {
                    self.answers.drain(..consumed);
                    return Ok(());
                }
                Ok(Some((seen, _))) => return Err(unexpected(format!("{seen:?}"))),
                Err(error) => return Err(unexpected(error.to_string())),
                Ok(None) => self.read_answers(&expected)?,
            }
        }
    }

    fn read_answers(&mut self, expected: &dyn Debug) -> Result<(), SynthError> {
        let mut buffer = [0; 256];
        let expected = || format!("{expected:?}");
        match self.line.read(&mut buffer) {
            Ok(0) => Err(SynthError::Closed { expected: expected() }),
            Ok(read) => {
                self.answers.extend_from_slice(&buffer[..read]);
                if self.acknowledges_at_once {
                    self.line.quick_ack();
                }
                Ok(())
            }
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(SynthError::Silent {
                    expected: expected(),
                    waited: self.patience,
                }),
                io::ErrorKind::ConnectionReset => Err(SynthError::Closed { expected: expected() }),
                _ => Err(io_error("reading an answer", error)),
            },
        }
    }
}

fn io_error(doing: &'static str, source: io::Error) -> SynthError {
    SynthError::io("main channel", doing, source)
}
