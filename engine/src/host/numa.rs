//! NUMA: the nodes, their cores and memory, and where a receiver's memory should lie.
//!
//! All of it comes from `devices/system/node` in sysfs. A kernel without NUMA has no such directory, and one on a machine
//! with one memory has one node: neither needs a placement, and none is made.

use super::cores::parse_core_list;
use super::proc;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use thiserror::Error;

/// Nodes that a kernel can have at most (`MAX_NUMNODES`): higher numbers are ignored.
pub(crate) const NODES_MAX: usize = 1024;

/// One NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct NumaNode {
    /// Its number.
    pub node: usize,
    /// Its cores; empty for a node of memory alone.
    pub cores: Vec<usize>,
    /// The node whose memory is nearest to its cores: itself, unless it has no memory. None where that cannot be read.
    pub memory_node: Option<usize>,
}

/// Why the cores of a node cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NumaError {
    /// The kernel reports no node.
    #[error("this kernel has no NUMA nodes: leave --numa-node out, or give --cores")]
    None,
    /// There is no such node.
    #[error("there is no NUMA node {node}; there are {nodes}")]
    Unknown {
        /// The requested node.
        node: usize,
        /// The existing nodes, with their cores.
        nodes: String,
    },
    /// It has no cores, or none that this process may use.
    #[error(
        "this process may use no core of NUMA node {node}; there are {nodes}, and `taskset -p $$` shows which cores it may use"
    )]
    NoCore {
        /// The requested node.
        node: usize,
        /// The existing nodes, with their cores.
        nodes: String,
    },
}

/// The NUMA nodes of a machine, in the order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    nodes: Vec<NumaNode>,
}

/// Where a receiver's cores and memory are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Placement {
    /// The cores that it receives on.
    pub cores: Vec<CorePlace>,
    /// The nodes that RAM images lie on, interleaved if there are several; empty where the kernel decides, because there
    /// is one memory only.
    pub image_nodes: Vec<usize>,
}

/// Where a core is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CorePlace {
    /// Its number.
    pub core: usize,
    /// Its node, where there are nodes.
    pub node: Option<usize>,
    /// The node for the pages that it receives; none where the kernel decides.
    pub memory_node: Option<usize>,
}

impl Topology {
    /// Reads that of this machine.
    pub fn read() -> Self {
        Self::read_from(Path::new("/sys"))
    }

    /// Reads that of a tree like `/sys`. What cannot be read or parsed is ignored.
    pub fn read_from(sys: &Path) -> Self {
        let directory = sys.join("devices/system/node");
        let list = |file: &str| -> Option<Vec<usize>> {
            let numbers = parse_core_list(&proc::text(directory.join(file))?).ok()?;
            numbers.iter().all(|node| *node < NODES_MAX).then_some(numbers)
        };
        let mut online = list("online").unwrap_or_default();
        online.sort_unstable();
        let with_memory = list("has_memory").unwrap_or_default();
        let node = |node: &usize| {
            let of_node =
                |file: &str| proc::text(directory.join(format!("node{node}/{file}"))).unwrap_or_default();
            let mut cores = parse_core_list(&of_node("cpulist")).unwrap_or_default();
            cores.sort_unstable();
            NumaNode {
                node: *node,
                cores,
                memory_node: nearest(*node, &online, &with_memory, &of_node("distance")),
            }
        };
        Self {
            nodes: online.iter().map(node).collect(),
        }
    }

    /// The nodes.
    pub fn nodes(&self) -> &[NumaNode] {
        &self.nodes
    }

    /// Those cores of a node that are among the `allowed`, at most `most`.
    ///
    /// # Errors
    /// If there are none; the error names the nodes that exist.
    pub fn cores_of(&self, node: usize, allowed: &[usize], most: usize) -> Result<Vec<usize>, NumaError> {
        if self.nodes.is_empty() {
            return Err(NumaError::None);
        }
        let nodes = self.to_string();
        let Some(found) = self.nodes.iter().find(|found| found.node == node) else {
            return Err(NumaError::Unknown { node, nodes });
        };
        let cores = found.cores.iter().filter(|core| allowed.contains(core));
        let cores: Vec<usize> = cores.take(most).copied().collect();
        match cores.is_empty() {
            true => Err(NumaError::NoCore { node, nodes }),
            false => Ok(cores),
        }
    }

