//! A guard's histogram logs, written by a thread of their own.
//!
//! A write waits for as long as its file system hangs, and the guard must not. Intervals that find no place in the queue are lost,
//! and a warning says so once.

use super::GuardArgs;
use super::measurements::Interval;
use crate::output::tell;
use colo_ring::metrics::{IntervalLog, MetricsError, set_aside_logs, with_suffix};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::SystemTime;

/// Most intervals that wait: a minute, which a busy disk may take.
const WAITING_MAX: usize = 60;

/// The logs' names.
const PHASES: [&str; 2] = ["stopped", "held"];

/// The guard's side of the thread, which ends when this is dropped.
pub(super) struct Logs {
    name: String,
    intervals: SyncSender<Interval>,
    is_warned: bool,
}

impl Logs {
    /// Starts the thread, which makes the logs. Where there is no thread or no log, there is a warning: that costs measurements, not
    /// the guest's protection.
    pub(super) fn start(args: &GuardArgs) -> Option<Self> {
        let prefix = args.hist.clone()?;
        let (intervals, waiting) = sync_channel(WAITING_MAX);
        let name = args.name.clone();
        let work = move || {
            if let Err(error) = write(&name, &prefix, &waiting) {
                tell(&format!("WARNING: {name}: measurements are not logged: {error}"));
            }
        };
        let started = std::thread::Builder::new()
            .name("guard-hist".to_owned())
            .spawn(work);
        if let Err(error) = started {
            tell(&format!(
                "WARNING: {}: measurements are not logged: {error}",
                args.name
            ));
            return None;
        }
        Some(Self {
            name: args.name.clone(),
            intervals,
            is_warned: false,
        })
    }

    /// Has an interval written.
    pub(super) fn put(&mut self, interval: Interval) {
        // The thread has said why, if it has ended.
        let is_full = matches!(self.intervals.try_send(interval), Err(TrySendError::Full(_)));
        if is_full && !std::mem::replace(&mut self.is_warned, true) {
            tell(&format!(
                "WARNING: {}: measurements are lost: the logs of --hist have not been written for {WAITING_MAX} s",
                self.name
            ));
        }
    }
}

/// Writes what comes until the guard ends. A full disk costs intervals, and a warning.
fn write(guest: &str, prefix: &Path, waiting: &Receiver<Interval>) -> Result<(), MetricsError> {
    let [mut stopped, mut held] = begin(guest, prefix)?;
    let mut is_warned = false;
    for interval in waiting {
        let both =
            [(&mut stopped, &interval.stopped), (&mut held, &interval.held)].map(|(log, histogram)| {
                if histogram.is_empty() {
                    return Ok(());
                }
                log.add(None, histogram, interval.start, interval.length)?;
                log.append()
            });
        for error in both.into_iter().filter_map(Result::err) {
            if !std::mem::replace(&mut is_warned, true) {
                tell(&format!("WARNING: {guest}: measurements are lost: {error}"));
            }
        }
    }
    Ok(())
}

/// Begins both logs. Those of an earlier worker or guard are set aside.
fn begin(guest: &str, prefix: &Path) -> Result<[IntervalLog; 2], MetricsError> {
    let _beginning = set_aside_logs(prefix, &PHASES)?;
    let path = |phase: &str| -> PathBuf { with_suffix(prefix, &format!(".{phase}.hlog")) };
    let [stopped, held] = PHASES.map(|phase| {
        let comments = [format!("{phase} of the guest {guest}, in nanoseconds")];
        IntervalLog::create(path(phase), &comments, SystemTime::now())
    });
    Ok([stopped?, held?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::Histogram;
    use std::time::Duration;

    fn interval() -> Interval {
        let histogram = || Histogram::new(3).unwrap();
        Interval {
            start: Duration::ZERO,
            length: Duration::from_secs(1),
            stopped: histogram(),
            held: histogram(),
        }
    }

    /// What the guard's thread does comes back at once, also when nothing is written.
    #[test]
    fn a_file_system_that_hangs_does_not_hold_up_the_guard() {
        let (intervals, waiting) = sync_channel(WAITING_MAX);
        let mut logs = Logs {
            name: "web3".to_owned(),
            intervals,
            is_warned: false,
        };
        (0..WAITING_MAX).for_each(|_| logs.put(interval()));
        assert!(!logs.is_warned);
        logs.put(interval());
        assert!(logs.is_warned);
        drop(logs);
        assert_eq!(waiting.into_iter().count(), WAITING_MAX);
    }
}
