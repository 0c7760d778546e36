//! A dump as a client of a receiver makes it: it opens the files, and gives them their names once the receiver has written them.
//!
//! `checkpoint.json` names the others: a file for every RAM block, the device state, what is constant for the session (spec §15): the
//! stream's header with its configuration, and the vmdesc; and once the session has ended, a copy of each of the guest's disks. What a
//! receiver says decides no path: names of blocks and disks are made harmless here.

use super::dump::{CopiedDisk, DumpContents, DumpedCheckpoint};
use crate::disk::is_name;
use crate::files::{self, NewFile, Readers};
use crate::store::file_names;
use crate::text;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Name of the schema of `checkpoint.json`.
pub const DUMP_SCHEMA: &str = "colo-ring.checkpoint";

/// Its version.
pub const DUMP_VERSION: u32 = 1;

const INDEX_FILE: &str = "checkpoint.json";
const DEVICE_STATE_FILE: &str = "device-state.bin";
const HEADER_FILE: &str = "stream-header.bin";
const VMDESC_FILE: &str = "vmdesc.json";
/// With the names that they have in a receiver's own directory of disks.
const DISKS_DIRECTORY: &str = "disks";

/// No block's file has one of these names.
const RESERVED: [&str; 5] = [
    INDEX_FILE,
    DEVICE_STATE_FILE,
    HEADER_FILE,
    VMDESC_FILE,
    DISKS_DIRECTORY,
];

/// A dump; the content of `checkpoint.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Dumped {
    /// Always [`DUMP_SCHEMA`].
    pub schema: String,
    /// See [`DUMP_VERSION`].
    pub schema_version: u32,
    /// The session's number.
    pub session: u32,
    /// The checkpoint's number; 0 is the state at the end of precopy.
    pub checkpoint: u64,
    /// The primary's machine type.
    pub machine: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// Id of the RAM section in the primary's stream.
    pub ram_section: u32,
    /// The RAM blocks, in the primary's order.
    pub blocks: Vec<DumpedBlock>,
    /// File of the device state, which ends with its EOF byte.
    pub device_state_file: String,
    /// File of the stream's header and configuration, verbatim.
    pub header_file: String,
    /// File of the vmdesc.
    pub vmdesc_file: String,
    /// The guest's disks at the checkpoint.
    #[serde(default)]
    pub disks: Vec<DumpedDisk>,
    /// Which disks of the guest are not among them, and why; none if all are.
    #[serde(default)]
    pub disks_left_out: Option<String>,
}

/// One RAM block's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DumpedBlock {
    /// The block's name.
    pub name: String,
    /// Its length in bytes, and the file's.
    pub used_length: u64,
    /// The file, in the same directory: byte `o` of the block at offset `o`, with holes for zeros.
    pub file: String,
}

/// One disk's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DumpedDisk {
    /// Its export's name.
    pub name: String,
    /// Its length in bytes, and the file's.
    pub size_bytes: u64,
    /// The file, below the same directory: raw.
    pub file: String,
}

/// A file of a dump could not be made.
#[derive(Debug, Error)]
#[error("{}: {source}", path.display())]
pub struct DumpFileError {
    path: PathBuf,
    source: io::Error,
}

impl DumpFileError {
    fn of(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self {
            path: path.to_owned(),
            source,
        }
    }
}

/// A file of a dump, which has its name only when the dump is complete. No block's own file can be named as such a part.
struct Part {
    /// Below the directory.
    name: String,
    new: NewFile,
}

impl Part {
    fn create(directory: &Path, name: String) -> Result<Self, DumpFileError> {
        let path = directory.join(&name);
        let new =
            NewFile::create(&path, Readers::Owner).map_err(DumpFileError::of(&files::part_of(&path)))?;
        Ok(Self { name, new })
    }

    fn finish(&self) -> Result<(), DumpFileError> {
        let failed = DumpFileError::of(self.new.path());
        // Some file systems report only then that they are full.
        self.new.sync().and_then(|()| self.new.rename()).map_err(failed)
    }
}

