//! Times as numbers.

use std::time::Duration;

/// Nanoseconds, for reports and files; what is longer than 584 years is that.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
