//! The guard's end of the link to a receiver: messages as lines ([`colo_ring::link`]).

use crate::net::{Address, ConnectError, Socket};
use crate::tls::{Front, TlsArgs, TlsError};
use colo_ring::link::{Call, Hello, LINE_MAX, LINK_VERSION, PREFACE, ToGuard, ToReceiver};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::SendFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;

/// Why there is no link, or none any more.
#[derive(Debug, Error)]
pub(crate) enum LinkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the link to the receiver broke: {0}")]
    Broken(#[from] io::Error),
    #[error("the receiver closed the link")]
    Closed,
    #[error("the receiver does not take this guard: {0}")]
    Refused(String),
    #[error("the receiver at {0} does not answer as one with guards does; is it of an older version?")]
    NoReceiver(Address),
    #[error("a message of the receiver is not understood ({0})")]
    NotUnderstood(#[from] serde_json::Error),
    #[error("a line of more than {LINE_MAX} bytes from the receiver")]
    TooLong,
    #[error("the receiver does not answer")]
    Silent,
    #[error("the receiver does not read what is sent to it")]
    Full,
}

/// The connection, as the threads use it that read it and watch it.
#[derive(Debug)]
pub(super) struct LinkSocket {
    socket: Socket,
    /// Bytes that were read.
    read: AtomicU64,
    /// Held while a line is sent.
    sends: Mutex<()>,
}

impl LinkSocket {
    pub(super) fn of(socket: Socket) -> Self {
        Self {
            socket,
            read: AtomicU64::new(0),
            sends: Mutex::new(()),
        }
    }

    /// Sends a message, and never waits: a receiver that reads leaves room for it.
    ///
    /// # Errors
    /// If the link is over, or the receiver reads nothing.
    pub(super) fn send(&self, message: &ToReceiver) -> Result<(), LinkError> {
        self.send_behind(&[], message)
    }

    fn send_behind(&self, first: &[u8], message: &ToReceiver) -> Result<(), LinkError> {
        let mut line = first.to_vec();
        serde_json::to_writer(&mut line, message)?;
        line.push(b'\n');
        let _sends = self.sends.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = &line[..];
        while !left.is_empty() {
            match rustix::net::send(&self.socket, left, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => left = &left[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(LinkError::Full),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        Ok(())
    }

    fn read(&self, bytes: &mut [u8]) -> Result<usize, LinkError> {
        match rustix::io::read(&self.socket, bytes) {
            Ok(0) => Err(LinkError::Closed),
            Ok(count) => {
                self.read.fetch_add(count as u64, Ordering::Relaxed);
                Ok(count)
            }
            Err(Errno::INTR) => Ok(0),
            Err(Errno::AGAIN) => Err(LinkError::Silent),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// A number that changes when something has arrived, whether or not it was read.
    pub(super) fn heard(&self) -> u64 {
        // One that cannot be asked has ended, which is noticed when it is read.
        let unread = ioctl_fionread(&self.socket).unwrap_or_default();
        self.read.load(Ordering::Relaxed).wrapping_add(unread)
    }
}

/// A connection that the receiver has welcomed.
#[derive(Debug)]
pub(crate) struct Link {
    socket: Arc<LinkSocket>,
    /// What has arrived and is not a whole line.
    buffer: Vec<u8>,
}

impl Link {
    /// Connects and says which guest this guards. The receiver may take so long for either.
    ///
    /// # Errors
    /// If there is no receiver, or it refuses: with its reason.
    pub(super) fn connect(
        address: &Address,
        tls: &TlsArgs,
        hello: Hello,
        patience: Duration,
    ) -> Result<Self, LinkError> {
        Self::open((address, tls), &ToReceiver::Hello(hello), patience)
    }

    /// Connects, and asks what a guest is called that nothing guards.
    ///
    /// # Errors
    /// If there is no receiver, or it refuses: with its reason.
    pub(crate) fn call(
        address: &Address,
        tls: &TlsArgs,
        call: Call,
        patience: Duration,
    ) -> Result<Self, LinkError> {
        Self::open((address, tls), &ToReceiver::Call(call), patience)
    }

    fn open(
        (address, tls): (&Address, &TlsArgs),
        first_message: &ToReceiver,
        patience: Duration,
    ) -> Result<Self, LinkError> {
        // Until the receiver has answered; and with the certificates that are there now.
        let front = tls.front(address)?;
        let to = front.as_ref().map_or(address, Front::address);
        let socket = Socket::connect(to, "the link to the receiver", patience)?;
        socket.set_nodelay()?;
        let mut link = Self {
            socket: Arc::new(LinkSocket::of(socket)),
            buffer: Vec::with_capacity(LINE_MAX),
        };
        link.socket.send_behind(&PREFACE, first_message)?;
        let answer = link.read_message().map_err(|error| match error {
            LinkError::Closed | LinkError::NotUnderstood(_) => LinkError::NoReceiver(address.clone()),
            other => other,
        })?;
        match answer {
            ToGuard::Welcome { version } if version == LINK_VERSION => {}
            ToGuard::Refused { reason } => return Err(LinkError::Refused(reason)),
            _ => return Err(LinkError::NoReceiver(address.clone())),
        }
        Ok(link)
    }

    /// For a watch.
    pub(super) fn socket(&self) -> Arc<LinkSocket> {
        self.socket.clone()
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// If the link is over, or the receiver says nothing for long.
    pub(crate) fn read_message(&mut self) -> Result<ToGuard, LinkError> {
        loop {
            if let Some(message) = self.next_message()? {
                return Ok(message);
            }
            self.fill()?;
        }
    }

    /// Reads what has arrived, after poll(2) has said that something has.
    ///
    /// # Errors
    /// If the link is over.
    pub(super) fn fill(&mut self) -> Result<(), LinkError> {
        let mut bytes = [0; LINE_MAX];
        let count = self.socket.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(())
    }

    /// The next message that has arrived whole.
    ///
    /// # Errors
    /// If it is not understood.
    pub(super) fn next_message(&mut self) -> Result<Option<ToGuard>, LinkError> {
        let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
            return match self.buffer.len() >= LINE_MAX {
                true => Err(LinkError::TooLong),
                false => Ok(None),
            };
        };
        let message = serde_json::from_slice(&self.buffer[..end]);
        self.buffer.drain(..=end);
        Ok(Some(message?))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// As of [`LinkSocket::send`].
    pub(super) fn send(&self, message: &ToReceiver) -> Result<(), LinkError> {
        self.socket.send(message)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.socket.as_fd()
    }
}
