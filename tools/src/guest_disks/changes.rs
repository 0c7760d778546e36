//! What a guest has written since its disk last equalled the receiver's copy, and the copy of that alone.
//!
//! QEMU notes it in a dirty bitmap on the disk's node, one for each receiver and export. It begins with the first copy, and
//! is kept once that is complete. From then on a block that is not in it is the same at both ends: the receiver's copy
//! goes back to a checkpoint, which has all that was written before the record began, and whatever is copied again leaves
//! the record only when it has arrived.

use super::mirror::{self, Mirror, MirrorError, MirrorState, Mirrors};
use crate::net::Address;
use crate::qmp::Qmp;
use serde_json::{Value, json};

/// What is behind the name of a record that is not complete.
const UNFINISHED: &str = " unfinished";

/// Begins records of what is written to these disks, in place of those of an earlier copy. They count once [`keep`] is called.
///
/// # Errors
/// If QEMU refuses one.
pub(crate) fn begin(qmp: &mut Qmp, to: &Address, disks: &[Mirror]) -> Result<(), MirrorError> {
    for disk in disks {
        let (name, unfinished) = (record(to, disk), unfinished(to, disk));
        for bitmap in bitmaps(&mirror::node(qmp, &disk.disk.node)?) {
            if bitmap["name"] == name || bitmap["name"] == unfinished {
                ask(
                    qmp,
                    "block-dirty-bitmap-remove",
                    disk,
                    json!({"name": bitmap["name"]}),
                )?;
            }
        }
        ask(qmp, "block-dirty-bitmap-add", disk, json!({"name": unfinished}))?;
    }
    Ok(())
}

/// Keeps the records that [`begin`] began: the copies are complete. In a qcow2 image they outlive this QEMU.
///
/// # Errors
/// If QEMU refuses one.
pub(crate) fn keep(qmp: &mut Qmp, to: &Address, disks: &[Mirror]) -> Result<(), MirrorError> {
    for disk in disks {
        let (name, unfinished) = (record(to, disk), unfinished(to, disk));
        let persistent = mirror::node(qmp, &disk.disk.node)?["drv"] == "qcow2";
        let options = json!({"name": name, "persistent": persistent});
        ask(qmp, "block-dirty-bitmap-add", disk, options)?;
        let merged = json!({"target": name, "bitmaps": [unfinished]});
        ask(qmp, "block-dirty-bitmap-merge", disk, merged)?;
        ask(
            qmp,
            "block-dirty-bitmap-remove",
            disk,
            json!({"name": unfinished}),
        )?;
    }
    Ok(())
}

/// How many bytes are in the records of these disks.
///
/// # Errors
/// If a disk has none that can be used.
pub(crate) fn bytes(qmp: &mut Qmp, to: &Address, disks: &[Mirror]) -> Result<u64, MirrorError> {
    let mut all = 0_u64;
    for disk in disks {
        let name = record(to, disk);
        let node = mirror::node(qmp, &disk.disk.node)?;
        let usable = |bitmap: &&Value| {
            bitmap["name"] == name && bitmap["recording"] == true && bitmap["inconsistent"] != true
        };
        let found = bitmaps(&node).iter().find(usable);
        let count = found.and_then(|bitmap| bitmap["count"].as_u64());
        all += count.ok_or_else(|| MirrorError::NoRecord {
            disk: disk.disk.name.clone(),
            export: disk.export.clone(),
            to: to.to_string(),
        })?;
    }
    Ok(all)
}

impl Mirrors {
    /// Begins to copy what is in the records. What has arrived is in them no longer, but for what was written meanwhile.
    ///
    /// # Errors
    /// The first disk that QEMU refuses.
    pub(crate) fn start_copy_of_changes(&self, qmp: &mut Qmp, to: &Address) -> Result<(), MirrorError> {
        for (number, disk) in self.disks().iter().enumerate() {
            let options = json!({
                "job-id": mirror::job(number), "device": disk.disk.node, "target": mirror::target(number),
                "sync": "incremental", "bitmap": record(to, disk),
            });
            let begun = qmp.execute("blockdev-backup", &options);
            begun.map_err(|error| mirror::refused(error, disk))?;
        }
        Ok(())
    }

    /// How far these copies are; `is_synced` when all of them have ended.
    ///
    /// # Errors
    /// If one has failed.
    pub(crate) fn copy_of_changes(&self, qmp: &mut Qmp) -> Result<MirrorState, MirrorError> {
        let jobs = mirror::jobs(qmp)?;
        let mut state = MirrorState {
            is_synced: true,
            ..MirrorState::default()
        };
        for (number, disk) in self.disks().iter().enumerate() {
            let name = mirror::job(number);
            match jobs.iter().find(|job| job["device"] == *name) {
                Some(job) => {
                    state.add(job);
                    state.is_synced = false;
                }
                None => mirror::check_completed(qmp, &name, disk)?,
            }
        }
        Ok(state)
    }
}

fn record(to: &Address, disk: &Mirror) -> String {
    format!("colo-ring {to} {}", disk.export)
}

fn unfinished(to: &Address, disk: &Mirror) -> String {
    record(to, disk) + UNFINISHED
}

fn bitmaps(node: &Value) -> &[Value] {
    node["dirty-bitmaps"].as_array().map_or(&[], Vec::as_slice)
}

fn ask(qmp: &mut Qmp, command: &str, disk: &Mirror, mut options: Value) -> Result<(), MirrorError> {
    options["node"] = json!(disk.disk.node);
    let asked = qmp.execute(command, &options);
    asked.map_err(|error| mirror::refused(error, disk)).map(|_| ())
}
