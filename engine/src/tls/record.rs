//! Records after the handshake: opened in place, made, and the keys changed when the peer changes them.
//!
//! The handshake is rustls' alone. After it, rustls gives the keys away, and each direction goes to where its bytes are: [`Incoming`] to the
//! core that receives, [`Outgoing`] to whoever sends. What opens and makes a record is rustls' own code, too.

use super::RECORD_HEADER;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ExtractedSecrets, ProtocolVersion,
    SupportedCipherSuite,
};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use thiserror::Error;

/// Most bytes of a record's body: 2^14 of content, and what TLS 1.2 allows for the cipher. TLS 1.3 allows less.
const BODY_MAX: usize = (16 << 10) + 2048;
const BODY_MAX_13: usize = (16 << 10) + 256;

/// Most bytes of a record.
pub(crate) const RECORD_MAX: usize = RECORD_HEADER + BODY_MAX;

const CLIENT_HELLO: u8 = 1;
const KEY_UPDATE: u8 = 24;
/// Type, and a length of 24 bits.
const KEY_UPDATE_HEADER: [u8; 4] = [KEY_UPDATE, 0, 0, 1];

/// Changes of the peer's keys on one connection: GnuTLS changes them once in some 2^24 records, which is 64 GiB of pages. More than this is
/// an attempt to keep the receiver busy.
const KEY_UPDATES_MAX: u32 = 1 << 16;

/// Records that one key makes: AES-GCM is for some 2^24 of the largest (RFC 8446, 5.5), and these are small.
const RECORDS_OF_A_KEY: u64 = 1 << 23;

/// Why a connection's records make no sense.
#[derive(Debug, Error)]
pub enum RecordError {
    /// No record begins so.
    #[error("bytes that are no TLS record ({0:02x?})")]
    NotARecord([u8; 3]),
    /// Longer than records can be.
    #[error("a TLS record of {0} bytes, which none may have")]
    TooLong(usize),
    /// It was changed on its way, or made with another key.
    #[error("a TLS record that does not decrypt: it was changed on its way")]
    Changed,
    /// The peer has ended the connection with an error.
    #[error("the peer sent the TLS alert {0}")]
    Alert(String),
    /// A second handshake of TLS 1.2.
    #[error("the peer asked for another TLS handshake (renegotiation), which is refused")]
    Renegotiation,
    /// Something that has no place after the handshake.
    #[error("a TLS record of type {0} that does not belong there")]
    Unexpected(u8),
    /// See `KEY_UPDATES_MAX`.
    #[error("the peer changes its TLS keys again and again")]
    KeyUpdates,
    /// There is no other key.
    #[error("TLS keys: {0}")]
    Keys(#[from] rustls::Error),
    /// What the peer has to be sent does not fit into the socket.
    #[error("the peer does not read what TLS has to tell it: {0}")]
    Answer(io::Error),
}

impl RecordError {
    /// The alert that the peer is sent.
    pub(crate) fn alert(&self) -> Option<AlertDescription> {
        match self {
            Self::NotARecord(_) | Self::Unexpected(_) | Self::KeyUpdates => {
                Some(AlertDescription::UnexpectedMessage)
            }
            Self::TooLong(_) => Some(AlertDescription::RecordOverflow),
            Self::Changed => Some(AlertDescription::BadRecordMac),
            Self::Renegotiation => Some(AlertDescription::NoRenegotiation),
            Self::Keys(_) => Some(AlertDescription::InternalError),
            Self::Alert(_) | Self::Answer(_) => None,
        }
    }
}

/// What a record holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    /// Bytes of the protocol above; may be none.
    Data(&'a [u8]),
    /// The peer has changed its key, and wants the same of this end, or not.
    KeyUpdate {
        /// Whether it wants it.
        is_requested: bool,
    },
    /// close_notify.
    Closed,
}

/// The length of the first record in `bytes`, header and all. None while it is not known.
///
/// # Errors
/// If none begins so.
pub(crate) fn record_length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(header) = bytes.first_chunk::<RECORD_HEADER>() else {
        return Ok(None);
    };
    let [kind, major, minor, high, low] = *header;
    // ChangeCipherSpec to application data.
    if !(20..=23).contains(&kind) || major != 3 {
        return Err(RecordError::NotARecord([kind, major, minor]));
    }
    let body = usize::from(u16::from_be_bytes([high, low]));
    match body > BODY_MAX {
        true => Err(RecordError::TooLong(body)),
        false => Ok(Some(RECORD_HEADER + body)),
    }
}

