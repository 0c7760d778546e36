//! SIGINT and SIGTERM as a wish to end cleanly.

use crate::output::{CommandError, tell};
use nix::sys::signal::{SigSet, Signal};

/// Calls `end` at the first SIGINT or SIGTERM. A second one ends the process at once, with exit code 1.
///
/// # Errors
/// See [`on_each`], and call it as early as that.
pub fn on_end(end: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    let mut end = Some(end);
    on_each(move || end.take().map(|end| end()).is_some())
}

/// Calls `act` at each SIGINT or SIGTERM. Where it returns false the process ends at once, with exit code 1.
///
/// To be called before any other thread is started: the signals are blocked from here on, in all threads that
/// follow.
///
/// # Errors
/// If the signals cannot be blocked or the thread that waits for them not be started.
pub fn on_each(mut act: impl FnMut() -> bool + Send + 'static) -> Result<(), CommandError> {
    let signals = block(&[Signal::SIGINT, Signal::SIGTERM])?;
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if !act() {
                tell(&format!("colo-ring: {signal} again: ending at once"));
                std::process::exit(1);
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}

/// Makes a write beyond `ulimit -f` an error of that write, in this thread and those that follow, instead of the
/// process's end.
///
/// # Errors
/// If the signal cannot be blocked.
pub fn survive_file_limit() -> Result<(), CommandError> {
    block(&[Signal::SIGXFSZ]).map(drop)
}

fn block(signals: &[Signal]) -> Result<SigSet, CommandError> {
    let signals: SigSet = signals.iter().copied().collect();
    signals.thread_block().map_err(|errno| failed(errno.into()))?;
    Ok(signals)
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::Failed(format!("signals cannot be waited for: {error}"))
}
