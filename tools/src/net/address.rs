//! Where a secondary listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// The address is neither `tcp:HOST:PORT` nor `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("invalid address \"{0}\": use tcp:HOST:PORT or unix:PATH")]
pub struct AddressError(String);

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
            Some(("tcp", host_port)) if host_port.contains(':') => Ok(Self::Tcp(host_port.to_owned())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(AddressError(text.to_owned())),
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
        for text in ["", "tcp:", "tcp:host", "unix:", "udp:1:2", "host:1"] {
            assert_eq!(text.parse::<Address>(), Err(AddressError(text.to_owned())));
        }
        assert_eq!(
            "tcp:[::1]:4444".parse::<Address>().unwrap().to_string(),
            "tcp:[::1]:4444"
        );
    }
}
