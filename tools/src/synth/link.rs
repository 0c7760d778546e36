//! The primary's connections: opening them, and the main channel with its buffer.

use super::recording::{RecordedConnection, Recording};
use super::{Address, SynthError};
use colo_ring::wire::Parsed;
use colo_ring::wire::colo::Message;
use colo_ring::wire::return_path::RpMessage;
use std::fmt::Debug;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Where a session goes.
pub(super) enum Destination<'a> {
    Secondary(&'a Address),
    Recording(&'a Recording),
}

impl Destination<'_> {
    /// Opens one channel: see [`Socket::connect`].
    pub(super) fn open(&self, what: &str, patience: Duration) -> Result<Socket, SynthError> {
        match self {
            Self::Secondary(address) => Socket::connect(address, what, patience),
            Self::Recording(recording) => recording.open(what).map(Socket::Recorded),
        }
    }
}

/// A connected stream, or what takes its place.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Recorded(RecordedConnection),
}

impl Socket {
    /// Connects one channel, called `what`. Reads and writes give up after `patience`.
    pub(crate) fn connect(address: &Address, what: &str, patience: Duration) -> Result<Self, SynthError> {
        let connect = || -> io::Result<Self> {
            Ok(match address {
                Address::Tcp(host_port) => {
                    let socket = TcpStream::connect(host_port)?;
                    socket.set_read_timeout(Some(patience))?;
                    socket.set_write_timeout(Some(patience))?;
                    Self::Tcp(socket)
                }
                Address::Unix(path) => {
                    let socket = UnixStream::connect(path)?;
                    socket.set_read_timeout(Some(patience))?;
                    socket.set_write_timeout(Some(patience))?;
                    Self::Unix(socket)
                }
            })
        };
        connect().map_err(|source| SynthError::Connect {
            what: what.to_owned(),
            address: address.to_string(),
            source,
        })
    }

    /// Has what comes next acknowledged at once, where anything is acknowledged.
    fn quick_ack(&self) {
        if let Self::Tcp(socket) = self {
            colo_ring::ring::quick_ack(socket.as_raw_fd());
        }
    }

    /// Switches Nagle's algorithm off where there is one.
    pub(crate) fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nodelay(true),
            Self::Unix(_) | Self::Recorded(_) => Ok(()),
        }
    }

    pub(crate) fn shutdown(&self) {
        // A peer that has closed already makes this fail, which is the same in the end.
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
            Self::Recorded(_) => Ok(()),
        };
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Recorded(connection) => Self::Recorded(connection.clone()),
        })
    }

    /// Makes reads and writes return where they would wait.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(true),
            Self::Unix(socket) => socket.set_nonblocking(true),
            Self::Recorded(_) => Ok(()),
        }
    }

    /// Its descriptor, to wait for it.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tcp(socket) => Some(socket.as_fd()),
            Self::Unix(socket) => Some(socket.as_fd()),
            Self::Recorded(_) => None,
        }
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
            Self::Recorded(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Writes what there is room for.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
            Self::Recorded(connection) => connection.send(&[IoSlice::new(bytes)]).map(|()| bytes.len()),
        }
    }

    /// Writes all of `parts`, in as few calls as the system allows.
    pub(crate) fn write_parts(&mut self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let written = match self {
                Self::Tcp(socket) => socket.write_vectored(parts),
                Self::Unix(socket) => socket.write_vectored(parts),
                Self::Recorded(connection) => return connection.send(parts),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut parts, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
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
    socket: Socket,
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
    pub(crate) fn new(socket: Socket, patience: Duration) -> Self {
        Self {
            socket,
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

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
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
        let written = self.socket.write_parts(&mut [IoSlice::new(bytes)]);
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
        if let Socket::Recorded(connection) = &self.socket {
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
        match self.socket.read(&mut buffer) {
            Ok(0) => Err(SynthError::Closed { expected: expected() }),
            Ok(read) => {
                self.answers.extend_from_slice(&buffer[..read]);
                if self.acknowledges_at_once {
                    self.socket.quick_ack();
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
