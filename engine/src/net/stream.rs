//! Connected sockets that tasks read and write.
#![forbid(unsafe_code)]

use crate::ring::quick_ack;
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{Shutdown, setsockopt, shutdown};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use tokio_uring::buf::BoundedBuf;

/// A connection. With io_uring its operations go through tokio-uring, else they wait for readiness; what they do is the
/// same. One task may read while another writes.
pub struct Stream {
    waiting: Waiting,
    /// The same socket: options and shutting down need no waiting.
    socket: OwnedFd,
    is_tcp: bool,
}

enum Waiting {
    UringTcp(tokio_uring::net::TcpStream),
    UringUnix(tokio_uring::net::UnixStream),
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Stream {
    /// Takes a connected socket that blocks. With `uring` it must be used on tokio-uring's runtime.
    ///
    /// # Errors
    /// If there are too many open files, or it cannot be waited on.
    pub fn new(socket: OwnedFd, is_tcp: bool, uring: bool) -> io::Result<Self> {
        let waiting = match (is_tcp, uring) {
            (true, true) => {
                Waiting::UringTcp(tokio_uring::net::TcpStream::from_std(socket.try_clone()?.into()))
            }
            (false, true) => {
                Waiting::UringUnix(tokio_uring::net::UnixStream::from_std(socket.try_clone()?.into()))
            }
            (true, false) => {
                let stream = TcpStream::from(socket.try_clone()?);
                stream.set_nonblocking(true)?;
                Waiting::Tcp(tokio::net::TcpStream::from_std(stream)?)
            }
            (false, false) => {
                let stream = UnixStream::from(socket.try_clone()?);
                stream.set_nonblocking(true)?;
                Waiting::Unix(tokio::net::UnixStream::from_std(stream)?)
            }
        };
        Ok(Self {
            waiting,
            socket,
            is_tcp,
        })
    }

    /// Reads what is there, at most `max` bytes, to the front of `buffer`, and gives `buffer` back with just these; none
    /// where the other end has closed. Without anything there it waits.
    pub async fn read(&self, mut buffer: Vec<u8>, max: usize) -> (io::Result<usize>, Vec<u8>) {
        buffer.clear();
        buffer.reserve(max);
        match &self.waiting {
            Waiting::UringTcp(stream) => {
                let (count, part) = stream.read(buffer.slice(..max)).await;
                (count, part.into_inner())
            }
            Waiting::UringUnix(stream) => {
                let (count, part) = stream.read(buffer.slice(..max)).await;
                (count, part.into_inner())
            }
            Waiting::Tcp(_) | Waiting::Unix(_) => {
                buffer.resize(max, 0);
                let count = self.read_when_ready(&mut buffer).await;
                buffer.truncate(*count.as_ref().unwrap_or(&0));
                (count, buffer)
            }
        }
    }

    /// Writes all of `buffer`, and gives it back.
    pub async fn write_all(&self, buffer: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        match &self.waiting {
            Waiting::UringTcp(stream) => stream.write_all(buffer).await,
            Waiting::UringUnix(stream) => stream.write_all(buffer).await,
            Waiting::Tcp(_) | Waiting::Unix(_) => {
                let written = self.write_when_ready(&buffer).await;
                (written, buffer)
            }
        }
    }

    async fn read_when_ready(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match &self.waiting {
                Waiting::Tcp(stream) => {
                    stream.readable().await?;
                    stream.try_read(buffer)
                }
                Waiting::Unix(stream) => {
                    stream.readable().await?;
                    stream.try_read(buffer)
                }
                Waiting::UringTcp(_) | Waiting::UringUnix(_) => {
                    unreachable!("it does not wait for readiness")
                }
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }

    async fn write_when_ready(&self, mut rest: &[u8]) -> io::Result<()> {
        while !rest.is_empty() {
            let written = match &self.waiting {
                Waiting::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write(rest)
                }
                Waiting::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write(rest)
                }
                Waiting::UringTcp(_) | Waiting::UringUnix(_) => {
                    unreachable!("it does not wait for readiness")
                }
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Over TCP, acknowledges at once what comes next; see [`crate::net`].
    pub fn quick_ack(&self) {
        if self.is_tcp {
            quick_ack(self.socket.as_raw_fd());
        }
    }

    /// Shuts it down; a read or write that waits returns. What has failed already stays so.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = shutdown(self.socket.as_raw_fd(), how);
    }

    /// From now on closing it tells the other end by a reset, where there is one (TCP), and drops what was not sent.
    pub fn reset_on_close(&self) {
        let at_once = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // A UNIX socket takes the option and has no use for it.
        let _ = setsockopt(&self.socket, Linger, &at_once);
    }

    /// Gives the socket back as it was: the mode belongs to the connection, not to the descriptor.
    ///
    /// # Errors
    /// If it cannot be made to block again.
    pub fn leave(self) -> io::Result<OwnedFd> {
        match self.waiting {
            Waiting::UringTcp(_) | Waiting::UringUnix(_) => {}
            Waiting::Tcp(stream) => stream.into_std()?.set_nonblocking(false)?,
            Waiting::Unix(stream) => stream.into_std()?.set_nonblocking(false)?,
        }
        Ok(self.socket)
    }
}
