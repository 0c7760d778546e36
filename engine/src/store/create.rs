//! Making a store: the image, the files of its checkpoints, and the cache, with all memory populated.

use super::{CacheKind, CommitMode, Fallback, Store, StoreError, StoreOptions};
use crate::blocks::BlockTable;
use crate::budget::Account;
use crate::canary::{self, Canary};
use crate::store::cache::Cache;
use crate::store::cache::extents::Extents;
use crate::store::cache::mirror::{self, Mirror};
use crate::store::cache::pool::{Pool, all_in_image};
use crate::store::cache::pool_layout::PoolLayout;
use crate::store::charge::{CacheShape, Charge};
use crate::store::commit::bitmap::{DirtyBitmap, PageSet};
use crate::store::commit::flusher::{Flush, FlushSizes};
use crate::store::committed::{CheckpointFiles, CommittedImage};
use crate::store::durable::layout::{GuestShape, Record};
use crate::store::durable::record::{self, DurableRecord};
use crate::store::flight::{FLIGHT_CHECKPOINTS, FlightRing, ring_bytes};
use crate::store::memory::file_names::file_names;
use crate::store::memory::image::{NamedFiles, RamImage};
use crate::store::memory::index;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::mlock;
use crate::store::memory::numa::NumaNodes;
use crate::store::memory::populate::populate;
use crate::store::memory::ram_dir::{RamDirectory, RamFiles};
use crate::store::memory::slab::{Slab, SlabMemory};
use crate::store::memory::words::Words;
use crate::units::PAGE_SIZE;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that each file for a device state in a RAM directory has at first, which are taken with the guest's other files.
pub(crate) const DEVICE_FILE_BYTES: u64 = 2 << 20;

/// How finely memory is divided. Product code uses [`Granularity::default`]; tests, whose guests are small, use less.
#[derive(Clone, Copy)]
pub(crate) struct Granularity {
    pub(crate) mirror_slab_pages: u64,
    /// Extents in a slab of a pool; none for what suits the guest's size.
    pub(crate) pool_slab_extents: Option<u32>,
    /// Bytes allocated in a RAM directory for a device state before there is one.
    pub(crate) area_bytes: u64,
    /// That the flight recorder holds.
    pub(crate) flight_checkpoints: u64,
    pub(crate) flush: FlushSizes,
}

impl Default for Granularity {
    fn default() -> Self {
        Self {
            mirror_slab_pages: mirror::SLAB_PAGES,
            pool_slab_extents: None,
            area_bytes: DEVICE_FILE_BYTES,
            flight_checkpoints: FLIGHT_CHECKPOINTS,
            flush: FlushSizes::default(),
        }
    }
}

