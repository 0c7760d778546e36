//! What a primary must be set to for COLO (spec §22), and what that changes.

use crate::net::Address;
use crate::output::CommandError;
use crate::qmp::{Qmp, QmpError, Version};
use crate::tls::TlsArgs;
use serde_json::{Value, json};

/// Capabilities that make another protocol of it, or hold it up: the receiver refuses a primary that has one.
const OFF: [&str; 10] = [
    "background-snapshot",
    "compress",
    "dirty-bitmaps",
    "mapped-ram",
    "pause-before-switchover",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "switchover-ack",
    // Left on by a resume with shared memory: RAM would not be sent.
    "x-ignore-shared",
];

/// The last version whose COLO breaks its own connection with return-path on, and hangs under TCG.
const LAST_OLD: Version = Version {
    major: 10,
    minor: 0,
    micro: u64::MAX,
};

/// The first version whose COLO demands return-path.
const FIRST_NEW: Version = Version {
    major: 11,
    minor: 0,
    micro: 0,
};

/// Whether this version of QEMU is one that stops after its first checkpoint under TCG.
pub(super) fn stops_under_tcg(version: Version) -> bool {
    version <= LAST_OLD
}

/// Values for `return-path` to be tried, in this order.
fn return_paths(version: Version) -> &'static [bool] {
    if version <= LAST_OLD {
        &[false]
    } else if version < FIRST_NEW {
        // Not known which of these began to demand it: those that do refuse to be without.
        &[false, true]
    } else {
        &[true]
    }
}

/// What the capabilities are to be for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// multifd channels; 0 = without.
    pub(super) channels: u8,
    pub(super) xbzrle: bool,
    /// Whether the stream carries the guest's UUID.
    pub(super) uuid: bool,
}

/// What is on and off at the moment.
fn capabilities(qmp: &mut Qmp) -> Result<Vec<(String, bool)>, QmpError> {
    let listed = qmp.execute("query-migrate-capabilities", &json!({}))?;
    let entry = |entry: &Value| {
        Some((
            entry["capability"].as_str()?.to_owned(),
            entry["state"].as_bool()?,
        ))
    };
    Ok(listed
        .as_array()
        .map_or(Vec::new(), |list| list.iter().filter_map(entry).collect()))
}

/// The capabilities that must change, for one of the values of return-path.
fn changes(known: &[(String, bool)], for_: Wanted, return_path: bool) -> Vec<(&str, bool)> {
    let Wanted {
        channels,
        xbzrle,
        uuid,
    } = for_;
    let wanted = |name: &str| match name {
        "x-colo" => Some(true),
        "return-path" => Some(return_path),
        "multifd" => Some(channels > 0),
        // Where it is on for something else it stays.
        "validate-uuid" => uuid.then_some(true),
        // Left on, it would lose bytes of a guest that runs.
        "xbzrle" => Some(xbzrle),
        _ => OFF.contains(&name).then_some(false),
    };
    let change = |(name, state): &'_ (String, bool)| wanted(name).filter(|wanted| wanted != state);
    known
        .iter()
        .filter_map(|entry| Some((entry.0.as_str(), change(entry)?)))
        .collect()
}

fn check_known(
    known: &[(String, bool)],
    channels: u8,
    xbzrle: bool,
    version: Version,
) -> Result<(), CommandError> {
    let lacks = |name: &str| known.iter().all(|(known, _)| known != name);
    if lacks("x-colo") {
        return Err(CommandError::Failed(format!(
            "this QEMU ({version}) has no capability x-colo: it was built without COLO (configure --enable-replication)"
        )));
    }
    if channels > 0 && lacks("multifd") {
        return Err(CommandError::Failed(format!(
            "this QEMU ({version}) has no capability multifd; give --channels 0, to the receiver too"
        )));
    }
    if xbzrle && lacks("xbzrle") {
        return Err(CommandError::Failed(format!(
            "this QEMU ({version}) has no capability xbzrle; protect it without --xbzrle"
        )));
    }
    Ok(())
}

/// Switches the capabilities that COLO needs on and those that it cannot have off. Returns what was changed, like
/// `x-ignore-shared off`.
///
/// # Errors
/// If QEMU lacks one or refuses.
pub(super) fn set_capabilities(qmp: &mut Qmp, wanted: Wanted) -> Result<Vec<String>, CommandError> {
    let known = capabilities(qmp).map_err(CommandError::failed)?;
    check_known(&known, wanted.channels, wanted.xbzrle, qmp.version())?;
    let attempts = return_paths(qmp.version());
    for (attempt, return_path) in attempts.iter().enumerate() {
        let changes = changes(&known, wanted, *return_path);
        let list: Vec<Value> = (changes.iter())
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        match qmp.execute("migrate-set-capabilities", &json!({"capabilities": list})) {
            Ok(_) => {
                let said =
                    |(name, state): &(&str, bool)| format!("{name} {}", if *state { "on" } else { "off" });
                return Ok(changes.iter().map(said).collect());
            }
            Err(error) => {
                let about_it = error.refusal().is_some_and(|said| said.contains("return-path"));
                if !about_it || attempt + 1 == attempts.len() {
                    return Err(CommandError::failed(error));
                }
            }
        }
    }
    unreachable!("the last attempt returns")
}

