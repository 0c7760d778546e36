//! Making a store: the image, the files of its checkpoints, and the cache, with all memory populated.

use super::{CacheKind, CommitMode, Fallback, Store, StoreError, StoreOptions};
use crate::blocks::BlockTable;
use crate::canary::{self, Canary};
use crate::store::cache::Cache;
use crate::store::cache::extents::Extents;
use crate::store::cache::mirror::{self, Mirror};
use crate::store::cache::pool::Pool;
use crate::store::cache::pool_layout::PoolLayout;
use crate::store::commit::bitmap::{DirtyBitmap, PageSet};
use crate::store::commit::flusher::{Flush, FlushSizes};
use crate::store::committed::{CheckpointFiles, CommittedImage};
use crate::store::durable::record::{self, DurableRecord, GuestShape};
use crate::store::memory::image::RamImage;
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::mlock;
use crate::store::memory::numa::NumaNodes;
use crate::store::memory::populate::populate;
use crate::store::memory::ram_dir::{RamDirectory, RamFiles};
use crate::store::memory::slab::{Slab, SlabMemory};
use crate::store::memory::words::Words;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How finely memory is divided. Product code uses [`Granularity::default`]; tests, whose guests are small, use less.
#[derive(Clone, Copy)]
pub(crate) struct Granularity {
    pub(crate) mirror_slab_pages: u64,
    /// Extents in a slab of a pool; none for what suits the guest's size.
    pub(crate) pool_slab_extents: Option<u32>,
    /// Bytes allocated in a RAM directory for a device state before there is one.
    pub(crate) area_bytes: u64,
    pub(crate) flush: FlushSizes,
}

impl Default for Granularity {
    fn default() -> Self {
        Self {
            mirror_slab_pages: mirror::SLAB_PAGES,
            pool_slab_extents: None,
            area_bytes: 2 << 20,
            flush: FlushSizes::default(),
        }
    }
}

impl Store {
    /// Maps and populates memory for the guest of `table`: the image, and the first slabs of the cache. The names of the image's
    /// files in a RAM directory begin with `label`, which the caller chooses, not the peer.
    ///
    /// Populating takes about a second per 4 GiB and core on a quiet host; call it where waiting does no harm.
    ///
    /// Returns notes on the options that it could not follow.
    ///
    /// # Errors
    /// If there is not enough memory, or the RAM directory cannot be used. See [`StoreError`].
    ///
    /// # Panics
    /// If `options` have no shard, or nodes but not for every shard.
    pub fn create(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        Self::with_granularity(table, label, options, Granularity::default())
    }

    /// Most memory mappings that a store for the guest of `table` ever has.
    pub fn mappings_max(table: &BlockTable, options: &StoreOptions) -> u64 {
        let pages = table.total_pages();
        let cache = match options.cache {
            CacheKind::Mirror => index(pages.div_ceil(mirror::SLAB_PAGES)),
            CacheKind::Pool => PoolLayout::of_guest(pages, options.pool_max).limit,
        };
        let image = RamImage::mappings_max(table, options.ram_dir.is_some());
        (image + cache) as u64 + record::MAPPINGS_MAX
    }

    /// As [`Store::create`], with another granularity.
    pub(crate) fn with_granularity(
        table: Arc<BlockTable>,
        label: &str,
        options: &StoreOptions,
        granularity: Granularity,
    ) -> Result<(Self, Vec<Fallback>), StoreError> {
        let restores = (options.cache, options.commit) == (CacheKind::Mirror, CommitMode::Sync);
        if options.running_guest.is_some() && !restores {
            return Err(StoreError::RunningGuest);
        }
        let pages = table.total_pages();
        let mut notes = Vec::new();
        let directory = open_directory(label, options, &mut notes)?;
        let image = RamImage::map(
            table,
            options.hugepages,
            directory.files.as_deref(),
            directory.is_durable,
            &mut notes,
        )?;
        let nodes = place_image(&image, options, &mut notes);
        let memory = SlabMemory::new(options.hugepages, nodes.clone());
        let mut making = Making {
            options,
            granularity,
            image: Arc::new(image),
            notes,
        };
        let (cache, record) = match options.cache {
            CacheKind::Mirror => (making.mirror(memory)?, None),
            CacheKind::Pool => {
                let files = directory.files.clone().filter(|_| directory.is_durable);
                making.pool(options.pool_max, nodes, memory, files)?
            }
        };
        let files = CheckpointFiles {
            image: directory.files,
            record,
        };
        let record = files.record.clone();
        let complete = move || {
            if let Some(record) = record.as_ref().filter(|_| !canary::is_set(Canary::EndlessFlush)) {
                record.flushed();
            }
        };
        let (image, sizes) = (making.image.clone(), granularity.flush);
        let flush = Flush::new(image, cache.clone(), Box::new(complete), sizes);
        let store = Self {
            committed: Arc::new(CommittedImage::of_session(making.image, files, flush.clone())),
            flush,
            cache,
            colo: AtomicBool::new(false),
            dirty: DirtyBitmap::new(pages, options.shards),
            running_guest: options.running_guest.clone(),
            received: PageSet::new(pages),
            mode: options.commit,
        };
        Ok((store, making.notes))
    }
}

