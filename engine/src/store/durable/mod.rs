//! Checkpoints that outlive the process: the record in the RAM directory, and the recovery from it.
#![forbid(unsafe_code)]

pub(crate) mod record;
pub(crate) mod recovery;
