//! UNIX sockets that listen: who may connect, and the files that they leave.

use super::ListenAddress;
use super::listener::{ListenError, retry_while_in_use};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, socket};
use nix::sys::stat::{Mode, fchmod};
use std::fs::Metadata;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Who may connect to a UNIX socket, of those who can reach its directory. Never everybody, whatever the umask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// This user alone.
    Owner,
    /// This user, and the group where the umask allows it: a QEMU may run as another user.
    Group,
}

impl Clients {
    fn mode(self) -> Mode {
        match self {
            Self::Owner => Mode::S_IRUSR | Mode::S_IWUSR,
            Self::Group => Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IWGRP,
        }
    }
}

/// The file that a bound socket has made. Dropped, it is removed, unless another program has bound its name since.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
    /// Whether it stays when this is dropped.
    stays: bool,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            id: id(&std::fs::symlink_metadata(path)?),
            stays: false,
        })
    }

    /// Leaves the file where it is: another process goes on with the socket.
    pub(crate) fn leave(mut self) {
        self.stays = true;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_own = || std::fs::symlink_metadata(&self.path).is_ok_and(|about| id(&about) == self.id);
        if !self.stays && is_own() {
            // What cannot be removed is replaced when the name is bound again.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket that listens, with its file.
#[derive(Debug)]
pub struct BoundSocket {
    /// Dropped first: once the socket is closed, another program may bind the name and get the same inode.
    file: SocketFile,
    listener: UnixListener,
}

impl BoundSocket {
    /// The socket, and the file, which is to be dropped when nothing listens any more.
    pub fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Deref for BoundSocket {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

fn id(about: &Metadata) -> (u64, u64) {
    (about.dev(), about.ino())
}

/// Binds a UNIX socket. A stale socket file, as a killed process leaves it, is replaced.
fn bind(path: &Path, clients: Clients) -> io::Result<BoundSocket> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // Linux gives the file the mode that the socket has when it is bound, less the umask: there is no instant at which others may
    // connect, as there would be before a chmod, and other threads' files are not touched, as they would be by another umask.
    fchmod(&socket, clients.mode())?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(BoundSocket {
        listener: socket.into(),
        file: SocketFile::of(path)?,
    })
}

/// A UNIX socket that listens.
///
/// # Errors
/// If it cannot be bound.
pub fn bind_unix(path: &Path, clients: Clients) -> Result<BoundSocket, ListenError> {
    retry_while_in_use(|| bind(path, clients)).map_err(|source| ListenError {
        address: ListenAddress::Unix(path.to_owned()),
        source,
    })
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::net::Listener;

    /// Under any umask: another test's thread may change nothing of it.
    #[test]
    fn a_socket_is_never_open_to_everybody() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let path = directory.path().join("control");
        let _control = bind_unix(&path, Clients::Owner).unwrap();
        assert_eq!(mode(&path), 0o600);
        let path = directory.path().join("data");
        let _data = Listener::bind(&ListenAddress::Unix(path.clone())).unwrap();
        assert_eq!(
            mode(&path) & 0o717,
            0o600,
            "no right to search, and none for others"
        );
    }

    #[test]
    fn a_socket_leaves_no_file_but_one_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let address = ListenAddress::Unix(path.clone());
        let first = Listener::bind(&address).unwrap();
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
        let first = Listener::bind(&address).unwrap();
        first.close();
        let _second = Listener::bind(&address).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
