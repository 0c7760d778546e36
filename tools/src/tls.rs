//! TLS for what this command connects to a receiver: by the thread that writes, as a QEMU does it, or as a front in this process, a socket
//! to which it connects without TLS, and from which each connection goes on to the receiver with TLS. So whatever connects needs to know
//! nothing of it.

use crate::net::{Address, ConnectError, Socket, TlsStream};
use crate::output::tell;
use clap::Args;
use colo_ring::tls::{CredentialsError, client_config};
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, ClientConnection};
use schemars::JsonSchema;
use serde::Serialize;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};
use tempfile::TempDir;
use thiserror::Error;

/// How long a connection and its handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 128 << 10;

/// Content of a record: QEMU makes one of each page.
const RECORD_BYTES: usize = 4096;

/// Options of what connects to a receiver with TLS.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TlsArgs {
    /// Connect with TLS: a directory with ca-cert.pem, client-cert.pem and client-key.pem, as QEMU's tls-creds-x509 has it
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,

    /// What the receiver's certificate must say [default: the host of its address]
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub tls_hostname: Option<String>,
}

/// Why there is no TLS to a receiver.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The files.
    #[error("--tls: {0}")]
    Credentials(#[from] CredentialsError),
    /// Its name.
    #[error("--tls-hostname {name}: {source}")]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        source: InvalidDnsNameError,
    },
    /// A UNIX socket has no host.
    #[error("with --tls and a UNIX socket, give --tls-hostname: what the receiver's certificate says")]
    NoName,
    /// The front.
    #[error("a socket for TLS cannot be made: {0}")]
    Front(#[from] io::Error),
}

impl TlsArgs {
    /// What the receiver's certificate must say.
    ///
    /// # Errors
    /// If that is not known.
    pub fn name(&self, to: &Address) -> Result<String, TlsError> {
        match (&self.tls_hostname, to) {
            (Some(name), _) => Ok(name.clone()),
            (None, Address::Tcp(host_port)) => {
                let host = host_port.rsplit_once(':').map_or(&**host_port, |(host, _)| host);
                Ok(host.trim_start_matches('[').trim_end_matches(']').to_owned())
            }
            (None, Address::Unix(_)) => Err(TlsError::NoName),
        }
    }

    /// What connections are made with; none without `--tls`.
    ///
    /// # Errors
    /// If the files cannot be used.
    pub fn client(&self, to: &Address) -> Result<Option<ClientTls>, TlsError> {
        let Some(directory) = &self.tls else {
            return Ok(None);
        };
        let name = self.name(to)?;
        Ok(Some(ClientTls::new(client_config(directory)?, &name)?))
    }

    /// A front to a receiver, in a directory of this user's alone; none without `--tls`.
    ///
    /// # Errors
    /// If there cannot be one.
    pub fn front(&self, to: &Address) -> Result<Option<Front>, TlsError> {
        let Some(client) = self.client(to)? else {
            return Ok(None);
        };
        let directory = tempfile::tempdir()?;
        let listen = Address::Unix(directory.path().join("tls"));
        let mut front = Front::start(&listen, to.clone(), client)?;
        front._directory = Some(directory);
        Ok(Some(front))
    }
}

/// What a connection's TLS is made with.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl ClientTls {
    /// With this configuration, to a receiver of this name.
    ///
    /// # Errors
    /// If that is no name.
    pub fn new(config: Arc<ClientConfig>, name: &str) -> Result<Self, TlsError> {
        let parsed = ServerName::try_from(name.to_owned());
        let mut config = (*config).clone();
        // The bytes of its header count.
        config.max_fragment_size = Some(RECORD_BYTES + 5);
        Ok(Self {
            config: Arc::new(config),
            name: parsed.map_err(|source| TlsError::Name {
                name: name.to_owned(),
                source,
            })?,
        })
    }

    /// Connects one channel, called `what`, as [`Socket::connect`] does, and does the handshake.
    pub(crate) fn open(&self, to: &Address, what: &str, patience: Duration) -> Result<Socket, ConnectError> {
        let connect = || {
            let socket = Socket::connect(to, what, patience).map_err(io::Error::other)?;
            let secured = self.secure(socket)?;
            secured.0.set_patience(Some(patience))?;
            Ok(secured)
        };
        let connected = connect().map_err(|source| ConnectError {
            what: what.to_owned(),
            address: to.to_string(),
            source,
        });
        connected.map(|(socket, connection)| Socket::Tls(TlsStream::new(socket, connection)))
    }

    fn connect(&self, to: &Address) -> io::Result<(Socket, ClientConnection)> {
        let socket = Socket::connect(to, "TLS", PATIENCE).map_err(io::Error::other)?;
        socket.set_nodelay()?;
        self.secure(socket)
    }

    /// Does the handshake.
    fn secure(&self, mut socket: Socket) -> io::Result<(Socket, ClientConnection)> {
        let connection = ClientConnection::new(self.config.clone(), self.name.clone());
        let mut connection = connection.map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        connection.set_buffer_limit(None);
        socket.set_patience(None)?;
        Ok((socket, connection))
    }
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listening {
    fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(listener) => {
                let socket = listener.accept()?.0;
                socket.set_nodelay(true)?;
                Socket::Tcp(socket)
            }
            Self::Unix(listener) => Socket::Unix(listener.accept()?.0),
        })
    }
}

