//! SIGINT and SIGTERM as a request to end cleanly.
//!
//! They are caught by handlers, which a started program does not inherit: the signals reach it as usual.

use crate::output::{CommandError, tell};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Calls `end` at the first SIGINT or SIGTERM. A second one ends the process at once, with exit code 1.
///
/// # Errors
/// See [`on_each`].
pub fn on_end(end: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    let mut end = Some(end);
    on_each(move || end.take().map(|end| end()).is_some())
}

/// Calls `act` at each SIGINT or SIGTERM, on a thread of its own. Where it returns false the process ends at once, with
/// exit code 1.
///
/// # Errors
/// If the signals cannot be caught or the thread that waits for them cannot be started.
pub fn on_each(mut act: impl FnMut() -> bool + Send + 'static) -> Result<(), CommandError> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let wait = move || {
        for signal in signals.forever() {
            if !act() {
                let name = signal_name(signal).unwrap_or("signal");
                tell(&format!("colo-ring: {name} again: ending at once"));
                crate::stderr::flush();
                std::process::exit(1);
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}

/// Makes a write beyond `ulimit -f` an error of that write instead of the process's end.
///
/// # Errors
/// If the signal cannot be caught.
pub fn survive_file_limit() -> Result<(), CommandError> {
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGXFSZ, ignored)
        .map(drop)
        .map_err(failed)
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::Failed(format!("cannot wait for signals: {error}"))
}
