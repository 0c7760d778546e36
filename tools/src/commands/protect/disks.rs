//! The guest's disks: which are mirrored to the receiver, and their first copy.

mod copy;

use crate::guest_disks::{self, DiskUse, GuestDisk, Mirror, Mirrors, remove_all};
use crate::net::Address;
use crate::options::Size;
use crate::output::{CommandError, mebibytes, tell};
use crate::qmp::Qmp;
use clap::{Args, ValueEnum};
pub(super) use copy::Changes;
use copy::FirstCopy;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use std::collections::HashSet;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::Duration;

/// Longest name of an export, in bytes.
const NAME_MAX: usize = 64;

/// Options of `colo-ring protect` about disks.
#[derive(Debug, Default, Args)]
pub struct DiskArgs {
    /// A disk to protect, and the receiver's name for it: NAME.raw in its --disks directory. DISK is the id of its
    /// -drive, device or node. Repeatable [default: every disk that the guest can write to, as GUEST-DISK]
    #[arg(long, value_name = "DISK[=NAME]", conflicts_with = "no_disks")]
    disk: Vec<DiskName>,

    /// Where the receiver serves disks, as the primary reaches it [default: port 10809 of --to's host, or --to's path
    /// with .nbd behind it]
    #[arg(long, value_name = "ADDRESS")]
    disk_to: Option<Address>,

    /// What is copied before the guest is protected
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    disk_sync: DiskSync,

    /// Protect the guest's memory alone: after a failover its disks are ahead of it, unless something else keeps them
    #[arg(long)]
    no_disks: bool,
}

/// What is copied at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskSync {
    /// Everything
    #[default]
    Full,
    /// What the guest has written since this QEMU began to mirror them to the same receiver: it is copied while the guest
    /// runs, and the last of it while the guest is stopped
    Changed,
    /// Nothing: you know that the receiver's copies equal the guest's disks now
    None,
}

/// `DISK` or `DISK=NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DiskName {
    disk: String,
    export: Option<String>,
}

impl FromStr for DiskName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (disk, export) = match text.split_once('=') {
            Some((disk, export)) => (disk, Some(export)),
            None => (text, None),
        };
        if disk.is_empty() || export.is_some_and(|name| !is_export_name(name)) {
            return Err(
                "write DISK or DISK=NAME, NAME of letters, digits, '-', '_' and '.', not beginning with '.'"
                    .to_owned(),
            );
        }
        Ok(Self {
            disk: disk.to_owned(),
            export: export.map(str::to_owned),
        })
    }
}

fn is_export_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && name.bytes().all(is_name_byte)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// A mirrored disk, in a report.
#[derive(Debug, Serialize, JsonSchema)]
struct MirroredDisk {
    /// The guest's disk, by its device.
    disk: String,
    /// Its export's name at the receiver.
    export: String,
    /// Its size in bytes.
    bytes: u64,
    /// Its image on this host.
    file: String,
}

/// Disks, in a report.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct DiskReport {
    /// The receiver's address for disks; null if none is mirrored.
    disk_to: Option<String>,
    /// What was copied at first.
    disk_sync: DiskSync,
    /// The mirrored disks.
    disks: Vec<MirroredDisk>,
    /// Disks that the guest can write to and that are not protected.
    unprotected_disks: Vec<String>,
    /// Disks that the guest cannot write to: they are not mirrored.
    read_only_disks: Vec<String>,
    /// How long the first copy of the disks took.
    disk_copy_ms: u64,
    /// Of `--disk-sync changed`; null without.
    disk_changes: Option<Changes>,
}

/// What is to be done with the guest's disks.
#[derive(Debug)]
pub(super) struct DiskPlan {
    wanted: Vec<Mirror>,
    /// Writable, and left alone.
    unprotected: Vec<GuestDisk>,
    read_only: Vec<GuestDisk>,
    to: Address,
    /// The receiver.
    receiver: Address,
    /// The guest's, where it has one.
    uuid: Option<String>,
    /// Mirrors of an earlier protection were removed.
    replaces: bool,
}

