//! A consistent dump of the last committed checkpoint, while further checkpoints are committed.
//!
//! It is made in passes: the first copies the whole image without a lock, while every commit records the pages that it changes;
//! the next ones copy those again; the last one copies the pages that remain under the lock of the commit record, together with
//! the device state. So a commit waits for the little that changed during the last unlocked pass, not for the guest's whole RAM,
//! and the dump is of one checkpoint: the one committed at the end.

use crate::blocks::BlockTable;
use crate::files::{self, NewFile, Readers};
use crate::store::cache::plan::FlushPlan;
use crate::store::commit::bitmap::DirtyBitmap;
use crate::store::committed::CommittedImage;
use crate::store::error::StoreError;
use crate::store::memory::copy;
use crate::store::memory::file_names::file_names;
use crate::store::memory::image::RamImage;
use crate::store::memory::span::PageSpan;
use crate::units::PageRun;
use crate::units::{CheckpointId, PAGE_BYTES, PAGE_SIZE};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

/// File name of the device state.
pub const DEVICE_STATE_FILE: &str = "device-state.bin";

/// File names that no block gets, since callers put files of these names beside the dump: its description, the stream's
/// header, the vmdesc, the directory of disks.
pub const RESERVED_FILES: [&str; 4] = ["checkpoint.json", "stream-header.bin", "vmdesc.json", "disks"];

/// Passes after which more pages are copied under the lock, if the guest leaves no fewer: [`LOCKED_PAGES_MAX`].
const SHORT_PASSES: u32 = 4;

/// Passes after which a dump gives up: the guest changes faster than its disk writes.
const PASSES_MAX: u32 = 16;

/// Pages few enough to be copied under the lock, in memory: 4 MiB, about 2 ms.
const LOCKED_PAGES: u64 = 1024;

/// Pages that may be copied under the lock after [`SHORT_PASSES`]: 64 MiB, some 30 ms once in a dump.
const LOCKED_PAGES_MAX: u64 = 16 * LOCKED_PAGES;

/// Pages written by one call.
const CHUNK_PAGES: u64 = 256;

/// The content of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpReport {
    /// The checkpoint it is of.
    pub checkpoint: CheckpointId,
    /// The RAM blocks, in the order of the guest's list.
    pub blocks: Vec<DumpedBlock>,
    /// The device state's file: [`DEVICE_STATE_FILE`].
    pub device_state: PathBuf,
    /// Passes over the image, the last one under the lock included.
    pub passes: u32,
}

/// One block of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedBlock {
    /// The block's name, as the primary gave it.
    pub name: Box<[u8]>,
    /// Its file: byte `o` of the block at offset `o`, with holes for zeros.
    pub file: PathBuf,
    /// Its length.
    pub bytes: u64,
}

impl CommittedImage {
    /// Dumps the last committed checkpoint into `directory`, which is made if it does not exist: a file per block and
    /// [`DEVICE_STATE_FILE`]. Files of an earlier dump there are replaced, once the new one is complete.
    ///
    /// One dump at a time: another one waits.
    ///
    /// # Errors
    /// Before the first commit, or when a file cannot be written. Then no file of this dump remains.
    pub fn dump(&self, directory: &Path) -> Result<DumpReport, StoreError> {
        // The lock guards no data: a dump that panicked leaves nothing behind that matters to the next.
        let _only_one = self.dumping.lock().unwrap_or_else(PoisonError::into_inner);
        self.begin_tracking()?;
        let dumped = DumpFiles::create(directory, self.table()).and_then(|files| {
            self.dump_passes(&files)
                .map(|(checkpoint, passes)| (files, checkpoint, passes))
        });
        self.lock().tracking = None;
        let (files, checkpoint, passes) = dumped?;
        files.finish(self.table(), checkpoint, passes)
    }

    fn begin_tracking(&self) -> Result<(), StoreError> {
        let mut record = self.lock();
        if record.checkpoint.is_none() {
            return Err(StoreError::NothingCommitted);
        }
        record.tracking = Some(DirtyBitmap::new(self.table().total_pages(), 1));
        Ok(())
    }

