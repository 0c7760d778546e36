//! How much memory all guests together may take: the option `--ram-limit`, as far as this host, its cgroups and the address space of this
//! process allow it.

use crate::budget::Budget;
use crate::host::{MemoryBound, host_bytes, smallest_bound};
use std::sync::Arc;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLimit {
    bytes: u64,
    name: String,
    is_cut: bool,
}

const OPTION: &str = "--ram-limit";

/// One that receives, one that decodes; and a thread for everything else, and for the few that a new guest needs for a moment.
const THREADS_PER_CORE: usize = 2;
const OTHER_THREADS: usize = 12;

impl RamLimit {
    /// So many bytes, which are known to be there.
    pub fn exactly(bytes: u64) -> Self {
        Self {
            bytes,
            name: OPTION.to_owned(),
            is_cut: false,
        }
    }

    /// What the operator has asked for, or three quarters of this host's memory, as far as this process may take it. It will
    /// receive on so many cores.
    pub fn find(option: Option<u64>, cores: usize) -> Self {
        let bound = smallest_bound(THREADS_PER_CORE * cores + OTHER_THREADS);
        Self::within(option, host_bytes(), bound)
    }

    fn within(option: Option<u64>, host: u64, bound: Option<MemoryBound>) -> Self {
        let asked = option.unwrap_or(host - host / 4);
        match bound {
            Some(bound) if bound.for_guests < asked => Self {
                bytes: bound.for_guests,
                name: format!("the part of {OPTION} that fits {}", bound.what),
                is_cut: true,
            },
            _ => Self {
                bytes: asked,
                name: match option {
                    Some(_) => OPTION.to_owned(),
                    None => format!("{OPTION}, by default three quarters of this host's memory"),
                },
                is_cut: false,
            },
        }
    }

    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is, in the operator's words.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is less than the option, or than its default.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    pub(super) fn budget(&self) -> Arc<Budget> {
        Arc::new(Budget::new(self.bytes, &self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_counts_and_the_option_is_named() {
        let bound = |for_guests| {
            let what = "cgroup /colo".to_owned();
            Some(MemoryBound { for_guests, what })
        };
        let limit = |option, bound| {
            let limit = RamLimit::within(option, 1000, bound);
            (limit.bytes, limit.name, limit.is_cut)
        };
        let cut = "the part of --ram-limit that fits cgroup /colo".to_owned();
        let default = "--ram-limit, by default three quarters of this host's memory".to_owned();
        assert_eq!(limit(Some(400), None), (400, "--ram-limit".to_owned(), false));
        assert_eq!(
            limit(Some(400), bound(400)),
            (400, "--ram-limit".to_owned(), false)
        );
        assert_eq!(limit(Some(400), bound(300)), (300, cut.clone(), true));
        assert_eq!(limit(None, None), (750, default.clone(), false));
        assert_eq!(limit(None, bound(900)), (750, default, false));
        assert_eq!(limit(None, bound(300)), (300, cut, true));
    }
}
