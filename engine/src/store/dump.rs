//! A consistent dump of the last committed checkpoint, while further checkpoints are committed.
//!
//! It is made in passes: the first copies the whole image without a lock, while every commit records the pages that it changes;
//! the next ones copy those again; the last one copies the pages that remain under the lock of the commit record, together with
//! the device state. So a commit waits for the little that changed during the last unlocked pass, not for the guest's whole RAM,
//! and the dump is of one checkpoint: the one committed at the end.
//!
//! It goes to files that the caller has opened: what names they have, and whether they keep them, is the caller's affair.

use crate::blocks::BlockTable;
use crate::store::cache::plan::FlushPlan;
use crate::store::commit::bitmap::DirtyBitmap;
use crate::store::committed::CommittedImage;
use crate::store::error::StoreError;
use crate::store::memory::copy;
use crate::store::memory::image::RamImage;
use crate::store::memory::index;
use crate::store::memory::span::PageSpan;
use crate::units::PageRun;
use crate::units::{CheckpointId, PAGE_BYTES, PAGE_SIZE};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

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

/// Where a dump goes: open files, which are empty.
#[derive(Clone, Debug)]
pub struct DumpTargets<'a> {
    /// One for each RAM block, in the order of the guest's list: byte `o` of the block at offset `o`, with holes for zeros.
    pub blocks: Vec<&'a File>,
    /// For the device state.
    pub device_state: &'a File,
}

/// What was dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpReport {
    /// The checkpoint it is of.
    pub checkpoint: CheckpointId,
    /// Passes over the image, the last one under the lock included.
    pub passes: u32,
}

impl CommittedImage {
    /// Dumps the last committed checkpoint into `targets`.
    ///
    /// One dump at a time: another one waits.
    ///
    /// # Errors
    /// Before the first commit, if there is not one target for each block, or when one cannot be written.
    pub fn dump(&self, targets: &DumpTargets<'_>) -> Result<DumpReport, StoreError> {
        // The lock guards no data: a dump that panicked leaves nothing behind that matters to the next.
        let _only_one = self.dumping.lock().unwrap_or_else(PoisonError::into_inner);
        self.begin_tracking()?;
        let writer = DumpWriter::new(self.table(), targets);
        let dumped = writer.and_then(|writer| self.dump_passes(&writer));
        self.lock().tracking = None;
        dumped
    }

    fn begin_tracking(&self) -> Result<(), StoreError> {
        let mut record = self.lock();
        if record.checkpoint.is_none() {
            return Err(StoreError::NothingCommitted);
        }
        record.tracking = Some(DirtyBitmap::new(self.table().total_pages(), 1)?);
        Ok(())
    }

    fn dump_passes(&self, writer: &DumpWriter<'_>) -> Result<DumpReport, StoreError> {
        // What is committed from here on is tracked; what was committed before is brought into the image.
        self.finish_flush();
        writer.write_all(self.image())?;
        let mut plan = FlushPlan::with_room(self.table().total_pages())?;
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
                let _lease = self.image().beside(plan.pages() * PAGE_BYTES)?;
                let pages = read_plan(self.image(), &plan)?;
                let device_state = copied(&record.device_state)?;
                let checkpoint = record.checkpoint.ok_or(StoreError::NothingCommitted)?;
                drop(record);
                writer.write_pages(self.image(), &plan, &pages)?;
                writer.write_device_state(&device_state)?;
                return Ok(DumpReport { checkpoint, passes });
            }
            drop(record);
            if passes == PASSES_MAX {
                return Err(StoreError::DumpTooSlow { passes });
            }
            // The pages of the plan are committed, so that they are in the image after this.
            self.finish_flush();
            writer.write_plan(self.image(), &plan)?;
        }
    }
}

/// The pages of `plan`, in its order.
fn read_plan(image: &RamImage, plan: &FlushPlan) -> Result<Vec<[u8; PAGE_SIZE]>, StoreError> {
    let (mut pages, count) = (Vec::new(), index(plan.pages()));
    let reserved = pages.try_reserve_exact(count);
    reserved.map_err(|_| StoreError::no_tables::<[u8; PAGE_SIZE]>(count))?;
    for run in plan.runs(0..plan.len()) {
        for at in 0..run.pages {
            let mut page = [0; PAGE_SIZE];
            copy::read(image.span(PageRun::one(run.skip(at).first)), &mut page);
            pages.push(page);
        }
    }
    Ok(pages)
}

fn copied(bytes: &[u8]) -> Result<Vec<u8>, StoreError> {
    let mut copy = Vec::new();
    let reserved = copy.try_reserve_exact(bytes.len());
    reserved.map_err(|_| StoreError::no_tables::<u8>(bytes.len()))?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// A block's file.
struct BlockFile<'a> {
    file: &'a File,
    name: String,
}

impl BlockFile<'_> {
    fn refused(&self, source: io::Error) -> StoreError {
        StoreError::dump(&self.name, source)
    }

    fn write(&self, span: PageSpan<'_>, offset: u64) -> Result<(), StoreError> {
        span.write_to(self.file, offset)
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

/// Writes to the targets of a dump.
struct DumpWriter<'a> {
    /// In the order of the table.
    blocks: Vec<BlockFile<'a>>,
    device_state: &'a File,
}

impl<'a> DumpWriter<'a> {
    fn new(table: &BlockTable, targets: &DumpTargets<'a>) -> Result<Self, StoreError> {
        let (files, blocks) = (targets.blocks.len(), table.iter().count());
        if files != blocks {
            return Err(StoreError::DumpTargets { files, blocks });
        }
        let block = |((_, block), file): ((_, &crate::blocks::RamBlock), &&'a File)| {
            let block_file = BlockFile {
                file,
                name: block.display_name(),
            };
            file.set_len(block.used_length)
                .map_err(|error| block_file.refused(error))?;
            Ok(block_file)
        };
        Ok(Self {
            blocks: table
                .iter()
                .zip(&targets.blocks)
                .map(block)
                .collect::<Result<_, StoreError>>()?,
            device_state: targets.device_state,
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
            let wrote = block.file.write_all_at(content, offset);
            wrote.map_err(|error| block.refused(error))?;
        }
        Ok(())
    }

    fn write_device_state(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut file = self.device_state;
        file.write_all(bytes)
            .map_err(|error| StoreError::dump("the device state", error))
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
        let full = File::options().write(true).open("/dev/full").unwrap();
        // It has no length that could be set.
        let writer = DumpWriter {
            blocks: vec![BlockFile {
                file: &full,
                name: "pc.ram".to_owned(),
            }],
            device_state: &full,
        };
        let refused = store.committed.dump_passes(&writer).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the dump of pc.ram: No space left on device (os error 28)"
        );
        let refused = writer.write_device_state(&[1]).unwrap_err();
        assert!(refused.to_string().contains("the dump of the device state"));
    }
}
