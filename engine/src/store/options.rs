//! The options of a store: its cache, when it flushes, and of what pages its memory is.

use crate::budget::Budget;
use crate::store::{DirtyBitmap, HugePages};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// Where received pages wait for their commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum CacheKind {
    /// Slots that are taken as pages arrive and used again: takes the memory of a checkpoint or two
    Pool,
    /// A slot for every page of the guest: takes as much memory again as the guest has
    Mirror,
}

/// When dirty slots are copied to the RAM image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum CommitMode {
    /// After the primary goes on: the checkpoint is committed by its record
    ///
    /// It is whole in image and slots together.
    Deferred,
    /// Before the primary goes on
    ///
    /// The image is complete when the commit returns.
    Sync,
}

/// How a store is made.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Which pages its memory is made of.
    pub hugepages: HugePages,
    /// Directory for the RAM image's files, on tmpfs or hugetlbfs; without one they are memfds.
    pub ram_dir: Option<PathBuf>,
    /// Its cache.
    pub cache: CacheKind,
    /// With [`CacheKind::Pool`]: bytes up to which it grows ahead of need; `None` for as much as the guest's RAM. A
    /// checkpoint that needs more gets it, slower, and that is counted.
    pub pool_max: Option<u64>,
    /// When dirty slots are copied.
    pub commit: CommitMode,
    /// Threads that receive pages: each marks in its own shard of the dirty bitmap. At least 1.
    pub shards: usize,
    /// The NUMA node that each shard's memory should lie on; empty where the kernel decides. The image lies on all of them.
    pub nodes: Vec<usize>,
    /// Of which all memory is taken before it is allocated; without a limit by default.
    pub budget: Arc<Budget>,
    /// Where the guest runs on the RAM image between checkpoints: marks the pages that it changes, which each commit then
    /// restores. Only with [`CacheKind::Mirror`] and [`CommitMode::Sync`]. The guest must stand still during a
    /// commit, and all its marks must have been made before.
    pub running_guest: Option<Arc<DirtyBitmap>>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            hugepages: HugePages::Huge2M,
            ram_dir: None,
            cache: CacheKind::Pool,
            pool_max: None,
            commit: CommitMode::Deferred,
            shards: 1,
            nodes: Vec::new(),
            budget: Budget::unlimited(),
            running_guest: None,
        }
    }
}
