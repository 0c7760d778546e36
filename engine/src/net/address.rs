//! Addresses to listen on.

use crate::text::written_as_text;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Longest path of a UNIX socket, in bytes: `sun_path`, less the byte that ends it.
pub const SOCKET_PATH_MAX: usize = 107;

/// Most characters of what was typed that an error repeats.
const SHOWN_MAX: usize = 64;

/// Where primaries connect to: `tcp:HOST:PORT` or `unix:PATH`, as in QEMU's migration URIs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ListenAddress {
    /// An IPv4 or IPv6 address. Port 0 selects a free port.
    Tcp(SocketAddr),
    /// A UNIX socket. A stale one at that path is replaced.
    Unix(PathBuf),
}

/// Why an address could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// It does not say which kind it is.
    #[error(
        "{0:?} does not begin with tcp: or unix:, as in tcp:192.0.2.1:4444, tcp:[::]:4444 or unix:/run/colo.sock"
    )]
    NoKind(String),
    /// Another kind.
    #[error("{0:?} is not known: an address begins with tcp: or unix:")]
    Kind(String),
    /// There is no port.
    #[error("{0:?} has no port: write tcp:ADDRESS:PORT, like tcp:192.0.2.1:4444")]
    NoPort(String),
    /// The port is none.
    #[error("{0:?} is not a port: write a number from 0 to 65535; 0 takes a free one")]
    Port(String),
    /// An IPv6 address without brackets.
    #[error("the IPv6 address {0:?} must be in brackets, like tcp:[::1]:4444")]
    NoBrackets(String),
    /// The host is a name, or nothing.
    #[error(
        "{0:?} is not an address of this host: write its number, like 127.0.0.1, 0.0.0.0 for all, or [::] for all with IPv6"
    )]
    Host(String),
    /// It is no path for a socket.
    #[error(transparent)]
    Path(#[from] SocketPathError),
}

/// Why a text is no path of a UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SocketPathError {
    /// There is none.
    #[error("the path of the UNIX socket is missing")]
    Empty,
    /// Linux takes no longer ones.
    #[error("the path of a UNIX socket has at most {SOCKET_PATH_MAX} bytes, this one has {0}")]
    TooLong(usize),
}

/// The path of a UNIX socket.
///
/// # Errors
/// If it is empty, or longer than Linux allows.
pub fn socket_path(text: &str) -> Result<PathBuf, SocketPathError> {
    match text.len() {
        0 => Err(SocketPathError::Empty),
        1..=SOCKET_PATH_MAX => Ok(text.into()),
        bytes => Err(SocketPathError::TooLong(bytes)),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect()
}

/// `ADDRESS:PORT`; what is wrong with it is said.
fn tcp(text: &str) -> Result<SocketAddr, AddressError> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return Err(AddressError::NoBrackets(shown(text)));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && !port.ends_with(']') => (host, port),
        _ => return Err(AddressError::NoPort(shown(text))),
    };
    if port.parse::<u16>().is_err() {
        return Err(AddressError::Port(shown(port)));
    }
    match host.parse::<Ipv6Addr>() {
        Ok(_) => Err(AddressError::NoBrackets(shown(host))),
        Err(_) => Err(AddressError::Host(shown(host))),
    }
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("tcp", address)) => tcp(address).map(Self::Tcp),
            Some(("unix", path)) => Ok(Self::Unix(socket_path(path)?)),
            Some((kind, _)) if !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_alphabetic()) => {
                Err(AddressError::Kind(format!("{}:", shown(kind))))
            }
            _ => Err(AddressError::NoKind(shown(text))),
        }
    }
}

written_as_text!(ListenAddress, AddressError);

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
    }

    #[test]
    fn what_is_wrong_with_an_address_is_said() {
        let long = format!("unix:/{}", "x".repeat(SOCKET_PATH_MAX));
        for (text, said) in [
            ("", "does not begin with tcp: or unix:"),
            ("4444", "does not begin with tcp: or unix:"),
            ("127.0.0.1:4444", "does not begin with tcp: or unix:"),
            ("/run/colo.sock", "does not begin with tcp: or unix:"),
            ("tpc:127.0.0.1:4444", "\"tpc:\" is not known"),
            ("tcp", "does not begin with tcp: or unix:"),
            ("tcp:", "has no port"),
            ("tcp:0:", "has no port"),
            ("tcp:0.0.0.0", "has no port"),
            ("tcp:[::]", "has no port"),
            ("tcp:127.0.0.1:99999", "\"99999\" is not a port"),
            ("tcp:127.0.0.1:http", "\"http\" is not a port"),
            (
                "tcp:localhost:21501",
                "\"localhost\" is not an address of this host",
            ),
            (":::4444", "does not begin with tcp: or unix:"),
            ("tcp:::1:4444", "must be in brackets"),
            ("tcp::4444", "\"\" is not an address of this host"),
            ("unix:", "path of the UNIX socket is missing"),
            (&long, "at most 107 bytes, this one has 108"),
        ] {
            let error = text.parse::<ListenAddress>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        long[..long.len() - 1].parse::<ListenAddress>().unwrap();
    }
}
