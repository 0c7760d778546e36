//! The server's side of a handshake, and reading what follows it until the connection is handed to a core.
//!
//! Records are read off the socket one by one, so that nothing is in any buffer that belongs behind the last one that was needed.

use super::credentials::ServerCredentials;
use super::identity::{Identity, UnreadableCertificate};
use super::record::{Incoming, Outgoing, RECORD_MAX, Record, RecordError, directions, record_length};
use super::{HANDSHAKE_BYTES_MAX, RECORD_HEADER};
use rustls::ProtocolVersion;
use rustls::server::{ServerConfig, ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Why a connection has no TLS.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ended too early.
    #[error("it was closed in its TLS handshake")]
    Closed,
    /// Its first bytes are not those of TLS.
    #[error("its first bytes are not those of TLS ({0:02x?})")]
    NotTls([u8; 4]),
    /// The handshake failed.
    #[error("its TLS handshake failed: {}", explain(.0))]
    Failed(rustls::Error),
    /// More than a handshake has.
    #[error("its TLS handshake has more than {HANDSHAKE_BYTES_MAX} bytes")]
    TooLong,
    /// A record that is none.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its certificate.
    #[error(transparent)]
    Certificate(#[from] UnreadableCertificate),
    /// It may not connect.
    #[error("its certificate is that of {0}, which --tls-allow does not name")]
    NotAllowed(String),
    /// What came next is not what an unmodified QEMU does.
    #[error("the TLS library asked for something that servers do not do")]
    Unforeseen,
}

impl HandshakeError {
    /// Whether it is what a primary would bring about whose certificates are not those that they should be, and not any stranger.
    pub(crate) fn is_of_a_client(&self) -> bool {
        use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
        match self {
            Self::NotAllowed(_) | Self::Certificate(_) => true,
            Self::Failed(error) => matches!(
                error,
                NoCertificatesPresented | InvalidCertificate(_) | AlertReceived(_)
            ),
            _ => false,
        }
    }
}

/// rustls' words for what an operator can put right, with details where they have none.
fn explain(error: &rustls::Error) -> String {
    use rustls::{CertificateError, Error};
    match error {
        Error::NoCertificatesPresented => {
            "it presented no certificate: give its tls-creds-x509 object a directory with client-cert.pem and client-key.pem".into()
        }
        Error::InvalidCertificate(why) => {
            let why = match why {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".to_owned(),
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    "it is not valid yet (are the clocks of both hosts right?)".to_owned()
                }
                CertificateError::Revoked => "it is revoked (ca-crl.pem)".to_owned(),
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    "ca-cert.pem did not sign it".to_owned()
                }
                other => other.to_string(),
            };
            format!("its certificate is refused: {why}")
        }
        Error::AlertReceived(alert) => format!(
            "the primary ended it with {alert:?}: its ca-cert.pem, its clock, or the name that it knows this host by (tls-hostname) does \
             not fit server-cert.pem"
        ),
        other => other.to_string(),
    }
}

/// A connection after its handshake.
pub(crate) struct Channel {
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Arc<Outgoing>,
    /// What was read and opened, and is not used yet.
    pub(crate) plain: Vec<u8>,
    pub(crate) about: About,
}

/// What is known of the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct About {
    /// None without a certificate.
    pub(crate) identity: Option<Arc<Identity>>,
    /// Version and cipher.
    pub(crate) suite: String,
}

/// What a handshake does next.
enum Step {
    Read,
    Write,
    Done,
}

/// A handshake without its socket.
struct Handshake {
    connection: UnbufferedServerConnection,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Handshake {
    fn new(config: Arc<ServerConfig>) -> Result<Self, HandshakeError> {
        Ok(Self {
            connection: UnbufferedServerConnection::new(config).map_err(HandshakeError::Failed)?,
            input: Vec::new(),
            output: Vec::new(),
        })
    }

    /// Goes on until something has to be read or written, or it is done.
    fn step(&mut self) -> Result<Step, HandshakeError> {
        loop {
            let is_handshaking = self.connection.is_handshaking();
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(&mut self.input);
            let step = match state {
                Err(error) => Err(HandshakeError::Failed(error)),
                Ok(ConnectionState::EncodeTlsData(data)) => append(data, &mut self.output).map(|()| None),
                Ok(ConnectionState::TransmitTlsData(sent)) => {
                    sent.done();
                    Ok(Some(Step::Write))
                }
                Ok(ConnectionState::BlockedHandshake) => Ok(Some(Step::Read)),
                Ok(ConnectionState::WriteTraffic(_)) => Ok(Some(match is_handshaking {
                    true => Step::Read,
                    false => Step::Done,
                })),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(HandshakeError::Closed),
                Ok(_) => Err(HandshakeError::Unforeseen),
            };
            self.input.drain(..discard);
            match step {
                Ok(None) => {}
                // Whether it is done, it says only after this.
                Ok(Some(Step::Read)) if !self.connection.is_handshaking() => return Ok(Step::Done),
                Ok(Some(step)) => return Ok(step),
                Err(error) => return Err(error),
            }
        }
    }

    /// The alert that tells the peer why it failed.
    fn last_words(&mut self) -> &[u8] {
        self.output.clear();
        // What is to be sent comes before anything else. No more is asked: what has failed is not to be gone on with.
        let UnbufferedStatus { state, .. } = self.connection.process_tls_records(&mut self.input);
        if let Ok(ConnectionState::EncodeTlsData(data)) = state {
            // It may be gone, and so may what would tell it.
            let _ = append(data, &mut self.output);
        }
        &self.output
    }
}

/// Appends what is to be sent.
fn append(
    mut data: EncodeTlsData<'_, ServerConnectionData>,
    output: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    let length = output.len();
    let needed = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(lack)) => lack.required_size,
        Ok(_) | Err(EncodeError::AlreadyEncoded) => 0,
    };
    output.resize(length + needed, 0);
    let encoded = data.encode(&mut output[length..]);
    encoded.map(drop).map_err(|_| HandshakeError::Unforeseen)
}

