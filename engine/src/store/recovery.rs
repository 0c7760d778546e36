//! Recovery: finding the checkpoints of earlier receivers in a RAM directory, and making committed images of them.

use crate::blocks::BlockTable;
use crate::budget::{Budget, Lease};
use crate::failpoint;
use crate::store::StoreError;
use crate::store::cache::extent_refs::ExtentId;
use crate::store::cache::extents::EXTENT_BYTES;
use crate::store::cache::pool::Place;
use crate::store::charge;
use crate::store::committed::{CheckpointFiles, CommittedImage};
use crate::store::durable::layout::RECORD_FILE;
use crate::store::durable::record::{self, DurableRecord, Found, FoundCheckpoint, PLACES_FILE};
use crate::store::memory::copy;
use crate::store::memory::file_names::file_names;
use crate::store::memory::image::{NamedFiles, RamImage};
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::ram_dir::{RamDirectory, RamFiles};
use crate::store::memory::slab::{SLAB_FILES, slab_file};
use crate::store::memory::words::Words;
use crate::units::{CheckpointId, PAGE_BYTES, PageIndex, PageRun};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The labels of the guests that have files in a directory, as given to [`Store::create`](crate::store::Store::create).
///
/// # Errors
/// If it is not a RAM directory.
pub fn labels_in(directory: &Path) -> Result<Vec<String>, StoreError> {
    Ok(RamDirectory::open(directory)?.labels()?.into_iter().collect())
}

/// What can be recovered of a guest.
pub enum Recoverable {
    /// A checkpoint.
    Checkpoint(Box<RecoverableCheckpoint>),
    /// Nothing: no checkpoint was committed. Its files were removed.
    Nothing,
    /// Nothing now: another process has the guest.
    InUse,
    /// Unknown: there are files, but no commit record.
    Unknown,
}

/// A checkpoint that was found. Its files stay as they are until it is recovered.
pub struct RecoverableCheckpoint {
    durable: Box<DurableRecord>,
    found: FoundCheckpoint,
    session: Vec<u8>,
    device_state: Vec<u8>,
}

impl RecoverableCheckpoint {
    /// Looks for the checkpoint of one label.
    ///
    /// # Errors
    /// If its files are damaged; they stay as they are.
    pub fn find(directory: &Path, label: &str) -> Result<Recoverable, StoreError> {
        let files = Arc::new(RamFiles::new(RamDirectory::open(directory)?, label));
        files.keep(true);
        let (durable, found) = match DurableRecord::open(files.clone())? {
            Found::Checkpoint(durable, found) => (durable, found),
            Found::InUse => return Ok(Recoverable::InUse),
            Found::NoRecord => return Ok(Recoverable::Unknown),
            Found::Nothing => {
                files.keep(false);
                return Ok(Recoverable::Nothing);
            }
        };
        Ok(Recoverable::Checkpoint(Box::new(Self {
            session: durable.session()?,
            device_state: durable.device_state(&found)?,
            durable,
            found,
        })))
    }

    /// Its number.
    pub fn checkpoint(&self) -> CheckpointId {
        self.found.slot.checkpoint
    }

    /// How long ago it was committed, by this host's clock.
    pub fn age(&self) -> Duration {
        let committed = SystemTime::UNIX_EPOCH + Duration::from_nanos(self.found.slot.committed_ns);
        committed.elapsed().unwrap_or_default()
    }

    /// Whether it was given to a QEMU, so that a guest may have changed it.
    pub fn is_given(&self) -> bool {
        self.found.state.is_given
    }

    /// What [`Store::record_session`](crate::store::Store::record_session) has written of the session.
    pub fn session(&self) -> &[u8] {
        &self.session
    }

    /// Bytes of its device state.
    pub fn device_state_bytes(&self) -> usize {
        self.device_state.len()
    }

