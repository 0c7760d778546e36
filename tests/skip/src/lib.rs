//! How a test says that it cannot run here. A test that passes without testing looks like one that tests, so a skip
//! is a failure unless it was allowed by name.

use std::fs::OpenOptions;
use std::io::Write;

/// Names of tests that may be skipped, separated by spaces. `scripts/test` sets it from its list.
pub const MAY_SKIP: &str = "COLO_RING_MAY_SKIP";

/// A file to which a line is added for every test that is skipped. `scripts/test` prints it at its end.
pub const SKIPPED: &str = "COLO_RING_SKIPPED";

/// Reports that test `name` cannot run here because of `reason`. The test has to return after this.
///
/// # Panics
/// If `COLO_RING_MAY_SKIP` does not have the name, or the report cannot be written.
pub fn skip(name: &str, reason: &str) {
    let allowed = std::env::var(MAY_SKIP).unwrap_or_default();
    assert!(
        allowed.split_whitespace().any(|word| word == name),
        "{name} cannot run here: {reason}. To skip it, set {MAY_SKIP}={name}"
    );
    // Written to standard error itself: the test harness captures what the macros print.
    writeln!(std::io::stderr(), "SKIPPED {name}: {reason}").expect("standard error");
    if let Some(path) = std::env::var_os(SKIPPED) {
        // One write of one line: tests in several processes append.
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(format!("{name}: {reason}\n").as_bytes()))
            .expect("the list of skipped tests");
    }
}
