//! Accepting connections and reading what they are: on the control thread, one task a listener and one a connection,
//! so that a silent connection holds up nobody.
//!
//! With io_uring the waiting is done by tokio-uring, else by readiness; what is read is the same. Exactly the bytes
//! that tell the kind of a channel are taken off the socket, and for a multifd channel its init packet.

use super::assemble::{Identity, Origin, Peer};
use super::options::ListenAddress;
use crate::ring::own_descriptor;
use crate::wire::multifd::{INIT_LEN, Init};
use crate::wire::stream::{ChannelKind, classify};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{
    KeepAlive, PeerCredentials, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpNoDelay, TcpUserTimeout,
};
use nix::sys::socket::{Shutdown, getsockopt, setsockopt, shutdown};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_uring::buf::{BoundedBuf, Slice};

/// Bytes that tell the kind of a connection.
pub(super) const FIRST_LEN: usize = 4;

/// Most connections that are accepted and not identified, or wait for the rest of their session. More are closed.
pub(super) const PENDING_MAX: usize = 1024;

/// A TCP connection whose other host is silent for this long is probed.
const PROBE_AFTER_SECONDS: u32 = 10;

/// Seconds between probes.
const PROBE_EVERY_SECONDS: u32 = 5;

/// Probes without an answer that end the connection: 40 seconds after the last sign of life.
const PROBES: u32 = 6;

/// An accepted connection.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) socket: OwnedFd,
    pub(super) is_tcp: bool,
    pub(super) peer: Peer,
    /// The other end, for people.
    pub(super) from: String,
}

impl Accepted {
    /// Whether the other end has closed it, even if not all that it sent was read.
    pub(super) fn is_gone(&self) -> bool {
        // nix has no name for it. A reset and an error are always reported.
        let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut ends = [PollFd::new(self.socket.as_fd(), closed)];
        poll(&mut ends, PollTimeout::ZERO).is_ok_and(|ended| ended > 0)
    }
}

/// A socket that listens.
pub(super) struct Listener {
    socket: OwnedFd,
    address: ListenAddress,
}

/// Why an address cannot be listened on.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {source}{}", hint(.source))]
pub struct ListenError {
    address: ListenAddress,
    source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another program has it: `ss -lntpx` shows which",
        io::ErrorKind::AddrNotAvailable => "; no interface of this host has that address: `ip address`",
        io::ErrorKind::PermissionDenied => "; ports below 1024 and foreign directories need privileges",
        _ => "",
    }
}

