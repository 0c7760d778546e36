//! Identifies accepted connections: one task a connection, so that a silent one does not delay the others.
//!
//! Exactly the bytes that identify a connection are taken off the socket: its magic, and for a multifd channel its init packet; with TLS
//! the records that hold them.

use super::assemble::Identity;
use crate::link::PREFACE;
use crate::tls::{self, HandshakeError, ServerCredentials};
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
    /// This receiver has TLS, the primary has not.
    #[error(
        "{0} without TLS, and this receiver has --tls: give --tls to `colo-ring protect` or `guard`, or set tls-creds on the primary"
    )]
    IsPlain(String),
    /// It has no TLS.
    #[error("{0}")]
    Handshake(HandshakeError),
    /// The handshake was not done in time.
    #[error("its TLS handshake, and what identifies it, did not come within {0:?}")]
    HandshakeDeadline(Duration),
    /// There is no memory for its handshake.
    #[error("no memory for a TLS handshake: {0}")]
    Memory(#[from] crate::budget::BudgetError),
    /// The thread of the handshakes has ended.
    #[error("the thread that does TLS handshakes has ended")]
    NoHandshakes,
}

impl IdentifyError {
    /// Whether it is what a primary or a guard would bring about whose TLS is set up wrongly.
    pub(super) fn is_of_a_client(&self) -> bool {
        match self {
            Self::IsPlain(_) => true,
            Self::Handshake(error) => error.is_of_a_client(),
            _ => false,
        }
    }
}

impl From<HandshakeError> for IdentifyError {
    fn from(error: HandshakeError) -> Self {
        match error {
            HandshakeError::Io(error) => Self::Read(error),
            error => Self::Handshake(error),
        }
    }
}

/// A connection, of which what identifies it was read.
pub(super) struct Identified {
    pub(super) socket: OwnedFd,
    pub(super) kind: ConnectionKind,
    /// Its keys, if it has TLS.
    pub(super) tls: Option<tls::Channel>,
}

/// Reads what kind of connection this is. No duplicate is made of its socket: it would be one more descriptor for every stranger.
///
/// # Errors
/// If it is no migration channel, ends early or stays silent; it is closed then.
pub(super) async fn identify(socket: OwnedFd, deadline: Duration) -> Result<Identified, IdentifyError> {
    let reading = async {
        let mut stream = stream(socket)?;
        let mut first = [0; FIRST_LEN];
        read(&mut stream, &mut first).await?;
        let kind = match first {
            PREFACE => ConnectionKind::Link,
            _ => ConnectionKind::Channel(channel(&mut stream, first).await?),
        };
        Ok(Identified {
            socket: socket_of(stream)?,
            kind,
            tls: None,
        })
    };
    let result = tokio::time::timeout(deadline, reading).await;
    result.unwrap_or(Err(IdentifyError::Deadline(deadline)))
}

/// Does the handshake of a connection, and reads what kind of connection it is.
///
/// # Errors
/// As [`identify`], and if it has no TLS.
pub(super) async fn identify_secured(
    mut stream: TcpStream,
    credentials: &ServerCredentials,
) -> Result<(TcpStream, ConnectionKind, tls::Channel), IdentifyError> {
    let mut secured = match tls::accept(&mut stream, credentials).await {
        Ok(secured) => secured,
        Err(HandshakeError::NotTls(first)) => return Err(plain(&mut stream, first).await),
        Err(error) => return Err(error.into()),
    };
    let mut first = [0; FIRST_LEN];
    secured.read(&mut stream, &mut first).await?;
    let kind = match first {
        PREFACE => ConnectionKind::Link,
        _ => ConnectionKind::Channel(match classify(first)? {
            ChannelKind::Main => Identity::Main,
            ChannelKind::Multifd => {
                let mut init = [0; INIT_LEN];
                let (start, rest) = init.split_at_mut(FIRST_LEN);
                start.copy_from_slice(&first);
                secured.read(&mut stream, rest).await?;
                Identity::Multifd(Init::decode(&init)?)
            }
        }),
    };
    Ok((stream, kind, secured))
}

/// What a connection is that has no TLS.
async fn plain(stream: &mut TcpStream, first: [u8; FIRST_LEN]) -> IdentifyError {
    if first == PREFACE {
        return IdentifyError::IsPlain("a guard's link".to_owned());
    }
    match channel(stream, first).await {
        Ok(Identity::Main) => IdentifyError::IsPlain("a main channel".to_owned()),
        Ok(Identity::Multifd(init)) => IdentifyError::IsPlain(format!("multifd {}", init.channel)),
        Err(error) => error,
    }
}

/// A UNIX socket as well: reading is the same for every family.
pub(super) fn stream(socket: OwnedFd) -> io::Result<TcpStream> {
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

/// The data plane expects a blocking socket.
pub(super) fn socket_of(stream: TcpStream) -> io::Result<OwnedFd> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream.into())
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
