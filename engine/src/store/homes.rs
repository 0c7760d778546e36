//! Homes: the NUMA nodes that a store's memory lies on, one for the shards of each node.
//!
//! A store that is told of no nodes has one home, which is anywhere: nothing is asked of the kernel then.
#![forbid(unsafe_code)]

use super::huge::Fallback;
use super::map::{Mapping, Policy};
use nix::errno::Errno;

/// Position of a home among the store's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HomeId(pub(super) usize);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Homes {
    /// The node of each home, in the order of their numbers; none for the one that is anywhere.
    nodes: Vec<usize>,
    /// The home of each shard; none where all have the same.
    of_shard: Vec<HomeId>,
}

impl Homes {
    /// One home, anywhere.
    pub(super) fn anywhere() -> Self {
        Self {
            nodes: Vec::new(),
            of_shard: Vec::new(),
        }
    }

    /// For shards whose nodes are these.
    pub(super) fn of(shard_nodes: &[usize]) -> Self {
        let mut nodes = shard_nodes.to_vec();
        nodes.sort_unstable();
        nodes.dedup();
        let home = |node: &usize| HomeId(nodes.binary_search(node).expect("sorted from the same ones"));
        let of_shard = match nodes.len() {
            0 | 1 => Vec::new(),
            _ => shard_nodes.iter().map(home).collect(),
        };
        Self { nodes, of_shard }
    }

    /// How many: at least one.
    pub(super) fn count(&self) -> usize {
        self.nodes.len().max(1)
    }

    /// The home of a shard.
    pub(super) fn of_shard(&self, shard: usize) -> HomeId {
        self.of_shard.get(shard).copied().unwrap_or_default()
    }

    /// Puts memory, not yet populated, on a home's node.
    pub(super) fn settle(&self, memory: &Mapping, home: HomeId) -> Result<(), Errno> {
        match self.nodes.get(home.0) {
            Some(node) => memory.place_on(Policy::Prefer(*node)),
            None => Ok(()),
        }
    }

    /// Puts memory, not yet populated, on the nodes of all homes: page by page in turn, if there are several.
    pub(super) fn spread(&self, memory: &Mapping) -> Result<(), Errno> {
        match &self.nodes[..] {
            [] => Ok(()),
            [node] => memory.place_on(Policy::Prefer(*node)),
            nodes => memory.place_on(Policy::Interleave(nodes)),
        }
    }

    /// The note on memory that the kernel would not put there.
    pub(super) fn refused(&self, what: &'static str, errno: Errno) -> Fallback {
        let remedy = match errno {
            Errno::EPERM => "allow the system call mbind (docker: --cap-add SYS_NICE)",
            Errno::EINVAL => "let the process use these nodes (cpuset.mems of its control group)",
            _ => "a kernel with CONFIG_NUMA",
        };
        Fallback::Placement {
            what,
            nodes: self.nodes.clone(),
            reason: errno.desc().to_owned(),
            remedy,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn shards_of_a_node_share_a_home() {
        let homes = Homes::of(&[4, 1, 4]);
        assert_eq!((homes.count(), &homes.nodes[..]), (2, &[1, 4][..]));
        let of: Vec<_> = (0..3).map(|shard| homes.of_shard(shard).0).collect();
        assert_eq!(of, [1, 0, 1]);
    }

    #[test]
    fn one_node_is_one_home() {
        for homes in [Homes::of(&[3, 3]), Homes::of(&[]), Homes::anywhere()] {
            assert_eq!(homes.count(), 1);
            assert_eq!(homes.of_shard(1), HomeId(0));
        }
    }
}
