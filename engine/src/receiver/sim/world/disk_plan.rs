//! What is chosen of the guests' disks before a run.

use super::super::disks::{DISK_FAULTS, DiskFault};
use super::super::rng::Rng;
use super::super::tests::scratch;
use super::STEPS_USUAL;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What the seed of the disks differs by.
const DISKS: u64 = 0x6469_736b_7321;

/// See the module.
pub(super) struct DiskPlan {
    /// Where their bases are, if the guests have disks.
    pub(super) bases: Option<PathBuf>,
    _own_bases: Option<TempDir>,
    /// Of its own, so that a seed of guests without disks stays the run that it was.
    pub(super) rng: Rng,
    pub(super) fault: Option<(u64, DiskFault)>,
}

impl DiskPlan {
    /// With bases in the receiver's RAM directory, if it has one.
    pub(super) fn random(seed: u64, ram_dir: Option<&Path>) -> Self {
        let mut rng = Rng::new(seed ^ DISKS);
        let has_disks = rng.one_in(2);
        let own_bases = (has_disks && ram_dir.is_none()).then(scratch);
        let bases = ram_dir.or(own_bases.as_ref().map(TempDir::path));
        let fault = rng.one_in(3).then(|| {
            let at = rng.any_size(STEPS_USUAL) as u64;
            (at, rng.pick(&DISK_FAULTS))
        });
        Self {
            bases: bases.filter(|_| has_disks).map(Path::to_owned),
            _own_bases: own_bases,
            rng,
            fault,
        }
    }
}
