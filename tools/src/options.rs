//! Values of options as types: read from the command line, written back as they would be typed.

use clap::ValueEnum;
use serde::{Serialize, Serializer};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Why the value of an option was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionError {
    /// An address that is neither of TCP nor of UNIX.
    #[error("'{0}' is no address; write tcp:HOST:PORT (IPv6 in brackets, tcp:[::]:4444) or unix:PATH")]
    Address(String),
    /// A port that is none.
    #[error("'{port}' in '{address}' is no port; ports are 0 to 65535, 0 takes a free one")]
    Port {
        /// The part that was read as a port.
        port: String,
        /// The whole address.
        address: String,
    },
    /// A path that is empty or too long for a UNIX socket.
    #[error("the path of a UNIX socket has 1 to {UNIX_PATH_MAX} bytes, '{0}' has not; choose a shorter one")]
    UnixPath(String),
    /// Something else than a UNIX socket where only that will do.
    #[error("'{0}' is no UNIX socket; write unix:PATH")]
    NotUnix(String),
    /// A size that is none.
    #[error(
        "'{0}' is no size; write a number of bytes, or one with K, M, G or T (powers of 1024), like 512M or 6G"
    )]
    Size(String),
}

/// Bytes that the path of a UNIX socket may have: `sun_path` less its NUL (unix(7)).
const UNIX_PATH_MAX: usize = 107;

/// Where a receiver listens, or is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp {
        /// A name or an address; IPv6 without its brackets.
        host: String,
        /// The port; 0 takes a free one.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return unix_path(path).map(Self::Unix);
        }
        let malformed = || OptionError::Address(text.to_owned());
        let rest = text.strip_prefix("tcp:").ok_or_else(malformed)?;
        let (host, port) = match rest.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once("]:").ok_or_else(malformed)?,
            None => rest.rsplit_once(':').ok_or_else(malformed)?,
        };
        // Outside of brackets a colon in the host is an IPv6 address whose last group would be taken for the port.
        if host.is_empty() || (host.contains(':') && !rest.starts_with('[')) {
            return Err(malformed());
        }
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let number = port.parse().ok().filter(|_| digits);
        let port = number.ok_or_else(|| OptionError::Port {
            port: port.to_owned(),
            address: text.to_owned(),
        })?;
        let host = host.to_owned();
        Ok(Self::Tcp { host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn unix_path(path: &str) -> Result<PathBuf, OptionError> {
    if path.is_empty() || path.len() > UNIX_PATH_MAX {
        return Err(OptionError::UnixPath(path.to_owned()));
    }
    Ok(PathBuf::from(path))
}

/// The control socket: `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlAddress(pub PathBuf);

impl FromStr for ControlAddress {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let path = text.strip_prefix("unix:");
        let path = path.ok_or_else(|| OptionError::NotUnix(text.to_owned()))?;
        unix_path(path).map(Self)
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

/// A number of bytes: `4096`, `512M`, `6G`, `6GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let malformed = || OptionError::Size(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KIB" => 10,
            "M" | "MIB" => 20,
            "G" | "GIB" => 30,
            "T" | "TIB" => 40,
            _ => return Err(malformed()),
        };
        let number: u64 = number.parse().map_err(|_| malformed())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(malformed)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1u64 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
        let whole = units
            .into_iter()
            .find(|(unit, _)| self.0 >= *unit && self.0.is_multiple_of(*unit));
        match whole {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// How bytes are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// One io_uring per core
    Uring,
    /// One epoll per core, for hosts without io_uring
    Epoll,
    /// A thread per channel, as QEMU does it: the baseline to compare with
    Threads,
}

impl Backend {
    /// Every backend.
    pub const ALL: [Self; 3] = [Self::Uring, Self::Epoll, Self::Threads];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Epoll => "epoll",
            Self::Threads => "threads",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// Use it
    On,
    /// Do without
    Off,
}

/// Where received pages wait for their commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// A slot for every page of the guest: takes as much memory again as the guest has
    Mirror,
}

/// When a checkpoint's pages are copied to the RAM image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Commit {
    /// Before the primary goes on
    Sync,
}

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub enum HugePages {
    /// The pool of 2 MiB pages
    #[value(name = "2M")]
    #[serde(rename = "2M")]
    TwoMiB,
    /// The pool of 1 GiB pages
    #[value(name = "1G")]
    #[serde(rename = "1G")]
    OneGiB,
    /// Ordinary pages that the kernel may join
    #[serde(rename = "thp")]
    Thp,
    /// Ordinary pages
    #[serde(rename = "off")]
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_back_as_they_were_typed() {
        for text in [
            "tcp:0.0.0.0:4444",
            "tcp:[::1]:4444",
            "tcp:[::]:0",
            "tcp:secondary.example:65535",
            "unix:/run/colo.sock",
            "unix:relative",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let address = "tcp:[fe80::1%eth0]:1".parse();
        assert_eq!(
            address,
            Ok(Address::Tcp {
                host: "fe80::1%eth0".to_owned(),
                port: 1
            })
        );
    }

    #[test]
    fn bad_addresses_are_refused() {
        use OptionError as E;
        for text in [
            "",
            "4444",
            "0.0.0.0:4444",
            "tcp:",
            "tcp:host",
            "tcp::4444",
            "tcp:::1:4444",
            "tcp:[::1]4444",
            "tcp:[]:1",
            "udp:a:1",
        ] {
            assert!(
                matches!(text.parse::<Address>(), Err(E::Address(_))),
                "{text}: {:?}",
                text.parse::<Address>()
            );
        }
        for text in ["tcp:a:65536", "tcp:a:", "tcp:a:-1", "tcp:a:+1", "tcp:[::1]:x"] {
            assert!(matches!(text.parse::<Address>(), Err(E::Port { .. })), "{text}");
        }
        assert!(matches!("unix:".parse::<Address>(), Err(E::UnixPath(_))));
        let longest = format!("unix:{}", "a".repeat(UNIX_PATH_MAX));
        assert!(longest.parse::<Address>().is_ok());
        assert!(matches!(
            format!("{longest}a").parse::<Address>(),
            Err(E::UnixPath(_))
        ));
        assert!(matches!("tcp:a:1".parse::<ControlAddress>(), Err(E::NotUnix(_))));
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("6G", 6 << 30),
            ("6GiB", 6 << 30),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            "1GB",
            "1P",
            "16777216T",
            "18446744073709551616",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in ["6G", "1536M", "4097", "0", "2T"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn names_agree_between_the_command_line_and_reports() {
        for backend in Backend::ALL {
            let typed = backend.to_possible_value().unwrap();
            assert_eq!(typed.get_name(), backend.name());
            assert_eq!(serde_json::to_value(backend).unwrap(), backend.name());
        }
        for size in HugePages::value_variants() {
            let typed = size.to_possible_value().unwrap();
            assert_eq!(serde_json::to_value(size).unwrap(), typed.get_name());
        }
    }
}
