//! What a guest takes of the budget when it arrives: all that it cannot do without.
//!
//! More is taken of it for what grows later, by what grows: slabs of the pool beyond its reserve (`memory/slab.rs`), the pages that a
//! dump copies under the lock.

use crate::blocks::BlockTable;
use crate::budget::{Budget, BudgetError, Lease};
use crate::store::cache::extent_refs::ExtentRefs;
use crate::store::cache::mirror::Mirror;
use crate::store::cache::plan::FlushPlan;
use crate::store::cache::pool_layout::PoolLayout;
use crate::store::commit::bitmap::{DirtyBitmap, PageSet};
use crate::store::durable::layout::Record;
use crate::store::durable::record;
use crate::store::memory::file_names::file_names;
use crate::store::memory::image::{NamedFiles, RamImage};
use crate::store::memory::ram_dir::RamFiles;
use crate::store::memory::slab::{self, Slab};
use std::sync::{Arc, OnceLock};

/// In bytes.
pub(crate) struct Charge {
    /// What a kept checkpoint has.
    pub(crate) checkpoint: u64,
    /// What is counted page by page while a session runs.
    pub(crate) tables: u64,
    /// Slabs of the cache; what a pool needs beyond that it takes later.
    pub(crate) cache: u64,
}

/// The parts that were taken.
pub(crate) struct Leases {
    pub(crate) checkpoint: Lease,
    pub(crate) tables: Lease,
    pub(crate) cache: Lease,
}

/// The cache of a guest, as far as its memory depends on it.
#[derive(Clone, Copy)]
pub(crate) enum CacheShape {
    Mirror { slab_pages: u64 },
    Pool(PoolLayout),
}

impl Charge {
    /// `durable` are the files of a guest whose checkpoints outlive the process, with so many bytes for a device state at first;
    /// `flight` are those of the flight recorder.
    pub(crate) fn of(
        table: &BlockTable,
        named: NamedFiles<'_>,
        durable: Option<(&RamFiles, u64)>,
        cache: CacheShape,
        shards: usize,
        flight: u64,
    ) -> Self {
        let pages = table.total_pages();
        let of_pages =
            DirtyBitmap::bytes(pages, shards) + PageSet::bytes(pages) + FlushPlan::bytes_max(pages);
        let (of_cache, slabs) = match cache {
            CacheShape::Mirror { slab_pages } => (0, Mirror::charge(pages, slab_pages)),
            CacheShape::Pool(layout) => {
                let places = pages.saturating_mul(8);
                let slabs = (layout.reserved as u64).saturating_mul(slab::charge(layout.slab_bytes()));
                (places.saturating_add(pool_tables(layout)), slabs)
            }
        };
        // A guest in a directory has a record there also where no checkpoint outlives the process.
        let with_record = named.files.filter(|files| files.is_fine_grained());
        let record = with_record.map_or(0, |files| Record::charge(files, &file_names(table.names(), &[])));
        let files = durable.map_or(0, |(files, area_bytes)| record::files_charge(files, area_bytes));
        let flight = durable.map_or(flight, |(files, _)| files.bytes_of(flight));
        let files = files.saturating_add(record).saturating_add(flight);
        Self {
            checkpoint: of_checkpoint(table, named).saturating_add(files),
            tables: of_pages.saturating_add(of_cache),
            cache: slabs,
        }
    }

    pub(crate) fn total(&self) -> u64 {
        let apart = self.tables.saturating_add(self.cache);
        self.checkpoint.saturating_add(apart)
    }

    /// # Errors
    /// If the budget does not allow all of it.
    pub(crate) fn take(&self, budget: &Arc<Budget>) -> Result<Leases, BudgetError> {
        let mut rest = budget.take(self.total())?;
        Ok(Leases {
            checkpoint: rest.split(self.checkpoint),
            tables: rest.split(self.tables),
            cache: rest,
        })
    }
}

/// The image, and what a dump of it needs.
pub(crate) fn of_checkpoint(table: &BlockTable, named: NamedFiles<'_>) -> u64 {
    let pages = table.total_pages();
    let dump = DirtyBitmap::bytes(pages, 1) + FlushPlan::bytes_max(pages);
    RamImage::charge(table, named).saturating_add(dump)
}

fn pool_tables(layout: PoolLayout) -> u64 {
    let slabs = layout.limit as u64;
    let extents = slabs.saturating_mul(layout.slab_extents.into());
    let of_slabs = slabs.saturating_mul(size_of::<OnceLock<Slab>>() as u64);
    extents
        .saturating_mul(ExtentRefs::BYTES_PER_EXTENT)
        .saturating_add(of_slabs)
}
