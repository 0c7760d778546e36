//! Accepting connections: one task a listener.

use super::ListenAddress;
use super::passed::PassedSockets;
use super::unix_socket::{Clients, SocketFile, bind_unix};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{
    KeepAlive, PeerCredentials, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpNoDelay, TcpUserTimeout,
};
use nix::sys::socket::{Shutdown, getsockopt, setsockopt, shutdown};
use std::io;
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::mpsc;

/// Seconds between probes of a silent host.
const PROBE_EVERY_SECONDS: u32 = 1;

/// Most probes that Linux counts.
const PROBES_MAX: u32 = 127;

/// How long to retry an address that is in use: that of a killed receiver stays in use for some 40 ms after its end, until
/// the kernel has released its rings.
const IN_USE_RETRY: Duration = Duration::from_secs(1);

/// When a TCP connection to a host that has vanished is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostWatch {
    /// Seconds of silence after which the other host is probed, once a second.
    pub probe_after_s: u32,
    /// Seconds without a response after which the connection is closed.
    pub give_up_after_s: u32,
}

impl Default for HostWatch {
    /// For a decision within 10 seconds.
    fn default() -> Self {
        Self {
            probe_after_s: 3,
            give_up_after_s: 8,
        }
    }
}

impl HostWatch {
    /// Sets it on a socket.
    ///
    /// # Errors
    /// If it is not a TCP socket.
    pub fn apply(self, socket: &impl AsFd) -> nix::Result<()> {
        self.probe(socket)?;
        // This decides, for probes and for unacknowledged data: with it, Linux does not count probes. It ends a connection, too,
        // whose peer is there but reads nothing for so long while more is sent than its buffers hold.
        setsockopt(socket, TcpUserTimeout, &self.give_up_after_s.saturating_mul(1000))
    }

    /// Sets it on a socket to a host that may read nothing for any time: only a silent connection is probed and closed.
    ///
    /// # Errors
    /// If it is not a TCP socket.
    pub fn apply_to_silence(self, socket: &impl AsFd) -> nix::Result<()> {
        self.probe(socket)?;
        let probes = self.give_up_after_s.saturating_sub(self.probe_after_s) / PROBE_EVERY_SECONDS;
        setsockopt(socket, TcpKeepCount, &probes.clamp(1, PROBES_MAX))
    }

    fn probe(self, socket: &impl AsFd) -> nix::Result<()> {
        setsockopt(socket, KeepAlive, &true)?;
        setsockopt(socket, TcpKeepIdle, &self.probe_after_s.max(1))?;
        setsockopt(socket, TcpKeepInterval, &PROBE_EVERY_SECONDS)
    }
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A host.
    Host(IpAddr),
    /// A process of this host, over a UNIX socket.
    Process(i32),
}

impl Origin {
    /// What counts as one where there is a limit by origin: a host, or with IPv6 its network of 64 bits, of which one host
    /// may have every address.
    pub fn group(self) -> Self {
        match self {
            Self::Host(address) => Self::Host(match address.to_canonical() {
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
                IpAddr::V4(address) => address.into(),
            }),
            Self::Process(_) => self,
        }
    }
}

/// What the connections of one session have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Position of the listener among all.
    pub listener: usize,
    /// Where it comes from.
    pub origin: Origin,
}

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// It blocks.
    pub socket: OwnedFd,
    /// Whether it is TCP, else it is a UNIX socket.
    pub is_tcp: bool,
    /// Its peer.
    pub peer: Peer,
    /// The other end, for messages.
    pub from: String,
}

impl Accepted {
    /// Whether the other end has closed it, even if not all that it sent was read.
    pub fn is_gone(&self) -> bool {
        is_gone(self.socket.as_fd())
    }
}

/// Whether the other end has closed a connection, even if not all that it sent was read.
pub(crate) fn is_gone(socket: BorrowedFd<'_>) -> bool {
    // nix has no name for it. A reset and an error are always reported.
    let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut ends = [PollFd::new(socket, closed)];
    poll(&mut ends, PollTimeout::ZERO).is_ok_and(|ended| ended > 0)
}

/// A socket that listens.
pub struct Listener {
    /// Of a UNIX socket; dropped before it.
    file: Option<SocketFile>,
    socket: OwnedFd,
    address: ListenAddress,
    watch: HostWatch,
    /// Whether another process goes on with the socket.
    is_shared: bool,
}

/// Why a connection was not accepted.
#[derive(Debug, Error)]
#[error("{address}: a connection could not be accepted: {source}")]
pub struct AcceptError {
    address: ListenAddress,
    source: io::Error,
}

/// Why an address cannot be listened on.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {source}{}", hint(.source))]
pub struct ListenError {
    pub(super) address: ListenAddress,
    pub(super) source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another program uses it: `ss -lntpx` shows which",
        io::ErrorKind::AddrNotAvailable => "; no interface of this host has that address: `ip address`",
        io::ErrorKind::PermissionDenied => "; ports below 1024 and foreign directories need privileges",
        _ => "",
    }
}

