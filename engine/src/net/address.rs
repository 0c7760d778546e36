//! Addresses to listen on.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Where primaries connect to: `tcp:HOST:PORT` or `unix:PATH`, as in QEMU's migration URIs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// An IPv4 or IPv6 address. Port 0 selects a free port.
    Tcp(SocketAddr),
    /// A UNIX socket. A stale one at that path is replaced.
    Unix(PathBuf),
}

/// Why an address could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not an address to listen on: write tcp:192.0.2.1:4444, tcp:[::]:4444 or unix:/run/colo.sock"
)]
pub struct AddressError(String);

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError(text.to_owned());
        match text.split_once(':') {
            Some(("tcp", address)) => address.parse().map(Self::Tcp).map_err(|_| bad()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "tcp:127.0.0.1:4444",
            "tcp:[::1]:4444",
            "tcp:0.0.0.0:0",
            "unix:/run/colo.sock",
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "tcp",
            "tcp:",
            "tcp:host",
            "tcp:::1:4444",
            "unix:",
            "udp:1.2.3.4:5",
            "4444",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }
}
