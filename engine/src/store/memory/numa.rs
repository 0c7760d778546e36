//! The NUMA nodes that a store's memory lies on: those of its shards.
//!
//! A store without nodes in its options has one node, which stands for all memory: the kernel is then not asked to bind any.

use crate::store::memory::huge::Fallback;
use crate::store::memory::mapping::Mapping;
use crate::store::memory::mapping::Policy;
use nix::errno::Errno;

/// Position of a node among the store's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeIndex(pub(crate) usize);

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct NumaNodes {
    /// The node of each node, in the order of their numbers; none for the one that is anywhere.
    nodes: Vec<usize>,
    /// The node of each shard; none where all have the same.
    of_shard: Vec<NodeIndex>,
}

impl NumaNodes {
    /// One node, anywhere.
    pub(crate) fn anywhere() -> Self {
        Self {
            nodes: Vec::new(),
            of_shard: Vec::new(),
        }
    }

    /// For shards whose nodes are these.
    pub(crate) fn of(shard_nodes: &[usize]) -> Self {
        let mut nodes = shard_nodes.to_vec();
        nodes.sort_unstable();
        nodes.dedup();
        let node = |node: &usize| NodeIndex(nodes.binary_search(node).expect("sorted from the same ones"));
        let of_shard = match nodes.len() {
            0 | 1 => Vec::new(),
            _ => shard_nodes.iter().map(node).collect(),
        };
        Self { nodes, of_shard }
    }

    /// How many: at least one.
    pub(crate) fn count(&self) -> usize {
        self.nodes.len().max(1)
    }

    /// The node of a shard.
    pub(crate) fn of_shard(&self, shard: usize) -> NodeIndex {
        self.of_shard.get(shard).copied().unwrap_or_default()
    }

    /// Puts memory, not yet populated, on a node's node.
    pub(crate) fn place(&self, memory: &Mapping, node: NodeIndex) -> Result<(), Errno> {
        match self.nodes.get(node.0) {
            Some(node) => memory.place_on(Policy::Prefer(*node)),
            None => Ok(()),
        }
    }

    /// Puts memory, not yet populated, on the nodes of all nodes_of_store: page by page in turn, if there are several.
    pub(crate) fn spread(&self, memory: &Mapping) -> Result<(), Errno> {
        match &self.nodes[..] {
            [] => Ok(()),
            [node] => memory.place_on(Policy::Prefer(*node)),
            nodes => memory.place_on(Policy::Interleave(nodes)),
        }
    }

    /// The note on memory that the kernel would not put there.
    pub(crate) fn refused(&self, what: &'static str, errno: Errno) -> Fallback {
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
    fn shards_of_a_node_share_its_index() {
        let nodes_of_store = NumaNodes::of(&[4, 1, 4]);
        assert_eq!(
            (nodes_of_store.count(), &nodes_of_store.nodes[..]),
            (2, &[1, 4][..])
        );
        let of: Vec<_> = (0..3).map(|shard| nodes_of_store.of_shard(shard).0).collect();
        assert_eq!(of, [1, 0, 1]);
    }

    #[test]
    fn one_node_is_one_index() {
        for nodes_of_store in [NumaNodes::of(&[3, 3]), NumaNodes::of(&[]), NumaNodes::anywhere()] {
            assert_eq!(nodes_of_store.count(), 1);
            assert_eq!(nodes_of_store.of_shard(1), NodeIndex(0));
        }
    }
}
