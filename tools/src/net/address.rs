//! Where a secondary listens.

use colo_ring::net::{SocketPathError, socket_path};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Why a text is no address of a secondary.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// It is neither `tcp:HOST:PORT` nor `unix:PATH`.
    #[error("invalid address \"{0}\": use tcp:HOST:PORT or unix:PATH")]
    Kind(String),
    /// A number that is no port. A name is one of a service.
    #[error("invalid address \"{0}\": a port is a number from 1 to 65535")]
    Port(String),
    /// No path that a socket can have.
    #[error(transparent)]
    Path(#[from] SocketPathError),
}

/// A secondary's address, written as QEMU's `migrate` command writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`; an IPv6 host is in brackets.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// The port that is assigned to NBD.
const NBD_PORT: u16 = 10809;

impl Address {
    /// Where a secondary that listens here serves disks if nothing else is said.
    #[must_use]
    pub fn of_disks(&self) -> Self {
        match self {
            Self::Tcp(host_port) => {
                let host = host_port
                    .rsplit_once(':')
                    .map_or(host_port.as_str(), |(host, _)| host);
                Self::Tcp(format!("{host}:{NBD_PORT}"))
            }
            Self::Unix(path) => {
                let mut name = path.clone().into_os_string();
                name.push(".nbd");
                Self::Unix(name.into())
            }
        }
    }

    /// Whether both are on the same host, as they are written: the same name, or both UNIX sockets.
    #[must_use]
    pub fn has_host_of(&self, other: &Self) -> bool {
        let host = |address: &Self| match address {
            Self::Tcp(host_port) => host_port.rsplit_once(':').map(|(host, _)| host.to_owned()),
            Self::Unix(_) => None,
        };
        host(self) == host(other)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("tcp", host_port)) => match host_port.rsplit_once(':') {
                Some((_, port))
                    if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_alphanumeric()) =>
                {
                    let is_wrong = port.starts_with(|first: char| first.is_ascii_digit())
                        && port.parse::<u16>().map_or(true, |port| port == 0);
                    match is_wrong {
                        true => Err(AddressError::Port(text.to_owned())),
                        false => Ok(Self::Tcp(host_port.to_owned())),
                    }
                }
                _ => Err(AddressError::Kind(text.to_owned())),
            },
            Some(("unix", path)) => Ok(Self::Unix(socket_path(path)?)),
            _ => Err(AddressError::Kind(text.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp:{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_served_beside_it() {
        for (receiver, disks) in [
            ("tcp:[::1]:4444", "tcp:[::1]:10809"),
            ("unix:/run/colo.sock", "unix:/run/colo.sock.nbd"),
        ] {
            let receiver: Address = receiver.parse().unwrap();
            assert_eq!(receiver.of_disks().to_string(), disks);
        }
    }

    #[test]
    fn hosts_are_compared_as_they_are_written() {
        let same = |one: &str, other: &str| {
            let [one, other] = [one, other].map(|text| text.parse::<Address>().unwrap());
            one.has_host_of(&other)
        };
        assert!(same("tcp:[::1]:4444", "tcp:[::1]:10809") && same("unix:/a", "unix:/b"));
        assert!(!same("tcp:a:1", "tcp:b:1") && !same("tcp:a:1", "unix:/a"));
    }

    #[test]
    fn an_address_is_written_as_qemu_writes_it() {
        for text in [
            "",
            "tcp:",
            "tcp:host",
            "tcp:host:",
            "udp:1:2",
            "host:1",
            "tcp:[::1]",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Kind(text.to_owned())));
        }
        for text in ["tcp:host:99999", "tcp:host:0", "tcp:host:44x4"] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Port(text.to_owned())));
        }
        assert!("unix:".parse::<Address>().is_err());
        let long = format!("unix:/{}", "x".repeat(107)).parse::<Address>();
        assert!(long.unwrap_err().to_string().contains("at most 107 bytes"));
        assert_eq!(
            "tcp:[::1]:4444".parse::<Address>().unwrap().to_string(),
            "tcp:[::1]:4444"
        );
    }
}
