//! Connected sockets that the proxy's tasks read and write.

use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{Shutdown, setsockopt, shutdown};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio_uring::buf::BoundedBuf;

/// A connection. With io_uring its operations go through tokio-uring, else they wait for readiness; the effect is the
/// same. One task may read while another writes.
pub(super) struct Stream {
    waiting: Waiting,
    /// The same socket: options and shutting down need no waiting.
    socket: OwnedFd,
    is_tcp: bool,
}

/// Both take UNIX sockets too: reads and writes of a connected socket are the same for every family.
enum Waiting {
    Uring(tokio_uring::net::TcpStream),
    Readiness(tokio::net::TcpStream),
}

impl Stream {
    /// Takes a connected socket that blocks. With `uring` it must be used on tokio-uring's runtime.
    ///
    /// # Errors
    /// If there are too many open files, or the runtime cannot wait for the socket.
    pub(super) fn new(socket: OwnedFd, is_tcp: bool, uring: bool) -> io::Result<Self> {
        let stream = std::net::TcpStream::from(socket.try_clone()?);
        let waiting = if uring {
            Waiting::Uring(tokio_uring::net::TcpStream::from_std(stream))
        } else {
            stream.set_nonblocking(true)?;
            Waiting::Readiness(tokio::net::TcpStream::from_std(stream)?)
        };
        Ok(Self {
            waiting,
            socket,
            is_tcp,
        })
    }

    /// Reads what has arrived, at most `max` bytes, to the front of `buffer`, and gives `buffer` back with just these;
    /// with none where the other end has closed. Waits for the first byte.
    pub(super) async fn read(&self, mut buffer: Vec<u8>, max: usize) -> (io::Result<usize>, Vec<u8>) {
        buffer.clear();
        buffer.reserve(max);
        match &self.waiting {
            Waiting::Uring(stream) => {
                let (count, part) = stream.read(buffer.slice(..max)).await;
                (count, part.into_inner())
            }
            Waiting::Readiness(socket) => {
                buffer.resize(max, 0);
                let count = read_when_ready(socket, &mut buffer).await;
                buffer.truncate(*count.as_ref().unwrap_or(&0));
                (count, buffer)
            }
        }
    }

    /// Writes all of `buffer`, and gives it back.
    pub(super) async fn write_all(&self, buffer: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        match &self.waiting {
            Waiting::Uring(stream) => stream.write_all(buffer).await,
            Waiting::Readiness(socket) => {
                let written = write_when_ready(socket, &buffer).await;
                (written, buffer)
            }
        }
    }

    /// Over TCP, acknowledges at once what comes next; see [`colo_ring::net`].
    pub(super) fn quick_ack(&self) {
        if self.is_tcp {
            colo_ring::net::quick_ack(self.socket.as_raw_fd());
        }
    }

    /// Shuts it down; a read or write that waits returns. An error that has already occurred remains.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _ = shutdown(self.socket.as_raw_fd(), how);
    }

    /// From now on closing it sends a reset, where the protocol has one (TCP), and drops what was not sent.
    pub(super) fn reset_on_close(&self) {
        let at_once = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // A UNIX socket accepts the option and ignores it.
        let _ = setsockopt(&self.socket, Linger, &at_once);
    }
}

async fn read_when_ready(socket: &tokio::net::TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        socket.readable().await?;
        match socket.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write_when_ready(socket: &tokio::net::TcpStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        socket.writable().await?;
        match socket.try_write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
