//! What the receiver calls the guest: asked over a connection of its own, which names it before its first checkpoint is made.

use crate::commands::guard::Link;
use crate::net::Address;
use crate::output::tell;
use crate::tls::TlsArgs;
use colo_ring::link::{Call, LINK_VERSION, ToGuard};
use colo_ring::receiver::{GuestName, GuestUuid, SessionTitle};
use std::time::Duration;

/// How long the receiver may take for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection over which the receiver will say what it calls the guest.
pub(super) struct Calling {
    link: Link,
    name: Option<GuestName>,
}

/// A guest at its receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Called {
    pub(super) session: u32,
    /// The operator's name, or the UUID; none if it has neither.
    pub(super) name: Option<String>,
}

impl Calling {
    /// Names the guest, if it is to have a name from here. A receiver that is not to be asked costs the protection nothing.
    pub(super) fn begin(
        (to, tls): (&Address, &TlsArgs),
        name: Option<&GuestName>,
        uuid: Option<String>,
    ) -> Option<Self> {
        let call = Call {
            version: LINK_VERSION,
            name: name.map(ToString::to_string),
            uuid,
        };
        match Link::call(to, tls, call, PATIENCE) {
            Ok(link) => Some(Self {
                link,
                name: name.cloned(),
            }),
            Err(error) => {
                not_known(&error);
                None
            }
        }
    }

    /// What it is called, now that it is protected.
    pub(super) fn end(mut self) -> Option<Called> {
        let called = match self.link.read_message() {
            Ok(ToGuard::Called { session, name }) => Called { session, name },
            Ok(other) => {
                not_known(&format!("an answer that does not belong here ({other:?})"));
                return None;
            }
            Err(error) => {
                not_known(&error);
                return None;
            }
        };
        if let Some(wanted) = self
            .name
            .filter(|name| called.name.as_deref() != Some(name.as_str()))
        {
            let name = called.name.as_deref().unwrap_or("nothing");
            tell(&format!(
                "warning: the receiver calls the guest {name}, not {wanted}: its own --guest names it so"
            ));
        }
        Some(called)
    }
}

fn not_known(why: &dyn std::fmt::Display) {
    tell(&format!(
        "warning: what the receiver calls the guest is not known: {why}"
    ));
}

impl Called {
    /// A line for people.
    pub(super) fn line(&self) -> String {
        let is_uuid = |name: &&String| name.parse::<GuestUuid>().is_ok();
        let name = self.name.as_ref().filter(|name| !is_uuid(name));
        let title = SessionTitle {
            session: self.session,
            name: name.and_then(|name| name.parse().ok()),
            uuid: None,
        };
        match (&self.name, name) {
            (Some(uuid), None) => {
                format!("at the receiver it is session {title}, called by its UUID {uuid}\n")
            }
            _ => format!("at the receiver it is session {title}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_found_at_its_receiver_by_what_is_printed() {
        let line = |name: Option<&str>| {
            let name = name.map(str::to_owned);
            Called { session: 3, name }.line()
        };
        assert_eq!(line(Some("web3")), "at the receiver it is session 3 (web3)\n");
        assert_eq!(line(None), "at the receiver it is session 3\n");
        let uuid = "0c5a1f00-0000-4000-8000-0000000000ff";
        assert!(line(Some(uuid)).contains(uuid));
    }
}