    /// Where memory should lie for a receiver on `cores`: what a core receives on the nearest node, RAM images on all of
    /// these. Where there is one memory only, or a core's is not known, the kernel decides.
    pub fn place(&self, cores: &[usize]) -> Placement {
        let node_of = |core: &usize| self.nodes.iter().find(|node| node.cores.contains(core));
        let matters = {
            let mut memories: Vec<_> = self.nodes.iter().filter_map(|node| node.memory_node).collect();
            memories.sort_unstable();
            memories.dedup();
            memories.len() > 1
        };
        let memory_of = |core: &usize| node_of(core).and_then(|node| node.memory_node);
        let known = matters && cores.iter().all(|core| memory_of(core).is_some());
        let place = |core: &usize| CorePlace {
            core: *core,
            node: node_of(core).map(|node| node.node),
            memory_node: memory_of(core).filter(|_| known),
        };
        let cores: Vec<CorePlace> = cores.iter().map(place).collect();
        let mut image_nodes: Vec<usize> = cores.iter().filter_map(|core| core.memory_node).collect();
        image_nodes.sort_unstable();
        image_nodes.dedup();
        Placement { cores, image_nodes }
    }
}

/// The node with memory that is nearest to `node`, by the distances to all online nodes in its `distance` file.
fn nearest(node: usize, online: &[usize], with_memory: &[usize], distances: &str) -> Option<usize> {
    if with_memory.contains(&node) {
        return Some(node);
    }
    let distances = distances.split_whitespace().map(|text| text.parse::<u32>().ok());
    let others = online
        .iter()
        .zip(distances)
        .filter(|(other, _)| with_memory.contains(other));
    let (nearest, _) = others
        .filter_map(|(other, far)| Some((*other, far?)))
        .min_by_key(|(_, far)| *far)?;
    Some(nearest)
}

impl Placement {
    /// The node that memory of each core should lie on, in the order of the cores; empty where the kernel decides.
    pub fn memory_nodes(&self) -> Vec<usize> {
        self.cores.iter().filter_map(|core| core.memory_node).collect()
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, node) in self.nodes.iter().enumerate() {
            let separator = if position == 0 { "" } else { ", " };
            let cores = match node.cores.is_empty() {
                true => "no cores".to_owned(),
                false => format!("cores {}", ranges(&node.cores)),
            };
            write!(f, "{separator}node {} ({cores})", node.node)?;
        }
        Ok(())
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nodes: Vec<_> = self.cores.iter().map(|core| core.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        for (position, node) in nodes.iter().enumerate() {
            let of_node = self.cores.iter().filter(|core| core.node == *node);
            let cores: Vec<usize> = of_node.map(|core| core.core).collect();
            let separator = if position == 0 { "" } else { ", " };
            let word = if cores.len() == 1 { "core" } else { "cores" };
            write!(f, "{separator}{word} {}", ranges(&cores))?;
            if let Some(node) = node {
                write!(f, " of NUMA node {node}")?;
            }
        }
        match &self.image_nodes[..] {
            [] => write!(f, "; memory where the kernel puts it"),
            [node] => write!(f, "; memory on node {node}"),
            several => write!(
                f,
                "; a pool's slabs on the node of their core, RAM images interleaved over nodes {}",
                ranges(several)
            ),
        }
    }
}

