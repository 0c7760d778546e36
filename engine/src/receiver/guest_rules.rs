//! What an operator has settled about guests: their names, by what they are recognised, and what holds for one of them alone.
//!
//! Of several rules that match a guest, that with the closest conditions counts: a UUID before a listener, a listener before a peer, a small
//! network before a large one; then the first.

use super::names::{GuestName, Marks, NameError, NameRule};
use crate::net::ListenAddress;
use crate::tls::{Allowed, Identity};
use std::cmp::Reverse;
use std::time::Duration;
use thiserror::Error;

/// A rule for the name of a guest, and what holds for that guest alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRule {
    /// What it is called, and by what it is recognised.
    pub name: NameRule,
    /// Identities of which its connections must have one; where there are none, that of any peer that may connect.
    pub allowed: Allowed,
    /// How long it may send nothing in its first copy; where it is not said, as long as any guest.
    pub precopy_deadline: Option<Duration>,
}

impl From<NameRule> for GuestRule {
    fn from(name: NameRule) -> Self {
        Self {
            name,
            allowed: Allowed::default(),
            precopy_deadline: None,
        }
    }
}

/// A connection has another identity than those of the guest that it is, or claims to be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{who} is not allowed for the guest {name}: its tls-allow names other identities")]
pub struct NotAllowed {
    name: GuestName,
    who: String,
}

/// All rules of a receiver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestRules(Vec<GuestRule>);

impl GuestRules {
    /// Checks them, for a receiver that listens on these addresses.
    ///
    /// # Errors
    /// If one can never match, or matches every guest, or two cannot be told apart.
    pub fn new(rules: Vec<GuestRule>, listen: &[ListenAddress]) -> Result<Self, NameError> {
        for (position, GuestRule { name: rule, .. }) in rules.iter().enumerate() {
            rule.check()?;
            if let Some(listener) = rule
                .listener
                .as_ref()
                .filter(|listener| !listen.contains(listener))
            {
                return Err(NameError::NoListener {
                    name: rule.name.clone(),
                    listener: listener.clone(),
                });
            }
            let is_same = |other: &&GuestRule| {
                let other = &other.name;
                (&other.listener, other.peer, other.uuid) == (&rule.listener, rule.peer, rule.uuid)
                    && other.name != rule.name
            };
            if let Some(other) = rules[..position].iter().find(is_same) {
                return Err(NameError::Ambiguous(other.name.name.clone(), rule.name.clone()));
            }
        }
        Ok(Self(rules))
    }

    /// The rule of a guest; none if no rule matches.
    pub fn rule(&self, guest: &Marks<'_>) -> Option<&GuestRule> {
        let matching = self.0.iter().filter(|rule| rule.name.matches(guest));
        // The first of the closest.
        matching.min_by_key(|rule| Reverse(rule.name.closeness()))
    }

    /// Whether a peer may be the guest that these marks say.
    ///
    /// # Errors
    /// If the guest's rule names other identities.
    pub fn check_identity(&self, guest: &Marks<'_>, who: Option<&Identity>) -> Result<(), NotAllowed> {
        match self.rule(guest).filter(|rule| !rule.allowed.has(who)) {
            Some(rule) => Err(rule.refused(who)),
            None => Ok(()),
        }
    }

    /// Whether a peer may call its guest so: where rules of that name have identities, one of them must allow the peer.
    ///
    /// # Errors
    /// If none does.
    pub fn check_claim(&self, name: &GuestName, who: Option<&Identity>) -> Result<(), NotAllowed> {
        let of_name = |rule: &&GuestRule| rule.name.name == *name && !rule.allowed.identities().is_empty();
        let mut limited = self.0.iter().filter(of_name).peekable();
        match limited.peek().copied() {
            Some(rule) if !limited.any(|rule| rule.allowed.has(who)) => Err(rule.refused(who)),
            _ => Ok(()),
        }
    }

    /// The rules themselves, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &GuestRule> {
        self.0.iter()
    }
}