/// Sets how many connections may wait to be accepted.
fn limit_queue(listener: &impl AsFd) -> io::Result<()> {
    Ok(rustix::net::listen(listener, BACKLOG)?)
}

/// Connections that wait to be accepted, at most: the kernel accepts one more than this.
pub const QUEUE_MAX: u64 = BACKLOG as u64 + 1;

/// As many as Linux allows by its default of `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

impl Listener {
    /// Listens on an address.
    ///
    /// # Errors
    /// If it is unavailable; the message names a remedy where there is one.
    pub fn bind(address: &ListenAddress) -> Result<Self, ListenError> {
        let failed = |source| ListenError {
            address: address.clone(),
            source,
        };
        match address {
            ListenAddress::Tcp(wanted) => {
                let listener = retry_while_in_use(|| TcpListener::bind(wanted)).map_err(failed)?;
                let address = ListenAddress::Tcp(listener.local_addr().map_err(failed)?);
                limit_queue(&listener).map_err(failed)?;
                Ok(Self {
                    socket: listener.into(),
                    file: None,
                    address,
                    watch: HostWatch::default(),
                    is_shared: false,
                })
            }
            ListenAddress::Unix(path) => {
                let (socket, file) = bind_unix(path, Clients::Group)?.into_parts();
                limit_queue(&socket).map_err(failed)?;
                Ok(Self {
                    socket: socket.into(),
                    file: Some(file),
                    address: address.clone(),
                    watch: HostWatch::default(),
                    is_shared: false,
                })
            }
        }
    }