/// A front to a receiver, until it is dropped. Connections that were made through it go on.
#[derive(Debug)]
pub struct Front {
    address: Address,
    is_over: Arc<AtomicBool>,
    _directory: Option<TempDir>,
}

impl Front {
    /// Listens at an address (port 0 takes a free one), and connects each connection to `to` with TLS.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn start(listen: &Address, to: Address, client: ClientTls) -> io::Result<Self> {
        let (listener, address) = match listen {
            Address::Tcp(host_port) => {
                let listener = TcpListener::bind(host_port)?;
                let address = Address::Tcp(listener.local_addr()?.to_string());
                (Listening::Tcp(listener), address)
            }
            Address::Unix(path) => (Listening::Unix(UnixListener::bind(path)?), listen.clone()),
        };
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        std::thread::Builder::new()
            .name("tls-front".into())
            .spawn(move || {
                while let Ok(plain) = listener.accept() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    // In their order: the main channel is the first.
                    match client.connect(&to) {
                        Ok(secured) => {
                            if let Err(error) = Tunnel::start(plain, secured) {
                                tell(&format!("warning: TLS to {to}: {error}"));
                            }
                        }
                        Err(error) => tell(&format!("warning: TLS to {to}: {error}")),
                    }
                }
            })?;
        Ok(Self {
            address,
            is_over,
            _directory: None,
        })
    }

    /// Where to connect to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The same, if it is TCP.
    pub fn socket_address(&self) -> Option<SocketAddr> {
        match &self.address {
            Address::Tcp(host_port) => host_port.parse().ok(),
            Address::Unix(_) => None,
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // So that it looks.
        let _ = Socket::connect(&self.address, "TLS", PATIENCE);
    }
}

/// A connection on its way through.
struct Tunnel {
    connection: Mutex<ClientConnection>,
}

impl Tunnel {
    /// Starts the threads of both directions.
    fn start(plain: Socket, (secured, connection): (Socket, ClientConnection)) -> io::Result<()> {
        let tunnel = Arc::new(Self {
            connection: Mutex::new(connection),
        });
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(work)
        };
        let (mut from_plain, mut to_secured) = (plain.try_clone()?, secured.try_clone()?);
        let out = tunnel.clone();
        start(
            "tls-out",
            Box::new(move || {
                // One that has ended has nothing more to send.
                let _ = out.seal(&mut from_plain, &mut to_secured);
                // Both directions: its other end may be gone, and then nothing else would end them.
                to_secured.shutdown();
            }),
        )?;
        let (mut to_plain, mut from_secured) = (plain, secured);
        start(
            "tls-in",
            Box::new(move || {
                if let Err(error) = tunnel.open(&mut from_secured, &mut to_plain)
                    && error.kind() == io::ErrorKind::InvalidData
                {
                    tell(&format!("warning: TLS: {error}"));
                }
                to_plain.shutdown();
                from_secured.shutdown();
            }),
        )?;
        Ok(())
    }

    fn connection(&self) -> MutexGuard<'_, ClientConnection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seal(&self, plain: &mut Socket, secured: &mut Socket) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = plain.read(&mut piece)?;
            let mut connection = self.connection();
            match count {
                0 => connection.send_close_notify(),
                _ => connection.writer().write_all(&piece[..count])?,
            }
            while connection.wants_write() {
                connection.write_tls(secured)?;
            }
            if count == 0 {
                return Ok(());
            }
        }
    }

    fn open(&self, secured: &mut Socket, plain: &mut Socket) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = secured.read(&mut piece)?;
            if count == 0 {
                return Ok(());
            }
            let (mut records, mut opened) = (&piece[..count], Vec::new());
            let mut connection = self.connection();
            while !records.is_empty() {
                if connection.read_tls(&mut records)? == 0 {
                    // Behind its close_notify nothing is taken.
                    return Ok(());
                }
                let state = connection.process_new_packets();
                let state = state.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = opened.len();
                opened.resize(length + state.plaintext_bytes_to_read(), 0);
                connection.reader().read_exact(&mut opened[length..])?;
            }
            while connection.wants_write() {
                connection.write_tls(secured)?;
            }
            drop(connection);
            plain.write_all(&opened)?;
        }
    }
}

/// A date as text, of seconds since 1970.
pub(crate) fn date(unix_s: i64) -> String {
    let Ok(seconds) = u64::try_from(unix_s) else {
        return "before 1970".to_owned();
    };
    // Beyond it the formatting has no digits.
    const LAST: u64 = 253_402_300_799;
    let time = UNIX_EPOCH + Duration::from_secs(seconds.min(LAST));
    humantime::format_rfc3339_seconds(time).to_string()
}
