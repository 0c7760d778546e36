//! A guest's disks: which it has, as its QEMU lists them, and their mirrors at a receiver.
//!
//! A mirror is three things in QEMU, all named here by its number, so that they are found again by whichever command ends
//! them: an NBD client node to the receiver's export, a filter node over the guest's disk, and the job that copies.

pub(crate) mod changes;
mod mirror;

pub(crate) use mirror::{
    Mirror, MirrorError, MirrorState, Mirrors, is_mirrors_connection, remove_all, running as running_mirrors,
};

use crate::qmp::{Qmp, QmpError};
use serde_json::{Value, json};

/// What a guest can do to a disk, and so what its protection needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskUse {
    /// It writes to it: to be mirrored.
    Writable,
    /// It only reads it: the fresh QEMU reads the same.
    ReadOnly,
    /// Firmware's flash memory: its content is a RAM block, and the fresh QEMU writes it to its own file.
    Flash,
}

/// A disk of a guest, with a medium in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    /// What an operator calls it: QEMU's own name for its drive, or its device's, or its node's.
    pub(crate) name: String,
    /// All names that it has.
    aliases: Vec<String>,
    /// The node that the device uses.
    pub(crate) node: String,
    /// Its size, as the guest sees it.
    pub(crate) bytes: u64,
    /// Where its content is.
    pub(crate) file: String,
    /// The same, and the images that it is an overlay of.
    pub(crate) files: Vec<String>,
    /// What the guest does with it.
    pub(crate) usage: DiskUse,
}

impl GuestDisk {
    /// Whether it is called so.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.aliases.iter().any(|alias| alias == name)
    }
}

/// All disks of a guest that have a medium, in QEMU's order.
///
/// # Errors
/// If QEMU does not answer.
pub(crate) fn list(qmp: &mut Qmp) -> Result<Vec<GuestDisk>, QmpError> {
    let listed = qmp.execute("query-block", &json!({}))?;
    let mut disks = Vec::new();
    for (number, entry) in listed.as_array().into_iter().flatten().enumerate() {
        // A drive that no device uses is no disk of the guest.
        let Some(device) = entry["qdev"].as_str() else {
            continue;
        };
        let is_flash = device_type(qmp, device)?.starts_with("cfi.pflash");
        disks.extend(parse(number, entry, is_flash));
    }
    Ok(disks)
}

/// The type of a device; empty where QEMU does not say.
fn device_type(qmp: &mut Qmp, device: &str) -> Result<String, QmpError> {
    match qmp.execute("qom-get", &json!({"path": device, "property": "type"})) {
        Ok(name) => Ok(name.as_str().unwrap_or_default().to_owned()),
        Err(QmpError::Refused { .. }) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// A disk, from an entry of `query-block`; none where no medium is in it.
fn parse(number: usize, entry: &Value, is_flash: bool) -> Option<GuestDisk> {
    let inserted = entry.get("inserted")?;
    let node = inserted["node-name"].as_str()?.to_owned();
    let drive = entry["device"].as_str().filter(|name| !name.is_empty());
    let path = entry["qdev"].as_str()?;
    // A path of the object model, unless the device has an id.
    let device = match path.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next(),
        None => Some(path).filter(|path| !path.starts_with('/')),
    };
    let named_node = Some(node.as_str()).filter(|node| !node.starts_with('#'));
    let aliases: Vec<_> = [drive, device, Some(path), Some(node.as_str())]
        .into_iter()
        .flatten()
        .map(str::to_owned)
        .collect();
    let name = drive.or(device).or(named_node).map(str::to_owned);
    let name = name.unwrap_or_else(|| format!("disk{number}"));
    let mut aliases = aliases;
    aliases.push(name.clone());
    Some(GuestDisk {
        name,
        aliases,
        node,
        bytes: inserted["image"]["virtual-size"].as_u64()?,
        files: chain(inserted),
        file: inserted["file"].as_str().unwrap_or_default().to_owned(),
        usage: match inserted["ro"].as_bool() {
            _ if is_flash => DiskUse::Flash,
            Some(true) => DiskUse::ReadOnly,
            _ => DiskUse::Writable,
        },
    })
}

/// The files of an image and of those behind it.
fn chain(inserted: &Value) -> Vec<String> {
    let mut files: Vec<_> = inserted["file"].as_str().map(str::to_owned).into_iter().collect();
    let mut image = &inserted["image"];
    while let Some(file) = image["filename"].as_str() {
        files.push(file.to_owned());
        image = &image["backing-image"];
    }
    files
}

#[cfg(test)]
mod tests;