/// Does the server's side of a handshake. The caller has a deadline.
///
/// # Errors
/// If there is none, or the peer may not connect: it has been sent an alert.
pub(crate) async fn accept(
    stream: &mut TcpStream,
    credentials: &ServerCredentials,
) -> Result<Channel, HandshakeError> {
    let mut first = [0; RECORD_HEADER];
    read(stream, &mut first[..4]).await?;
    let [kind, major, ..] = first;
    if (kind, major) != (22, 3) {
        let [a, b, c, d, _] = first;
        return Err(HandshakeError::NotTls([a, b, c, d]));
    }
    read(stream, &mut first[4..]).await?;
    let mut handshake = Handshake::new(credentials.config())?;
    handshake.input.extend_from_slice(&first);
    read_body(stream, &mut handshake.input, 0).await?;
    let mut total = handshake.input.len();
    loop {
        match handshake.step() {
            Ok(Step::Write) => {
                stream.write_all(&handshake.output).await?;
                handshake.output.clear();
            }
            Ok(Step::Read) => {
                let at = handshake.input.len();
                read_record(stream, &mut handshake.input).await?;
                total += handshake.input.len() - at;
                if total > HANDSHAKE_BYTES_MAX {
                    return Err(HandshakeError::TooLong);
                }
            }
            Ok(Step::Done) => break,
            Err(error) => {
                // It may be gone.
                let _ = stream.try_write(handshake.last_words());
                return Err(error);
            }
        }
    }
    let certificate = handshake.connection.peer_certificates().and_then(<[_]>::first);
    let identity = certificate.map(Identity::of).transpose()?.map(Arc::new);
    let (secrets, updates) =
        (handshake.connection.dangerous_into_kernel_connection()).map_err(HandshakeError::Failed)?;
    let version = match updates.protocol_version() {
        ProtocolVersion::TLSv1_2 => "TLS 1.2",
        _ => "TLS 1.3",
    };
    let suite = format!("{version}, {:?}", updates.negotiated_cipher_suite().suite());
    let (incoming, outgoing) = directions(secrets, updates).map_err(HandshakeError::Failed)?;
    if !credentials.allowed().has(identity.as_deref()) {
        outgoing.alert(stream.as_raw_fd(), rustls::AlertDescription::AccessDenied);
        let who = identity.map_or_else(|| "nobody".to_owned(), |identity| identity.to_string());
        return Err(HandshakeError::NotAllowed(who));
    }
    Ok(Channel {
        incoming,
        outgoing: Arc::new(outgoing),
        plain: Vec::new(),
        about: About { identity, suite },
    })
}

impl Channel {
    /// Fills `bytes` with what the peer has sent, and reads no record beyond.
    ///
    /// # Errors
    /// If it ends before, or sends what is no record.
    pub(crate) async fn read(
        &mut self,
        stream: &mut TcpStream,
        bytes: &mut [u8],
    ) -> Result<(), HandshakeError> {
        let fd = stream.as_raw_fd();
        while self.plain.len() < bytes.len() {
            self.read_more(stream, fd).await?;
        }
        let rest = self.plain.split_off(bytes.len());
        bytes.copy_from_slice(&self.plain);
        self.plain = rest;
        Ok(())
    }

    /// Reads a record and appends what it holds.
    ///
    /// # Errors
    /// If there is none any more, or it is none.
    pub(crate) async fn read_more(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
        fd: RawFd,
    ) -> Result<(), HandshakeError> {
        let mut record = Vec::new();
        read_record(stream, &mut record).await?;
        let opened = match self.incoming.open(&mut record) {
            Ok(Record::Data(data)) => {
                self.plain.extend_from_slice(data);
                Ok(())
            }
            Ok(Record::KeyUpdate { is_requested }) => {
                let outgoing = self.outgoing.clone();
                outgoing.key_update(fd, &mut self.incoming, is_requested)
            }
            Ok(Record::Closed) => return Err(HandshakeError::Closed),
            Err(error) => Err(error),
        };
        opened.map_err(|error| {
            if let Some(alert) = error.alert() {
                self.outgoing.alert(fd, alert);
            }
            error.into()
        })
    }
}

/// Appends a record.
async fn read_record(
    stream: &mut (impl AsyncRead + Unpin),
    record: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    let start = record.len();
    let mut header = [0; RECORD_HEADER];
    read(stream, &mut header).await?;
    record.extend_from_slice(&header);
    read_body(stream, record, start).await
}

/// Appends the body of the record whose header is the last that was read.
async fn read_body(
    stream: &mut (impl AsyncRead + Unpin),
    record: &mut Vec<u8>,
    start: usize,
) -> Result<(), HandshakeError> {
    let length = record_length(&record[start..])?.unwrap_or(RECORD_MAX);
    record.resize(start + length, 0);
    read(stream, &mut record[start + RECORD_HEADER..]).await
}

async fn read(stream: &mut (impl AsyncRead + Unpin), bytes: &mut [u8]) -> Result<(), HandshakeError> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(HandshakeError::Closed),
        Err(error) => Err(error.into()),
    }
}
