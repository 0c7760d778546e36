//! Values of options as types: read from the command line, written back as they would be typed.

use clap::ValueEnum;
use colo_ring::host::parse_core_list;
use colo_ring::net::{SocketPathError, socket_path};
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Why the value of an option was refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionError {
    /// Something else than a UNIX socket where only that will do.
    #[error("invalid UNIX socket address '{0}': write unix:PATH, or a path with a /")]
    NotUnix(String),
    /// No path that a socket can have.
    #[error(transparent)]
    Path(#[from] SocketPathError),
    /// Not a size.
    #[error(
        "'{0}' is not a size; write a number of bytes, or one with K, M, G or T (powers of 1024), like 512M or 6G"
    )]
    Size(String),
}

/// The control socket: `unix:PATH`, or the path alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlAddress(pub PathBuf);

impl FromStr for ControlAddress {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let path = match text.strip_prefix("unix:") {
            Some(path) => path,
            // Not what begins with another kind of address.
            None if text.split(':').next().is_some_and(|first| first.contains('/')) => text,
            None => return Err(OptionError::NotUnix(text.to_owned())),
        };
        Ok(Self(socket_path(path)?))
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

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
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

/// A list of cores, like `2-5,8`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CoreList(pub Vec<usize>);

impl CoreList {
    /// Reads a list of at least one core.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match parse_core_list(text) {
            Ok(cores) if cores.is_empty() => Err("no core; write it like 2-5,8".to_owned()),
            Ok(cores) => Ok(Self(cores)),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// Use it
    On,
    /// Do without
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_ring::ring::BackendKind;
    use colo_ring::store::{CacheKind, CommitMode, HugePages};
    use colo_ring::wire::codec::Method;

    #[test]
    fn a_control_address_is_a_unix_socket() {
        let address: ControlAddress = "unix:/run/colo.sock".parse().unwrap();
        assert_eq!(address.0, PathBuf::from("/run/colo.sock"));
        assert_eq!(address.to_string(), "unix:/run/colo.sock");
        for text in ["/run/colo.sock", "./colo.sock", "/run/a:b"] {
            assert_eq!(text.parse::<ControlAddress>().unwrap().0, PathBuf::from(text));
        }
        for text in ["", "colo.sock", "tcp:127.0.0.1:1", "tcp:/x"] {
            assert_eq!(
                text.parse::<ControlAddress>(),
                Err(OptionError::NotUnix(text.to_owned()))
            );
        }
        for (text, said) in [
            ("unix:".to_owned(), "missing"),
            (
                format!("unix:/{}", "x".repeat(130)),
                "at most 107 bytes, this one has 131",
            ),
        ] {
            let error = text.parse::<ControlAddress>().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
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
        fn agree<T: ValueEnum + Serialize>() {
            for value in T::value_variants() {
                let typed = value.to_possible_value().unwrap();
                assert_eq!(serde_json::to_value(value).unwrap(), typed.get_name());
            }
        }
        agree::<BackendKind>();
        agree::<CommitMode>();
        agree::<HugePages>();
        agree::<CacheKind>();
        agree::<Method>();
        for backend in BackendKind::ALL {
            assert_eq!(serde_json::to_value(backend).unwrap(), backend.name());
        }
    }
}
