//! Processor time of the threads that receive, in a process that is the primary, too.

use std::path::Path;
use std::time::Duration;

/// What the names of a receiver's threads begin with, and of a sink's.
const NAMES: [&str; 2] = ["colo-", "flush-"];

/// Of all threads of this process that receive, as far as they have not ended; none if the kernel does not say it. One that
/// sleeps has been counted whole.
pub(super) fn processor_time() -> Option<Duration> {
    let mut sum = Duration::ZERO;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let task = task.ok()?.path();
        // One that has ended meanwhile has no file any more.
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if NAMES.iter().any(|own| name.starts_with(own)) {
            // The same.
            sum += ran(&task.join("schedstat")).unwrap_or_default();
        }
    }
    // Where the kernel counts nothing, all are 0.
    (!sum.is_zero()).then_some(sum)
}

/// The first of three numbers: time spent running.
fn ran(path: &Path) -> Option<Duration> {
    let text = std::fs::read_to_string(path).ok()?;
    let nanoseconds = text.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}