/// The object that a primary's credentials are.
const CREDENTIALS: &str = "colo-ring-tls";

/// Gives the primary the credentials of `--tls`, read anew, and has its migration use them. Without `--tls` it keeps what it has.
///
/// # Errors
/// If they cannot be used, by this command or by QEMU.
pub(super) fn set_credentials(qmp: &mut Qmp, tls: &TlsArgs, to: &Address) -> Result<(), CommandError> {
    let Some(directory) = &tls.tls else {
        return Ok(());
    };
    let name = tls.name(to).map_err(CommandError::failed)?;
    // As QEMU finds it, whose own directory is another.
    let directory = directory
        .canonicalize()
        .map_err(|error| CommandError::Failed(format!("--tls {}: {error}", directory.display())))?;
    let old = json!({"id": CREDENTIALS});
    match qmp.execute("object-del", &old) {
        Ok(_) => {}
        // There is none, or not one that can be removed: then adding another fails, with the reason.
        Err(error) if error.refusal().is_some() => {}
        Err(error) => return Err(CommandError::failed(error)),
    }
    let object = json!({
        "qom-type": "tls-creds-x509",
        "id": CREDENTIALS,
        "dir": directory,
        "endpoint": "client",
        "verify-peer": true,
    });
    qmp.execute("object-add", &object).map_err(|error| {
        CommandError::Failed(format!(
            "QEMU cannot use the certificates in {}, which it reads itself: {error}",
            directory.display()
        ))
    })?;
    let parameters = json!({"tls-creds": CREDENTIALS, "tls-hostname": name});
    let set = qmp.execute("migrate-set-parameters", &parameters);
    set.map(drop).map_err(CommandError::failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(on: &[&str]) -> Vec<(String, bool)> {
        let names = [
            "x-colo",
            "return-path",
            "multifd",
            "xbzrle",
            "x-ignore-shared",
            "events",
            "auto-converge",
        ];
        names.map(|name| (name.to_owned(), on.contains(&name))).to_vec()
    }

    fn plain(channels: u8, xbzrle: bool) -> Wanted {
        Wanted {
            channels,
            xbzrle,
            uuid: false,
        }
    }

    #[test]
    fn the_uuid_is_sent_where_it_is_wanted() {
        let known = [("validate-uuid".to_owned(), false)];
        assert_eq!(changes(&known, plain(4, false), true), []);
        let wanted = Wanted {
            uuid: true,
            ..plain(4, false)
        };
        assert_eq!(changes(&known, wanted, true), [("validate-uuid", true)]);
    }

    #[test]
    fn what_hinders_is_switched_off_and_the_rest_is_left() {
        let all = ["multifd", "xbzrle", "x-ignore-shared", "events", "auto-converge"];
        assert_eq!(
            changes(&known(&all), plain(4, false), true),
            [
                ("x-colo", true),
                ("return-path", true),
                ("xbzrle", false),
                ("x-ignore-shared", false)
            ]
        );
        assert_eq!(
            changes(&known(&all), plain(0, false), false),
            [
                ("x-colo", true),
                ("multifd", false),
                ("xbzrle", false),
                ("x-ignore-shared", false)
            ]
        );
        assert_eq!(
            changes(
                &known(&["x-colo", "return-path", "multifd"]),
                plain(1, false),
                true
            ),
            []
        );
    }

    #[test]
    fn xbzrle_is_switched_on_where_it_is_asked_for() {
        let ready = known(&["x-colo", "return-path"]);
        assert_eq!(changes(&ready, plain(0, true), true), [("xbzrle", true)]);
        assert_eq!(changes(&ready, plain(0, false), true), []);
        let on = known(&["x-colo", "return-path", "xbzrle"]);
        assert_eq!(changes(&on, plain(0, true), true), []);
        assert_eq!(changes(&on, plain(0, false), true), [("xbzrle", false)]);
        let without = [("x-colo".to_owned(), true)];
        let version = Version {
            major: 11,
            minor: 1,
            micro: 3,
        };
        let refused = check_known(&without, 0, true, version).unwrap_err();
        assert!(refused.to_string().contains("without --xbzrle"), "{refused}");
    }

    #[test]
    fn return_path_is_for_the_version() {
        let version = |major, minor| Version {
            major,
            minor,
            micro: 2,
        };
        assert_eq!(return_paths(version(7, 2)), [false]);
        assert_eq!(return_paths(version(10, 0)), [false]);
        assert_eq!(return_paths(version(10, 1)), [false, true]);
        assert_eq!(return_paths(version(11, 0)), [true]);
        assert!(stops_under_tcg(version(10, 0)) && !stops_under_tcg(version(10, 1)));
    }

    #[test]
    fn a_qemu_without_colo_is_reported() {
        let version = Version {
            major: 11,
            minor: 1,
            micro: 3,
        };
        let refused = check_known(&known(&[])[1..], 4, false, version).unwrap_err();
        assert!(refused.to_string().contains("--enable-replication"), "{refused}");
        assert!(check_known(&known(&[])[..2], 0, false, version).is_ok());
        assert!(
            check_known(&known(&[])[..2], 4, false, version)
                .unwrap_err()
                .to_string()
                .contains("--channels 0")
        );
    }
}
