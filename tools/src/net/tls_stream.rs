//! A connection with TLS whose records are made and opened by the thread that writes and reads, as a QEMU's threads do.

use super::Socket;
use rustls::ClientConnection;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Content that is sealed at a time, before anything of it is sent.
const PIECE_BYTES: usize = 128 << 10;

/// A connection after its handshake. Copies of it are the same connection: while one reads and waits, no other can write.
#[derive(Debug)]
pub(crate) struct TlsStream {
    socket: Box<Socket>,
    connection: Arc<Mutex<ClientConnection>>,
}

impl TlsStream {
    /// `connection` has done its handshake over `socket`, and takes all that is written to it.
    pub(crate) fn new(socket: Socket, connection: ClientConnection) -> Self {
        Self {
            socket: Box::new(socket),
            connection: Arc::new(Mutex::new(connection)),
        }
    }

    /// What is below the records.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: Box::new(self.socket.try_clone()?),
            connection: self.connection.clone(),
        })
    }

    fn parts(&mut self) -> (&mut Socket, MutexGuard<'_, ClientConnection>) {
        let connection = self.connection.lock();
        (
            &mut self.socket,
            connection.unwrap_or_else(PoisonError::into_inner),
        )
    }
}

fn send(connection: &mut ClientConnection, socket: &mut Socket) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(socket)?;
    }
    Ok(())
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (socket, mut connection) = self.parts();
        loop {
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A receiver ends its connections without close_notify.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            connection.read_tls(socket)?;
            let opened = connection.process_new_packets();
            opened.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            send(&mut connection, socket)?;
        }
    }
}

impl Write for TlsStream {
    /// Takes a piece. What there is no room for in the socket goes before the next one, or with [`Self::flush`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (socket, mut connection) = self.parts();
        send(&mut connection, socket)?;
        let taken = connection
            .writer()
            .write(&bytes[..bytes.len().min(PIECE_BYTES)])?;
        match send(&mut connection, socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => sent?,
        }
        Ok(taken)
    }

    /// Sends what has been taken.
    fn flush(&mut self) -> io::Result<()> {
        let (socket, mut connection) = self.parts();
        send(&mut connection, socket)
    }
}
