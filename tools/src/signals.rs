//! SIGINT and SIGTERM as a wish to end cleanly.

use crate::output::{CommandError, tell};
use nix::sys::signal::{SigSet, Signal};

/// Calls `end` at the first SIGINT or SIGTERM. A second one ends the process at once, with exit code 1.
///
/// To be called before any other thread is started: the signals are blocked from here on, in all threads that
/// follow.
///
/// # Errors
/// If the signals cannot be blocked or the thread that waits for them not be started.
pub fn on_end(end: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    let failed =
        |error: std::io::Error| CommandError::Failed(format!("signals cannot be waited for: {error}"));
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().map_err(|errno| failed(errno.into()))?;
    let wait = move || {
        let mut end = Some(end);
        while let Ok(signal) = signals.wait() {
            match end.take() {
                Some(end) => end(),
                None => {
                    tell(&format!("colo-ring: {signal} again: ending at once"));
                    std::process::exit(1);
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}
