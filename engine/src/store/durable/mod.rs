//! What lets a checkpoint outlive the process: the record in the RAM directory. `recovery.rs` beside this folder reads it.

pub(crate) mod layout;
pub(crate) mod record;
