//! A CA and what it signs, made by `scripts/make-certs`, and primaries that connect with it.

use crate::command::Scratch;
use crate::receiver_options;
use colo_ring::receiver::{ListenAddress, Receiver, ReceiverOptions};
use colo_ring::ring::BackendKind;
use colo_ring::tls::{Allowed, ServerCredentials, client_config};
use colo_ring_tools::net::Address;
use colo_ring_tools::tls::{ClientTls, Front};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Stream};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// What the receiver's certificate says.
pub const RECEIVER: &str = "localhost";

/// A CA in a directory of its own. The directory `receiver` is for a receiver, `primary` for a primary.
#[derive(Debug)]
pub struct Authority {
    scratch: Scratch,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// A new one.
    ///
    /// # Panics
    /// If openssl is missing.
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new();
        let authority = Self { scratch };
        authority.make(&[]);
        authority
    }

    /// Has the script do more.
    ///
    /// # Panics
    /// If it fails.
    pub fn make(&self, words: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-certs");
        let made = Command::new(script).arg(self.scratch.path()).args(words).output();
        let made = made.expect("scripts/make-certs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    /// One of its directories.
    #[must_use]
    pub fn directory(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// What a receiver has.
    ///
    /// # Panics
    /// If it cannot be used.
    #[must_use]
    pub fn credentials(&self, demands_certificate: bool, allowed: &[&str]) -> Arc<ServerCredentials> {
        let allowed = Allowed::new(allowed.iter().map(ToString::to_string).collect());
        let directory = self.directory("receiver");
        Arc::new(ServerCredentials::load(&directory, demands_certificate, allowed).expect("credentials"))
    }

    /// What a primary has.
    ///
    /// # Panics
    /// If it cannot be used.
    #[must_use]
    pub fn client(&self, name: &str) -> Arc<ClientConfig> {
        client_config(&self.directory(name)).expect("credentials")
    }

    /// A front on TCP, through which connections have the certificate in one of the directories.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    pub fn front(&self, name: &str, receiver: SocketAddr) -> Front {
        front(self.client(name), receiver)
    }
}

/// A front on TCP with this configuration.
///
/// # Panics
/// If it cannot listen.
#[must_use]
pub fn front(config: Arc<ClientConfig>, receiver: SocketAddr) -> Front {
    let client = ClientTls::new(config, RECEIVER).expect("a name");
    let listen = Address::Tcp("127.0.0.1:0".to_owned());
    let to = format!("tcp:{receiver}").parse().expect("an address");
    Front::start(&listen, to, client).expect("a port")
}

/// The options of a receiver with TLS.
#[must_use]
pub fn options(backend: BackendKind, channels: u8, credentials: Arc<ServerCredentials>) -> ReceiverOptions {
    ReceiverOptions {
        tls: Some(credentials),
        ..receiver_options(backend, channels)
    }
}

/// Where a receiver listens.
///
/// # Panics
/// If it is not TCP.
#[must_use]
pub fn address(receiver: &Receiver) -> SocketAddr {
    match receiver.addresses()[0] {
        ListenAddress::Tcp(address) => address,
        ListenAddress::Unix(_) => panic!("the receiver listens on TCP"),
    }
}

/// A client whose records are a test's to change.
pub struct Client {
    /// The socket.
    pub socket: TcpStream,
    /// rustls' part.
    pub connection: ClientConnection,
}

impl Client {
    /// Connects, and sends nothing yet.
    ///
    /// # Panics
    /// If nothing listens there.
    #[must_use]
    pub fn connect(to: SocketAddr, config: Arc<ClientConfig>) -> Self {
        let name = ServerName::try_from(RECEIVER).expect("a name");
        let mut connection = ClientConnection::new(config, name).expect("a client");
        connection.set_buffer_limit(None);
        let socket = TcpStream::connect(to).expect("the receiver listens");
        socket
            .set_read_timeout(Some(crate::HANG_LIMIT))
            .expect("a timeout");
        socket.set_nodelay(true).expect("a TCP socket");
        Self { socket, connection }
    }

    /// Does the handshake.
    ///
    /// # Errors
    /// If it fails.
    pub fn shake(&mut self) -> std::io::Result<()> {
        while self.connection.is_handshaking() {
            self.connection.complete_io(&mut self.socket)?;
        }
        Ok(())
    }

    /// Records of these bytes, and of what else is to be sent.
    ///
    /// # Panics
    /// Never: there is memory.
    pub fn records(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.connection.writer().write_all(bytes).expect("memory");
        let mut records = Vec::new();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut records).expect("memory");
        }
        records
    }

    /// Sends bytes in records. That the receiver has closed meanwhile is what many tests are about.
    pub fn send(&mut self, bytes: &[u8]) {
        let records = self.records(bytes);
        let _ = self.socket.write_all(&records);
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Reads exactly these bytes.
    ///
    /// # Panics
    /// If something else comes, or nothing.
    pub fn expect(&mut self, expected: &[u8]) {
        let mut seen = vec![0; expected.len()];
        let mut stream = Stream::new(&mut self.connection, &mut self.socket);
        stream.read_exact(&mut seen).expect("an answer");
        assert_eq!(seen, expected);
    }

    /// Reads what comes until the end of the connection, and returns the error of TLS in it, if there is one.
    pub fn end(&mut self) -> Option<String> {
        let mut piece = [0; 4096];
        loop {
            match self.socket.read(&mut piece) {
                Ok(0) | Err(_) => return None,
                Ok(count) => {
                    let mut records = &piece[..count];
                    while !records.is_empty() {
                        match self.connection.read_tls(&mut records) {
                            Ok(0) => return None,
                            Ok(_) => {}
                            Err(error) => return Some(error.to_string()),
                        }
                        if let Err(error) = self.connection.process_new_packets() {
                            return Some(error.to_string());
                        }
                    }
                }
            }
        }
    }
}
