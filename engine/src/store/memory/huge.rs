//! Huge pages: what the operator may ask for, what the host has, and the notes on every step down from the one to
//! the other, and from other wishes.
#![forbid(unsafe_code)]

use thiserror::Error;

/// Bytes of a 2 MiB page.
pub(crate) const HUGE_2M: u64 = 2 << 20;

/// Bytes of a 1 GiB page.
pub(crate) const HUGE_1G: u64 = 1 << 30;

/// Which pages guest memory is to be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB pages of the host's pool.
    Huge2M,
    /// 1 GiB pages for the RAM image, 2 MiB pages for the cache.
    Huge1G,
    /// Transparent huge pages, as the kernel finds them.
    Thp,
    /// Ordinary pages.
    Off,
}

/// A step down from what was asked for: the store works without it, but slower. Each names what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Fallback {
    /// The pool has too few pages for a RAM block.
    #[error(
        "ram block {block} gets {got} because {needed} huge pages of {page_kib} KiB were not to be had ({reason}); \
         for huge pages: {remedy}"
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
        /// What the kernel said.
        reason: String,
        /// The command that mends it.
        remedy: String,
    },
    /// The pool has too few pages for the cache.
    #[error(
        "{slabs} of the {slabs_all} cache slabs get {got} because {needed} huge pages of 2048 KiB were not to be had \
         ({reason}); for huge pages: {remedy}"
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
        /// What the kernel said.
        reason: String,
        /// The command that mends it.
        remedy: String,
    },
    /// There is a RAM directory, and a checkpoint in it would be lost with the receiver.
    #[error(
        "its checkpoints do not outlive this receiver, though {directory} would let them, because {reason}; for that use \
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
        /// The memory meant.
        what: &'static str,
        /// The switch.
        file: &'static str,
        /// How it stands.
        setting: String,
        /// How it should stand.
        wanted: &'static str,
    },
    /// The kernel does not let memory be put on NUMA nodes.
    #[error("{what} lies where the kernel puts it, not on NUMA nodes {nodes:?} ({reason}); remedy: {remedy}")]
    Placement {
        /// The memory meant.
        what: &'static str,
        /// Where it should lie.
        nodes: Vec<usize>,
        /// What the kernel said.
        reason: String,
        /// What mends it.
        remedy: &'static str,
    },
    /// Memory that may be swapped out.
    #[error(
        "{mib} MiB of guest memory are not locked ({reason}), so that this host may swap them out, and read them back \
         within a pause; remedy: ulimit -l unlimited (service: LimitMEMLOCK=infinity), or swapoff -a"
    )]
    Unlocked {
        /// How much.
        mib: usize,
        /// What the kernel said.
        reason: String,
    },
}

/// The switch of transparent huge pages for private memory.
const THP_PRIVATE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// The same for shared memory.
const THP_SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// A value of a file like `always [madvise] never`.
fn chosen(text: &str) -> &str {
    let after = text.split_once('[').map_or("", |(_, after)| after);
    after.split_once(']').map_or("", |(chosen, _)| chosen)
}

/// Whether asking for transparent huge pages does anything: `Some` note where it does not.
fn transparent(file: &'static str, what: &'static str, wanted: &'static str) -> Option<Fallback> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let setting = match chosen(&text) {
        "" => "nothing: the kernel has none".to_owned(),
        setting => setting.to_owned(),
    };
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
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{page_kib}kB");
    let read = |file: &str| -> u64 {
        let text = std::fs::read_to_string(format!("{directory}/{file}")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    if !std::fs::exists(&directory).unwrap_or(false) {
        return format!("a kernel and processor with {page_kib} KiB pages");
    }
    let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
    let total = read("nr_hugepages").saturating_sub(free) + needed;
    match page_kib {
        2048 => format!("sysctl vm.nr_hugepages={total}"),
        _ => format!("echo {total} > {directory}/nr_hugepages"),
    }
}

/// Size in bytes of this host's default huge pages, from the text of `/proc/meminfo`.
fn default_size(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Whether `hugepage-rs`, which takes this host's default huge pages, gives pages of 2 MiB.
///
/// # Errors
/// The reason why not: no huge pages at all (where that package would panic), or other ones (each slab's end
/// would be rounded up to 1 GiB).
pub(crate) fn default_is_2m() -> Result<(), String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match default_size(&meminfo) {
        Some(HUGE_2M) => Ok(()),
        Some(other) => Err(format!(
            "this host's default huge pages are of {} KiB",
            other >> 10
        )),
        None => Err("this kernel has no huge pages".to_owned()),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn kernel_texts_are_read() {
        assert_eq!(chosen("always [madvise] never\n"), "madvise");
        assert_eq!(chosen("always within_size advise [never] deny force\n"), "never");
        assert_eq!(chosen(""), "");
        assert_eq!(
            default_size("HugePages_Surp: 0\nHugepagesize:       2048 kB\n"),
            Some(HUGE_2M)
        );
        assert_eq!(default_size("Hugepagesize:    1048576 kB\n"), Some(HUGE_1G));
        assert_eq!(default_size("MemTotal: 3 kB\n"), None);
    }

    #[test]
    fn the_remedy_asks_for_enough() {
        let remedy = pool_remedy(2048, 1_000_000);
        let total: u64 = remedy.rsplit_once('=').unwrap().1.parse().unwrap();
        assert!(total >= 1_000_000, "{remedy}");
        assert!(pool_remedy(12345, 1).contains("12345 KiB"));
    }
}
