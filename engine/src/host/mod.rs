//! What this machine offers to a receiver, found out by trying and by reading what the kernel reports, never by the kernel's
//! version. io_uring has a report of its own: [`crate::ring::RingReport`].
//!
//! A [`HostReport`] is a snapshot: nothing is changed on the machine, and what was tried is undone before the probe
//! returns. `doctor` prints it, and the receiver's warnings use the same words.

mod cores;
mod machine;
mod memory;
mod memory_limit;
mod network;
mod numa;
mod os_error;
mod proc;
pub(crate) mod thread_times;

pub use cores::{CoreListError, allowed_cores, parse_core_list, pin};
pub use machine::Machine;
pub use memory::{HugePagePool, MemoryReport};
pub(crate) use memory::{chosen_setting, default_huge_page_bytes, has_swap, huge_page_pools};
pub(crate) use memory_limit::{MemoryBound, host_bytes, smallest_bound};
pub use network::NetworkReport;
pub(crate) use numa::NODES_MAX;
pub use numa::{CorePlace, NumaError, NumaNode, Placement, Topology, ranges};
pub use os_error::OsError;
pub(crate) use proc::{io_uring_disabled, max_mappings};

use schemars::JsonSchema;
use serde::Serialize;

/// Everything that [`HostReport::probe`] finds out.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct HostReport {
    /// What the machine is.
    pub machine: Machine,
    /// Memory, huge pages and the limits on pinned memory.
    pub memory: MemoryReport,
    /// TCP as this network namespace has it.
    pub network: NetworkReport,
    /// Cores that this process may run on; empty if that cannot be read.
    pub cores_allowed: Vec<usize>,
    /// NUMA nodes with their cores.
    pub numa_nodes: Vec<NumaNode>,
}

impl HostReport {
    /// Reads everything.
    pub fn probe() -> Self {
        Self {
            machine: Machine::read(),
            memory: MemoryReport::read(),
            network: NetworkReport::read(),
            cores_allowed: allowed_cores().unwrap_or_default(),
            numa_nodes: Topology::read().nodes().to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_probed() {
        let report = HostReport::probe();
        assert!(report.memory.total_bytes > 0);
        assert!(!report.cores_allowed.is_empty());
        assert_eq!(report.machine.cores_allowed, report.cores_allowed.len());
        // The report can be printed as JSON, whatever the machine has.
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["memory"]["memfd"].is_object());
    }
}
