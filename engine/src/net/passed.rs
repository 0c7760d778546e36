//! Sockets that listen already when a receiver starts: made by a service manager, or by the receiver before it, whose socket the service
//! manager has kept. Connections that come meanwhile wait in them.
//!
//! A passed socket is known by its address: it is taken by the listener of that address, in place of one that would be bound. So no option names
//! passed sockets, and a receiver that is started without a service manager differs in nothing else.

use super::ListenAddress;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use rustix::net::{SocketAddrUnix, getsockname};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};
use thiserror::Error;

/// Keeps a duplicate of a socket for the next receiver, by this name. Returns whether it does.
pub type Keep = dyn Fn(&str, BorrowedFd<'_>) -> bool + Send + Sync;

/// Why a passed socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotTaken {
    /// No option listens there.
    #[error("no option listens there")]
    NotWanted,
    /// Nobody can connect to it.
    #[error("its file was removed")]
    FileRemoved,
}

/// What the mode of a file allows to users that are neither its owner nor of its group.
const OTHERS: u32 = 0o007;

/// See the module. Clones share the sockets.
#[derive(Clone, Default)]
pub struct PassedSockets {
    sockets: Arc<Mutex<Vec<(ListenAddress, OwnedFd)>>>,
    keep: Option<Arc<Keep>>,
}

impl fmt::Debug for PassedSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassedSockets")
            .field("sockets", &*self.lock())
            .finish_non_exhaustive()
    }
}

impl PassedSockets {
    /// Takes those of `descriptors` that are sockets which listen, and returns the others' positions.
    pub fn new(descriptors: Vec<OwnedFd>, keep: Option<Arc<Keep>>) -> (Self, Vec<usize>) {
        let (mut sockets, mut others) = (Vec::new(), Vec::new());
        for (position, descriptor) in descriptors.into_iter().enumerate() {
            match address_of(&descriptor) {
                Some(address) => sockets.push((address, descriptor)),
                None => others.push(position),
            }
        }
        let sockets = Arc::new(Mutex::new(sockets));
        (Self { sockets, keep }, others)
    }

    /// The socket of this address, if it was passed.
    ///
    /// # Errors
    /// If it is a UNIX socket that every user of this host may connect to: whoever has made it may not have thought of its mode.
    pub(crate) fn take(&self, address: &ListenAddress) -> io::Result<Option<OwnedFd>> {
        let mut sockets = self.lock();
        let Some(position) = sockets.iter().position(|(passed, _)| passed == address) else {
            return Ok(None);
        };
        if let ListenAddress::Unix(path) = address {
            let mode = std::fs::metadata(path)?.permissions().mode() & 0o777;
            if mode & OTHERS != 0 {
                return Err(io::Error::other(format!(
                    "the service manager has made it with mode {mode:04o}, for every user: set SocketMode=0600 in its unit, or 0660 \
                     and SocketGroup="
                )));
            }
        }
        Ok(Some(sockets.swap_remove(position).1))
    }

    /// Has a socket kept for the next receiver, if there is anyone who keeps sockets. The file of a UNIX socket must stay then.
    pub(crate) fn keep(&self, address: &ListenAddress, socket: BorrowedFd<'_>) -> bool {
        let keep = self.keep.as_ref();
        keep.is_some_and(|keep| keep(&kept_name(address), socket))
    }

