//! Accepting the connections of one session.

use crate::net::Socket;
use colo_ring::net::{BoundSocket, Clients, bind_unix};
use colo_ring::receiver::ListenAddress;
use colo_ring::wire::stream::MAIN_MAGIC;
use nix::sys::socket::{MsgFlags, recv};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};

/// A listening socket.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(BoundSocket, ListenAddress),
}

/// All connections of a session, in non-blocking mode.
pub(super) struct Connections {
    pub main: Socket,
    pub channels: Vec<Socket>,
}

impl Listener {
    pub(super) fn bind(address: &ListenAddress) -> io::Result<Self> {
        Ok(match address {
            ListenAddress::Tcp(socket_address) => Self::Tcp(TcpListener::bind(socket_address)?),
            ListenAddress::Unix(path) => {
                let listener = bind_unix(path, Clients::Group).map_err(io::Error::other)?;
                Self::Unix(listener, address.clone())
            }
        })
    }

    /// The address that it is bound to.
    pub(super) fn address(&self) -> io::Result<ListenAddress> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(ListenAddress::Tcp),
            Self::Unix(_, address) => Ok(address.clone()),
        }
    }

    /// Waits for all connections of a session. A primary makes them all before it waits for an answer.
    pub(super) fn accept_session(&self, channels: u8) -> io::Result<Connections> {
        let (mut main, mut others) = (None, Vec::new());
        let accepted = (0..=channels)
            .map(|_| self.accept())
            .collect::<io::Result<Vec<_>>>()?;
        for socket in accepted {
            let mut magic = [0; MAIN_MAGIC.len()];
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
            let peeked = recv(socket.as_fd().as_raw_fd(), &mut magic, flags)?;
            socket.set_nonblocking()?;
            if magic[..peeked] == MAIN_MAGIC {
                main = Some(socket);
            } else {
                others.push(socket);
            }
        }
        match main {
            Some(main) if others.len() == usize::from(channels) => Ok(Connections {
                main,
                channels: others,
            }),
            _ => Err(io::Error::other(format!(
                "of {} connections {} were multifd channels: is the primary's multifd-channels {channels}?",
                usize::from(channels) + 1,
                others.len()
            ))),
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(listener) => {
                let socket = listener.accept()?.0;
                // All answers are a few bytes, and a guest waits for them.
                socket.set_nodelay(true)?;
                Socket::Tcp(socket)
            }
            Self::Unix(listener, _) => Socket::Unix(listener.accept()?.0),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, ListenAddress::Unix(path)) = self {
            // It fails only if the file does not exist any more.
            let _ = std::fs::remove_file(path);
        }
    }
}