impl Listener {
    pub(super) fn bind(address: &ListenAddress) -> Result<Self, ListenError> {
        let failed = |source| ListenError {
            address: address.clone(),
            source,
        };
        match address {
            ListenAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(failed)?;
                let address = ListenAddress::Tcp(listener.local_addr().map_err(failed)?);
                Ok(Self {
                    socket: listener.into(),
                    address,
                })
            }
            ListenAddress::Unix(path) => {
                let socket = bind_unix(path).map_err(failed)?.into();
                Ok(Self {
                    socket,
                    address: address.clone(),
                })
            }
        }
    }

    /// The address with the real port.
    pub(super) fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Makes a pending accept return: tokio-uring ends only when nothing is in flight.
    pub(super) fn close(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    fn is_tcp(&self) -> bool {
        matches!(self.address, ListenAddress::Tcp(_))
    }

    /// Accepts for ever; ends when the socket is shut down. `position` is this listener's among all.
    pub(super) async fn accept_all(
        self: Rc<Self>,
        position: usize,
        uring: bool,
        tell: mpsc::Sender<Result<Accepted, String>>,
    ) -> io::Result<()> {
        let socket = self.socket.try_clone()?;
        let acceptor = Acceptor::new(socket, self.is_tcp(), uring)?;
        loop {
            let text =
                |error: io::Error| format!("{}: a connection could not be accepted: {error}", self.address);
            let accepted = acceptor.accept().await;
            let shortage = accepted.is_err();
            let accepted = match accepted {
                // An error here is of this one connection: its peer has gone already. The next must not wait for it.
                Ok(socket) => self.describe(socket, position).map_err(text),
                // The listening socket was shut down: the end.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                Err(error) => Err(text(error)),
            };
            if tell.send(accepted).await.is_err() {
                return Ok(());
            }
            if shortage {
                // Of descriptors or memory: it passes.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    fn describe(&self, socket: OwnedFd, listener: usize) -> io::Result<Accepted> {
        let is_tcp = self.is_tcp();
        let (origin, from) = if is_tcp {
            setsockopt(&socket, TcpNoDelay, &true)?;
            watch_for_vanished_host(&socket)?;
            let stream = TcpStream::from(socket.try_clone()?);
            let peer = stream.peer_addr()?;
            (Origin::Host(peer.ip()), peer.to_string())
        } else {
            let process = getsockopt(&socket, PeerCredentials)?.pid();
            (
                Origin::Process(process),
                format!("{}, process {process}", self.address),
            )
        };
        Ok(Accepted {
            socket,
            is_tcp,
            peer: Peer { listener, origin },
            from,
        })
    }
}

/// Makes the connection fail where the primary's host has gone without a word (spec §14.1): between checkpoints it
/// is silent for as long as `x-checkpoint-delay`, so that silence alone says nothing.
fn watch_for_vanished_host(socket: &OwnedFd) -> nix::Result<()> {
    setsockopt(socket, KeepAlive, &true)?;
    setsockopt(socket, TcpKeepIdle, &PROBE_AFTER_SECONDS)?;
    setsockopt(socket, TcpKeepInterval, &PROBE_EVERY_SECONDS)?;
    setsockopt(socket, TcpKeepCount, &PROBES)?;
    // The same for an answer of ours that nobody acknowledges: probes are not sent then.
    let given_up = (PROBE_AFTER_SECONDS + PROBE_EVERY_SECONDS * PROBES) * 1000;
    setsockopt(socket, TcpUserTimeout, &given_up)
}

enum Acceptor {
    Uring(tokio_uring::net::TcpListener),
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    fn new(socket: OwnedFd, is_tcp: bool, uring: bool) -> io::Result<Self> {
        if !is_tcp {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            return Ok(Self::Unix(tokio::net::UnixListener::from_std(listener)?));
        }
        let listener = TcpListener::from(socket);
        if uring {
            return Ok(Self::Uring(tokio_uring::net::TcpListener::from_std(listener)));
        }
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(tokio::net::TcpListener::from_std(listener)?))
    }

    /// The accepted socket; it blocks, as the data plane wants it.
    async fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Acceptor::Uring(listener) => own_descriptor(&listener.accept().await?.0),
            Acceptor::Tcp(listener) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Acceptor::Unix(listener) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
        }
    }
}

/// Reads what kind of connection this is.
///
/// # Errors
/// What an operator should know: it is no migration channel, or ended or stayed silent.
pub(super) async fn identify(
    accepted: &Accepted,
    uring: bool,
    deadline: Duration,
) -> Result<Identity, String> {
    let reading = async {
        let text = |error: io::Error| error.to_string();
        let mut reader = Reader::new(accepted, uring).map_err(text)?;
        let first: [u8; FIRST_LEN] = reader.read().await?;
        let identity = match classify(first).map_err(|error| error.to_string())? {
            ChannelKind::Main => Identity::Main,
            ChannelKind::Multifd => {
                let mut init = [0; INIT_LEN];
                let rest: [u8; INIT_LEN - FIRST_LEN] = reader.read().await?;
                init[..FIRST_LEN].copy_from_slice(&first);
                init[FIRST_LEN..].copy_from_slice(&rest);
                Init::decode(&init)
                    .map(Identity::Multifd)
                    .map_err(|error| error.to_string())?
            }
        };
        reader.done().map_err(text)?;
        Ok(identity)
    };
    let result = match tokio::time::timeout(deadline, reading).await {
        Ok(result) => result,
        Err(_) => Err(format!("it did not say what it is within {deadline:?}")),
    };
    if result.is_err() {
        // It also ends a read that is still in flight.
        let _ = shutdown(accepted.socket.as_raw_fd(), Shutdown::Both);
    }
    result
}