    /// Closes the sockets that no listener will take, and returns their addresses with the reason. Before anything is bound: a socket of one
    /// address is in the way of a wildcard's.
    pub fn close_others(&self, wanted: &[ListenAddress]) -> Vec<(ListenAddress, NotTaken)> {
        let mut sockets = self.lock();
        let mut closed = Vec::new();
        for (address, socket) in std::mem::take(&mut *sockets) {
            if !wanted.contains(&address) {
                closed.push((address, NotTaken::NotWanted));
            } else if !has_file(&address) {
                closed.push((address, NotTaken::FileRemoved));
            } else if !sockets.iter().any(|(other, _)| *other == address) {
                sockets.push((address, socket));
            }
            // A unit's socket and a kept duplicate of it: the unit's comes first.
        }
        closed
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(ListenAddress, OwnedFd)>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name by which the socket of an address is kept: of the characters that sd_notify(3) allows in `FDNAME=`.
pub fn kept_name(address: &ListenAddress) -> String {
    let is_allowed = |character: char| matches!(character, ' '..='~') && character != ':';
    address
        .to_string()
        .replace(|character| !is_allowed(character), "_")
}

/// Whether a UNIX socket can be found still.
fn has_file(address: &ListenAddress) -> bool {
    match address {
        ListenAddress::Unix(path) => path
            .symlink_metadata()
            .is_ok_and(|about| about.file_type().is_socket()),
        ListenAddress::Tcp(_) => true,
    }
}

/// The address of a socket that listens for streams; none of anything else.
fn address_of(socket: &impl AsFd) -> Option<ListenAddress> {
    let is_stream = getsockopt(socket, SockType).ok()? == nix::sys::socket::SockType::Stream;
    if !is_stream || !getsockopt(socket, AcceptConn).ok()? {
        return None;
    }
    let name = getsockname(socket).ok()?;
    if let Ok(address) = SocketAddr::try_from(name.clone()) {
        return Some(ListenAddress::Tcp(address));
    }
    let address = SocketAddrUnix::try_from(name).ok()?;
    let path = address.path()?;
    let path = Path::new(std::ffi::OsStr::from_bytes(path.to_bytes()));
    Some(ListenAddress::Unix(path.to_owned()))
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::net::Listener;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn what_listens_is_known_by_its_address_and_nothing_else_is_taken() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("x");
        let tcp = TcpListener::bind("[::1]:0").unwrap();
        let tcp_address = ListenAddress::Tcp(tcp.local_addr().unwrap());
        let connection = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let unix = UnixListener::bind(&path).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let descriptors: Vec<OwnedFd> = vec![
            file.into(),
            tcp.into(),
            connection.into(),
            unix.into(),
            UnixDatagram::unbound().unwrap().into(),
        ];
        let (passed, others) = PassedSockets::new(descriptors, None);
        assert_eq!(others, [0, 2, 4]);
        let unix_address = ListenAddress::Unix(path.clone());
        assert_eq!(
            passed.close_others(std::slice::from_ref(&unix_address)),
            [(tcp_address, NotTaken::NotWanted)]
        );
        // As a unit without SocketMode= makes it.
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        let refused = passed.take(&unix_address).unwrap_err().to_string();
        assert!(refused.contains("0666"), "{refused}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o660)).unwrap();
        assert!(passed.take(&unix_address).unwrap().is_some());
        assert!(passed.take(&unix_address).unwrap().is_none());
    }

    #[test]
    fn a_socket_of_one_address_makes_way_for_all_addresses() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let (passed, _) = PassedSockets::new(vec![tcp.into()], None);
        let wildcard = ListenAddress::Tcp(([0, 0, 0, 0], port).into());
        assert_eq!(passed.close_others(std::slice::from_ref(&wildcard)).len(), 1);
        Listener::obtain(&wildcard, &passed).unwrap();
    }

    /// What a service manager keeps.
    type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

    /// No passed sockets, and somewhere to keep them.
    fn keeping() -> (PassedSockets, Store) {
        let kept = Store::default();
        let store = kept.clone();
        let keep: Arc<Keep> = Arc::new(move |name, socket: BorrowedFd<'_>| {
            let socket = socket.try_clone_to_owned().unwrap();
            store.lock().unwrap().push((name.to_owned(), socket));
            true
        });
        (PassedSockets::new(Vec::new(), Some(keep)).0, kept)
    }

    #[test]
    fn a_kept_unix_socket_keeps_its_file_and_one_without_it_is_given_up() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("d\u{e4}ta:x");
        let address = ListenAddress::Unix(path.clone());
        let (none, kept) = keeping();
        let first = Listener::obtain(&address, &none).unwrap();
        first.close();
        drop(first);
        let waiting = UnixStream::connect(&path).unwrap();
        let (name, socket) = kept.lock().unwrap().pop().unwrap();
        assert!(name.ends_with("d_ta_x") && name.is_ascii(), "{name}");
        let twice = vec![socket.try_clone().unwrap(), socket.try_clone().unwrap()];
        let (passed, _) = PassedSockets::new(twice, None);
        assert_eq!(passed.close_others(std::slice::from_ref(&address)), []);
        let next = Listener::obtain(&address, &passed).unwrap();
        assert!(next.has_waiting());
        assert!(passed.take(&address).unwrap().is_none(), "a duplicate is closed");
        drop((next, waiting));
        std::fs::remove_file(&path).unwrap();
        let (passed, _) = PassedSockets::new(vec![socket], None);
        assert_eq!(
            passed.close_others(std::slice::from_ref(&address)),
            [(address.clone(), NotTaken::FileRemoved)]
        );
        let _bound = Listener::obtain(&address, &passed).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    /// What came while no receiver was there is served by the next one.
    #[test]
    fn a_kept_socket_goes_on_listening() {
        let (none, kept) = keeping();
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let first = Listener::obtain(&address, &none).unwrap();
        let address = first.address().clone();
        first.close();
        drop(first);
        let ListenAddress::Tcp(real) = address else {
            panic!("a TCP address was bound");
        };
        let waiting = TcpStream::connect(real).unwrap();
        let (name, socket) = kept.lock().unwrap().pop().unwrap();
        assert_eq!(name, kept_name(&address));
        assert!(!name.contains(':'));
        let (passed, _) = PassedSockets::new(vec![socket], None);
        let next = Listener::obtain(&address, &passed).unwrap();
        assert!(next.has_waiting());
        drop(waiting);
    }
}
