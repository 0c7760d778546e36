//! Where a secondary listens.

use super::SynthError;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A secondary's address, written as QEMU's `migrate` command writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`; an IPv6 host stands in brackets.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = SynthError;

    fn from_str(text: &str) -> Result<Self, SynthError> {
        match text.split_once(':') {
            Some(("tcp", host_port)) if host_port.contains(':') => Ok(Self::Tcp(host_port.to_owned())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(SynthError::Address(text.to_owned())),
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
