//! The guard's end of the link to a receiver: messages as lines ([`colo_ring::link`]).

use crate::net::{Address, ConnectError, Socket};
use colo_ring::link::{Hello, LINE_MAX, LINK_VERSION, PREFACE, ToGuard, ToReceiver};
use colo_ring::net::HostWatch;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use thiserror::Error;

/// How long the receiver may take for an answer or to take a line.
const PATIENCE: Duration = Duration::from_secs(2);

/// When a receiver's host that does not answer is given up. It is a matter of a second or two, since the guest may be stopped.
const WATCH: HostWatch = HostWatch {
    probe_after_s: 1,
    give_up_after_s: 2,
};

/// Why there is no link, or none any more.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
}

/// A connection that the receiver has welcomed.
#[derive(Debug)]
pub(super) struct Link {
    socket: Socket,
    /// What has arrived and is not a whole line.
    buffer: Vec<u8>,
}

impl Link {
    /// Connects and says which guest this guards.
    ///
    /// # Errors
    /// If there is no receiver, or it refuses: with its reason.
    pub(super) fn connect(address: &Address, hello: Hello) -> Result<Self, LinkError> {
        let mut socket = Socket::connect(address, "the guard's link", PATIENCE)?;
        socket.set_nodelay()?;
        if matches!(address, Address::Tcp(_)) {
            // A host that has vanished says nothing.
            WATCH.apply(&socket).map_err(io::Error::from)?;
        }
        let mut first = PREFACE.to_vec();
        add_line(&mut first, &ToReceiver::Hello(hello))?;
        socket.write_parts(&mut [IoSlice::new(&first)])?;
        let mut link = Self {
            socket,
            buffer: Vec::with_capacity(LINE_MAX),
        };
        let answer = link.read_first().map_err(|error| match error {
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

    fn read_first(&mut self) -> Result<ToGuard, LinkError> {
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
        let count = match self.socket.read(&mut bytes) {
            Ok(0) => return Err(LinkError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error.into()),
        };
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
    /// If the link is over, or the receiver reads nothing.
    pub(super) fn send(&mut self, message: &ToReceiver) -> Result<(), LinkError> {
        let mut line = Vec::with_capacity(64);
        add_line(&mut line, message)?;
        Ok(self.socket.write_parts(&mut [IoSlice::new(&line)])?)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn add_line(line: &mut Vec<u8>, message: &ToReceiver) -> Result<(), LinkError> {
    serde_json::to_writer(&mut *line, message)?;
    line.push(b'\n');
    Ok(())
}