/// The files of a guest in the operator's RAM directory, if there is one.
struct Directory {
    files: Option<Arc<RamFiles>>,
    /// Whether checkpoints in it outlive the process.
    is_durable: bool,
}

/// Opens the RAM directory. A note says why checkpoints would not outlive the process in it.
fn open_directory(
    label: &str,
    options: &StoreOptions,
    notes: &mut Vec<Fallback>,
) -> Result<Directory, StoreError> {
    let Some(path) = options.ram_dir.as_deref() else {
        return Ok(Directory {
            files: None,
            is_durable: false,
        });
    };
    let files = RamFiles::new(RamDirectory::open(path)?, label);
    let obstacle = match options.cache {
        CacheKind::Mirror => Some("its cache is a mirror"),
        CacheKind::Pool if !files.is_fine_grained() => Some("its huge pages are larger than 2 MiB"),
        CacheKind::Pool => None,
    };
    notes.extend(obstacle.map(|reason| Fallback::NotDurable {
        directory: path.display().to_string(),
        reason,
    }));
    Ok(Directory {
        files: Some(Arc::new(files)),
        is_durable: obstacle.is_none(),
    })
}

/// Binds the image to the nodes of all shards, and returns these. Where the kernel refuses, memory lies where the kernel puts
/// it, and a note says so.
fn place_image(image: &RamImage, options: &StoreOptions, notes: &mut Vec<Fallback>) -> NumaNodes {
    let all = options.nodes.is_empty() || options.nodes.len() == options.shards;
    assert!(all, "either every shard has a node, or none has");
    let nodes = NumaNodes::of(&options.nodes);
    let placed = image.mappings().iter().try_for_each(|block| nodes.spread(block));
    match placed {
        Ok(()) => nodes,
        Err(errno) => {
            notes.push(nodes.refused("guest memory", errno));
            NumaNodes::anywhere()
        }
    }
}

/// A store whose image is mapped and whose cache is being made.
struct Making<'a> {
    options: &'a StoreOptions,
    granularity: Granularity,
    image: Arc<RamImage>,
    notes: Vec<Fallback>,
}

impl Making<'_> {
    fn pages(&self) -> u64 {
        self.image.table().total_pages()
    }

    /// Populates the image and the cache, and locks them in memory where the limits allow that.
    fn populate<'a>(&mut self, cache: impl Iterator<Item = &'a Slab>) -> Result<(), StoreError> {
        let image = self.image.clone();
        let cache = cache.map(|slab| slab.memory());
        let mappings: Vec<&Mapping> = image.mappings().iter().chain(cache).collect();
        populate(&mappings).map_err(|errno| StoreError::NoMemory {
            bytes: image.table().total_bytes(),
            source: errno.into(),
        })?;
        self.notes.extend(mlock::lock(mappings.into_iter()));
        Ok(())
    }

    fn mirror(&mut self, memory: SlabMemory) -> Result<Cache, StoreError> {
        let slab_pages = self.granularity.mirror_slab_pages;
        let mirror = Mirror::map(self.pages(), slab_pages, memory, &mut self.notes)?;
        self.populate(mirror.slabs().iter())?;
        Ok(Cache::Mirror(Arc::new(mirror)))
    }

    /// A pool of at most `max` bytes where that suffices, in `files` if its checkpoints are to outlive the process.
    fn pool(
        &mut self,
        max: Option<u64>,
        nodes: NumaNodes,
        memory: SlabMemory,
        files: Option<Arc<RamFiles>>,
    ) -> Result<(Cache, Option<Arc<DurableRecord>>), StoreError> {
        let pages = self.pages();
        let layout = match self.granularity.pool_slab_extents {
            None => PoolLayout::of_guest(pages, max),
            Some(extents) => PoolLayout::with_slabs(pages, max, extents),
        };
        let (memory, places, record) = match files {
            None => (memory, Words::zeroed(index(pages)), None),
            Some(files) => {
                let shape = GuestShape {
                    pages,
                    slab_extents: u64::from(layout.slab_extents),
                };
                let (record, places) =
                    DurableRecord::create(files.clone(), shape, self.granularity.area_bytes)?;
                (memory.in_files(files), places, Some(Arc::new(record)))
            }
        };
        let extents = Extents::map(layout, memory, &mut self.notes)?;
        self.populate(extents.slabs())?;
        let pool = Pool::new(extents, nodes, places, self.options.shards);
        Ok((Cache::Pool(Arc::new(pool)), record))
    }
}
