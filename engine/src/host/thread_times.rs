//! How long the calling thread ran, and how long it could have run and was not let: as the kernel's scheduler counts it.

use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;
use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Of one thread, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ThreadTimes {
    pub(crate) ran: Duration,
    pub(crate) runnable: Duration,
}

thread_local! {
    /// None if it cannot be opened, or says nothing.
    static SCHEDSTAT: OnceCell<Option<File>> = const { OnceCell::new() };
}

/// Lets the calling thread know its times from now on. To be called before it is confined.
///
/// # Errors
/// If the kernel does not say them; [`read`] gives none then.
pub(crate) fn open() -> io::Result<()> {
    // By the path that the sandbox lets it open.
    let path = format!("/proc/self/task/{}/schedstat", gettid());
    let opened = File::open(path).and_then(|file| match runnable(&file) {
        Some(_) => Ok(file),
        None => Err(io::Error::other("the kernel counts nothing there")),
    });
    let (file, result) = match opened {
        Ok(file) => (Some(file), Ok(())),
        Err(error) => (None, Err(error)),
    };
    SCHEDSTAT.with(|known| {
        // A thread opens it once.
        let _ = known.set(file);
    });
    result
}

/// The times of the calling thread; none if it did not [`open`] them. Two system calls of a fraction of a microsecond each.
pub(crate) fn read() -> Option<ThreadTimes> {
    SCHEDSTAT.with(|known| {
        let runnable = runnable(known.get()?.as_ref()?)?;
        let ran = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok()?;
        Some(ThreadTimes {
            ran: ran.into(),
            runnable,
        })
    })
}

/// The second of three numbers: time spent running and waiting to run, in nanoseconds, and how often it was let run.
fn runnable(file: &File) -> Option<Duration> {
    let mut text = [0; 64];
    let length = file.read_at(&mut text, 0).ok()?;
    parse(text.get(..length)?)
}

fn parse(text: &[u8]) -> Option<Duration> {
    let mut numbers = str::from_utf8(text).ok()?.split_ascii_whitespace();
    let ran: u64 = numbers.next()?.parse().ok()?;
    let runnable: u64 = numbers.next()?.parse().ok()?;
    let times: u64 = numbers.next()?.parse().ok()?;
    // Where nothing is counted all three are 0, and a thread that reads has run.
    (ran > 0 || times > 0).then(|| Duration::from_nanos(runnable))
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use crate::host::{allowed_cores, pin};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    #[test]
    fn its_text_is_read() {
        assert_eq!(
            parse(b"371390461 55785844 24\n"),
            Some(Duration::from_nanos(55_785_844))
        );
        for none in [&b"0 0 0\n"[..], b"", b"12", b"1 -2 3", b"a b c", b"\xff"] {
            assert_eq!(parse(none), None);
        }
    }

    #[test]
    fn a_thread_that_does_not_ask_has_no_times() {
        assert_eq!(read(), None);
    }

    /// Two threads that always run on one core: each is kept from it about half of the time.
    #[test]
    fn a_thread_that_is_kept_off_its_core_sees_it() {
        let core = allowed_cores().unwrap()[0];
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(&[core]).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let seen = scope.spawn(|| {
                pin(&[core]).unwrap();
                if let Err(error) = open() {
                    let name = "host::thread_times::tests::a_thread_that_is_kept_off_its_core_sees_it";
                    return colo_ring_skip::skip(name, &format!("the kernel does not say it: {error}"));
                }
                let begin = Instant::now();
                let before = read().unwrap();
                loop {
                    let now = read().unwrap();
                    let kept = now.runnable - before.runnable;
                    // As long as it takes to be seen.
                    if kept > Duration::from_millis(20) {
                        let all = kept + (now.ran - before.ran);
                        assert!(all <= begin.elapsed() + Duration::from_millis(5), "{all:?}");
                        return;
                    }
                    assert!(begin.elapsed() < Duration::from_secs(60), "{now:?}");
                }
            });
            let seen = seen.join();
            stop.store(true, Ordering::Relaxed);
            seen.unwrap();
        });
    }
}
