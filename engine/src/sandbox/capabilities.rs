//! Capabilities (capabilities(7)).

use super::kinds::ThreadKind;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use std::io;

/// Gives up all capabilities of the calling thread but these.
pub(super) fn keep(kept: CapabilitySet) -> io::Result<()> {
    let has = capabilities(None)?;
    let kept = CapabilitySets {
        effective: has.effective & kept,
        permitted: has.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    if kept != has {
        set_capabilities(None, kept)?;
    }
    Ok(())
}

/// The names of the capabilities that this process has and no thread of a receiver needs; to be asked before any thread has given up
/// one. Empty where they cannot be read.
pub fn spare_capabilities() -> Vec<String> {
    let Ok(has) = capabilities(None) else {
        return Vec::new();
    };
    let needed = ThreadKind::ALL
        .iter()
        .fold(STARTUP, |all, kind| all | kind.capabilities());
    let spare = has.permitted - needed;
    spare
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect()
}

/// What a receiver may need until it has started: a port below 1024.
const STARTUP: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;
