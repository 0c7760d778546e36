//! What this machine offers to a receiver, found out by trying and by reading what the kernel says of itself;
//! never by its version.
//!
//! A [`HostReport`] is a snapshot: nothing is changed on the machine, and what was tried is undone before the
//! probe returns. `doctor` prints it, and the receiver's warnings use the same words.

mod cores;
mod machine;
mod memory;
mod network;
mod numa;
mod proc;
mod registration;
mod ring;

pub use cores::{CoreListError, allowed_cores, parse_core_list, pin};
pub use machine::Machine;
pub(crate) use memory::has_swap;
pub use memory::{HugePagePool, MemoryReport};
pub use network::NetworkReport;
pub(crate) use numa::NODES_MAX;
pub use numa::{CorePlace, NumaError, NumaNode, Placement, Topology};
pub use ring::{
    OPCODES, OpcodeSupport, RegistrationReport, RingReport, RingUnavailable, SETUP_LEVELS, SetupLevel,
};

use serde::Serialize;

/// Everything that [`HostReport::probe`] finds out.
#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    /// What the machine is.
    pub machine: Machine,
    /// io_uring as this process may use it.
    pub ring: Result<RingReport, RingUnavailable>,
    /// Memory, huge pages and the limits on pinned memory.
    pub memory: MemoryReport,
    /// TCP as this network namespace has it.
    pub network: NetworkReport,
    /// Cores that this process may run on; empty if the kernel would not say.
    pub cores_allowed: Vec<usize>,
    /// NUMA nodes with their cores.
    pub numa_nodes: Vec<NumaNode>,
}

impl HostReport {
    /// Looks at everything. Takes some milliseconds, and pins at most
    /// [`RegistrationReport::TRIAL_BYTES_MAX`] of memory meanwhile.
    pub fn probe() -> Self {
        let memory = MemoryReport::read();
        Self {
            machine: Machine::read(),
            ring: RingReport::probe(memory.memlock_limit_bytes),
            memory,
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
        // Whatever the machine has, the report can be printed for machines.
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["ring"]["Ok"].is_object() || json["ring"]["Err"]["reason"].is_string());
    }
}