    /// The checkpoint, whole in the image; `table` are the guest's blocks. Pages that were not copied to the image yet are copied
    /// now; that can be interrupted at any time and repeated.
    ///
    /// # Errors
    /// If the image or the slots are damaged, or the budget does not allow it; the files stay as they are.
    pub fn recover(self, table: Arc<BlockTable>, budget: &Arc<Budget>) -> Result<CommittedImage, StoreError> {
        let pages = table.total_pages();
        let files = self.durable.files().clone();
        if self.found.shape.pages != pages {
            let what = format!(
                "it is of a guest of {} pages, and its blocks have {pages}",
                self.found.shape.pages
            );
            return Err(StoreError::damaged(&files.path(RECORD_FILE), what));
        }
        let names = file_names(table.names(), &[]);
        let lease = self.lease(&table, &files, budget)?;
        let image = RamImage::map_existing(table, &files, lease)?;
        if self.found.state.is_flushing {
            self.flush(&image, &files)?;
            self.durable.flushed();
        }
        record::own(&files, &names)?;
        files.remove(SLAB_FILES);
        files.remove(PLACES_FILE);
        files.keep(false);
        let flight = record::open_flight(&files);
        let files = CheckpointFiles {
            image: Some(files),
            record: Some(Arc::from(self.durable)),
        };
        let checkpoint = self.found.slot.checkpoint;
        Ok(CommittedImage::recovered(
            image,
            files,
            checkpoint,
            self.device_state,
            flight,
        ))
    }

    /// What the files that stay have of the budget.
    fn lease(&self, table: &BlockTable, files: &RamFiles, budget: &Arc<Budget>) -> Result<Lease, StoreError> {
        let named = NamedFiles {
            files: Some(files),
            are_all_named: true,
        };
        let bytes = charge::of_checkpoint(table, named).saturating_add(self.durable.bytes());
        Ok(budget.take(bytes)?)
    }

    /// Copies the pages whose places are not in the image to it.
    fn flush(&self, image: &RamImage, files: &RamFiles) -> Result<(), StoreError> {
        let path = files.path(PLACES_FILE);
        let damaged = |what: String| StoreError::damaged(&path, what);
        let places = open(files, PLACES_FILE)?;
        let count = index(self.found.shape.pages);
        if places.len() / 8 < count {
            return Err(damaged(format!("it is too short for {count} pages")));
        }
        let places = Words::mapped(places, count);
        let mut slabs = Vec::new();
        for (page, word) in (0..).zip(places.iter()) {
            let word = word.load(std::sync::atomic::Ordering::Acquire);
            let target = image.span(PageRun::one(PageIndex::new(page)));
            let place = Place::parse(page, word);
            match place.ok_or_else(|| damaged(format!("page {page} has the invalid place {word:#x}")))? {
                Place::Image => {}
                Place::Zero => copy::zero(target),
                Place::Slot(extent, offset) => {
                    let (slab, begin) = self.locate(extent, files, &mut slabs)?;
                    let inside = begin
                        .checked_add(offset)
                        .filter(|_| offset <= EXTENT_BYTES - PAGE_BYTES);
                    let at = inside.filter(|at| at + PAGE_BYTES <= u64::try_from(slab.len()).unwrap_or(0));
                    let at =
                        at.ok_or_else(|| damaged(format!("the place of page {page} is beyond its slab")))?;
                    copy::copy(target, slab.read_span(at, 1), copy::CopyMethod::Memcpy);
                }
            }
            failpoint::may_be_killed();
        }
        copy::fence();
        Ok(())
    }

    /// The slab of an extent, mapped when it is first needed, and where the extent begins in it.
    fn locate<'a>(
        &self,
        extent: ExtentId,
        files: &RamFiles,
        slabs: &'a mut Vec<(u64, Mapping)>,
    ) -> Result<(&'a Mapping, u64), StoreError> {
        let per_slab = self.found.shape.slab_extents.max(1);
        let (number, within) = (u64::from(extent.0) / per_slab, u64::from(extent.0) % per_slab);
        let known = slabs.iter().position(|(known, _)| *known == number);
        let position = match known {
            Some(position) => position,
            None => {
                slabs.push((number, open(files, &slab_file(index(number)))?));
                slabs.len() - 1
            }
        };
        Ok((&slabs[position].1, within * EXTENT_BYTES))
    }
}

fn open(files: &RamFiles, name: &str) -> Result<Mapping, StoreError> {
    let path = files.path(name);
    let file = files.open(name)?;
    let file = file.ok_or_else(|| StoreError::damaged(&path, "the file does not exist"))?;
    file.map_owned()
        .map_err(|errno| StoreError::file(&path, errno.into()))
}