impl GuestRule {
    fn refused(&self, who: Option<&Identity>) -> NotAllowed {
        NotAllowed {
            name: self.name.name.clone(),
            who: who.map_or_else(|| "a peer without a certificate".to_owned(), Identity::to_string),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::net::Origin;

    const UUID: &str = "6b3fb1c2-0d0b-4e0c-9a54-1f0d5c2e7a10";

    fn rules(lines: &[&str], listen: &[&str]) -> Result<GuestRules, NameError> {
        let rule = |line: &&str| line.parse().map(|rule: NameRule| GuestRule::from(rule));
        let rules: Result<Vec<_>, NameError> = lines.iter().map(rule).collect();
        let listen: Vec<_> = listen.iter().map(|text| text.parse().unwrap()).collect();
        GuestRules::new(rules?, &listen)
    }

    #[test]
    fn the_closest_rule_names_a_guest() {
        let listen = ["tcp:0.0.0.0:0", "unix:/run/a"];
        let rules = rules(
            &[
                "lab,peer=192.0.2.0/24",
                "web,peer=192.0.2.7",
                "port,listener=tcp:0.0.0.0:0",
                &format!("known,uuid={UUID}"),
                "six,peer=2001:db8::/32",
                "local,listener=unix:/run/a",
            ],
            &listen,
        )
        .unwrap();
        let [tcp, unix] = listen.map(|text| text.parse::<ListenAddress>().unwrap());
        let (real, other) = (
            "tcp:0.0.0.0:4444".parse().unwrap(),
            "tcp:0.0.0.0:5".parse().unwrap(),
        );
        let name = |listeners, origin, uuid: Option<&str>| {
            let uuid = uuid.map(|uuid| uuid.parse().unwrap());
            let marks = Marks {
                listeners,
                origin,
                uuid,
            };
            rules.rule(&marks).map(|rule| rule.name.name.as_str())
        };
        let host = |text: &str| Origin::Host(text.parse().unwrap());
        assert_eq!(name([&other, &other], host("192.0.2.9"), None), Some("lab"));
        assert_eq!(
            name([&other, &other], host("::ffff:192.0.2.7"), None),
            Some("web")
        );
        assert_eq!(name([&other, &other], host("2001:db8:1::1"), None), Some("six"));
        assert_eq!(name([&other, &other], host("2001:db9::1"), None), None);
        assert_eq!(name([&tcp, &real], host("192.0.2.7"), None), Some("port"));
        assert_eq!(name([&tcp, &real], host("192.0.2.7"), Some(UUID)), Some("known"));
        assert_eq!(name([&unix, &unix], Origin::Process(7), None), Some("local"));
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        let refused = |lines: &[&str]| rules(lines, &["tcp:0.0.0.0:4444"]).unwrap_err().to_string();
        assert!(refused(&["a,listener=tcp:0.0.0.0:4445"]).contains("nothing listens on tcp:0.0.0.0:4445"));
        assert!(refused(&["a,peer=::1", "b,peer=::1"]).contains("same conditions"));
        rules(&["a,peer=::1", "a,peer=::1", "a,peer=::2"], &[]).unwrap();
        let unconditional = NameRule {
            name: "a".parse().unwrap(),
            listener: None,
            peer: None,
            uuid: None,
        };
        assert!(GuestRules::new(vec![unconditional.into()], &[]).is_err());
    }

    /// Two rules, of which the first names an identity.
    fn limited() -> GuestRules {
        let known: NameRule = format!("web3,uuid={UUID}").parse().unwrap();
        let lab: NameRule = "lab,peer=192.0.2.0/24".parse().unwrap();
        let known = GuestRule {
            allowed: Allowed::new(vec!["CN=host1".to_owned(), "CN=host2".to_owned()]),
            ..known.into()
        };
        GuestRules::new(vec![known, lab.into()], &[]).unwrap()
    }

    #[test]
    fn a_guest_has_the_identities_of_its_rule_alone() {
        let rules = limited();
        let listener: ListenAddress = "tcp:0.0.0.0:4444".parse().unwrap();
        let may = |host: &str, uuid: Option<&str>, who: Option<&str>| {
            let marks = Marks {
                listeners: [&listener, &listener],
                origin: Origin::Host(host.parse().unwrap()),
                uuid: uuid.map(|uuid| uuid.parse().unwrap()),
            };
            rules.check_identity(&marks, who.map(Identity::named).as_ref())
        };
        for who in ["host1", "host2"] {
            assert_eq!(may("192.0.2.7", Some(UUID), Some(who)), Ok(()));
        }
        let refused = may("192.0.2.7", Some(UUID), Some("host3"))
            .unwrap_err()
            .to_string();
        assert!(
            refused.starts_with("CN=host3 is not allowed for the guest web3"),
            "{refused}"
        );
        let refused = may("198.51.100.1", Some(UUID), None).unwrap_err().to_string();
        assert!(
            refused.starts_with("a peer without a certificate is not"),
            "{refused}"
        );
        // Another guest, with a rule and without one.
        for host in ["192.0.2.7", "198.51.100.1"] {
            for who in [Some("host3"), None] {
                assert_eq!(may(host, None, who), Ok(()));
            }
        }
    }

    #[test]
    fn a_name_with_identities_is_no_other_peers_to_claim() {
        let rules = limited();
        let may = |name: &str, who: Option<&str>| {
            let claim = rules.check_claim(&name.parse().unwrap(), who.map(Identity::named).as_ref());
            claim.is_ok()
        };
        assert!(may("web3", Some("host1")) && may("web3", Some("host2")));
        assert!(!may("web3", Some("host3")) && !may("web3", None));
        assert!(may("lab", None) && may("web4", Some("host3")));
    }
}
