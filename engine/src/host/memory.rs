//! Memory, huge pages, and how much memory this process may pin.

use super::{OsError, proc};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use schemars::JsonSchema;
use serde::Serialize;

/// Number of CAP_IPC_LOCK in the capability sets (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

/// The pool of one size of huge pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct HugePagePool {
    /// Size of one page.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub pages: u64,
    /// Pages of the pool that are neither in use nor reserved.
    pub pages_free: u64,
    /// Pages that the kernel may add on demand.
    pub pages_overcommit: u64,
}

/// See the module's documentation.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MemoryReport {
    /// Memory of the machine.
    pub total_bytes: u64,
    /// Swap space.
    pub swap_bytes: u64,
    /// Memory that can be used without swapping.
    pub available_bytes: u64,
    /// Every size of huge pages that the kernel has.
    pub huge_page_pools: Vec<HugePagePool>,
    /// Transparent huge pages for private memory: `always`, `madvise` or `never`.
    pub thp: Option<String>,
    /// Transparent huge pages for shared memory (memfd, tmpfs).
    pub thp_shmem: Option<String>,
    /// RLIMIT_MEMLOCK; none means unlimited.
    pub memlock_limit_bytes: Option<u64>,
    /// Whether this process has CAP_IPC_LOCK. The kernel counts it only in the initial user namespace, so a
    /// container may have it without effect: [`crate::ring::RegistrationReport::beyond_limit`] was tried.
    pub cap_ipc_lock: bool,
    /// Whether a memfd can be made: it holds guest memory.
    #[schemars(with = "Result<(), String>")]
    pub memfd: Result<(), OsError>,
}

impl MemoryReport {
    /// Reads it. A value that cannot be read is 0 or none.
    pub fn read() -> Self {
        let meminfo = proc::text("/proc/meminfo").unwrap_or_default();
        Self {
            total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
            swap_bytes: meminfo_bytes(&meminfo, "SwapTotal"),
            available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
            huge_page_pools: huge_page_pools(),
            thp: chosen_setting("/sys/kernel/mm/transparent_hugepage/enabled"),
            thp_shmem: chosen_setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            memlock_limit_bytes: memlock_limit(),
            cap_ipc_lock: has_capability(&proc::text("/proc/self/status").unwrap_or_default(), CAP_IPC_LOCK),
            memfd: memfd_create(c"colo-ring-probe", MFdFlags::MFD_CLOEXEC)
                .map(drop)
                .map_err(|errno| OsError(errno as i32)),
        }
    }

    /// The pool of one size, if the kernel has that size.
    pub fn pool(&self, page_bytes: u64) -> Option<&HugePagePool> {
        self.huge_page_pools
            .iter()
            .find(|pool| pool.page_bytes == page_bytes)
    }
}

/// Whether memory may be swapped out here.
pub(crate) fn has_swap() -> bool {
    meminfo("SwapTotal") > 0
}

/// Size of this host's default huge pages, if its kernel has any.
pub(crate) fn default_huge_page_bytes() -> Option<u64> {
    Some(meminfo("Hugepagesize")).filter(|bytes| *bytes > 0)
}

/// The chosen value of a file like `always [madvise] never`.
pub(crate) fn chosen_setting(path: &str) -> Option<String> {
    Some(proc::chosen(&proc::text(path)?)?.to_owned())
}

/// Memory of the machine, 0 if unknown.
pub(super) fn total_bytes() -> u64 {
    meminfo("MemTotal")
}

/// A value of /proc/meminfo in bytes, 0 if it is not there.
pub(super) fn meminfo(key: &str) -> u64 {
    meminfo_bytes(&proc::text("/proc/meminfo").unwrap_or_default(), key)
}

fn meminfo_bytes(meminfo: &str, key: &str) -> u64 {
    let kilobytes = proc::field(meminfo, key).and_then(|value| value.strip_suffix(" kB")?.parse().ok());
    kilobytes.and_then(|kb: u64| kb.checked_mul(1024)).unwrap_or(0)
}

/// The pool of every size of huge pages that the kernel has.
pub(crate) fn huge_page_pools() -> Vec<HugePagePool> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return Vec::new();
    };
    let pool = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let kilobytes: u64 = name
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?
            .parse()
            .ok()?;
        let value = |file: &str| proc::number(entry.path().join(file)).unwrap_or(0);
        Some(HugePagePool {
            page_bytes: kilobytes.checked_mul(1024)?,
            pages: value("nr_hugepages"),
            pages_free: value("free_hugepages").saturating_sub(value("resv_hugepages")),
            pages_overcommit: value("nr_overcommit_hugepages"),
        })
    };
    let mut pools: Vec<_> = entries.flatten().filter_map(pool).collect();
    pools.sort_by_key(|pool| pool.page_bytes);
    pools
}

fn memlock_limit() -> Option<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((0, 0));
    (soft != RLIM_INFINITY).then_some(soft)
}

fn has_capability(status: &str, capability: u32) -> bool {
    let effective = proc::field(status, "CapEff").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    effective.is_some_and(|set| set >> capability & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let status = |effective: &str| format!("CapPrm:\t000001ffffffffff\nCapEff:\t{effective}\n");
        assert!(has_capability(&status("0000000000004000"), CAP_IPC_LOCK));
        assert!(!has_capability(&status("000001ffffffbfff"), CAP_IPC_LOCK));
        assert!(!has_capability("", CAP_IPC_LOCK));
    }

    #[test]
    fn meminfo_is_in_kibibytes() {
        assert_eq!(meminfo_bytes("MemTotal:       4 kB", "MemTotal"), 4096);
        assert_eq!(meminfo_bytes("MemTotal:       4", "MemTotal"), 0);
    }
}
