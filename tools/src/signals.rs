//! SIGINT and SIGTERM as a wish to end cleanly.

use crate::output::{CommandError, tell};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use std::sync::mpsc;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{self, SignalKind};

/// What a process is asked to end with.
const ENDING: [Signal; 2] = [Signal::SIGINT, Signal::SIGTERM];

/// Calls `end` at the first SIGINT or SIGTERM. A second one ends the process at once, with exit code 1.
///
/// # Errors
/// See [`on_each`], and call it as early as that.
pub fn on_end(end: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    let mut end = Some(end);
    on_each(move || end.take().map(|end| end()).is_some())
}

/// Calls `act` at each SIGINT or SIGTERM, on a thread of its own. Where it returns false the process ends at once, with
/// exit code 1.
///
/// To be called before any other thread is started: the signals are blocked from here on, in all threads that
/// follow, so that they interrupt none of them.
///
/// # Errors
/// If the signals cannot be caught or the thread that waits for them not be started.
pub fn on_each(mut act: impl FnMut() -> bool + Send + 'static) -> Result<(), CommandError> {
    block(&ENDING)?;
    let (tell_ready, ready) = mpsc::channel();
    let wait = move || {
        let caught = Caught::new();
        let mut caught = match caught {
            Ok(caught) => caught,
            Err(error) => return drop(tell_ready.send(Err(error))),
        };
        drop(tell_ready.send(Ok(())));
        loop {
            let signal = caught.next();
            if !act() {
                tell(&format!("colo-ring: {signal} again: ending at once"));
                std::process::exit(1);
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map_err(failed)?;
    let gone = |_| Err(std::io::Error::other("its thread has ended"));
    ready.recv().unwrap_or_else(gone).map_err(failed)
}

/// Runs `start`, which starts a program, so that SIGINT and SIGTERM reach that: a program inherits which signals are blocked,
/// and hardly any unblocks them. One that comes here meanwhile is caught all the same.
pub fn reaching_children<T>(start: impl FnOnce() -> T) -> T {
    let ending: SigSet = ENDING.into_iter().collect();
    let before = ending.thread_swap_mask(SigmaskHow::SIG_UNBLOCK);
    let started = start();
    // It has refused nothing before, and so it does not now.
    let _ = before.and_then(|before| before.thread_set_mask());
    started
}

/// The signals, caught by handlers: what is started here does not inherit those.
struct Caught {
    runtime: Runtime,
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Caught {
    /// Catches them, in this thread at the latest.
    fn new() -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let (interrupt, terminate) = {
            let _inside = runtime.enter();
            (
                unix::signal(SignalKind::interrupt())?,
                unix::signal(SignalKind::terminate())?,
            )
        };
        let ending: SigSet = ENDING.into_iter().collect();
        ending.thread_unblock()?;
        Ok(Self {
            runtime,
            interrupt,
            terminate,
        })
    }

    fn next(&mut self) -> Signal {
        let Self {
            runtime,
            interrupt,
            terminate,
        } = self;
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => Signal::SIGINT,
                _ = terminate.recv() => Signal::SIGTERM,
            }
        })
    }
}

/// Makes a write beyond `ulimit -f` an error of that write, in this thread and those that follow, instead of the
/// process's end.
///
/// # Errors
/// If the signal cannot be blocked.
pub fn survive_file_limit() -> Result<(), CommandError> {
    block(&[Signal::SIGXFSZ])
}

fn block(signals: &[Signal]) -> Result<(), CommandError> {
    let signals: SigSet = signals.iter().copied().collect();
    signals.thread_block().map_err(|errno| failed(errno.into()))
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::Failed(format!("signals cannot be waited for: {error}"))
}
