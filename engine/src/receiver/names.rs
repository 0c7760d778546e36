//! How a guest gets its name: by rules of the operator, by its guard, or by its UUID.
//!
//! A [`NameRule`] says where a guest comes in, from which host, or which UUID it has, and how it is called. Rules are options and
//! configuration; [`GuestRules`](super::guest_rules::GuestRules) is all of them, checked.

use super::uuid::{Uuid, format_uuid, parse_uuid};
use crate::net::{ListenAddress, Origin};
use crate::text::written_as_text;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use thiserror::Error;

/// Longest name of a guest, in bytes: file names, tags of logs and columns have room for it.
pub const GUEST_NAME_MAX: usize = 64;

/// Why a text is no name, no UUID, no network, or no rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// It cannot be a name.
    #[error(
        "{0:?} cannot be a guest's name: 1 to {GUEST_NAME_MAX} of A-Z a-z 0-9 . _ - that begin with a letter or a digit and are \
         not a number"
    )]
    Name(String),
    /// It is no UUID, or that of guests without one.
    #[error(
        "{0:?} is no guest's UUID: write its 36 characters, like 6b3fb1c2-0d0b-4e0c-9a54-1f0d5c2e7a10, not all digits 0"
    )]
    Uuid(String),
    /// It is no address.
    #[error("{0:?} is no peer: write an address or a network, like 192.0.2.7, 2001:db8::7 or 192.0.2.0/24")]
    Peer(String),
    /// A part of a rule is not understood.
    #[error("{0:?} is no condition: write listener=ADDRESS, peer=ADDRESS or uuid=UUID")]
    Condition(String),
    /// A condition is there twice.
    #[error("the condition {0} is there twice")]
    Twice(&'static str),
    /// Its listener's address is none.
    #[error(transparent)]
    Listener(#[from] crate::net::AddressError),
    /// A rule that every guest would match.
    #[error("the name {0} has no condition: add listener=ADDRESS, peer=ADDRESS or uuid=UUID")]
    Unconditional(GuestName),
    /// A rule that no guest can match.
    #[error("the guest {name}: nothing listens on {listener}")]
    NoListener {
        /// The guest.
        name: GuestName,
        /// Its address.
        listener: ListenAddress,
    },
    /// Two rules with the same conditions.
    #[error("the guests {0} and {1} have the same conditions")]
    Ambiguous(GuestName, GuestName),
}

/// A guest's name. It can be told from the number of a session, and is harmless in file names, logs and tags.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestName(String);

impl GuestName {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of a guest that has no other.
    pub fn of_uuid(uuid: GuestUuid) -> Self {
        Self(uuid.to_string())
    }
}

impl FromStr for GuestName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let may_be = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let is_name = text.len() <= GUEST_NAME_MAX
            && text.bytes().all(may_be)
            && text
                .bytes()
                .next()
                .is_some_and(|first| first.is_ascii_alphanumeric())
            && !text.bytes().all(|byte| byte.is_ascii_digit());
        match is_name {
            true => Ok(Self(text.to_owned())),
            false => Err(NameError::Name(text.chars().take(2 * GUEST_NAME_MAX).collect())),
        }
    }
}

written_as_text!(GuestName, NameError);

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A guest's UUID. One that is all 0 is none: QEMU's, if it is given no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestUuid(Uuid);

impl GuestUuid {
    /// None if it is that of guests without one.
    pub fn new(uuid: [u8; 16]) -> Option<Self> {
        (uuid != [0; 16]).then_some(Self(uuid))
    }
}

impl FromStr for GuestUuid {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let uuid = parse_uuid(text).and_then(Self::new);
        uuid.ok_or_else(|| NameError::Uuid(text.chars().take(2 * GUEST_NAME_MAX).collect()))
    }
}

written_as_text!(GuestUuid, NameError);

impl fmt::Display for GuestUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_uuid(&self.0))
    }
}

/// Hosts that a guest may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerNetwork {
    /// The bits behind the prefix are 0.
    address: IpAddr,
    prefix: u8,
}

impl PeerNetwork {
    fn includes(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }

    fn bits(address: IpAddr) -> u8 {
        if address.is_ipv4() { 32 } else { 128 }
    }

    /// How many hosts it leaves out, as far as networks can be compared: a single one leaves out the most.
    fn closeness(self) -> u8 {
        128 - (Self::bits(self.address) - self.prefix)
    }
}

/// An address whose bits behind the prefix are 0.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

impl FromStr for PeerNetwork {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::Peer(text.chars().take(2 * GUEST_NAME_MAX).collect());
        let (address, prefix) = match text.split_once('/') {
            None => (text, None),
            Some((address, prefix)) => (address, Some(prefix.parse::<u8>().map_err(|_| bad())?)),
        };
        let address = address.parse::<IpAddr>().map_err(|_| bad())?.to_canonical();
        let bits = Self::bits(address);
        let prefix = prefix.unwrap_or(bits);
        if prefix > bits {
            return Err(bad());
        }
        Ok(Self {
            address: masked(address, prefix),
            prefix,
        })
    }
}

written_as_text!(PeerNetwork, NameError);

impl fmt::Display for PeerNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == Self::bits(self.address) {
            true => write!(f, "{}", self.address),
            false => write!(f, "{}/{}", self.address, self.prefix),
        }
    }
}

