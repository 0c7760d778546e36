//! Where a primary connects to, and the host's TCP settings that decide over times.

use std::fmt;
use std::fs;
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
    /// An address that nobody uses at the moment.
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

/// The host's TCP congestion control, set to `cubic` while this lives: a paced one (bbr) spreads the bursts of a
/// checkpoint and so decides over the figures.
#[derive(Debug)]
pub struct CongestionControl {
    before: String,
    now: String,
}

impl CongestionControl {
    const FILE: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

    /// Sets `cubic` where that is permitted; otherwise leaves what is there. Either way `Display` says what holds.
    #[must_use]
    pub fn cubic_if_permitted() -> Self {
        let before = Self::read();
        // A refusal is no failure: the figures are then measured and printed with what the host has.
        let _ = fs::write(Self::FILE, "cubic");
        Self {
            before,
            now: Self::read(),
        }
    }

    fn read() -> String {
        fs::read_to_string(Self::FILE).map_or_else(
            |error| format!("unknown ({error})"),
            |text| text.trim().to_owned(),
        )
    }
}

impl fmt::Display for CongestionControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.now)?;
        if self.before != self.now {
            write!(f, " (for this run; the host has {})", self.before)?;
        }
        Ok(())
    }
}

impl Drop for CongestionControl {
    fn drop(&mut self) {
        if self.before != self.now {
            let _ = fs::write(Self::FILE, &self.before);
        }
    }
}
