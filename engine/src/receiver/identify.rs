//! Identifies accepted connections: one task a connection, so that a silent one does not delay the others.
//!
//! Exactly the bytes that identify a connection are taken off the socket: its magic, and for a multifd channel its init packet.

use super::assemble::Identity;
use crate::link::PREFACE;
use crate::wire::WireError;
use crate::wire::multifd::{INIT_LEN, Init};
use crate::wire::stream::{ChannelKind, classify};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// Bytes that identify the kind of a connection.
pub(super) const FIRST_LEN: usize = 4;
/// What a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionKind {
    /// A channel of a migration.
    Channel(Identity),
    /// The link of a guard.
    Link,
}

/// Why a connection was not identified.
#[derive(Debug, Error)]
pub(super) enum IdentifyError {
    /// Reading from it failed.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is no migration channel.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It was closed too early.
    #[error("it was closed before its first bytes identified it")]
    Closed,
    /// It stayed silent.
    #[error("it sent nothing that identifies it within {0:?}")]
    Deadline(Duration),
}

/// Reads what kind of connection this is. No duplicate is made of its socket: it would be one more descriptor for every stranger.
///
/// # Errors
/// If it is no migration channel, ends early or stays silent; it is closed then.
pub(super) async fn identify(
    socket: OwnedFd,
    deadline: Duration,
) -> Result<(OwnedFd, ConnectionKind), IdentifyError> {
    let reading = async {
        // A UNIX socket as well: reading is the same for every family.
        let stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream)?;
        let mut first = [0; FIRST_LEN];
        read(&mut stream, &mut first).await?;
        let kind = match first {
            PREFACE => ConnectionKind::Link,
            _ => ConnectionKind::Channel(channel(&mut stream, first).await?),
        };
        // The data plane expects a blocking socket.
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok((stream.into(), kind))
    };
    let result = tokio::time::timeout(deadline, reading).await;
    result.unwrap_or(Err(IdentifyError::Deadline(deadline)))
}

/// Reads what kind of channel begins with these bytes.
async fn channel(stream: &mut TcpStream, first: [u8; FIRST_LEN]) -> Result<Identity, IdentifyError> {
    Ok(match classify(first)? {
        ChannelKind::Main => Identity::Main,
        ChannelKind::Multifd => {
            let mut init = [0; INIT_LEN];
            let (start, rest) = init.split_at_mut(FIRST_LEN);
            start.copy_from_slice(&first);
            read(stream, rest).await?;
            Identity::Multifd(Init::decode(&init)?)
        }
    })
}

/// Fills `bytes` and reads nothing beyond: what follows belongs to the data plane.
async fn read(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), IdentifyError> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(IdentifyError::Closed),
        Err(error) => Err(error.into()),
    }
}
