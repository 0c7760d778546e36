//! Which cores of this machine a receiver takes.

use crate::output::CommandError;
use colo_ring::host::{Topology, allowed_cores, ranges};

fn cores_that_are_ours() -> Result<Vec<usize>, CommandError> {
    allowed_cores()
        .map_err(|error| CommandError::Failed(format!("which cores are allowed: {error}; give --cores")))
}

/// The cores this process may use, at most one per channel.
pub(crate) fn default_cores(channels: u8) -> Result<Vec<usize>, CommandError> {
    let mut cores = cores_that_are_ours()?;
    cores.truncate(usize::from(channels.max(1)));
    Ok(cores)
}

/// Refuses cores that this process may not use, before a thread of any kind is pinned to one.
pub(crate) fn check_cores(wanted: &[usize]) -> Result<(), CommandError> {
    let ours = cores_that_are_ours()?;
    let foreign: Vec<_> = (wanted.iter().filter(|core| !ours.contains(core)))
        .map(ToString::to_string)
        .collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let (cores, are) = match foreign.len() {
        1 => ("core", "is"),
        _ => ("cores", "are"),
    };
    Err(CommandError::Usage(format!(
        "--cores: {cores} {} {are} not there, or not for this process, which may use {}",
        foreign.join(", "),
        ranges(&ours)
    )))
}

/// The cores this process may use that are a NUMA node's.
pub(crate) fn cores_of_node(node: usize, channels: u8) -> Result<Vec<usize>, CommandError> {
    Topology::read()
        .cores_of(node, &cores_that_are_ours()?, usize::from(channels.max(1)))
        .map_err(|error| CommandError::Usage(error.to_string()))
}
