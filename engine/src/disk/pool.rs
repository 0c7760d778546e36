//! The segments of one disk's log: made as they are needed, in the RAM directory as far as its share goes and else beside the bases,
//! and used again while they are still in a processor's cache.

use super::DiskError;
use super::segment::Segment;
use crate::files::{self, Readers};
use crate::store::memory::populate::populate;
use crate::store::memory::ram_dir::{LOG_FILES, MemoryFile, RamFiles};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Free segments that are kept whatever the last epochs needed.
const FREE_MIN: usize = 2;

/// How many epochs do not need a segment before it is given back.
const EPOCHS: u32 = 64;

/// A share of the host's memory.
pub(crate) trait RamShare: Send + Sync {
    /// Takes bytes, until what is returned is dropped; none if there is no room.
    fn take(&self, bytes: u64) -> Option<Box<dyn Send + Sync>>;
}

/// Where segments may lie in memory.
pub(crate) struct RamPlace {
    pub(crate) files: Arc<RamFiles>,
    pub(crate) share: Arc<dyn RamShare>,
}

/// A segment with its share of the memory.
struct Owned {
    segment: Arc<Segment>,
    share: Option<Box<dyn Send + Sync>>,
}

#[derive(Default)]
struct Inner {
    /// The last one was freed last.
    free: Vec<Arc<Segment>>,
    /// Those that an epoch has, or a reader still looks at.
    owned: Vec<Owned>,
    /// Free segments that a reader still looks at: they are not used again.
    pinned: Vec<Arc<Segment>>,
    next: u32,
    in_use: usize,
    /// The most at a time in this many epochs.
    in_use_most: usize,
    epochs: u32,
}

/// Why there is no segment.
pub(crate) enum NoSegment {
    /// The limit of the log is reached.
    Full,
    /// There is neither memory nor disk space.
    NoRoom(DiskError),
    /// There is no memory for the index of what is in the others.
    NoIndex,
}

/// See the module.
pub(crate) struct SegmentPool {
    directory: PathBuf,
    disk: String,
    segment_bytes: u64,
    limit: u64,
    ram: OnceLock<RamPlace>,
    inner: Mutex<Inner>,
    kept: AtomicBool,
}

/// The name of a disk's segments in a directory of RAM images, without their numbers.
pub(crate) fn ram_prefix(disk: &str) -> String {
    format!("{LOG_FILES}{disk}-")
}

/// The path of a disk's segments beside its base, without their numbers.
pub(crate) fn file_prefix(disk: &str) -> String {
    format!("{disk}.~log-")
}