impl DiskPlan {
    /// Finds the guest's disks and decides about each. Mirrors that an earlier protection has left are removed before:
    /// as long as one stands, QEMU lists its filter node in place of the disk.
    ///
    /// # Errors
    /// If QEMU does not answer or does not end a mirror, or a disk that is asked for is not there.
    pub(super) fn make(qmp: &mut Qmp, args: &DiskArgs, receiver: &Address) -> Result<Self, CommandError> {
        let replaces = remove_all(qmp).map_err(CommandError::failed)? > 0;
        if replaces {
            tell("removed what an earlier protection has left: mirrors of disks to another receiver");
        }
        let disks = guest_disks::list(qmp).map_err(CommandError::failed)?;
        let mut ask = |command: &str| qmp.execute(command, &json!({})).map_err(CommandError::failed);
        let guest = ask("query-name")?["name"].as_str().map(str::to_owned);
        let uuid = qmp.guest_uuid().map_err(CommandError::failed)?;
        let wanted = match args.disk.is_empty() {
            false => named_disks(&disks, &args.disk, guest.as_deref())?,
            true if args.no_disks => Vec::new(),
            true => {
                let writable = disks.iter().filter(|disk| disk.usage == DiskUse::Writable);
                writable
                    .map(|disk| mirror(disk, None, guest.as_deref()))
                    .collect()
            }
        };
        check_distinct(&wanted)?;
        let of_usage = |usage: DiskUse| disks.iter().filter(move |disk| disk.usage == usage).cloned();
        let is_wanted = |disk: &GuestDisk| wanted.iter().any(|mirror| mirror.disk.node == disk.node);
        let unprotected = of_usage(DiskUse::Writable).filter(|disk| !is_wanted(disk));
        Ok(Self {
            unprotected: unprotected.collect(),
            read_only: of_usage(DiskUse::ReadOnly).collect(),
            to: args.disk_to.clone().unwrap_or_else(|| receiver.of_disks()),
            receiver: receiver.clone(),
            wanted,
            uuid,
            replaces,
        })
    }

    /// Whether the guest has a UUID, by which the receiver knows its disks and its guard.
    pub(super) fn has_uuid(&self) -> bool {
        self.uuid.is_some()
    }

    /// What may be wrong with disks of a guest that has no UUID.
    fn doubt(&self) -> Option<String> {
        if self.has_uuid() || self.wanted.is_empty() {
            return None;
        }
        if !self.to.has_host_of(&self.receiver) {
            return Some(format!(
                "the guest has no UUID, so the receiver finds its disks by the address that they are mirrored from, which may be \
                 another one at {} than at {}: then they are not protected, and the receiver warns. A -uuid of the guest prevents that",
                self.to, self.receiver
            ));
        }
        matches!(self.to, Address::Tcp(_)).then(|| {
            "the guest has no UUID, so the receiver knows its disks by this host's address alone: only one such guest of this host \
             can be protected. A -uuid of each guest allows more"
                .to_owned()
        })
    }

    /// Says what is left alone, and what that means.
    pub(super) fn tell_what_is_left(&self) {
        if let Some(doubt) = self.doubt() {
            tell(&format!("WARNING: {doubt}"));
        }
        for disk in &self.read_only {
            tell(&format!(
                "disk {} is read-only and left alone: a fresh QEMU needs the same {}",
                disk.name, disk.file
            ));
        }
        if self.unprotected.is_empty() {
            return;
        }
        let names: Vec<_> = self.unprotected.iter().map(describe).collect();
        tell(&format!(
            "WARNING: not protected: {}\n\
             WARNING: after a failover a disk that is not protected is ahead of the guest's memory, which destroys file \
             systems. Only the receiver's copy (--disk) or storage that goes back with the checkpoint prevents that",
            names.join(", ")
        ));
    }

    /// Mirrors what is to be mirrored, and waits until all of it is copied. When it fails or is interrupted, nothing of it is left
    /// in QEMU.
    ///
    /// # Errors
    /// With QEMU's reason; the guest runs on as it did.
    pub(super) fn mirror(
        &self,
        qmp: &mut Qmp,
        args: &DiskArgs,
        wished: &mpsc::Receiver<()>,
        shows: bool,
    ) -> Result<(Mirrors, Option<Changes>), CommandError> {
        if self.wanted.is_empty() {
            return Ok((Mirrors::default(), None));
        }
        let wanted = self.wanted.clone();
        let connected = Mirrors::connect(qmp, &self.to, self.uuid.as_deref(), wanted, self.replaces);
        let copied = connected.and_then(|mirrors| {
            let mut copy = FirstCopy {
                qmp,
                to: &self.to,
                mirrors: &mirrors,
                wished,
                shows,
            };
            let changes = copy.run(args.disk_sync)?;
            Ok((mirrors, changes))
        });
        copied.map_err(|why| CommandError::Failed(format!("{why}; {}", give_up(qmp))))
    }

