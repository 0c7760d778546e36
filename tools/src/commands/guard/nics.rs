//! A guest's network cards, as QEMU lists them.

use crate::qmp::{Qmp, QmpError};
use serde_json::json;

/// A card's other end in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Nic {
    /// The id of the `-netdev`.
    pub(super) netdev: String,
    /// Its kind: `tap`, `stream`, `user`.
    pub(super) kind: String,
    /// The tap device's name, where QEMU was given that and not its descriptor.
    pub(super) interface: Option<String>,
}

/// All of them.
///
/// # Errors
/// If QEMU does not answer. Only its monitor for people has this list.
pub(super) fn list(qmp: &mut Qmp) -> Result<Vec<Nic>, QmpError> {
    let listed = qmp.execute("human-monitor-command", &json!({"command-line": "info network"}))?;
    Ok(parse(listed.as_str().unwrap_or_default()))
}

/// Of lines such as ` \ net0: index=0,type=tap,ifname=tap0`: a backend stands behind a backslash below its card.
fn parse(listed: &str) -> Vec<Nic> {
    let backends = listed
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('\\'));
    let nic = |backend: &str| {
        let (netdev, properties) = backend.trim().split_once(": ")?;
        let property = |name: &str| {
            let mut properties = properties.split(',');
            properties.find_map(|property| property.strip_prefix(name)?.strip_prefix('='))
        };
        Some(Nic {
            netdev: netdev.to_owned(),
            kind: property("type")?.to_owned(),
            interface: property("ifname").map(str::to_owned),
        })
    };
    let mut nics: Vec<Nic> = Vec::new();
    for nic in backends.filter_map(nic) {
        // A card with several queues is listed with each.
        if !nics.contains(&nic) {
            nics.push(nic);
        }
    }
    nics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_listed_with_their_backends() {
        let listed = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01\r\n \\ n0: \
                      index=0,type=tap,ifname=tap0,script=no\r\n \\ n0: index=1,type=tap,ifname=tap0,script=no\r\nfilters:\r\n  - \
                      hold0: type=filter-buffer,netdev=n0\r\ne1000.0: index=0,type=nic,model=e1000\r\n \\ n2: \
                      index=0,type=stream,connecting\r\n \\ n3: index=0,type=tap,fd=27\r\nhub0port0: index=0,type=hubport\r\n";
        let nic = |netdev: &str, kind: &str, interface: Option<&str>| Nic {
            netdev: netdev.into(),
            kind: kind.into(),
            interface: interface.map(str::to_owned),
        };
        let expected = [
            nic("n0", "tap", Some("tap0")),
            nic("n2", "stream", None),
            nic("n3", "tap", None),
        ];
        assert_eq!(parse(listed), expected);
        assert_eq!(parse(""), []);
    }
}