/// Numbers as sysfs writes them: `2-5,8`, in their order.
pub fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let part = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree like `/sys`, removed when dropped.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let root = tempfile::tempdir().unwrap();
            for (file, text) in files {
                let path = root.path().join("devices/system/node").join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self(root)
        }

        fn read(&self) -> Topology {
            Topology::read_from(self.0.path())
        }
    }

    const TWO: &[(&str, &str)] = &[
        ("online", "0-1\n"),
        ("has_memory", "0-1\n"),
        ("node0/cpulist", "0-1,4\n"),
        ("node0/distance", "10 21\n"),
        ("node1/cpulist", "2-3,5\n"),
        ("node1/distance", "21 10\n"),
    ];

    #[test]
    fn without_numa_the_kernel_decides() {
        let topology = Tree::new(&[]).read();
        assert_eq!(topology.nodes(), []);
        assert_eq!(topology.cores_of(0, &[0], 4), Err(NumaError::None));
        let placement = topology.place(&[0, 1]);
        assert!(placement.memory_nodes().is_empty());
        assert_eq!(
            placement.to_string(),
            "cores 0-1; memory where the kernel puts it"
        );
    }

    #[test]
    fn one_node_needs_no_placement() {
        let files = [
            ("online", "0\n"),
            ("has_memory", "0\n"),
            ("node0/cpulist", "0-3\n"),
            ("node0/distance", "10\n"),
        ];
        let topology = Tree::new(&files).read();
        assert_eq!(topology.cores_of(0, &[0, 1, 2, 3], 2), Ok(vec![0, 1]));
        let placement = topology.place(&[1]);
        assert_eq!(
            (placement.cores[0].node, placement.cores[0].memory_node),
            (Some(0), None)
        );
        assert!(placement.image_nodes.is_empty());
    }

    #[test]
    fn two_nodes_place_memory_by_core() {
        let tree = Tree::new(TWO);
        let topology = tree.read();
        let near = topology.place(&[2, 5]);
        assert_eq!(
            (near.memory_nodes(), &near.image_nodes[..]),
            (vec![1, 1], &[1][..])
        );
        assert_eq!(near.to_string(), "cores 2,5 of NUMA node 1; memory on node 1");
        let both = topology.place(&[3, 0]);
        assert_eq!(
            (both.memory_nodes(), &both.image_nodes[..]),
            (vec![1, 0], &[0, 1][..])
        );
        let text = both.to_string();
        assert!(
            text.starts_with("core 0 of NUMA node 0, core 3 of NUMA node 1; "),
            "{text}"
        );
        assert!(text.ends_with("interleaved over nodes 0-1"), "{text}");
        // A core that no node has: better no placement than half of one.
        assert!(topology.place(&[0, 9]).memory_nodes().is_empty());
    }

    #[test]
    fn only_cores_that_may_be_used_are() {
        let tree = Tree::new(TWO);
        let topology = tree.read();
        // Core 3 is offline or not ours.
        assert_eq!(topology.cores_of(1, &[0, 2, 5], 8), Ok(vec![2, 5]));
        let refused = topology.cores_of(1, &[0, 1], 8).unwrap_err().to_string();
        assert!(refused.contains("node 1 (cores 2-3,5)"), "{refused}");
        let unknown = topology.cores_of(7, &[0], 8).unwrap_err().to_string();
        assert!(
            unknown.contains("no NUMA node 7; there are node 0 (cores 0-1,4), node 1"),
            "{unknown}"
        );
    }

    #[test]
    fn cores_are_in_the_order_of_their_numbers() {
        let files = [
            ("online", "1,0\n"),
            ("has_memory", "0,1\n"),
            ("node0/cpulist", "6,0-1\n"),
            ("node1/cpulist", "7,2\n"),
        ];
        let topology = Tree::new(&files).read();
        let nodes: Vec<_> = topology.nodes().iter().map(|node| node.node).collect();
        assert_eq!(nodes, [0, 1]);
        assert_eq!(topology.cores_of(0, &[6, 1, 0], 8), Ok(vec![0, 1, 6]));
    }

    #[test]
    fn a_node_without_memory_takes_the_nearest() {
        let files = [
            ("online", "0-2\n"),
            ("has_memory", "0,2\n"),
            ("node0/cpulist", "0\n"),
            ("node1/cpulist", "1\n"),
            ("node1/distance", "31 10 21\n"),
            // Memory alone.
            ("node2/cpulist", "\n"),
        ];
        let topology = Tree::new(&files).read();
        assert_eq!(topology.place(&[1]).memory_nodes(), [2]);
        assert_eq!(topology.place(&[1]).cores[0].node, Some(1));
        let refused = topology.cores_of(2, &[0, 1], 8).unwrap_err();
        assert!(matches!(refused, NumaError::NoCore { node: 2, .. }), "{refused}");
        assert!(refused.to_string().contains("node 2 (no cores)"), "{refused}");
    }

    #[test]
    fn garbage_is_not_believed() {
        for online in ["all of them", "0-5000", "0,0"] {
            let tree = Tree::new(&[("online", online), ("has_memory", "0-1")]);
            assert_eq!(tree.read().nodes(), [], "{online}");
        }
        let files = [
            ("online", "0-1"),
            ("has_memory", "zero"),
            ("node0/cpulist", "\u{0}\u{1}"),
            ("node1/cpulist", "0-1"),
            ("node1/distance", "near far"),
        ];
        let topology = Tree::new(&files).read();
        assert!(topology.nodes()[0].cores.is_empty());
        assert!(topology.place(&[0, 1]).memory_nodes().is_empty());
        let missing_nodes = Tree::new(&[("online", "0-1"), ("has_memory", "0-1")]).read();
        assert!(missing_nodes.nodes().iter().all(|node| node.cores.is_empty()));
    }

    #[test]
    fn this_machine_has_a_topology_or_none() {
        let topology = Topology::read();
        let cores: Vec<usize> = topology
            .nodes()
            .iter()
            .flat_map(|node| node.cores.clone())
            .collect();
        assert_eq!(topology.place(&cores).cores.len(), cores.len());
    }
}
