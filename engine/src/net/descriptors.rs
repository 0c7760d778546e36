//! A reserve of file descriptors that connections of strangers cannot take: for the control socket, failovers, dumps and hooks.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Descriptors of the reserve, or a quarter of a low limit.
const RESERVE: u64 = 64;

/// Connections that a listener has accepted and nobody has looked at: less than the reserve with the ordinary limit.
pub(crate) const ACCEPTED_MAX: usize = 8;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DescriptorReserve {
    first: RawFd,
    strangers_max: usize,
}

impl DescriptorReserve {
    /// Of this process's limit.
    pub(crate) fn of_process() -> Self {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
        Self::of_limit(limit)
    }

    fn of_limit(limit: u64) -> Self {
        let first = limit - RESERVE.min(limit / 4);
        Self {
            first: RawFd::try_from(first).unwrap_or(RawFd::MAX),
            strangers_max: usize::try_from(limit / 2).unwrap_or(usize::MAX),
        }
    }

    /// How many connections may be open that have not said what they are, or wait for others: sessions need the rest.
    pub(crate) fn strangers_max(self) -> usize {
        self.strangers_max
    }

    /// Whether a new descriptor is one of the reserve, and must be closed: the kernel gives the lowest free number, so all below
    /// are in use.
    pub(crate) fn has(self, new: &OwnedFd) -> bool {
        new.as_raw_fd() >= self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_limit_has_a_small_reserve() {
        for (limit, first) in [(1024, 960), (64, 48), (4, 3), (u64::MAX, RawFd::MAX)] {
            assert_eq!(DescriptorReserve::of_limit(limit).first, first, "{limit}");
        }
    }
}
