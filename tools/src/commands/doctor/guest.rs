//! What a guest has that decides over its protection: asked of its QEMU, nothing is changed.

use super::Check;
use crate::guest_disks::{self, DiskUse, GuestDisk};
use crate::options::Size;
use crate::output::printable;
use crate::qmp::{CONNECT_LIMIT, Qmp, QmpError};
use serde_json::{Value, json};
use std::path::Path;

/// Judges the guest of the QEMU with this monitor.
///
/// # Errors
/// If QEMU does not answer.
pub(super) fn checks(monitor: &Path) -> Result<Vec<Check>, QmpError> {
    let mut qmp = Qmp::connect(monitor, CONNECT_LIMIT)?;
    let capabilities = qmp.execute("query-migrate-capabilities", &json!({}))?;
    let mut listed = capabilities.as_array().into_iter().flatten();
    let has_colo = listed.any(|one| one["capability"] == "x-colo");
    let version = format!("QEMU {}", qmp.version());
    let mut checks = vec![match has_colo {
        true => Check::ok("QEMU", version),
        false => Check::missing(
            "QEMU",
            version,
            "it was built without COLO (configure --enable-replication)",
            None,
        ),
    }];
    let migration = qmp.execute("query-migrate", &json!({}))?;
    checks.extend(blockers(&migration));
    let disks = guest_disks::list(&mut qmp)?;
    if disks.is_empty() {
        checks.push(Check::ok("disks", "none: its memory is all that is protected"));
    }
    checks.extend(disks.iter().map(disk));
    Ok(checks)
}

fn blockers(migration: &Value) -> Vec<Check> {
    let reasons = migration["blocked-reasons"].as_array().into_iter().flatten();
    let blocker = |reason: &str| {
        Check::missing(
            "devices",
            printable(reason),
            "a guest with it cannot be migrated, and so not protected",
            None,
        )
    };
    let blockers: Vec<_> = reasons.filter_map(Value::as_str).map(blocker).collect();
    match blockers.is_empty() {
        true => vec![Check::ok("devices", "QEMU knows of none that cannot be migrated")],
        false => blockers,
    }
}

fn disk(disk: &GuestDisk) -> Check {
    let named = format!(
        "{} ({}, {})",
        printable(&disk.name),
        printable(&disk.file),
        Size(disk.bytes)
    );
    let (what, meaning) = match disk.usage {
        DiskUse::Writable => (
            "written by the guest",
            "protect mirrors it to the receiver (receive --disks), and a failover goes on with the receiver's copy",
        ),
        DiskUse::ReadOnly => (
            "read-only",
            "it is left alone: the fresh QEMU needs the same content",
        ),
        DiskUse::Flash => (
            "firmware's flash memory",
            "it is left alone: its content is in the checkpoint, and the fresh QEMU writes it to its own file",
        ),
    };
    Check {
        meaning: meaning.to_owned(),
        ..Check::ok("disk", format!("{named}: {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::qmp::tests::{Responder, monitor};

    #[test]
    fn a_guest_is_judged_by_its_devices_and_disks() {
        let entry = |name: &str, read_only: bool| {
            json!({"device": name, "qdev": name, "inserted":
                {"node-name": name, "ro": read_only, "file": "f", "image": {"virtual-size": 1 << 30}}})
        };
        let respond: Responder = Box::new(move |command, _| match command {
            "query-migrate-capabilities" => Ok(json!([{"capability": "x-colo", "state": false}])),
            "query-migrate" => Ok(json!({"blocked-reasons": ["non-migratable device: amd-iommu"]})),
            "query-block" => Ok(json!([entry("vda", false), entry("cd", true)])),
            "qom-get" => Ok(json!("virtio-blk-device")),
            other => Err(format!("{other}: not now")),
        });
        let path = monitor((11, 1, 3), respond);
        let checks = checks(&path.0).unwrap();
        let states: Vec<_> = checks.iter().map(|check| check.state).collect();
        assert_eq!(states, [State::Ok, State::Missing, State::Ok, State::Ok]);
        assert_eq!(checks[2].seen, "vda (f, 1G): written by the guest");
        assert!(checks[3].seen.contains("read-only"));
    }
}