/// The files of a dump that is not complete. Dropped before it is, it leaves none of them.
pub struct DumpFiles {
    directory: PathBuf,
    contents: DumpContents,
    /// In the order of the contents.
    blocks: Vec<Part>,
    device_state: Part,
    header: Part,
    vmdesc: Part,
    disks: Vec<Part>,
}

impl DumpFiles {
    /// Makes them in a directory that exists. A `checkpoint.json` of an earlier dump there is removed, and its other files are replaced
    /// once this one is complete.
    ///
    /// # Errors
    /// If one cannot be made; none is left then.
    pub fn create(directory: &Path, contents: DumpContents) -> Result<Self, DumpFileError> {
        let index = directory.join(INDEX_FILE);
        match fs::remove_file(&index) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DumpFileError::of(&index)(error));
            }
            _ => {}
        }
        let names = contents.blocks.iter().map(|block| block.name.as_bytes());
        let part = |name: String| Part::create(directory, name);
        let blocks = file_names(names, &RESERVED).into_iter().map(part);
        let blocks = blocks.collect::<Result<_, _>>()?;
        let [device_state, header, vmdesc] =
            [DEVICE_STATE_FILE, HEADER_FILE, VMDESC_FILE].map(|name| part(name.to_owned()));
        let disk = |name: &String| {
            let path = format!("{DISKS_DIRECTORY}/{name}.raw");
            match is_name(name) {
                true => part(path),
                false => Err(DumpFileError::of(&directory.join(path))(
                    io::ErrorKind::InvalidFilename.into(),
                )),
            }
        };
        if !contents.disks.is_empty() {
            let disks = directory.join(DISKS_DIRECTORY);
            files::directory(&disks).map_err(DumpFileError::of(&disks))?;
        }
        let disks = contents.disks.iter().map(disk).collect::<Result<_, _>>()?;
        Ok(Self {
            directory: directory.to_owned(),
            blocks,
            device_state: device_state?,
            header: header?,
            vmdesc: vmdesc?,
            disks,
            contents,
        })
    }

    /// The files in the order in which a request for a dump passes them.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.all().map(|part| part.new.file().as_fd()).collect()
    }

    fn all(&self) -> impl Iterator<Item = &Part> {
        let others = [&self.device_state, &self.header, &self.vmdesc];
        self.blocks.iter().chain(others).chain(&self.disks)
    }

    /// The files as they are called until they are complete: what a client removes that is interrupted.
    pub fn parts(&self) -> Vec<PathBuf> {
        self.all().map(|part| part.new.part().to_owned()).collect()
    }

    /// The disks for which there are files.
    pub fn disks(&self) -> Vec<String> {
        self.contents.disks.clone()
    }

    /// Gives the files their names, once all that were written are on the disk, and writes the index.
    ///
    /// # Errors
    /// Those of the system. Some files may then exist, but no `checkpoint.json`.
    pub fn finish(self, dumped: DumpedCheckpoint) -> Result<Dumped, DumpFileError> {
        let copied = |name: &str| dumped.disks.iter().find(|disk| disk.name == name);
        let names = self.contents.disks.iter().zip(&self.disks);
        let disks: Vec<(&CopiedDisk, &Part)> = names
            .filter_map(|(name, part)| Some((copied(name)?, part)))
            .collect();
        let others = [&self.device_state, &self.header, &self.vmdesc];
        let all = self.blocks.iter().chain(others);
        all.chain(disks.iter().map(|(_, part)| *part))
            .try_for_each(Part::finish)?;
        let block = |(block, part): (&super::GuestBlock, &Part)| DumpedBlock {
            name: block.name.clone(),
            used_length: block.used_length,
            file: part.name.clone(),
        };
        let disk = |(disk, part): &(&CopiedDisk, &Part)| DumpedDisk {
            name: disk.name.clone(),
            size_bytes: disk.size_bytes,
            file: part.name.clone(),
        };
        let index = Dumped {
            schema: DUMP_SCHEMA.into(),
            schema_version: DUMP_VERSION,
            session: dumped.session,
            checkpoint: dumped.checkpoint,
            machine: dumped.machine,
            page_size: dumped.page_size,
            ram_section: dumped.ram_section,
            blocks: self.contents.blocks.iter().zip(&self.blocks).map(block).collect(),
            device_state_file: self.device_state.name.clone(),
            header_file: self.header.name.clone(),
            vmdesc_file: self.vmdesc.name.clone(),
            disks: disks.iter().map(disk).collect(),
            disks_left_out: dumped.disks_left_out,
        };
        let path = self.directory.join(INDEX_FILE);
        text::json(&index)
            .map_err(io::Error::from)
            .and_then(|text| files::write(&path, (text + "\n").as_bytes(), Readers::Owner))
            .map_err(DumpFileError::of(&path))?;
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(DumpFileError::of(&self.directory))?;
        Ok(index)
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::receiver::GuestBlock;
    use std::os::unix::fs::PermissionsExt;

    fn contents(blocks: &[&str], disks: &[&str]) -> DumpContents {
        let block = |name: &&str| GuestBlock {
            name: (*name).to_owned(),
            used_length: 4096,
            file: None,
        };
        DumpContents {
            session: 1,
            blocks: blocks.iter().map(block).collect(),
            disks: disks.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn dumped(disks: &[&str]) -> DumpedCheckpoint {
        let copied = |name: &&str| CopiedDisk {
            name: (*name).to_owned(),
            size_bytes: 512,
        };
        DumpedCheckpoint {
            session: 1,
            checkpoint: 7,
            machine: "pc".into(),
            page_size: 4096,
            ram_section: 2,
            disks: disks.iter().map(copied).collect(),
            disks_left_out: None,
        }
    }

    fn names_in(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_dump_that_fails_leaves_nothing_behind() {
        let scratch = tempfile::tempdir().unwrap();
        // A directory in the way of the second block's file, which shows when the first is open already.
        fs::create_dir(scratch.path().join("vga~part")).unwrap();
        let refused = DumpFiles::create(scratch.path(), contents(&["pc.ram", "vga"], &[])).err();
        let refused = refused.unwrap().to_string();
        assert!(refused.contains("vga~part"), "{refused}");
        assert_eq!(names_in(scratch.path()), ["vga~part"]);
        drop(DumpFiles::create(scratch.path(), contents(&["pc.ram"], &["root"])).unwrap());
        assert_eq!(names_in(scratch.path()), ["disks", "vga~part"]);
        assert!(names_in(&scratch.path().join("disks")).is_empty());
    }

    /// Whatever blocks are called, the files that are put beside them overwrite none of them, and others may not look at them.
    #[test]
    fn blocks_keep_out_of_the_way_of_other_files() {
        let scratch = tempfile::tempdir().unwrap();
        let blocks = ["checkpoint.json", "device-state.bin", "disks", "../../etc/passwd"];
        for _ in 0..2 {
            let files = DumpFiles::create(scratch.path(), contents(&blocks, &["root"])).unwrap();
            assert_eq!(files.descriptors().len(), 8);
            let index = files.finish(dumped(&["root"])).unwrap();
            assert_eq!(index.disks[0].file, "disks/root.raw");
            let mut files: Vec<_> = index.blocks.iter().map(|block| block.file.clone()).collect();
            assert!(files.iter().all(|file| !RESERVED.contains(&&**file)), "{files:?}");
            files.extend(RESERVED.map(str::to_owned));
            files.sort_unstable();
            assert_eq!(names_in(scratch.path()), files);
        }
        for file in names_in(scratch.path()) {
            let mode = fs::metadata(scratch.path().join(&file))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o077, 0, "{file}");
        }
    }

    #[test]
    fn what_a_receiver_says_decides_no_path() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["../root", "a/b", ".hidden", ""] {
            let refused = DumpFiles::create(scratch.path(), contents(&[], &[name])).err();
            assert!(refused.is_some(), "{name}");
        }
        // Nor that a disk was copied for which there is no file.
        let files = DumpFiles::create(scratch.path(), contents(&["pc.ram"], &[])).unwrap();
        assert!(files.finish(dumped(&["root"])).unwrap().disks.is_empty());
    }
}