/// What opens records. One core at a time has it.
pub(crate) struct Incoming {
    decrypter: Box<dyn MessageDecrypter>,
    number: u64,
    version: ProtocolVersion,
    updates: u32,
}

impl Incoming {
    /// Opens a whole record in place.
    ///
    /// # Errors
    /// If it is none of this connection, or does not belong there.
    pub(crate) fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<Record<'a>, RecordError> {
        let (header, body) = record
            .split_first_chunk_mut::<RECORD_HEADER>()
            .ok_or(RecordError::TooLong(0))?;
        let kind = header[0];
        let is_13 = self.version == ProtocolVersion::TLSv1_3;
        if is_13 && kind != u8::from(ContentType::ApplicationData) {
            return Err(RecordError::Unexpected(kind));
        }
        if is_13 && body.len() > BODY_MAX_13 {
            return Err(RecordError::TooLong(body.len()));
        }
        let message = InboundOpaqueMessage::new(kind.into(), ProtocolVersion::TLSv1_2, body);
        let opened = self.decrypter.decrypt(message, self.number);
        let opened = opened.map_err(|_| RecordError::Changed)?;
        // 2^64 records take centuries.
        self.number = self.number.wrapping_add(1);
        match opened.typ {
            ContentType::ApplicationData => Ok(Record::Data(opened.payload)),
            ContentType::Alert => match *opened.payload {
                [_, description] if description == u8::from(AlertDescription::CloseNotify) => {
                    Ok(Record::Closed)
                }
                [_, description] => {
                    let description = AlertDescription::from(description);
                    Err(RecordError::Alert(format!("{description:?}")))
                }
                _ => Err(RecordError::Unexpected(kind)),
            },
            ContentType::Handshake => self.handshake(opened.payload),
            other => Err(RecordError::Unexpected(other.into())),
        }
    }

    fn handshake(&mut self, message: &[u8]) -> Result<Record<'static>, RecordError> {
        match (self.version, message) {
            (ProtocolVersion::TLSv1_3, [header @ .., requested @ 0..=1]) if *header == KEY_UPDATE_HEADER => {
                self.updates += 1;
                match self.updates > KEY_UPDATES_MAX {
                    true => Err(RecordError::KeyUpdates),
                    false => Ok(Record::KeyUpdate {
                        is_requested: *requested == 1,
                    }),
                }
            }
            (ProtocolVersion::TLSv1_2, [CLIENT_HELLO, ..]) => Err(RecordError::Renegotiation),
            _ => Err(RecordError::Unexpected(ContentType::Handshake.into())),
        }
    }
}

/// Those of one direction, as rustls' own record code takes them.
fn split(
    secrets: ConnectionTrafficSecrets,
) -> Result<(rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv), rustls::Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(rustls::Error::General("a cipher that is not known".into())),
    }
}

fn decrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, rustls::Error> {
    let (key, iv) = split(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
            suite.aead_alg.decrypter(key, &iv.as_ref()[..fixed])
        }
    })
}

fn encrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageEncrypter>, rustls::Error> {
    let (key, iv) = split(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let (fixed, explicit) = iv
                .as_ref()
                .split_at(suite.aead_alg.key_block_shape().fixed_iv_len);
            suite.aead_alg.encrypter(key, fixed, explicit)
        }
    })
}

/// What makes records. The threads that have something to say to the peer share it, without haste: answers to checkpoints, of a few bytes.
pub(crate) struct Outgoing {
    keys: Mutex<Keys>,
    /// Whether bytes of the peer wait behind those that were handed on.
    has_more: AtomicBool,
}

struct Keys {
    encrypter: Box<dyn MessageEncrypter>,
    number: u64,
    suite: SupportedCipherSuite,
    updates: KernelConnection<ServerConnectionData>,
}

impl Keys {
    /// A record; before it one that changes the key, where the key has made as many as it may.
    fn record(&mut self, kind: ContentType, bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        if self.number < RECORDS_OF_A_KEY {
            return self.make(kind, bytes);
        }
        if self.suite.tls13().is_none() {
            return Err(rustls::Error::EncryptError);
        }
        let mut records = self.update()?;
        records.append(&mut self.make(kind, bytes)?);
        Ok(records)
    }

    /// The record that changes the key, which is changed then.
    fn update(&mut self) -> Result<Vec<u8>, rustls::Error> {
        let [kind, high, middle, low] = KEY_UPDATE_HEADER;
        let record = self.make(ContentType::Handshake, &[kind, high, middle, low, 0])?;
        let (number, secrets) = self.updates.update_tx_secret()?;
        self.encrypter = encrypter(self.suite, secrets)?;
        self.number = number;
        Ok(record)
    }

