//! A small NBD client, from the protocol's public document: fixed newstyle, simple replies, several requests in flight.
//!
//! Requests are sent in order; their replies may come in any. A reply's length is what was asked for, so nothing is
//! allocated by the server's word.

use crate::net::{Address, ConnectError, Socket};
use std::collections::HashMap;
use std::io::{self, IoSlice, Read};
use std::time::Duration;
use thiserror::Error;

const GREETING: [u64; 2] = [0x4e42_444d_4147_4943, OPTION];
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;

/// Handshake flags: fixed newstyle, and no zeroes after the export's size.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;

const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_WRITE_ZEROES: u16 = 1 << 6;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_WRITE_ZEROES: u16 = 6;

/// Requests in flight, as many as QEMU's client has.
const IN_FLIGHT_MAX: usize = 16;

/// Longest reply to an option that is read: an error's text has at most 4096 bytes.
const OPTION_REPLY_MAX: u32 = 8192;

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum NbdError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection failed.
    #[error("disk {export}: {doing}: {source}")]
    Io {
        /// The export.
        export: String,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It is no NBD server, or none of this protocol.
    #[error("disk {export}: the server sent {what}")]
    Protocol {
        /// The export.
        export: String,
        /// What came.
        what: String,
    },
    /// The server refuses the export.
    #[error("the server refuses the export {export}: {reason}")]
    Refused {
        /// The export.
        export: String,
        /// Its words, or the number of its error.
        reason: String,
    },
    /// The server failed to do something.
    #[error("disk {export}: the server answers error {errno} at byte {offset}")]
    Failed {
        /// The export.
        export: String,
        /// The number, of those that NBD knows.
        errno: u32,
        /// Where.
        offset: u64,
    },
}

/// What is written in one request.
#[derive(Clone, Debug)]
pub enum NbdWrite {
    /// These bytes.
    Data(Vec<u8>),
    /// So many zeroes.
    Zeroes(u32),
}

/// A connection to one export.
#[derive(Debug)]
pub struct NbdClient {
    socket: Socket,
    export: String,
    bytes: u64,
    flags: u16,
    next_cookie: u64,
}

