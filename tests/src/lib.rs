//! What the tests of the whole share: the laboratory with real QEMU, captures, the command under test.

use std::time::Duration;

/// How long a test waits for something that has to happen: a limit against hanging, not against a slow machine.
pub const HANG_LIMIT: Duration = Duration::from_secs(300);

pub mod capture;
pub mod command;
pub mod hostile;
pub mod lab;
pub mod model;
pub mod shrink;
