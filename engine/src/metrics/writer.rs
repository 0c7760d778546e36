//! The files of a run, written by a thread of their own.
//!
//! A write waits for as long as its file system hangs, or nobody reads the pipe that the file is. The control thread, which accepts,
//! ends sessions and begins failovers, must not. So it puts intervals that are encoded into a bounded queue, whose lock is held only
//! to add and to take one. What finds no place is lost, and is counted as what cannot be written is.

use super::earlier::{self, set_aside};
use super::files::{with_suffix, write_json};
use super::log::{Lines, LogFile};
use super::{MetricsError, Phase, Report, RunDescription};
use crate::sandbox::ThreadKind;
use crate::threads::Threads;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

/// A log that is larger is set aside, and a new one begins: with checkpoints of one guest all the time, after about half a day.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Most intervals that wait: about a minute, which a busy disk may take.
const WAITING_MAX: usize = 64;

/// Most bytes of them. One has about 6 KB for each session that had a checkpoint.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// How long the end of a run waits for the last files.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// An interval that has ended.
#[derive(Default)]
pub(super) struct Interval {
    /// Of each phase, in the order of [`Phase::ALL`].
    pub(super) lines: Vec<Vec<u8>>,
    /// Whether something is missing without it.
    pub(super) has_checkpoints: bool,
    /// Intervals before it that found no place.
    missed: u64,
}