enum Reader {
    UringTcp(tokio_uring::net::TcpStream),
    UringUnix(tokio_uring::net::UnixStream),
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Reader {
    fn new(accepted: &Accepted, uring: bool) -> io::Result<Self> {
        let socket = accepted.socket.try_clone()?;
        if accepted.is_tcp {
            let stream = TcpStream::from(socket);
            if uring {
                return Ok(Self::UringTcp(tokio_uring::net::TcpStream::from_std(stream)));
            }
            stream.set_nonblocking(true)?;
            return Ok(Self::Tcp(tokio::net::TcpStream::from_std(stream)?));
        }
        let stream = UnixStream::from(socket);
        if uring {
            return Ok(Self::UringUnix(tokio_uring::net::UnixStream::from_std(stream)));
        }
        stream.set_nonblocking(true)?;
        Ok(Self::Unix(tokio::net::UnixStream::from_std(stream)?))
    }

    /// Exactly N bytes, and not one more: what follows belongs to the data plane.
    async fn read<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        let mut have = 0;
        while have < N {
            let rest = &mut bytes[have..];
            let count = match self {
                Self::UringTcp(stream) => keep(stream.read(room(rest.len())).await, rest),
                Self::UringUnix(stream) => keep(stream.read(room(rest.len())).await, rest),
                Self::Tcp(stream) => stream.read(rest).await,
                Self::Unix(stream) => stream.read(rest).await,
            };
            match count {
                Ok(0) => return Err("it was closed before it said what it is".into()),
                Ok(count) => have += count,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(bytes)
    }

    /// Gives the socket back as it was: the mode belongs to the connection, not to the descriptor.
    fn done(self) -> io::Result<()> {
        match self {
            Self::UringTcp(_) | Self::UringUnix(_) => Ok(()),
            Self::Tcp(stream) => stream.into_std()?.set_nonblocking(false),
            Self::Unix(stream) => stream.into_std()?.set_nonblocking(false),
        }
    }
}

/// An owned buffer that takes exactly that many bytes, whatever it has room for.
fn room(bytes: usize) -> Slice<Vec<u8>> {
    Vec::with_capacity(bytes).slice(..bytes)
}

/// Moves what an owned buffer holds to where it belongs.
fn keep((count, part): (io::Result<usize>, Slice<Vec<u8>>), to: &mut [u8]) -> io::Result<usize> {
    let count = count?;
    to[..count].copy_from_slice(&part[..count]);
    Ok(count)
}

/// Binds a UNIX socket. A socket file that nobody listens on any more is replaced, as after a kill.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// The same for the control socket.
pub(super) fn bind_control(path: &Path) -> Result<UnixListener, ListenError> {
    let address = ListenAddress::Unix(path.to_owned());
    bind_unix(path).map_err(|source| ListenError { address, source })
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use nix::sys::socket::sockopt::Linger;
    use std::time::Instant;

    fn listener() -> (Listener, std::net::SocketAddr) {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = Listener::bind(&address).unwrap();
        match *listener.address() {
            ListenAddress::Tcp(address) => (listener, address),
            ListenAddress::Unix(_) => unreachable!("a TCP address was bound"),
        }
    }

    #[test]
    fn a_vanished_host_is_noticed() {
        let (listener, address) = listener();
        let _primary = TcpStream::connect(address).unwrap();
        let socket = TcpListener::from(listener.socket.try_clone().unwrap()).accept();
        let accepted = listener.describe(socket.unwrap().0.into(), 0).unwrap();
        assert!(getsockopt(&accepted.socket, KeepAlive).unwrap());
        assert_eq!(getsockopt(&accepted.socket, TcpKeepIdle).unwrap(), 10);
        assert_eq!(getsockopt(&accepted.socket, TcpUserTimeout).unwrap(), 40_000);
    }

    /// Connections that are reset before they are looked at do not hold up the one behind them.
    #[test]
    fn reset_connections_hold_up_nobody() {
        let (listener, address) = listener();
        for _ in 0..20 {
            let gone = TcpStream::connect(address).unwrap();
            let reset = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&gone, Linger, &reset).unwrap();
        }
        let primary = TcpStream::connect(address).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let begin = Instant::now();
        tokio::task::LocalSet::new().block_on(&runtime.unwrap(), async {
            let (tell, mut told) = mpsc::channel(64);
            let accepting = tokio::task::spawn_local(Rc::new(listener).accept_all(0, false, tell));
            let from = primary.local_addr().unwrap().to_string();
            while told
                .recv()
                .await
                .unwrap()
                .map_or(true, |accepted| accepted.from != from)
            {}
            accepting.abort();
        });
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
}