impl Granularity {
    fn cache_shape(&self, pages: u64, options: &StoreOptions) -> CacheShape {
        match (options.cache, self.pool_slab_extents) {
            (CacheKind::Mirror, _) => CacheShape::Mirror {
                slab_pages: self.mirror_slab_pages,
            },
            (CacheKind::Pool, None) => CacheShape::Pool(PoolLayout::of_guest(pages, options.pool_max)),
            (CacheKind::Pool, Some(extents)) => {
                CacheShape::Pool(PoolLayout::with_slabs(pages, options.pool_max, extents))
            }
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
        let directory = Directory::open(label, options, &mut notes)?;
        let named = directory.named();
        let shape = granularity.cache_shape(pages, options);
        let areas = named.files.filter(|_| directory.is_durable);
        let areas = areas.map(|files| (files, granularity.area_bytes));
        // Before the first byte is mapped.
        let flight_bytes = ring_bytes(granularity.flight_checkpoints);
        let charge = Charge::of(&table, named, areas, shape, options.shards, flight_bytes);
        let leases = charge.take(&options.budget)?;
        let record = directory.begin(&table, shape, granularity)?;
        let image = RamImage::map(table, options.hugepages, named, leases.checkpoint, &mut notes)?;
        let nodes = place_image(&image, options, &mut notes);
        let memory = SlabMemory::new(options.hugepages, nodes.clone(), Account::of(leases.cache));
        let mut making = Making {
            options,
            granularity,
            image: Arc::new(image),
            files: directory.files.clone(),
            notes,
        };
        let (cache, record) = match shape {
            CacheShape::Mirror { slab_pages } => (making.mirror(slab_pages, memory)?, None),
            CacheShape::Pool(layout) => {
                let files = directory.files.clone().zip(record);
                making.pool(layout, nodes, memory, files.filter(|_| directory.is_durable))?
            }
        };
        let flight = flight_ring(
            directory.files.as_deref().filter(|_| record.is_some()),
            flight_bytes,
        )?;
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
        let flush = Flush::new(image, cache.clone(), Box::new(complete), sizes)?;
        let store = Self {
            committed: Arc::new(CommittedImage::of_session(
                making.image,
                files,
                flush.clone(),
                flight,
            )),
            flush,
            cache,
            colo: AtomicBool::new(false),
            dirty: DirtyBitmap::new(pages, options.shards)?,
            running_guest: options.running_guest.clone(),
            received: PageSet::new(pages)?,
            mode: options.commit,
            reserved_bytes: charge.total(),
            _lease: leases.tables,
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

impl Directory {
    /// Opens the RAM directory. A note says why checkpoints would not outlive the process in it.
    fn open(label: &str, options: &StoreOptions, notes: &mut Vec<Fallback>) -> Result<Self, StoreError> {
        let Some(path) = options.ram_dir.as_deref() else {
            return Ok(Self {
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
        Ok(Self {
            files: Some(Arc::new(files)),
            is_durable: obstacle.is_none(),
        })
    }

    /// What blocks of the guest have names in it.
    fn named(&self) -> NamedFiles<'_> {
        NamedFiles {
            files: self.files.as_deref(),
            are_all_named: self.is_durable,
        }
    }

    /// Begins the files of a guest, if there is room for them: its record comes first, also where no checkpoint will
    /// outlive the process, so that a later receiver can remove what a killed one has left.
    fn begin(
        &self,
        table: &BlockTable,
        cache: CacheShape,
        granularity: Granularity,
    ) -> Result<Option<Record>, StoreError> {
        let Some(files) = &self.files else {
            return Ok(None);
        };
        let pages = table.total_pages();
        let mut bytes = RamImage::named_bytes(table, self.named());
        let mut slab_extents = 0;
        if let CacheShape::Pool(layout) = cache
            && self.is_durable
        {
            slab_extents = u64::from(layout.slab_extents);
            let slabs = (layout.first as u64).saturating_mul(layout.slab_bytes());
            let places = files.bytes_of(pages.saturating_mul(8));
            let flight = files.bytes_of(ring_bytes(granularity.flight_checkpoints));
            let areas = record::files_charge(files, granularity.area_bytes);
            let others = [slabs, places, areas, flight];
            bytes = others.into_iter().fold(bytes, u64::saturating_add);
        }
        files.check_room(bytes)?;
        let shape = GuestShape { pages, slab_extents };
        let make = || Record::create(files, shape, &file_names(table.names(), &[]));
        // Where the smallest file takes a gigabyte, that would be too much for it.
        files.is_fine_grained().then(make).transpose()
    }
}

/// The flight recorder, in a file of those that outlive the process or in memory.
fn flight_ring(files: Option<&RamFiles>, bytes: u64) -> Result<FlightRing, StoreError> {
    let words = index(bytes / 8);
    let words = match files {
        Some(files) => record::create_flight(files, bytes, words)?,
        None => {
            let words = Words::zeroed(words)?;
            // So that no page fault falls between two checkpoints.
            let first_of_page = words.iter().step_by(PAGE_SIZE / 8);
            first_of_page.for_each(|word| word.store(0, Ordering::Relaxed));
            words
        }
    };
    Ok(FlightRing::create(words))
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
    files: Option<Arc<RamFiles>>,
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
        populate(&mappings).map_err(|errno| {
            let bytes = image.table().total_bytes();
            let lack = self.files.as_ref().and_then(|files| files.lack(bytes, errno));
            lack.unwrap_or_else(|| StoreError::NoMemory {
                bytes,
                source: errno.into(),
            })
        })?;
        self.notes.extend(mlock::lock(mappings.into_iter()));
        Ok(())
    }

    fn mirror(&mut self, slab_pages: u64, memory: SlabMemory) -> Result<Cache, StoreError> {
        let mirror = Mirror::map(self.pages(), slab_pages, memory, &mut self.notes)?;
        self.populate(mirror.slabs().iter())?;
        Ok(Cache::Mirror(Arc::new(mirror)))
    }

    /// A pool, in files behind their record if its checkpoints are to outlive the process.
    fn pool(
        &mut self,
        layout: PoolLayout,
        nodes: NumaNodes,
        memory: SlabMemory,
        files: Option<(Arc<RamFiles>, Record)>,
    ) -> Result<(Cache, Option<Arc<DurableRecord>>), StoreError> {
        let pages = self.pages();
        let (memory, places, record) = match files {
            None => (memory, Words::zeroed(index(pages))?, None),
            Some((files, record)) => {
                let area_bytes = self.granularity.area_bytes;
                let (record, places) = DurableRecord::create(files.clone(), record, pages, area_bytes)?;
                all_in_image(&places);
                (memory.in_files(files), places, Some(Arc::new(record)))
            }
        };
        let extents = Extents::map(layout, memory, &mut self.notes)?;
        self.populate(extents.slabs())?;
        let pool = Pool::new(extents, nodes, places, self.options.shards);
        Ok((Cache::Pool(Arc::new(pool)), record))
    }
}