/// A guest's name, and by what it is known: all conditions that are there must hold, and there must be one.
///
/// As an option it is `NAME,CONDITION…`, each condition `listener=ADDRESS`, `peer=ADDRESS` or `uuid=UUID`; in a configuration file
/// it is the keys of the same names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameRule {
    /// What the guest is called.
    pub name: GuestName,
    /// The address that it connects to, as it is given to listen on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<ListenAddress>,
    /// Where it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<PeerNetwork>,
    /// Its UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<GuestUuid>,
}

impl FromStr for NameRule {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default().parse()?;
        let mut rule = Self {
            name,
            listener: None,
            peer: None,
            uuid: None,
        };
        for part in parts {
            let twice = match part.split_once('=') {
                Some(("listener", value)) => {
                    let before = rule.listener.replace(value.parse()?);
                    before.map(|_| "listener")
                }
                Some(("peer", value)) => rule.peer.replace(value.parse()?).map(|_| "peer"),
                Some(("uuid", value)) => rule.uuid.replace(value.parse()?).map(|_| "uuid"),
                _ => {
                    return Err(NameError::Condition(
                        part.chars().take(2 * GUEST_NAME_MAX).collect(),
                    ));
                }
            };
            if let Some(condition) = twice {
                return Err(NameError::Twice(condition));
            }
        }
        rule.check()?;
        Ok(rule)
    }
}

impl fmt::Display for NameRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(listener) = &self.listener {
            write!(f, ",listener={listener}")?;
        }
        if let Some(peer) = &self.peer {
            write!(f, ",peer={peer}")?;
        }
        match &self.uuid {
            Some(uuid) => write!(f, ",uuid={uuid}"),
            None => Ok(()),
        }
    }
}

impl NameRule {
    /// Whether a guest can be told from others by it: what a parser of single rules does not see.
    ///
    /// # Errors
    /// If it has no condition.
    pub fn check(&self) -> Result<(), NameError> {
        match (&self.listener, &self.peer, &self.uuid) {
            (None, None, None) => Err(NameError::Unconditional(self.name.clone())),
            _ => Ok(()),
        }
    }

    pub(super) fn matches(&self, guest: &Marks<'_>) -> bool {
        let listener = |wanted: &ListenAddress| guest.listeners.contains(&wanted);
        let peer = |wanted: &PeerNetwork| match guest.origin {
            Origin::Host(address) => wanted.includes(address),
            Origin::Process(_) => false,
        };
        self.listener.as_ref().is_none_or(listener)
            && self.peer.as_ref().is_none_or(peer)
            && self.uuid.is_none_or(|wanted| guest.uuid == Some(wanted))
    }

    /// The larger, the closer its conditions.
    pub(super) fn closeness(&self) -> (bool, bool, Option<u8>) {
        let peer = self.peer.map(PeerNetwork::closeness);
        (self.uuid.is_some(), self.listener.is_some(), peer)
    }
}

/// What the connections of a guest say of it.
#[derive(Clone, Copy, Debug)]
pub struct Marks<'a> {
    /// The address that it has connected to: as it was given, and with its real port.
    pub listeners: [&'a ListenAddress; 2],
    /// Where it comes from.
    pub origin: Origin,
    /// Its UUID, if it has one and has said so.
    pub uuid: Option<GuestUuid>,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const UUID: &str = "6b3fb1c2-0d0b-4e0c-9a54-1f0d5c2e7a10";

    #[test]
    fn a_name_is_no_number_and_harms_nothing() {
        for name in ["web3", "3web", "a", "db-1.example_x", UUID, &"x".repeat(64)] {
            assert_eq!(name.parse::<GuestName>().unwrap().as_str(), name);
        }
        for no_name in [
            "",
            "3",
            "007",
            "-x",
            ".x",
            "a b",
            "a,b",
            "a/b",
            "ä",
            "a\n",
            &"x".repeat(65),
        ] {
            assert!(no_name.parse::<GuestName>().is_err(), "{no_name:?}");
            let json = serde_json::to_string(no_name).unwrap();
            assert!(serde_json::from_str::<GuestName>(&json).is_err(), "{no_name:?}");
        }
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        for line in [
            "web3,listener=tcp:[::]:4444",
            "web3,listener=unix:/run/web3,peer=192.0.2.0/24",
            &format!("web3,peer=2001:db8::7,uuid={UUID}"),
        ] {
            let rule: NameRule = line.parse().unwrap();
            assert_eq!(rule.to_string(), line);
            let json = serde_json::to_string(&rule).unwrap();
            assert_eq!(serde_json::from_str::<NameRule>(&json).unwrap(), rule);
        }
        for (line, hint) in [
            ("web3", "no condition"),
            ("web3,", "listener=ADDRESS"),
            ("web3,mac=1", "listener=ADDRESS"),
            ("web3,uuid=x", "36 characters"),
            (
                "web3,uuid=00000000-0000-0000-0000-000000000000",
                "not all digits 0",
            ),
            ("web3,peer=192.0.2.7/33", "192.0.2.0/24"),
            ("web3,peer=host", "192.0.2.0/24"),
            ("web3,peer=192.0.2.7,peer=192.0.2.8", "twice"),
            ("web3,listener=4444", "tcp:"),
            ("7,peer=192.0.2.7", "not a number"),
        ] {
            let error = line.parse::<NameRule>().unwrap_err().to_string();
            assert!(error.contains(hint), "{line}: {error}");
        }
        assert!(serde_json::from_str::<NameRule>(r#"{"name":"a","mac":"1"}"#).is_err());
    }
}