    fn make(&mut self, kind: ContentType, bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let message = OutboundPlainMessage {
            typ: kind,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(bytes),
        };
        let made = self.encrypter.encrypt(message, self.number)?;
        self.number = self.number.wrapping_add(1);
        Ok(made.encode())
    }
}

/// Most records that a handshake has sent with a key of application data: Finished, in TLS 1.2.
const SENT_BEFORE_MAX: u64 = 4;

impl Keys {
    /// The next record has this number. The provider takes the first nonce that it sees for that of number 0, against which it checks that no later
    /// one comes twice: so it makes those records, too, which go nowhere.
    fn skip_to(&mut self, number: u64) -> Result<(), rustls::Error> {
        if number > SENT_BEFORE_MAX {
            return Err(rustls::Error::General("a handshake of too many records".into()));
        }
        while self.number < number {
            self.record(ContentType::ApplicationData, &[])?;
        }
        Ok(())
    }
}

/// Writes all of a record, or nothing that the peer could use: it never waits.
fn write(fd: RawFd, record: &[u8]) -> io::Result<()> {
    match send(fd, record, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
        Ok(sent) if sent == record.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(errno) => Err(errno.into()),
    }
}

impl Outgoing {
    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends bytes as one record.
    ///
    /// # Errors
    /// Of send(2): also if the socket has no room for all of it.
    pub(crate) fn send(&self, fd: RawFd, bytes: &[u8]) -> Result<(), Errno> {
        let sent = self.send_record(fd, ContentType::ApplicationData, bytes);
        sent.map_err(|error| match error {
            RecordError::Answer(error) => error.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw),
            _ => Errno::EPROTO,
        })
    }

    /// A record with these bytes, for a caller that writes it.
    ///
    /// # Errors
    /// If the key is used up.
    pub(crate) fn record(&self, bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.keys().record(ContentType::ApplicationData, bytes)
    }

    fn send_record(&self, fd: RawFd, kind: ContentType, bytes: &[u8]) -> Result<(), RecordError> {
        // Held while it is sent: records go in the order of their numbers.
        let mut keys = self.keys();
        let record = keys.record(kind, bytes)?;
        write(fd, &record).map_err(RecordError::Answer)
    }

    /// Tells the peer why the connection ends; it may be gone.
    pub(crate) fn alert(&self, fd: RawFd, alert: AlertDescription) {
        const FATAL: u8 = 2;
        let _ = self.send_record(fd, ContentType::Alert, &[FATAL, alert.into()]);
    }

    /// The peer has changed its key. The next records come with another one; if it wants that, this end's, too.
    ///
    /// # Errors
    /// If there is none, or the peer does not take the answer.
    pub(crate) fn key_update(
        &self,
        fd: RawFd,
        incoming: &mut Incoming,
        is_requested: bool,
    ) -> Result<(), RecordError> {
        let mut keys = self.keys();
        let (number, secrets) = keys.updates.update_rx_secret()?;
        incoming.decrypter = decrypter(keys.suite, secrets)?;
        incoming.number = number;
        if is_requested {
            let record = keys.update()?;
            write(fd, &record).map_err(RecordError::Answer)?;
        }
        Ok(())
    }

    /// Bytes of the peer wait, or none do.
    pub(super) fn set_more(&self, has_more: bool) {
        self.has_more.store(has_more, Ordering::Release);
    }

    /// Whether bytes of the peer wait that were read off the socket and not handed on.
    pub(crate) fn has_more(&self) -> bool {
        self.has_more.load(Ordering::Acquire)
    }
}

/// Both directions of a connection whose handshake is done.
///
/// # Errors
/// If rustls gives no keys.
pub(super) fn directions(
    secrets: ExtractedSecrets,
    updates: KernelConnection<ServerConnectionData>,
) -> Result<(Incoming, Outgoing), rustls::Error> {
    let suite = updates.negotiated_cipher_suite();
    let (rx_number, rx) = secrets.rx;
    let (tx_number, tx) = secrets.tx;
    let incoming = Incoming {
        decrypter: decrypter(suite, rx)?,
        number: rx_number,
        version: updates.protocol_version(),
        updates: 0,
    };
    let mut keys = Keys {
        encrypter: encrypter(suite, tx)?,
        number: 0,
        suite,
        updates,
    };
    keys.skip_to(tx_number)?;
    let outgoing = Outgoing {
        keys: Mutex::new(keys),
        has_more: AtomicBool::new(false),
    };
    Ok((incoming, outgoing))
}