    fn dump_passes(&self, files: &DumpFiles) -> Result<(CheckpointId, u32), StoreError> {
        // What is committed from here on is tracked; what was committed before is brought into the image.
        self.finish_flush();
        files.write_all(self.image())?;
        let mut plan = FlushPlan::default();
        let mut passes = 1;
        loop {
            let record = self.lock();
            if let Some(tracking) = &record.tracking {
                tracking.take(&mut plan);
            }
            passes += 1;
            let limit = if passes <= SHORT_PASSES {
                LOCKED_PAGES
            } else {
                LOCKED_PAGES_MAX
            };
            if plan.pages() <= limit {
                self.finish_flush();
                // A commit waits for this lock, and a guest for the commit: the pages are copied to memory under it and
                // written afterwards, however slow the disk is.
                let pages = read_plan(self.image(), &plan);
                let device_state = record.device_state.clone();
                let checkpoint = record.checkpoint.ok_or(StoreError::NothingCommitted)?;
                drop(record);
                files.write_pages(self.image(), &plan, &pages)?;
                files.write_device_state(&device_state)?;
                return Ok((checkpoint, passes));
            }
            drop(record);
            if passes == PASSES_MAX {
                return Err(StoreError::DumpTooSlow { passes });
            }
            // The pages of the plan are committed, so that they are in the image after this.
            self.finish_flush();
            files.write_plan(self.image(), &plan)?;
        }
    }
}

/// The pages of `plan`, in its order.
fn read_plan(image: &RamImage, plan: &FlushPlan) -> Vec<[u8; PAGE_SIZE]> {
    let mut pages = Vec::new();
    for run in plan.runs(0..plan.len()) {
        for at in 0..run.pages {
            let mut page = [0; PAGE_SIZE];
            copy::read(image.span(PageRun::one(run.skip(at).first)), &mut page);
            pages.push(page);
        }
    }
    pages
}

/// A file that has its name only when the dump is complete. No block's own file can be named as such a part
/// (`file_names.rs`).
struct DumpFile(NewFile);

impl DumpFile {
    fn create(path: &Path, bytes: u64) -> Result<Self, StoreError> {
        let made = NewFile::create(path, Readers::Owner).and_then(|new| {
            new.file().set_len(bytes)?;
            Ok(Self(new))
        });
        made.map_err(|error| StoreError::file(&files::part_of(path), error))
    }

    fn refused(&self, source: std::io::Error) -> StoreError {
        StoreError::file(self.0.part(), source)
    }

    fn write(&self, span: PageSpan<'_>, offset: u64) -> Result<(), StoreError> {
        span.write_to(self.0.file(), offset)
            .map_err(|error| self.refused(error))
    }

    /// Writes a block's pages but for those of zeros, which are holes of the new file.
    fn write_sparse(&self, image: &RamImage, block: PageRun) -> Result<(), StoreError> {
        let is_zero = |at: &u64| copy::is_zero(image.span(PageRun::one(block.skip(*at).first)));
        let mut at = 0;
        while at < block.pages {
            let end = block.pages.min(at + CHUNK_PAGES);
            let first = (at..end).find(|at| !is_zero(at)).unwrap_or(end);
            at = (first..end).find(is_zero).unwrap_or(end);
            if first < at {
                self.write(
                    image.span(block.skip(first)).first(at - first),
                    first * PAGE_BYTES,
                )?;
            }
        }
        Ok(())
    }
}

/// The files of a dump under way.
struct DumpFiles {
    directory: PathBuf,
    /// In the order of the table.
    blocks: Vec<DumpFile>,
    device_state: DumpFile,
}

impl DumpFiles {
    fn create(directory: &Path, table: &BlockTable) -> Result<Self, StoreError> {
        fs::create_dir_all(directory).map_err(|error| StoreError::file(directory, error))?;
        let [description, header, vmdesc, disks] = RESERVED_FILES;
        let names = file_names(table, &[DEVICE_STATE_FILE, description, header, vmdesc, disks]);
        let blocks = table.iter().zip(names);
        let create = |((_, block), name): ((_, &crate::blocks::RamBlock), String)| {
            DumpFile::create(&directory.join(name), block.used_length)
        };
        Ok(Self {
            directory: directory.to_owned(),
            blocks: blocks.map(create).collect::<Result<_, _>>()?,
            device_state: DumpFile::create(&directory.join(DEVICE_STATE_FILE), 0)?,
        })
    }

