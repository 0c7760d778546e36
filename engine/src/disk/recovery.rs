//! What a killed receiver has left of disks: logs that are committed are applied, others dropped.

use super::DiskError;
use super::apply::{bring_to_base, release};
use super::base::{Base, is_name, path_of};
use super::epoch::{Content, Epoch, Part};
use super::guest_disk::Disk;
use super::pool::{file_prefix, ram_prefix};
use super::record::{DiskRecord, SUFFIX};
use super::segment::{EntryKind, Segment, SegmentHeader};
use crate::store::memory::mapping::Mapping;
use crate::store::memory::ram_dir::RamFiles;
use crate::text::printable;
use crate::units::PAGE_BYTES;
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A disk as the record of its session names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredDisk {
    /// The directory of its base.
    pub(crate) directory: String,
    pub(crate) name: String,
    /// The id of its log.
    pub(crate) log: u64,
    pub(crate) size: u64,
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> DiskError {
    move |source| DiskError::File {
        path: path.to_owned(),
        source,
    }
}

/// The files in a directory whose names begin so, with the numbers behind that.
fn numbered(directory: &Path, prefix: &str) -> Result<Vec<(u32, PathBuf)>, DiskError> {
    let failed = file_error(directory);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(&failed)? {
        let entry = entry.map_err(&failed)?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix)?.parse().ok());
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes the logs beside a base, which no checkpoint needs.
pub(super) fn remove_logs(directory: &Path, disk: &str) -> Result<(), DiskError> {
    remove_numbered(directory, &file_prefix(disk))
}

fn remove_numbered(directory: &Path, prefix: &str) -> Result<(), DiskError> {
    for (_, path) in numbered(directory, prefix)? {
        std::fs::remove_file(&path).map_err(file_error(&path))?;
    }
    Ok(())
}

/// Maps a segment that an earlier receiver has left; none if it is no segment, as a receiver leaves it that is killed while it makes one.
fn map(path: &Path, number: u32, is_ram: bool) -> Result<Option<Segment>, DiskError> {
    let failed = file_error(path);
    let file = File::options()
        .read(true)
        .write(true)
        // Never through a link: other users may write to the directory.
        .custom_flags(OFlag::O_NOFOLLOW.bits() | OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(&failed)?;
    let about = file.metadata().map_err(&failed)?;
    if !about.is_file() || about.uid() != nix::unistd::geteuid().as_raw() {
        return Err(failed(io::Error::other("it is not a file of this user")));
    }
    let length = about.len() / PAGE_BYTES * PAGE_BYTES;
    if length < 2 * PAGE_BYTES {
        return Ok(None);
    }
    let memory = Mapping::shared(&file, length, false).map_err(|errno| failed(errno.into()))?;
    Ok(Some(Segment::new(memory, path.to_owned(), number, is_ram)))
}

/// The segments of a log, by checkpoint and position.
type Segments = BTreeMap<u64, BTreeMap<u64, Arc<Segment>>>;

fn collect(found: Vec<(u32, PathBuf)>, is_ram: bool, log: u64, into: &mut Segments) -> Result<(), DiskError> {
    for (number, path) in found {
        let Some(segment) = map(&path, number, is_ram)? else {
            continue;
        };
        if let Some(header) = segment.header().filter(|header| header.log == log) {
            let epoch = into.entry(header.checkpoint).or_default();
            epoch.insert(header.sequence, Arc::new(segment));
        }
    }
    Ok(())
}

/// Applies the epochs of a log up to `checkpoint`, and frees their segments.
fn replay(base: &Base, log: u64, segments: Segments, checkpoint: u64) -> Result<(), DiskError> {
    for (number, segments) in segments.range(..=checkpoint) {
        let mut epoch = Epoch::new(log, *number);
        let mut before = None;
        for (sequence, segment) in segments {
            if before.is_some_and(|before| before + 1 != *sequence) {
                return Err(DiskError::Damaged {
                    path: segment.path.clone(),
                    what: format!("the segment before it of checkpoint {number} is missing"),
                });
            }
            before = Some(*sequence);
            let header = SegmentHeader {
                log,
                checkpoint: *number,
                sequence: *sequence,
            };
            take_entries(&mut epoch, segment, header, base.size())?;
        }
        bring_to_base(base, &epoch, || {}).map_err(file_error(base.path()))?;
        release(&epoch);
    }
    Ok(())
}

/// Puts the entries of a segment into the index of its epoch.
fn take_entries(
    epoch: &mut Epoch,
    segment: &Arc<Segment>,
    header: SegmentHeader,
    size: u64,
) -> Result<(), DiskError> {
    let position = epoch.segments.len();
    epoch.segments.push(segment.clone());
    for number in 0..segment.entries() {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        let entry = segment.entry(number, header)?;
        let length = u64::from(entry.length);
        let end = entry.offset.checked_add(length);
        let is_inside = end.is_some_and(|end| end <= size);
        if !is_inside || entry.length == 0 {
            return Err(DiskError::Damaged {
                path: segment.path.clone(),
                what: format!("its entry {number} is outside of the disk"),
            });
        }
        epoch.insert(Part {
            offset: entry.offset,
            length,
            content: match entry.kind {
                EntryKind::Data(place) => Content::Data {
                    segment: position,
                    place,
                },
                EntryKind::Zero { may_punch } => Content::Zero { may_punch },
            },
        });
    }
    Ok(())
}

/// Brings a disk to the checkpoint of its session's record. `ram` are the session's files in the RAM directory. It can be interrupted at any time,
/// and repeated. If it was given away already, nothing is written to it.
///
/// # Errors
/// If the disk or its log is missing, damaged or in use. Its files stay as they are.
pub(crate) fn recover(
    stored: &StoredDisk,
    ram: &RamFiles,
    checkpoint: u64,
    is_given: bool,
) -> Result<Disk, DiskError> {
    let directory = Path::new(&stored.directory);
    // Else the paths below would lead somewhere else.
    if !is_name(&stored.name) || !directory.is_absolute() {
        return Err(DiskError::NoDisk {
            directory: stored.directory.clone(),
            name: stored.name.clone(),
        });
    }
    let record = DiskRecord::find(directory, &stored.name)?;
    record.keep();
    let damaged = |what: String| DiskError::Damaged {
        path: DiskRecord::path_of(directory, &stored.name),
        what,
    };
    if record.log() != stored.log {
        return Err(damaged(
            "the disk was mirrored again since that checkpoint".to_owned(),
        ));
    }
    let path = path_of(directory, &stored.name);
    let base = match is_given {
        // A guest may run on it.
        true => Base::open_shared(&path)?,
        false => Base::open(&path)?,
    };
    if base.size() != stored.size {
        return Err(damaged(format!(
            "the disk had {} bytes, and {} has {}",
            stored.size,
            path.display(),
            base.size()
        )));
    }
    let mut segments = Segments::new();
    let ram_files = ram.path(&ram_prefix(&stored.name));
    let ram_prefix = ram_files.file_name().and_then(|name| name.to_str());
    let ram_prefix = ram_prefix.ok_or_else(|| damaged("its name is not a text".to_owned()))?;
    collect(
        numbered(ram.directory(), ram_prefix)?,
        true,
        stored.log,
        &mut segments,
    )?;
    collect(
        numbered(directory, &file_prefix(&stored.name))?,
        false,
        stored.log,
        &mut segments,
    )?;
    if is_given && segments.range(..=checkpoint).next().is_some() {
        return Err(damaged(
            "it was given to a QEMU before its log was applied".to_owned(),
        ));
    }
    replay(&base, stored.log, segments, checkpoint)?;
    remove_logs(directory, &stored.name)?;
    remove_numbered(ram.directory(), ram_prefix)?;
    record.set_needed();
    Ok(Disk::recovered(directory, &stored.name, base, record, checkpoint))
}

/// What became of a disk that no recovered checkpoint needs.
pub(crate) enum OrphanOutcome {
    /// Its base is at this checkpoint of an earlier receiver, whose RAM is lost.
    At(u64),
    /// No checkpoint was committed, or its copy was never complete; nothing is known of its content.
    Unfinished,
    /// Its checkpoint was discarded, and its receiver was killed before all of that was removed. What could be
    /// applied of its log is in the base.
    Discarded,
    /// It belongs to a checkpoint that was not recovered. Its files are kept.
    Kept(DiskError),
}

/// Recovers the disks in a directory that earlier receivers have left and no recovered checkpoint needs, or leaves them as they are.
///
/// # Errors
/// If the directory cannot be read.
pub(crate) fn recover_orphans(directory: &Path) -> Result<Vec<(String, OrphanOutcome)>, DiskError> {
    let failed = file_error(directory);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(&failed)? {
        let file = entry.map_err(&failed)?.file_name();
        let name = file.to_str().and_then(|file| file.strip_suffix(SUFFIX));
        names.extend(name.filter(|name| is_name(name)).map(str::to_owned));
    }
    names.sort_unstable();
    let mut records = BTreeMap::new();
    let mut outcomes = Vec::new();
    for name in names {
        match DiskRecord::find(directory, &name) {
            Ok(record) => {
                record.keep();
                records.insert(name, record);
            }
            // Of a checkpoint that was recovered, or another receiver's.
            Err(DiskError::OtherReceiver(_)) => {}
            Err(error) => outcomes.push((name, OrphanOutcome::Kept(error))),
        }
    }
    let mut done = Vec::new();
    for (name, record) in &records {
        let result = recover_orphan(directory, name, record, &records);
        if !matches!(result, Ok(OrphanOutcome::Kept(_)) | Err(_)) {
            done.push(name);
        }
        outcomes.push((name.clone(), result.unwrap_or_else(OrphanOutcome::Kept)));
    }
    // The records with the word last: until then it can be repeated.
    let (leaders, others): (Vec<&String>, _) = done.into_iter().partition(|name| {
        records[*name]
            .ownership()
            .is_ok_and(|owner| owner.leader == **name)
    });
    for name in others.into_iter().chain(leaders) {
        records[name].remove();
    }
    Ok(outcomes)
}

fn recover_orphan(
    directory: &Path,
    name: &str,
    record: &DiskRecord,
    records: &BTreeMap<String, DiskRecord>,
) -> Result<OrphanOutcome, DiskError> {
    let owner = record.ownership()?;
    let leader = records.get(&owner.leader);
    let committed = leader.and_then(DiskRecord::committed);
    if !record.is_needed() && committed.is_none() {
        remove_logs(directory, name)?;
        return Ok(OrphanOutcome::Unfinished);
    }
    if let Some(ram_dir) = owner.ram_dir {
        if record.is_given_up() {
            remove_logs(directory, name)?;
            return Ok(OrphanOutcome::Discarded);
        }
        return Ok(OrphanOutcome::Kept(DiskError::Orphan {
            record: DiskRecord::path_of(directory, name),
            owner: format!("session {} in {}", owner.session, printable(&ram_dir)),
        }));
    }
    let Some(checkpoint) = committed else {
        return Err(DiskError::Damaged {
            path: DiskRecord::path_of(directory, name),
            what: format!(
                "the record of disk {}, which says what is committed, is missing",
                printable(&owner.leader)
            ),
        });
    };
    let base = Base::open(&path_of(directory, name))?;
    let mut segments = Segments::new();
    collect(
        numbered(directory, &file_prefix(name))?,
        false,
        record.log(),
        &mut segments,
    )?;
    replay(&base, record.log(), segments, checkpoint)?;
    remove_logs(directory, name)?;
    Ok(OrphanOutcome::At(checkpoint))
}
