//! Standard error of commands that others wait for: a receiver, a guard, a recorder.
//!
//! Who reads it may stop reading (a stuck collector, Ctrl-S in a terminal), and then a write does not return. So these commands put
//! their lines into a bounded queue, and one thread writes them. A line that finds the queue full is dropped and counted; the
//! count is written once there is a reader again.

use crate::log::{self, Entry, Fields};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Most texts that wait to be written.
const QUEUE_MAX: usize = 1024;

/// Longest text, in bytes.
const TEXT_MAX: usize = 4 << 10;

/// How long the end of the process waits for what is in the queue.
const FLUSH_MAX: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Queue> = OnceLock::new();

struct Queue {
    items: SyncSender<Item>,
    dropped: AtomicU64,
}

enum Item {
    Entry(Entry),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// From now on no write to standard error waits for its reader. The thread that writes calls `enter` first.
///
/// # Errors
/// If the thread that writes cannot be started.
pub(crate) fn never_wait(enter: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (items, received) = sync_channel(QUEUE_MAX);
    let queue = Queue {
        items,
        dropped: AtomicU64::new(0),
    };
    if QUEUE.set(queue).is_ok() {
        let dropped = || {
            QUEUE
                .get()
                .map_or(0, |queue| queue.dropped.swap(0, Ordering::Relaxed))
        };
        let write = move || {
            enter();
            write_all(&received, dropped, &mut io::stderr());
        };
        Builder::new().name("stderr".to_owned()).spawn(write)?;
        std::panic::set_hook(Box::new(report_panic));
    }
    Ok(())
}

/// As Rust's own hook does, but through the queue: a thread that panics has to end.
fn report_panic(info: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let mut text = format!(
        "colo-ring: thread '{}' {info}\n",
        thread.name().unwrap_or("unnamed")
    );
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        let _ = writeln!(text, "{backtrace}");
    }
    if let Some(entry) = log::entry(&shortened(text), Fields::default()) {
        write_entry(entry);
    }
}

/// Writes a text: at once, or through the queue if there is one. If standard error is closed, it has nowhere to go.
pub(crate) fn write(text: String) {
    write_entry(Entry::Text(text));
}

/// The same for a line of the log.
pub(crate) fn write_entry(entry: Entry) {
    let Some(queue) = QUEUE.get() else {
        return put(entry, &mut io::stderr());
    };
    if queue.items.try_send(Item::Entry(entry)).is_err() {
        queue.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// A line of the log that is not too long.
pub(crate) fn shortened(mut line: String) -> String {
    if line.len() > TEXT_MAX {
        let end = (0..=TEXT_MAX).rfind(|end| line.is_char_boundary(*end));
        line.truncate(end.unwrap_or(0));
        line.push('…');
    }
    line
}

fn put(entry: Entry, out: &mut impl Write) {
    match entry {
        Entry::Journal(entry, _) if log::send(&entry) => {}
        Entry::Text(text) | Entry::Journal(_, text) => drop(out.write_all(text.as_bytes())),
    }
}

/// Waits until the queue is written, but not longer than a moment: the process is about to end.
pub(crate) fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (written, is_written) = sync_channel(1);
    let begin = Instant::now();
    let mut item = Item::Flush(written);
    loop {
        match queue.items.try_send(item) {
            Ok(()) => break,
            Err(TrySendError::Full(back)) if begin.elapsed() < FLUSH_MAX => item = back,
            Err(_) => return,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = is_written.recv_timeout(FLUSH_MAX.saturating_sub(begin.elapsed()));
}

fn write_all(items: &Receiver<Item>, take_dropped: impl Fn() -> u64, out: &mut impl Write) {
    for item in items {
        match item {
            Item::Entry(entry) => {
                // It was in a full queue.
                let dropped = take_dropped();
                put(entry, out);
                let missing = format!("warning: standard error was not read: {dropped} lines are missing");
                if let Some(entry) = log::entry(&missing, Fields::default()).filter(|_| dropped > 0) {
                    put(entry, out);
                }
            }
            Item::Flush(written) => drop(written.send(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dropped_is_counted_once() {
        let (items, received) = sync_channel(4);
        for line in ["a\n", "b\n"] {
            items
                .try_send(Item::Entry(Entry::Text(line.to_owned())))
                .ok()
                .unwrap();
        }
        drop(items);
        let dropped = AtomicU64::new(7);
        let mut out = Vec::new();
        write_all(&received, || dropped.swap(0, Ordering::Relaxed), &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "a\nwarning: standard error was not read: 7 lines are missing\nb\n"
        );
    }
}