    /// Takes the socket of this address from those that were passed, or listens as [`Self::bind`] does; and has it kept for the next receiver,
    /// where sockets are kept.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn obtain(address: &ListenAddress, passed: &PassedSockets) -> Result<Self, ListenError> {
        let failed = |source| ListenError {
            address: address.clone(),
            source,
        };
        let mut listener = match passed.take(address).map_err(failed)? {
            Some(socket) => {
                // Whatever the service manager has set.
                limit_queue(&socket).map_err(failed)?;
                Self {
                    socket,
                    file: None,
                    address: address.clone(),
                    watch: HostWatch::default(),
                    is_shared: true,
                }
            }
            None => Self::bind(address)?,
        };
        if passed.keep(&listener.address, listener.socket.as_fd()) {
            listener.is_shared = true;
            if let Some(file) = listener.file.take() {
                file.leave();
            }
        }
        Ok(listener)
    }

    /// Sets how the hosts of accepted connections are watched.
    #[must_use]
    pub fn watching(mut self, watch: HostWatch) -> Self {
        self.watch = watch;
        self
    }

    /// The address with the real port.
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// The file of a UNIX socket, which is to be dropped when nothing listens any more, where another thread may do that.
    pub fn take_file(&mut self) -> Option<SocketFile> {
        self.file.take()
    }

    /// Refuses further connections; where another process goes on with the socket, they wait for that.
    pub fn close(&self) {
        if !self.is_shared {
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        }
    }

    /// Whether a connection waits to be accepted.
    pub fn has_waiting(&self) -> bool {
        let mut waits = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut waits, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn is_tcp(&self) -> bool {
        matches!(self.address, ListenAddress::Tcp(_))
    }

    /// Accepts until the socket is shut down or the receiver of `accepted` is gone. `position` is this listener's among
    /// all.
    pub async fn accept_all(
        self: Rc<Self>,
        position: usize,
        accepted: mpsc::Sender<Result<Accepted, AcceptError>>,
    ) {
        let failed = |source| AcceptError {
            address: self.address.clone(),
            source,
        };
        let acceptor = loop {
            match self.acceptor() {
                Ok(acceptor) => break acceptor,
                Err(error) => {
                    if accepted.send(Err(failed(error))).await.is_err() {
                        return;
                    }
                    // Of descriptors or memory: temporary.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        loop {
            let socket = acceptor.accept().await;
            let shortage = socket.is_err();
            let result = match socket {
                // An error here concerns this connection only: its peer has closed it already. The next need not wait.
                Ok(socket) => self.describe(socket, position).map_err(failed),
                // The listening socket was shut down.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                Err(error) => Err(failed(error)),
            };
            if accepted.send(result).await.is_err() {
                return;
            }
            if shortage {
                // Of descriptors or memory: temporary.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// What waits for connections; the runtime may not be able to.
    fn acceptor(&self) -> io::Result<Acceptor> {
        Acceptor::new(self.socket.try_clone()?, self.is_tcp())
    }

    fn describe(&self, socket: OwnedFd, listener: usize) -> io::Result<Accepted> {
        let is_tcp = self.is_tcp();
        let (origin, from) = if is_tcp {
            setsockopt(&socket, TcpNoDelay, &true)?;
            // Between checkpoints a primary is silent for as long as `x-checkpoint-delay`, so that silence alone says
            // nothing (spec §14.1).
            self.watch.apply(&socket)?;
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

enum Acceptor {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    fn new(socket: OwnedFd, is_tcp: bool) -> io::Result<Self> {
        if is_tcp {
            let listener = TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            return Ok(Self::Tcp(tokio::net::TcpListener::from_std(listener)?));
        }
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(tokio::net::UnixListener::from_std(listener)?))
    }

    /// The accepted socket; it blocks, as the data plane expects.
    async fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Unix(listener) => {
                let stream = listener.accept().await?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
        }
    }
}

/// Binds an address that may be in use for another moment.
pub(super) fn retry_while_in_use<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let begin = Instant::now();
    loop {
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begin.elapsed() < IN_USE_RETRY => {
                std::thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use nix::sys::socket::sockopt::Linger;

    fn listener() -> (Listener, std::net::SocketAddr) {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = Listener::bind(&address).unwrap();
        match *listener.address() {
            ListenAddress::Tcp(address) => (listener, address),
            ListenAddress::Unix(_) => unreachable!("a TCP address was bound"),
        }
    }

    #[test]
    fn a_network_of_ipv6_is_one_origin() {
        let host = |text: &str| Origin::Host(text.parse().unwrap()).group();
        assert_eq!(host("2001:db8::1"), host("2001:db8::ffff:1"));
        assert_ne!(host("2001:db8::1"), host("2001:db8:0:1::1"));
        assert_eq!(host("::ffff:192.0.2.1"), host("192.0.2.1"));
        assert_ne!(host("192.0.2.1"), host("192.0.2.2"));
        assert_eq!(Origin::Process(7).group(), Origin::Process(7));
    }

    #[test]
    fn a_vanished_host_is_noticed() {
        let (listener, address) = listener();
        let _primary = TcpStream::connect(address).unwrap();
        let socket = TcpListener::from(listener.socket.try_clone().unwrap()).accept();
        let accepted = listener.describe(socket.unwrap().0.into(), 0).unwrap();
        assert!(getsockopt(&accepted.socket, KeepAlive).unwrap());
        assert_eq!(getsockopt(&accepted.socket, TcpKeepIdle).unwrap(), 3);
        assert_eq!(getsockopt(&accepted.socket, TcpKeepInterval).unwrap(), 1);
        assert_eq!(getsockopt(&accepted.socket, TcpUserTimeout).unwrap(), 8_000);
    }

    /// An address that is given up a moment later is had then; one that stays taken is not waited for without end.
    #[test]
    fn an_address_is_had_once_it_is_free() {
        let (taken, address) = listener();
        let wanted = ListenAddress::Tcp(address);
        assert!(Listener::bind(&wanted).is_err());
        let end = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(taken);
        });
        assert_eq!(Listener::bind(&wanted).unwrap().address(), &wanted);
        end.join().unwrap();
    }

    /// A file, for example: it is said again and again, as long as nothing is accepted.
    #[test]
    fn a_socket_that_cannot_be_waited_for_is_reported() {
        let listener = Listener {
            file: None,
            socket: tempfile::tempfile().unwrap().into(),
            address: "tcp:127.0.0.1:7".parse().unwrap(),
            watch: HostWatch::default(),
            is_shared: false,
        };
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build();
        tokio::task::LocalSet::new().block_on(&runtime.unwrap(), async {
            let (tell, mut told) = mpsc::channel(64);
            tokio::task::spawn_local(Rc::new(listener).accept_all(0, tell));
            for _ in 0..2 {
                let error = told.recv().await.unwrap().err().unwrap().to_string();
                assert!(
                    error.contains("127.0.0.1:7: a connection could not be accepted"),
                    "{error}"
                );
            }
        });
    }

    /// Connections that are reset before they are looked at do not delay the one behind them.
    #[test]
    fn reset_connections_delay_no_other() {
        let (listener, address) = listener();
        // As many as wait to be accepted.
        for _ in 0..100 {
            let gone = TcpStream::connect(address).unwrap();
            let reset = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&gone, Linger, &reset).unwrap();
        }
        let primary = TcpStream::connect(address).unwrap();
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        // A clock that only pauses advance: one is taken after an error of the listener.
        let runtime = runtime.enable_all().start_paused(true).build();
        tokio::task::LocalSet::new().block_on(&runtime.unwrap(), async {
            let (tell, mut told) = mpsc::channel(64);
            let accepting = tokio::task::spawn_local(Rc::new(listener).accept_all(0, tell));
            let from = primary.local_addr().unwrap().to_string();
            let begin = tokio::time::Instant::now();
            while told
                .recv()
                .await
                .unwrap()
                .map_or(true, |accepted| accepted.from != from)
            {}
            accepting.abort();
            assert_eq!(begin.elapsed(), Duration::ZERO);
        });
    }
}
