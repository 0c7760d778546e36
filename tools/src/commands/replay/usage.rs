//! What the secondary's process uses, and what else keeps this machine busy.
//!
//! What is neither this process's nor the secondary's is *foreign*: processor time that the kernel counts as used
//! (`/proc/stat`: user, nice, system, irq, softirq and stolen time), less that of the two processes. The kernel counts in
//! ticks of some milliseconds, so it is looked at over windows of at least [`WINDOW`] and not for a checkpoint alone; the
//! checkpoints of a window are *disturbed* if more than [`FOREIGN_SHARE`] of one core was foreign in it.

use crate::run_file::SecondaryUse;
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Least length of a window.
const WINDOW: Duration = Duration::from_millis(250);

/// Foreign processor time that disturbs, as a share of one core.
const FOREIGN_SHARE: f64 = 0.2;

/// Foreign processor time that ticks alone can make of nothing.
const FOREIGN_MIN: Duration = Duration::from_millis(30);

/// Why the secondary's process cannot be watched.
#[derive(Debug, Error)]
#[error("process {pid} cannot be watched: {errno}")]
pub(super) struct NotWatchable {
    pid: u32,
    errno: Errno,
}

/// The secondary's process on this machine.
#[derive(Debug)]
pub(super) struct Secondary {
    pid: u32,
    clock: ClockId,
    /// Used while it was counted, and what it had used when counting began.
    used: Duration,
    used_before: Duration,
    rss_bytes_max: u64,
    page_bytes: u64,
}

impl Secondary {
    /// Finds it.
    ///
    /// # Errors
    /// If there is no such process.
    pub(super) fn find(pid: u32) -> Result<Self, NotWatchable> {
        let found = i32::try_from(pid)
            .map_err(|_| Errno::ESRCH)
            .and_then(|number| nix::time::clock_getcpuclockid(Pid::from_raw(number)));
        let clock = found.map_err(|errno| NotWatchable { pid, errno })?;
        let page_bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
        Ok(Self {
            pid,
            clock,
            used: Duration::ZERO,
            used_before: Duration::ZERO,
            rss_bytes_max: 0,
            page_bytes: page_bytes
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or(4096),
        })
    }

    /// Begins to count its processor time.
    pub(super) fn begin(&mut self) {
        self.used_before = self.cpu().unwrap_or_default();
    }

    /// Counts what it used since [`Self::begin`]. If it has ended meanwhile, that cannot be known.
    pub(super) fn end(&mut self) {
        self.look_at_memory();
        self.used += self.cpu().unwrap_or_default().saturating_sub(self.used_before);
    }

    /// Processor time of all its threads since its start; None when it has ended.
    fn cpu(&self) -> Option<Duration> {
        clock_gettime(self.clock).ok().map(Duration::from)
    }

    /// Looks at its resident memory.
    pub(super) fn look_at_memory(&mut self) {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid)).unwrap_or_default();
        let pages = statm
            .split_whitespace()
            .nth(1)
            .and_then(|pages| pages.parse::<u64>().ok());
        let bytes = pages.unwrap_or(0) * self.page_bytes;
        self.rss_bytes_max = self.rss_bytes_max.max(bytes);
    }

    /// What it used while it was counted.
    pub(super) fn used(&self) -> SecondaryUse {
        SecondaryUse {
            pid: self.pid,
            cpu_ns: u64::try_from(self.used.as_nanos()).unwrap_or(u64::MAX),
            rss_bytes_max: self.rss_bytes_max,
        }
    }
}

/// Watches for what disturbs, window by window.
#[derive(Debug)]
pub(super) struct Watch {
    window_began: Instant,
    before: Times,
}

/// Processor times at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    machine: Duration,
    own: Duration,
    secondary: Duration,
}

impl Watch {
    /// Begins the first window. None where the machine does not tell.
    pub(super) fn start(secondary: &Secondary) -> Option<Self> {
        Some(Self {
            window_began: Instant::now(),
            before: Times::read(secondary)?,
        })
    }

    /// A checkpoint has ended. Where the window ends with it, says what disturbed the window, if anything.
    pub(super) fn checkpoint_ended(&mut self, secondary: &Secondary) -> Option<Option<String>> {
        (self.window_began.elapsed() >= WINDOW).then(|| self.end_window(secondary))
    }

    /// Ends the window, and begins the next.
    pub(super) fn end_window(&mut self, secondary: &Secondary) -> Option<String> {
        let length = std::mem::replace(&mut self.window_began, Instant::now()).elapsed();
        let now = Times::read(secondary)?;
        let foreign = now.foreign_since(&std::mem::replace(&mut self.before, now));
        disturbance(foreign, length)
    }
}

fn disturbance(foreign: Duration, window: Duration) -> Option<String> {
    let limit = window.mul_f64(FOREIGN_SHARE).max(FOREIGN_MIN);
    (foreign > limit).then(|| {
        let share = foreign.as_secs_f64() / window.as_secs_f64() * 100.0;
        format!("other processes used {share:.0} % of a core")
    })
}

impl Times {
    fn read(secondary: &Secondary) -> Option<Self> {
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten()?;
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        let own = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok()?;
        Some(Self {
            machine: busy(&stat, u32::try_from(ticks).ok()?)?,
            own: Duration::from(own),
            secondary: secondary.cpu()?,
        })
    }

    fn foreign_since(&self, before: &Self) -> Duration {
        let known = self.own.saturating_sub(before.own) + self.secondary.saturating_sub(before.secondary);
        self.machine.saturating_sub(before.machine).saturating_sub(known)
    }
}

/// Time that the cores were busy, of the first line of `/proc/stat`.
fn busy(stat: &str, ticks_per_second: u32) -> Option<Duration> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // user nice system idle iowait irq softirq steal; guest time is in user.
    let mut ticks = 0u64;
    for position in 0..8 {
        let field: u64 = fields.next()?.parse().ok()?;
        if !(3..=4).contains(&position) {
            ticks = ticks.checked_add(field)?;
        }
    }
    Some(Duration::from_secs(ticks) / ticks_per_second.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_what_is_neither_idle_nor_waiting() {
        let stat = "cpu  100 1 20 9000 800 3 4 5 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy(stat, 100), Some(Duration::from_millis(1330)));
        for wrong in [
            "",
            "cpu",
            "cpu  1 2 3",
            "cpu0 1 2 3 4 5 6 7 8",
            "cpu  a 2 3 4 5 6 7 8",
        ] {
            assert_eq!(busy(wrong, 100), None, "{wrong}");
        }
    }

    #[test]
    fn ticks_alone_do_not_disturb() {
        let ms = Duration::from_millis;
        assert_eq!(disturbance(ms(30), ms(10)), None);
        assert_eq!(disturbance(ms(50), ms(250)), None);
        let text = disturbance(ms(125), ms(250)).unwrap();
        assert_eq!(text, "other processes used 50 % of a core");
    }

    #[test]
    fn this_process_can_be_watched_and_a_missing_one_not() {
        let mut own = Secondary::find(std::process::id()).unwrap();
        own.begin();
        let until = Instant::now() + Duration::from_millis(20);
        while Instant::now() < until {}
        own.end();
        let used = own.used();
        assert!(
            used.cpu_ns >= 1_000_000 && used.rss_bytes_max > 100_000,
            "{used:?}"
        );
        assert!(Secondary::find(u32::MAX).is_err());
        assert!(Watch::start(&own).is_some());
    }
}
