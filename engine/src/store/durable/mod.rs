//! Checkpoints that outlive the process: the record in the RAM directory, and the recovery from it.

pub(crate) mod record;
pub(crate) mod recovery;