impl SegmentPool {
    pub(crate) fn new(directory: &Path, disk: &str, segment_bytes: u64, limit: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            disk: disk.to_owned(),
            segment_bytes,
            limit,
            ram: OnceLock::new(),
            inner: Mutex::default(),
            kept: AtomicBool::new(false),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on segments may lie in memory.
    pub(crate) fn use_ram(&self, place: RamPlace) {
        // Set once: a disk is bound to one session.
        let _ = self.ram.set(place);
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Takes a segment.
    ///
    /// # Errors
    /// If the limit is reached, or there is no room.
    pub(crate) fn take(&self) -> Result<Arc<Segment>, NoSegment> {
        let mut inner = self.inner();
        if self.bytes_with_one_more(&inner) > self.limit {
            return Err(NoSegment::Full);
        }
        let segment = match inner.free.iter().rposition(|segment| segment.is_ram) {
            Some(ram) => inner.free.remove(ram),
            None => match self.make_in_ram(&mut inner) {
                Some(made) => made,
                None => match inner.free.pop() {
                    Some(other) => other,
                    None => self.make_in_directory(&mut inner).map_err(NoSegment::NoRoom)?,
                },
            },
        };
        inner.in_use += 1;
        inner.in_use_most = inner.in_use_most.max(inner.in_use);
        Ok(segment)
    }

    fn number(inner: &mut Inner) -> u32 {
        let number = inner.next;
        inner.next += 1;
        number
    }

    fn make_in_ram(&self, inner: &mut Inner) -> Option<Arc<Segment>> {
        let place = self.ram.get()?;
        let share = place.share.take(self.segment_bytes)?;
        let number = Self::number(inner);
        let name = format!("{}{number:06}", ram_prefix(&self.disk));
        // Without memory or huge pages the segment goes beside the base.
        place.files.check_room(self.segment_bytes).ok()?;
        let file = place.files.create(&name, self.segment_bytes).ok()?;
        let made = map(&file, number, true);
        match made {
            Ok(segment) => {
                let segment = Arc::new(segment);
                inner.owned.push(Owned {
                    segment: segment.clone(),
                    share: Some(share),
                });
                Some(segment)
            }
            Err(_) => {
                place.files.remove_one(&name);
                None
            }
        }
    }

    fn make_in_directory(&self, inner: &mut Inner) -> Result<Arc<Segment>, DiskError> {
        let number = Self::number(inner);
        let path = self
            .directory
            .join(format!("{}{number:06}", file_prefix(&self.disk)));
        let failed = |source| DiskError::File {
            path: path.clone(),
            source,
        };
        let file = files::create_new(&path, Readers::Owner).map_err(failed)?;
        let mut file = MemoryFile::unnamed(file.into(), self.segment_bytes, false);
        file.path.clone_from(&path);
        match map(&file, number, false) {
            Ok(segment) => {
                let segment = Arc::new(segment);
                inner.owned.push(Owned {
                    segment: segment.clone(),
                    share: None,
                });
                Ok(segment)
            }
            Err(error) => {
                // It is incomplete; the error is reported.
                drop(std::fs::remove_file(&path));
                Err(error)
            }
        }
    }

    /// Takes segments back, which are free of their epoch. A reader may still look at them. Does no I/O.
    pub(crate) fn put(&self, segments: Vec<Arc<Segment>>) {
        let mut inner = self.inner();
        inner.in_use = inner.in_use.saturating_sub(segments.len());
        for segment in segments.into_iter().rev() {
            // One reference is the pool's, one this.
            match Arc::strong_count(&segment) {
                ..=2 => inner.free.push(segment),
                _ => inner.pinned.push(segment),
            }
        }
    }

    /// Whether the limit allows another segment.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes_with_one_more(&self.inner()) <= self.limit
    }

    fn bytes_with_one_more(&self, inner: &Inner) -> u64 {
        (inner.in_use as u64 + 1).saturating_mul(self.segment_bytes)
    }

    #[cfg(test)]
    pub(crate) fn has_room_for(&self, segments: u64) -> bool {
        (self.inner().in_use as u64 + segments) * self.segment_bytes <= self.limit
    }

    pub(crate) fn has_free(&self) -> bool {
        !self.inner().free.is_empty()
    }

    /// Gives free segments back to the host that many epochs did not need. Called after each.
    pub(crate) fn trim(&self) {
        let mut inner = self.inner();
        self.forget_pinned(&mut inner);
        let keep = inner.in_use_most.saturating_sub(inner.in_use).max(FREE_MIN);
        inner.epochs += 1;
        if inner.epochs < EPOCHS {
            return;
        }
        inner.epochs = 0;
        inner.in_use_most = inner.in_use;
        // Those that were used last stay.
        while inner.free.len() > keep {
            let segment = inner.free.remove(0);
            self.forget(&mut inner, &segment);
        }
    }

    /// Gives all free segments back.
    pub(crate) fn trim_all(&self) {
        let mut inner = self.inner();
        self.forget_pinned(&mut inner);
        while let Some(segment) = inner.free.pop() {
            self.forget(&mut inner, &segment);
        }
    }

    fn forget_pinned(&self, inner: &mut Inner) {
        while let Some(segment) = inner.pinned.pop() {
            self.forget(inner, &segment);
        }
    }

    fn forget(&self, inner: &mut Inner, segment: &Arc<Segment>) {
        inner.owned.retain(|owned| !Arc::ptr_eq(&owned.segment, segment));
        self.remove_file(segment);
    }

    fn remove_file(&self, segment: &Segment) {
        match (segment.is_ram, self.ram.get()) {
            (true, Some(place)) => {
                place
                    .files
                    .remove_one(&format!("{}{:06}", ram_prefix(&self.disk), segment.number))
            }
            // It fails if the file is gone, which is what is wanted.
            _ => drop(std::fs::remove_file(&segment.path)),
        }
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.inner().owned.len() as u64 * self.segment_bytes
    }

    /// Whether segments stay in their files when this is dropped: logs that are not applied are in them.
    pub(crate) fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::Relaxed);
    }
}

impl Drop for SegmentPool {
    fn drop(&mut self) {
        // A receiver that panics must not remove a log.
        if self.kept.load(Ordering::Relaxed) || std::thread::panicking() {
            return;
        }
        let owned = std::mem::take(&mut self.inner().owned);
        for owned in owned {
            self.remove_file(&owned.segment);
            drop(owned.share);
        }
    }
}

fn map(file: &MemoryFile, number: u32, is_ram: bool) -> Result<Segment, DiskError> {
    let failed = |errno: nix::errno::Errno| DiskError::File {
        path: file.path.clone(),
        source: errno.into(),
    };
    let memory = file.map_owned().map_err(failed)?;
    populate(&[&memory]).map_err(failed)?;
    Ok(Segment::new(memory, file.path.clone(), number, is_ram))
}
