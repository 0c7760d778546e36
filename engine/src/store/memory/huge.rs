//! Huge pages: what an operator may ask for, what the host has, and the notes on every option that a store could not follow.

use crate::host;
use crate::text::mebibytes;
use nix::errno::Errno;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of a 2 MiB page.
pub(crate) const HUGE_2M: u64 = 2 << 20;

/// Bytes of a 1 GiB page.
pub(crate) const HUGE_1G: u64 = 1 << 30;

/// The size of the pages that hold guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum HugePages {
    /// The pool of 2 MiB pages
    #[cfg_attr(feature = "cli", value(name = "2M"))]
    #[serde(rename = "2M")]
    Huge2M,
    /// The pool of 1 GiB pages
    ///
    /// For the RAM image; the cache takes 2 MiB pages.
    #[cfg_attr(feature = "cli", value(name = "1G"))]
    #[serde(rename = "1G")]
    Huge1G,
    /// Ordinary pages that the kernel may join
    #[serde(rename = "thp")]
    Thp,
    /// Ordinary pages
    #[serde(rename = "off")]
    Off,
}

/// An option that the store could not follow: it works without, but slower. Each names the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fallback {
    /// The pool has too few pages for a RAM block.
    #[error(
        "ram block {block} gets {got}: cannot allocate {needed} huge pages of {} ({reason}); for huge pages: \
         {remedy}", mebibytes(*page_kib << 10)
    )]
    Image {
        /// The block's name.
        block: String,
        /// Pages it needs.
        needed: u64,
        /// Their size.
        page_kib: u64,
        /// What it gets instead.
        got: &'static str,
        /// The error of the kernel.
        reason: String,
        /// The command that gives the pool more pages.
        remedy: String,
    },
    /// The pool has too few pages for the cache.
    #[error(
        "{slabs} of the {slabs_all} cache slabs get {got}: cannot allocate {needed} huge pages of 2 MiB ({reason}); for \
         huge pages: {remedy}"
    )]
    Cache {
        /// Slabs without huge pages.
        slabs: usize,
        /// All slabs.
        slabs_all: usize,
        /// Pages they need.
        needed: u64,
        /// What they get instead.
        got: &'static str,
        /// The error of the kernel.
        reason: String,
        /// The command that gives the pool more pages.
        remedy: String,
    },
    /// Checkpoints in this RAM directory do not outlive the receiver.
    #[error(
        "its checkpoints in {directory} do not outlive this receiver, because {reason}; for that use \
         --cache pool, and a tmpfs or a hugetlbfs of 2 MiB pages"
    )]
    NotDurable {
        /// The directory.
        directory: String,
        /// Why.
        reason: &'static str,
    },
    /// Transparent huge pages are switched off.
    #[error(
        "{what} gets ordinary pages because {file} says \"{setting}\"; for transparent huge pages: echo {wanted} > {file}"
    )]
    Transparent {
        /// Which memory.
        what: &'static str,
        /// The switch.
        file: &'static str,
        /// Its setting.
        setting: String,
        /// The setting for transparent huge pages.
        wanted: &'static str,
    },
    /// The kernel refuses to bind memory to NUMA nodes.
    #[error("{what} is not bound to NUMA nodes {nodes:?} ({reason}); remedy: {remedy}")]
    Placement {
        /// Which memory.
        what: &'static str,
        /// The nodes.
        nodes: Vec<usize>,
        /// The error of the kernel.
        reason: String,
        /// What allows it.
        remedy: &'static str,
    },
    /// Memory that is not locked and may be swapped out.
    #[error(
        "{mib} MiB of guest memory are not locked ({reason}), so that this host may swap them out, and read them back \
         within a pause; remedy: ulimit -l unlimited (service: LimitMEMLOCK=infinity), or swapoff -a"
    )]
    Unlocked {
        /// How much.
        mib: usize,
        /// The error of the kernel.
        reason: String,
    },
}

/// The switch of transparent huge pages for private memory.
const THP_PRIVATE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// The same for shared memory.
const THP_SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether asking for transparent huge pages does anything: `Some` note where it does not.
fn transparent(file: &'static str, what: &'static str, wanted: &'static str) -> Option<Fallback> {
    let setting = host::chosen_setting(file);
    let setting = setting.unwrap_or_else(|| "nothing: the kernel has none".to_owned());
    let off = !matches!(
        &setting[..],
        "always" | "madvise" | "advise" | "within_size" | "force"
    );
    off.then_some(Fallback::Transparent {
        what,
        file,
        setting,
        wanted,
    })
}

/// The note on transparent huge pages for the cache, where they are switched off.
pub(crate) fn transparent_private() -> Option<Fallback> {
    transparent(THP_PRIVATE, "the cache", "madvise")
}

/// The note on transparent huge pages for the RAM image, where they are switched off.
pub(crate) fn transparent_shared() -> Option<Fallback> {
    transparent(THP_SHARED, "the ram image", "advise")
}

/// What memory gets in place of huge pages of the pool.
pub(crate) fn instead(transparent: &Option<Fallback>) -> &'static str {
    match transparent {
        None => "transparent huge pages",
        Some(_) => "ordinary pages",
    }
}

/// The command that gives the pool `needed` more pages of `page_kib` KiB than are free now.
pub(crate) fn pool_remedy(page_kib: u64, needed: u64) -> String {
    let pools = host::huge_page_pools();
    let Some(pool) = pools.iter().find(|pool| pool.page_bytes >> 10 == page_kib) else {
        return format!("a kernel and processor with {} pages", mebibytes(page_kib << 10));
    };
    let total = pool.pages.saturating_sub(pool.pages_free) + needed;
    match page_kib {
        2048 => format!("sysctl vm.nr_hugepages={total}"),
        _ => format!("echo {total} > /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages"),
    }
}

/// Why the pool gave no memory for a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum PoolError {
    /// There is no pool, and `hugepage-rs` would panic.
    #[error("this kernel has no huge pages")]
    NoHugePages,
    /// `hugepage-rs` takes the host's default huge pages, and would round each slab's end up to 1 GiB.
    #[error("this host's default huge pages are of {}", mebibytes(*.0))]
    DefaultSize(u64),
    /// The kernel refused.
    #[error("{}", .0.desc())]
    Kernel(Errno),
}

/// Checks that `hugepage-rs`, which takes this host's default huge pages, gives pages of 2 MiB.
pub(crate) fn default_is_2m() -> Result<(), PoolError> {
    match host::default_huge_page_bytes() {
        Some(HUGE_2M) => Ok(()),
        Some(other) => Err(PoolError::DefaultSize(other)),
        None => Err(PoolError::NoHugePages),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_asks_for_enough() {
        let remedy = pool_remedy(2048, 1_000_000);
        let total: u64 = remedy.rsplit_once('=').unwrap().1.parse().unwrap();
        assert!(total >= 1_000_000, "{remedy}");
        assert!(pool_remedy(12345, 1).contains("12.1 MiB"));
    }
}
