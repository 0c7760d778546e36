//! A small NBD client, so that tests can send what no good client does.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

/// The types of requests.
pub mod kind {
    /// READ.
    pub const READ: u16 = 0;
    /// WRITE.
    pub const WRITE: u16 = 1;
    /// DISC.
    pub const DISCONNECT: u16 = 2;
    /// FLUSH.
    pub const FLUSH: u16 = 3;
    /// TRIM.
    pub const TRIM: u16 = 4;
    /// WRITE_ZEROES.
    pub const WRITE_ZEROES: u16 = 6;
}

/// A client that has chosen an export, with simple replies.
pub struct NbdClient {
    stream: TcpStream,
    cookie: u64,
}

/// An option of the handshake.
#[must_use]
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("a short option");
    [
        b"IHAVEOPT",
        &number.to_be_bytes()[..],
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

/// A request's header.
#[must_use]
pub fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513u32.to_be_bytes()[..],
        &0u16.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Connects, and takes and answers the greeting.
///
/// # Errors
/// If there is no NBD server, or it closes the connection.
pub fn greet(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if greeting[..16] != *b"NBDMAGICIHAVEOPT" {
        return Err(io::Error::other(format!("a greeting {greeting:x?}")));
    }
    stream.write_all(&3u32.to_be_bytes())?;
    Ok(stream)
}

impl NbdClient {
    /// Connects and chooses an export.
    ///
    /// # Errors
    /// The server's reason for refusing it, or why there is no answer.
    ///
    /// # Panics
    /// If the name is longer than 4 GiB.
    pub fn go(address: SocketAddr, name: &str) -> Result<Self, String> {
        let mut stream = greet(address).map_err(|error| error.to_string())?;
        let length = u32::try_from(name.len()).expect("a short name");
        let data = [&length.to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        stream
            .write_all(&option(7, &data))
            .map_err(|error| error.to_string())?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).map_err(|error| error.to_string())?;
            let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let mut data = vec![0; usize::try_from(word(16)).expect("a short reply")];
            stream.read_exact(&mut data).map_err(|error| error.to_string())?;
            match word(12) {
                1 => return Ok(Self { stream, cookie: 0 }),
                kind if kind & 0x8000_0000 != 0 => return Err(String::from_utf8_lossy(&data).into_owned()),
                _ => {}
            }
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the server has closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a request with its payload, and waits for its reply: the error in it.
    ///
    /// # Errors
    /// If the server has closed the connection.
    pub fn ask(&mut self, kind: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<u32> {
        self.cookie += 1;
        let head = request(kind, self.cookie, offset, length);
        self.stream.write_all(&[&head, payload].concat())?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        let (magic, rest) = reply.split_at(4);
        let (error, cookie) = rest.split_at(4);
        if magic != 0x6744_6698u32.to_be_bytes() || cookie != self.cookie.to_be_bytes() {
            return Err(io::Error::other(format!("a reply {reply:x?}")));
        }
        Ok(u32::from_be_bytes(error.try_into().unwrap_or_default()))
    }

    /// Writes.
    ///
    /// # Errors
    /// If the server has closed the connection, or answers an error.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        match self.ask(kind::WRITE, offset, length, bytes)? {
            0 => Ok(()),
            error => Err(io::Error::other(format!("the server answers error {error}"))),
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// If the server has closed the connection, or answers an error.
    pub fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let count = u32::try_from(length).map_err(io::Error::other)?;
        match self.ask(kind::READ, offset, count, &[])? {
            0 => {
                let mut bytes = vec![0; length];
                self.stream.read_exact(&mut bytes)?;
                Ok(bytes)
            }
            error => Err(io::Error::other(format!("the server answers error {error}"))),
        }
    }

    /// Sends reads and a DISC at once, and returns how many bytes of answers come before the connection is closed.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn read_and_disconnect(&mut self, reads: &[(u64, u32)]) -> io::Result<usize> {
        let mut bytes = Vec::new();
        for (cookie, (offset, length)) in (1u64..).zip(reads) {
            bytes.extend(request(kind::READ, cookie, *offset, *length));
        }
        bytes.extend(request(kind::DISCONNECT, 0, 0, 0));
        self.stream.write_all(&bytes)?;
        let mut answers = Vec::new();
        self.stream.read_to_end(&mut answers)
    }

    /// Whether the server has closed the connection; waits for that.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}