impl Interval {
    pub(super) fn new(lines: Vec<Vec<u8>>, has_checkpoints: bool) -> Self {
        Self {
            lines,
            has_checkpoints,
            missed: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    fn bytes(&self) -> usize {
        self.lines.iter().map(Vec::len).sum()
    }
}

/// What the two threads share.
#[derive(Default)]
struct Queue {
    intervals: VecDeque<Interval>,
    bytes: usize,
    /// Intervals that found no place since one found one.
    missed: u64,
    /// Intervals that are missing in at least one log.
    lost: u64,
    /// Whether one that would be missed is being written.
    is_writing: bool,
    /// What is to be written behind all intervals.
    report: Option<Report>,
    finished: Option<(Report, Result<(), MetricsError>)>,
    /// Nobody waits for more.
    is_over: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// What the thread does next.
enum Work {
    Append { interval: Interval, is_last: bool },
    Finish(Box<Report>),
}

/// The other side of the thread, which ends when this is dropped, or after [`Self::finish`].
pub(super) struct Writer {
    prefix: PathBuf,
    shared: Arc<Shared>,
}

impl Writer {
    /// Makes the files, and starts the thread.
    ///
    /// # Errors
    /// If a file cannot be made, or there is no thread.
    pub(super) fn start(
        prefix: &Path,
        run: RunDescription,
        threads: &Threads,
        warn: impl Fn(String) + Send + 'static,
    ) -> Result<Self, MetricsError> {
        let files = Files::create(prefix, run)?;
        let shared = Arc::new(Shared::default());
        let (own, threads) = (shared.clone(), threads.clone());
        let work = move || {
            threads.enter(ThreadKind::Histograms);
            write_all(files, &own, warn);
        };
        let started = Builder::new().name("colo-hist".into()).spawn(work);
        started.map_err(MetricsError::Thread)?;
        Ok(Self {
            prefix: prefix.to_owned(),
            shared,
        })
    }

    /// What the names of the files begin with.
    pub(super) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// Intervals that are missing in at least one log.
    pub(super) fn lost(&self) -> u64 {
        self.shared.queue().lost
    }

    /// An interval could not be encoded.
    pub(super) fn lose(&self) {
        let mut queue = self.shared.queue();
        queue.missed += 1;
        queue.lost += 1;
    }

    /// Has an interval written. False if it found no place, and is lost.
    pub(super) fn put(&self, mut interval: Interval) -> bool {
        let bytes = interval.bytes();
        let mut queue = self.shared.queue();
        if queue.intervals.len() >= WAITING_MAX || queue.bytes + bytes > WAITING_BYTES_MAX {
            let lost = u64::from(interval.has_checkpoints);
            queue.missed += lost;
            queue.lost += lost;
            return false;
        }
        interval.missed = std::mem::take(&mut queue.missed);
        queue.bytes += bytes;
        queue.intervals.push_back(interval);
        self.shared.changed.notify_all();
        true
    }

    /// Has the last interval and the report written, and waits for that, but not for ever. Returns the report with what is known then.
    pub(super) fn finish(
        &self,
        last: Option<Interval>,
        report: Report,
    ) -> (Report, Result<(), MetricsError>) {
        self.finish_within(FINISH_WITHIN, last, report)
    }

    fn finish_within(
        &self,
        most: Duration,
        last: Option<Interval>,
        report: Report,
    ) -> (Report, Result<(), MetricsError>) {
        let mut queue = self.shared.queue();
        if let Some(mut last) = last {
            last.missed = std::mem::take(&mut queue.missed);
            queue.intervals.push_back(last);
        }
        queue.report = Some(report.clone());
        self.shared.changed.notify_all();
        let waits = |queue: &mut Queue| queue.finished.is_none();
        let waited = self.shared.changed.wait_timeout_while(queue, most, waits);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queue.is_over = true;
        queue.finished.take().unwrap_or_else(|| {
            let waiting = queue.intervals.iter().filter(|interval| interval.has_checkpoints);
            let waiting = waiting.count() as u64 + u64::from(queue.is_writing);
            let intervals_lost = queue.lost + waiting;
            let late = MetricsError::Late {
                prefix: self.prefix.clone(),
                waited: most,
            };
            let report = Report {
                intervals_lost,
                ..report
            };
            (report, Err(late))
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.queue().is_over = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to do; none at the end.
    fn next(&self) -> Option<Work> {
        let waits =
            |queue: &mut Queue| queue.intervals.is_empty() && queue.report.is_none() && !queue.is_over;
        let waited = self.changed.wait_while(self.queue(), waits);
        let mut queue = waited.unwrap_or_else(PoisonError::into_inner);
        if queue.is_over {
            return None;
        }
        if let Some(interval) = queue.intervals.pop_front() {
            queue.bytes = queue.bytes.saturating_sub(interval.bytes());
            queue.is_writing = interval.has_checkpoints;
            return Some(Work::Append {
                is_last: queue.intervals.is_empty() && queue.report.is_some(),
                interval,
            });
        }
        let mut report = queue.report.take()?;
        report.intervals_lost = queue.lost;
        Some(Work::Finish(Box::new(report)))
    }
}

fn write_all(mut files: Files, shared: &Shared, warn: impl Fn(String)) {
    let mut of_last = Ok(());
    while let Some(work) = shared.next() {
        match work {
            Work::Append { interval, is_last } => {
                if let Err(error) = files.start_anew_if_large() {
                    warn(error.to_string());
                }
                let written = files.append(&interval);
                let mut queue = shared.queue();
                queue.is_writing = false;
                queue.lost += u64::from(written.is_err() && interval.has_checkpoints);
                drop(queue);
                match written {
                    Err(error) if !is_last => warn(error.to_string()),
                    written => of_last = written,
                }
            }
            Work::Finish(report) => {
                let written = of_last.and(write_json(&files.report, &report));
                // Another run may have the prefix as soon as this one is known to be over.
                drop(files);
                shared.queue().finished = Some((*report, written));
                shared.changed.notify_all();
                return;
            }
        }
    }
}

struct Files {
    run: RunDescription,
    prefix: PathBuf,
    logs: Vec<LogFile>,
    report: PathBuf,
    /// Bytes of a log from which on new ones begin.
    anew_from: u64,
}

impl Files {
    fn create(prefix: &Path, run: RunDescription) -> Result<Self, MetricsError> {
        let _beginning = earlier::begin(prefix)?;
        earlier::check(prefix)?;
        set_aside(prefix)?;
        Ok(Self {
            prefix: prefix.to_owned(),
            logs: Self::begin_logs(prefix, &run)?,
            report: with_suffix(prefix, ".json"),
            anew_from: LOG_BYTES_MAX,
            run,
        })
    }

    fn append(&mut self, interval: &Interval) -> Result<(), MetricsError> {
        let mut result = Ok(());
        for (log, lines) in self.logs.iter_mut().zip(&interval.lines) {
            log.missed(interval.missed);
            // Every log is written, also after an error of another one.
            result = log.append(lines).and(result);
        }
        result
    }

    /// Sets the logs aside when one of them has become large, and begins new ones.
    fn start_anew_if_large(&mut self) -> Result<(), MetricsError> {
        let Some(large) = self.logs.iter().map(LogFile::bytes).max() else {
            return Ok(());
        };
        if large < self.anew_from {
            return Ok(());
        }
        // While another start looks at the directory, the next interval is early enough.
        let beginning = earlier::try_begin(&self.prefix);
        if let Ok(None) = beginning {
            return Ok(());
        }
        // If that fails, the old ones go on, perhaps under their new names, and it is not tried again soon.
        self.anew_from = large + LOG_BYTES_MAX;
        let _beginning = beginning?;
        set_aside(&self.prefix)?;
        self.logs = Self::begin_logs(&self.prefix, &self.run)?;
        self.anew_from = LOG_BYTES_MAX;
        Ok(())
    }

    fn begin_logs(prefix: &Path, run: &RunDescription) -> Result<Vec<LogFile>, MetricsError> {
        let logs = Phase::ALL.into_iter().map(|phase| {
            let comments = [
                format!(
                    "colo-ring {}: phase {phase}, receiver's clock",
                    env!("CARGO_PKG_VERSION")
                ),
                "values in nanoseconds; Interval_Max in milliseconds; tag: the guest's name, or session-N"
                    .to_owned(),
                format!("machine: {}", run.machine),
                format!("options: {}", run.options),
                "[Histogram log format version 1.3]".to_owned(),
            ];
            let path = with_suffix(prefix, &format!(".{phase}.hlog"));
            LogFile::create(path, &mut Lines::new(), &comments, run.started)
        });
        logs.collect()
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::host::Machine;
    use crate::metrics::Recorder;
    use crate::metrics::test_samples::sample;
    use nix::fcntl::OFlag;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::SystemTime;

    fn run() -> RunDescription {
        RunDescription {
            started: SystemTime::now(),
            options: serde_json::Value::Null,
            machine: Machine::read(),
        }
    }

    fn interval() -> Interval {
        Interval::new(vec![b"line\n".to_vec(); Phase::ALL.len()], true)
    }

    /// A pipe that is full, in the place of a log.
    struct Stuck {
        directory: tempfile::TempDir,
        pipe: File,
    }

    impl Stuck {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("run.pause.hlog");
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
            let mut both = File::options();
            both.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits());
            let pipe = both.open(&path).unwrap();
            Self { directory, pipe }
        }

        fn prefix(&self) -> PathBuf {
            self.directory.path().join("run")
        }

        fn fill(&self) {
            while (&self.pipe).write(b"#").is_ok() {}
        }

        fn empty(&self) {
            while (&self.pipe).read(&mut [0; 4096]).is_ok() {}
        }
    }

    #[test]
    fn what_is_not_written_is_lost_and_counted_and_nothing_waits() {
        let stuck = Stuck::new();
        let writer = Writer::start(&stuck.prefix(), run(), &Threads::free(), drop).unwrap();
        stuck.fill();
        let mut taken = 0;
        while writer.put(interval()) {
            taken += 1;
        }
        // One may be in the thread's hands.
        assert!((WAITING_MAX..=WAITING_MAX + 1).contains(&taken), "{taken}");
        while writer.put(interval()) {}
        let lost = writer.lost();
        assert!((1..=2).contains(&lost), "{lost}");
        // It goes on when it can, and the logs say what is missing.
        stuck.empty();
        while !writer.put(interval()) {
            stuck.empty();
        }
        let log = || std::fs::read_to_string(with_suffix(&stuck.prefix(), ".flush.hlog")).unwrap();
        while !log().contains("intervals are missing here") {
            stuck.empty();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_end_waits_for_the_last_files_but_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::start(None, run(), &Threads::free(), drop).unwrap();
        recorder.record(&sample(1, 1, Duration::from_millis(1)));
        let report = recorder.report(Duration::from_secs(2));
        let writer = Writer::start(&directory.path().join("run"), run(), &Threads::free(), drop).unwrap();
        assert!(writer.put(interval()));
        let (report, written) = writer.finish(Some(interval()), report);
        written.unwrap();
        assert_eq!(report.intervals_lost, 0);

        let stuck = Stuck::new();
        let writer = Writer::start(&stuck.prefix(), run(), &Threads::free(), drop).unwrap();
        stuck.fill();
        assert!(writer.put(interval()));
        let (report, written) = writer.finish_within(Duration::from_millis(50), Some(interval()), report);
        let late = written.unwrap_err().to_string();
        assert!(late.contains("within 50 ms"), "{late}");
        assert_eq!(report.intervals_lost, 2);
    }
}