    /// For the report.
    pub(super) fn report(&self, args: &DiskArgs, changes: Option<Changes>, copying: Duration) -> DiskReport {
        let names = |disks: &[GuestDisk]| disks.iter().map(|disk| disk.name.clone()).collect();
        DiskReport {
            disk_to: (!self.wanted.is_empty()).then(|| self.to.to_string()),
            disk_sync: args.disk_sync,
            disks: (self.wanted.iter())
                .map(|mirror| MirroredDisk {
                    disk: mirror.disk.name.clone(),
                    export: mirror.export.clone(),
                    bytes: mirror.disk.bytes,
                    file: mirror.disk.file.clone(),
                })
                .collect(),
            unprotected_disks: names(&self.unprotected),
            read_only_disks: names(&self.read_only),
            disk_copy_ms: u64::try_from(copying.as_millis()).unwrap_or(u64::MAX),
            disk_changes: changes,
        }
    }
}

impl DiskReport {
    /// A line for each disk.
    pub(super) fn lines(&self) -> String {
        let line = |disk: &MirroredDisk| {
            let (name, export, to) = (
                &disk.disk,
                &disk.export,
                self.disk_to.as_deref().unwrap_or_default(),
            );
            format!(
                "disk {name} ({}) is mirrored to {export} at {to}\n",
                size(disk.bytes)
            )
        };
        let lines: String = self.disks.iter().map(line).collect();
        let changes = self.disk_changes.map(|Changes { bytes, stopped_ms }| {
            let mebibytes = mebibytes(bytes);
            format!("{mebibytes:.1} MiB of them had changed; the guest was stopped for {stopped_ms} ms to copy the last of it\n")
        });
        lines + &changes.unwrap_or_default()
    }
}

/// Ends all mirrors, and says how the guest is left then.
pub(super) fn give_up(qmp: &mut Qmp) -> String {
    match remove_all(qmp) {
        Ok(0) => "the guest runs on, unprotected".to_owned(),
        Ok(_) => "the guest runs on, unprotected, and its disks are no longer mirrored".to_owned(),
        Err(error) => format!("the guest runs on, unprotected; its mirrors cannot be removed: {error}"),
    }
}

/// The disks that the operator names.
fn named_disks(
    disks: &[GuestDisk],
    names: &[DiskName],
    guest: Option<&str>,
) -> Result<Vec<Mirror>, CommandError> {
    let found = names.iter().map(|name| {
        let mut called = disks.iter().filter(|disk| disk.is_called(&name.disk));
        let Some(disk) = called.next() else {
            let known: Vec<_> = disks.iter().map(describe).collect();
            let known = match known.is_empty() {
                true => "it has none".to_owned(),
                false => format!("it has {}", known.join(", ")),
            };
            return Err(format!("the guest has no disk {}: {known}", name.disk));
        };
        match disk.usage {
            DiskUse::Writable => Ok(mirror(disk, name.export.clone(), guest)),
            DiskUse::ReadOnly => Err(format!(
                "disk {} is read-only: there is nothing to protect, leave it out",
                name.disk
            )),
            DiskUse::Flash => Err(format!(
                "disk {} is firmware's flash memory, which the checkpoint has as RAM: leave it out",
                name.disk
            )),
        }
    });
    found.collect::<Result<_, _>>().map_err(CommandError::Failed)
}

fn mirror(disk: &GuestDisk, export: Option<String>, guest: Option<&str>) -> Mirror {
    let named = || {
        let name = match guest {
            Some(guest) => format!("{guest}-{}", disk.name),
            None => disk.name.clone(),
        };
        export_name(&name)
    };
    Mirror {
        export: export.unwrap_or_else(named),
        disk: disk.clone(),
    }
}

/// A name with what is not allowed in that of an export replaced.
fn export_name(name: &str) -> String {
    let letter = |letter: char| match u8::try_from(letter) {
        Ok(byte) if is_name_byte(byte) => letter,
        _ => '-',
    };
    let name: String = name.chars().map(letter).take(NAME_MAX).collect();
    match name.strip_prefix('.') {
        Some(rest) => format!("-{rest}"),
        None => name,
    }
}

/// Two disks on one export would overwrite each other.
fn check_distinct(wanted: &[Mirror]) -> Result<(), CommandError> {
    let (mut exports, mut nodes) = (HashSet::new(), HashSet::new());
    for mirror in wanted {
        if !exports.insert(&mirror.export) || !nodes.insert(&mirror.disk.node) {
            return Err(CommandError::Usage(format!(
                "disk {} as {}: that disk or that name is there twice; name each once: --disk DISK=NAME",
                mirror.disk.name, mirror.export
            )));
        }
    }
    Ok(())
}

fn describe(disk: &GuestDisk) -> String {
    format!("{} ({}, {})", disk.name, disk.file, size(disk.bytes))
}

fn size(bytes: u64) -> String {
    Size(bytes).to_string()
}

#[cfg(test)]
mod tests;
