//! Where a primary connects to.

use std::fmt;
use std::net::TcpListener;
use std::path::PathBuf;

use super::{Lab, LabError};

/// The kind of socket between primary and secondary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP on loopback.
    Tcp,
    /// A UNIX stream socket.
    Unix,
}

/// An address in the form that both QEMU and `colo-ring` take: `tcp:HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug)]
pub enum Address {
    /// A port on 127.0.0.1.
    Tcp(u16),
    /// A socket's path.
    Unix(PathBuf),
}

impl Address {
    /// An address that is free at the moment.
    ///
    /// # Errors
    /// When loopback has no free port.
    pub fn free(lab: &Lab, transport: Transport) -> Result<Self, LabError> {
        match transport {
            Transport::Unix => Ok(Self::Unix(lab.fresh_file("migration", "sock"))),
            Transport::Tcp => {
                let port = TcpListener::bind(("127.0.0.1", 0))
                    .and_then(|listener| listener.local_addr())
                    .map_err(LabError::io("look for a free port"))?
                    .port();
                Ok(Self::Tcp(port))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => write!(f, "tcp:127.0.0.1:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