    fn write_all(&self, image: &RamImage) -> Result<(), StoreError> {
        let blocks = image.table().iter().zip(&self.blocks);
        for ((_, block), file) in blocks {
            let (first, pages) = (block.first_page, block.pages());
            file.write_sparse(image, PageRun { first, pages })?;
        }
        Ok(())
    }

    fn write_plan(&self, image: &RamImage, plan: &FlushPlan) -> Result<(), StoreError> {
        for mut run in plan.runs(0..plan.len()) {
            while run.pages > 0 {
                let (id, offset) = image.table().locate(run.first);
                let span = image.span(run);
                self.blocks[usize::from(id.0)].write(span, offset)?;
                run = run.skip(span.pages());
            }
        }
        Ok(())
    }

    /// Writes what [`read_plan`] has read.
    fn write_pages(
        &self,
        image: &RamImage,
        plan: &FlushPlan,
        pages: &[[u8; PAGE_SIZE]],
    ) -> Result<(), StoreError> {
        let runs = plan.runs(0..plan.len());
        let places = runs.flat_map(|run| (0..run.pages).map(move |at| run.skip(at).first));
        for (page, content) in places.zip(pages) {
            let (id, offset) = image.table().locate(page);
            let block = &self.blocks[usize::from(id.0)];
            let wrote = block.0.file().write_all_at(content, offset);
            wrote.map_err(|error| block.refused(error))?;
        }
        Ok(())
    }

    fn write_device_state(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let wrote = self.device_state.0.file().write_all(bytes);
        wrote.map_err(|error| self.device_state.refused(error))
    }

    /// Gives the files their names, once all of them are on the disk: some file systems report only then
    /// that they are full.
    fn finish(
        self,
        table: &BlockTable,
        checkpoint: CheckpointId,
        passes: u32,
    ) -> Result<DumpReport, StoreError> {
        let files = || self.blocks.iter().chain([&self.device_state]);
        for file in files() {
            file.0.sync().map_err(|error| file.refused(error))?;
        }
        for file in files() {
            let renamed = file.0.rename();
            renamed.map_err(|error| StoreError::file(file.0.path(), error))?;
        }
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| StoreError::file(&self.directory, error))?;
        let dumped = |((_, block), file): ((_, &crate::blocks::RamBlock), &DumpFile)| DumpedBlock {
            name: block.name.clone(),
            file: file.0.path().to_owned(),
            bytes: block.used_length,
        };
        Ok(DumpReport {
            checkpoint,
            blocks: table.iter().zip(&self.blocks).map(dumped).collect(),
            device_state: self.device_state.0.path().to_owned(),
            passes,
        })
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::store::{CopyMethod, Flusher, HugePages, Store, StoreOptions};
    use std::sync::Arc;

    /// A full disk, seen by the first write: the error names it, and commits go on.
    #[test]
    fn a_full_disk_is_an_error() {
        let entries = vec![(b"pc.ram".as_slice().into(), 8 * PAGE_BYTES)];
        let table = Arc::new(BlockTable::new(entries, 8 * PAGE_BYTES).unwrap());
        let options = StoreOptions {
            hugepages: HugePages::Off,
            ..StoreOptions::default()
        };
        let (store, _) = Store::create(table.clone(), "test", &options).unwrap();
        store
            .write(
                0,
                table.page(crate::units::BlockId(0), PAGE_BYTES).unwrap(),
                &[7; 4096],
            )
            .unwrap();
        let flusher = Flusher::new(CopyMethod::Memcpy, 0, &[]).unwrap();
        store.commit(CheckpointId(0), &mut Vec::new(), &flusher);
        let full = || {
            let file = File::options().write(true).open("/dev/full").unwrap();
            DumpFile(NewFile::of(
                "/dev/full".into(),
                "/nonexistent/pc.ram~part".into(),
                file,
            ))
        };
        let files = DumpFiles {
            directory: "/nonexistent".into(),
            blocks: vec![full()],
            device_state: full(),
        };
        let refused = store.committed.dump_passes(&files).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "/nonexistent/pc.ram~part: No space left on device (os error 28)"
        );
    }
}