impl NbdClient {
    /// Connects to an export. Whatever the server does not do within `patience` has failed.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn connect(address: &Address, export: &str, patience: Duration) -> Result<Self, NbdError> {
        let socket = Socket::connect(address, &format!("disk {export}"), patience)?;
        let mut client = Self {
            socket,
            export: export.to_owned(),
            bytes: 0,
            flags: 0,
            next_cookie: 0,
        };
        let set = client.socket.set_nodelay();
        set.map_err(|source| client.io("set TCP_NODELAY", source))?;
        client.negotiate()?;
        Ok(client)
    }

    /// The disk's size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the server takes [`NbdWrite::Zeroes`].
    #[must_use]
    pub fn has_write_zeroes(&self) -> bool {
        self.flags & FLAG_WRITE_ZEROES != 0
    }

    /// Whether nothing can be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags & FLAG_READ_ONLY != 0
    }

    /// Writes, several requests at a time, and returns once all are answered. Writes that overlap may be done in any order.
    ///
    /// # Errors
    /// The first that failed; the connection cannot be used then.
    pub fn write_all(&mut self, writes: impl IntoIterator<Item = (u64, NbdWrite)>) -> Result<(), NbdError> {
        let mut in_flight = HashMap::new();
        for (offset, write) in writes {
            if in_flight.len() == IN_FLIGHT_MAX {
                self.await_reply(&mut in_flight)?;
            }
            let cookie = match write {
                NbdWrite::Data(data) => {
                    let length = u32::try_from(data.len())
                        .map_err(|_| self.protocol("nothing: a write is too long"))?;
                    self.request(CMD_WRITE, offset, length, &data)?
                }
                NbdWrite::Zeroes(length) => self.request(CMD_WRITE_ZEROES, offset, length, &[])?,
            };
            in_flight.insert(cookie, offset);
        }
        while !in_flight.is_empty() {
            self.await_reply(&mut in_flight)?;
        }
        Ok(())
    }

    /// Reads into all of `buffer`.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let length = u32::try_from(buffer.len()).map_err(|_| self.protocol("nothing: a read is too long"))?;
        let cookie = self.request(CMD_READ, offset, length, &[])?;
        self.await_reply(&mut HashMap::from([(cookie, offset)]))?;
        self.read_exact("read data", buffer)
    }

    fn negotiate(&mut self) -> Result<(), NbdError> {
        let greeting = [self.read_u64()?, self.read_u64()?];
        if greeting != GREETING {
            return Err(self.protocol(&format!(
                "{:#x} {:#x}, which is no NBD greeting",
                greeting[0], greeting[1]
            )));
        }
        let flags = self.read_u16()?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(self.protocol("no fixed newstyle handshake"));
        }
        let name = self.export.as_bytes();
        let name_length =
            u32::try_from(name.len()).map_err(|_| self.protocol("nothing: the name is too long"))?;
        let mut out = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES))
            .to_be_bytes()
            .to_vec();
        out.extend(OPTION.to_be_bytes());
        out.extend(OPT_GO.to_be_bytes());
        // The name with its length, and that no further information is asked for.
        out.extend((name_length + 6).to_be_bytes());
        out.extend(name_length.to_be_bytes());
        out.extend(name);
        out.extend(0_u16.to_be_bytes());
        self.write("negotiate", &out)?;
        while self.option_reply()? {}
        Ok(())
    }

    /// Takes a reply to OPT_GO; whether more are to come.
    fn option_reply(&mut self) -> Result<bool, NbdError> {
        let (magic, option) = (self.read_u64()?, self.read_u32()?);
        let (kind, length) = (self.read_u32()?, self.read_u32()?);
        if magic != OPTION_REPLY || option != OPT_GO || length > OPTION_REPLY_MAX {
            return Err(self.protocol("an invalid option reply"));
        }
        let mut data = vec![0; length as usize];
        self.read_exact("negotiate", &mut data)?;
        match kind {
            REP_ACK => Ok(false),
            REP_INFO => {
                // Of the information items the one about the export is wanted, which is number 0.
                if let [0, 0, size @ .., flag_1, flag_2] = &data[..]
                    && let Ok(size) = <[u8; 8]>::try_from(size)
                {
                    self.bytes = u64::from_be_bytes(size);
                    self.flags = u16::from_be_bytes([*flag_1, *flag_2]);
                }
                Ok(true)
            }
            error if error & REP_ERROR != 0 => Err(NbdError::Refused {
                export: self.export.clone(),
                reason: match data.is_empty() {
                    true => format!("error {}", error & !REP_ERROR),
                    false => String::from_utf8_lossy(&data).into_owned(),
                },
            }),
            _ => Ok(true),
        }
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> Result<u64, NbdError> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut out = Vec::with_capacity(28);
        out.extend(REQUEST.to_be_bytes());
        out.extend(0_u16.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        let sent = self
            .socket
            .write_parts(&mut [IoSlice::new(&out), IoSlice::new(data)]);
        sent.map_err(|source| self.io("send a request", source))?;
        Ok(cookie)
    }

    /// Takes the head of a reply to one of these requests.
    fn await_reply(&mut self, in_flight: &mut HashMap<u64, u64>) -> Result<(), NbdError> {
        let (magic, errno, cookie) = (self.read_u32()?, self.read_u32()?, self.read_u64()?);
        let Some(offset) = in_flight.remove(&cookie).filter(|_| magic == SIMPLE_REPLY) else {
            return Err(self.protocol(&format!("a reply to request {cookie}, which is not in flight")));
        };
        match errno {
            0 => Ok(()),
            errno => Err(NbdError::Failed {
                export: self.export.clone(),
                errno,
                offset,
            }),
        }
    }

    fn read_u64(&mut self) -> Result<u64, NbdError> {
        let mut bytes = [0; 8];
        self.read_exact("read", &mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn read_u32(&mut self) -> Result<u32, NbdError> {
        let mut bytes = [0; 4];
        self.read_exact("read", &mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn read_u16(&mut self) -> Result<u16, NbdError> {
        let mut bytes = [0; 2];
        self.read_exact("read", &mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn read_exact(&mut self, doing: &'static str, buffer: &mut [u8]) -> Result<(), NbdError> {
        let mut done = 0;
        while done < buffer.len() {
            done += match self.socket.read(&mut buffer[done..]) {
                Ok(0) => return Err(self.io(doing, io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(self.io(doing, error)),
            };
        }
        Ok(())
    }

    fn write(&mut self, doing: &'static str, bytes: &[u8]) -> Result<(), NbdError> {
        let written = self.socket.write_parts(&mut [IoSlice::new(bytes)]);
        written.map_err(|source| self.io(doing, source))
    }

    fn io(&self, doing: &'static str, source: io::Error) -> NbdError {
        NbdError::Io {
            export: self.export.clone(),
            doing,
            source,
        }
    }

    fn protocol(&self, what: &str) -> NbdError {
        NbdError::Protocol {
            export: self.export.clone(),
            what: what.to_owned(),
        }
    }
}
