//! A stream socket to a secondary or from a primary, over TCP or in this host.

use super::{Address, TlsStream};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use thiserror::Error;

/// A channel cannot be connected.
#[derive(Debug, Error)]
#[error("cannot connect {what} to {address}: {source}; is the secondary listening there?")]
pub struct ConnectError {
    /// Which channel.
    pub what: String,
    /// The secondary's address.
    pub address: String,
    /// What the system said.
    pub source: io::Error,
}

/// A connected stream.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(TlsStream),
}

impl Socket {
    /// Connects one channel, called `what`. This, reads and writes give up after `patience`.
    pub(crate) fn connect(address: &Address, what: &str, patience: Duration) -> Result<Self, ConnectError> {
        let connect = || -> io::Result<Self> {
            Ok(match address {
                Address::Tcp(host_port) => {
                    let socket = connect_tcp(host_port, patience)?;
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
        connect().map_err(|source| ConnectError {
            what: what.to_owned(),
            address: address.to_string(),
            source,
        })
    }

    /// Has what comes next acknowledged at once, where anything is acknowledged.
    pub(crate) fn quick_ack(&self) {
        match self {
            Self::Tcp(socket) => colo_ring::net::quick_ack(socket.as_raw_fd()),
            Self::Unix(_) => {}
            Self::Tls(stream) => stream.socket().quick_ack(),
        }
    }

    /// Switches Nagle's algorithm off where there is one.
    pub(crate) fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nodelay(true),
            Self::Unix(_) => Ok(()),
            Self::Tls(stream) => stream.socket().set_nodelay(),
        }
    }

    pub(crate) fn shutdown(&self) {
        // A peer that has closed already makes this fail, which is the same in the end.
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
            Self::Tls(stream) => {
                stream.socket().shutdown();
                Ok(())
            }
        };
    }

    /// How long reads and writes may take; none is without a limit.
    pub(crate) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_read_timeout(patience)?;
                socket.set_write_timeout(patience)
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(patience)?;
                socket.set_write_timeout(patience)
            }
            Self::Tls(stream) => stream.socket().set_patience(patience),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Tls(stream) => Self::Tls(stream.try_clone()?),
        })
    }

    /// Makes reads and writes return where they would wait.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(true),
            Self::Unix(socket) => socket.set_nonblocking(true),
            Self::Tls(stream) => stream.socket().set_nonblocking(),
        }
    }

    /// Writes all of `parts`, in as few calls as the system allows.
    pub(crate) fn write_parts(&mut self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let written = match self {
                Self::Tcp(socket) => socket.write_vectored(parts),
                Self::Unix(socket) => socket.write_vectored(parts),
                Self::Tls(stream) => stream.write(&parts[0]),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut parts, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.flush()
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    /// Writes what there is room for. With TLS some of it may wait for the next call.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(_) | Self::Unix(_) => Ok(()),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// Connects to the first of a host's addresses that answers.
fn connect_tcp(host_port: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut refused = io::Error::new(io::ErrorKind::NotFound, "this name has no address");
    for address in host_port.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(socket) => return Ok(socket),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
            Self::Tls(stream) => stream.socket().as_fd(),
        }
    }
}
