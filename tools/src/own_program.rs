//! This very program as a command.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// This program, whatever has become of its file: an update replaces it while it runs.
pub(crate) fn command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(std::env::args_os().next().unwrap_or_else(|| "colo-ring".into()));
    command
}
