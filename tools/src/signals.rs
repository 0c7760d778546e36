//! SIGINT and SIGTERM as a request to end cleanly.
//!
//! They are caught by handlers, which a started program does not inherit: the signals reach it as usual.

use crate::output::{CommandError, tell};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
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

/// The same for a process that starts no programs. The thread that waits for the signals is the only one that they interrupt, and calls
/// `enter` first: the others, which are started after it, need not be able to do what their handlers do.
///
/// # Errors
/// See [`on_each`].
pub fn on_end_alone(
    enter: impl FnOnce() + Send + 'static,
    end: impl FnOnce() + Send + 'static,
) -> Result<(), CommandError> {
    let begin = alone(SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]), enter)?;
    let mut end = Some(end);
    start(begin, move || end.take().map(|end| end()).is_some())
}

/// Keeps signals from this thread, and from those that it starts. Returns what lets them through again and then calls `enter`.
fn alone(
    signals: SigSet,
    enter: impl FnOnce() + Send + 'static,
) -> Result<impl FnOnce() + Send + 'static, CommandError> {
    signals.thread_block().map_err(|errno| failed(errno.into()))?;
    Ok(move || {
        // The set is one of the kernel's, so that this cannot fail.
        let _ = signals.thread_unblock();
        enter();
    })
}

/// Calls `act` at each SIGINT or SIGTERM, on a thread of its own. Where it returns false the process ends at once, with
/// exit code 1.
///
/// # Errors
/// If the signals cannot be caught or the thread that waits for them cannot be started.
pub fn on_each(act: impl FnMut() -> bool + Send + 'static) -> Result<(), CommandError> {
    start(|| (), act)
}

fn start(
    enter: impl FnOnce() + Send + 'static,
    mut act: impl FnMut() -> bool + Send + 'static,
) -> Result<(), CommandError> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let wait = move || {
        enter();
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

/// Calls `act` at each SIGHUP. Like [`on_end_alone`].
///
/// # Errors
/// See [`on_each`].
pub fn on_hangup_alone(
    enter: impl FnOnce() + Send + 'static,
    act: impl Fn() + Send + 'static,
) -> Result<(), CommandError> {
    let begin = alone(SigSet::from(Signal::SIGHUP), enter)?;
    let mut signals = Signals::new([SIGHUP]).map_err(failed)?;
    let wait = move || {
        begin();
        for _ in signals.forever() {
            act();
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map(drop).map_err(failed)
}

/// Makes SIGINT, SIGTERM and SIGHUP nothing to this process, whose end comes in another way.
///
/// # Errors
/// If they cannot be caught.
pub fn survive_end() -> Result<(), CommandError> {
    [SIGINT, SIGTERM, SIGHUP].into_iter().try_for_each(survive)
}

/// Makes a write beyond `ulimit -f` an error of that write instead of the process's end.
///
/// # Errors
/// If the signal cannot be caught.
pub fn survive_file_limit() -> Result<(), CommandError> {
    survive(SIGXFSZ)
}

fn survive(signal: i32) -> Result<(), CommandError> {
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal, ignored)
        .map(drop)
        .map_err(failed)
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::Failed(format!("cannot wait for signals: {error}"))
}
