//! The control thread's work that waits for disks, sockets or memory.
//!
//! Each piece of work has a thread of its own, so that none waits for another. Where the host gives no thread any more (a limit of
//! processes, or no memory for a stack), threads that were made at the start do the work one piece after the other. There is
//! one for each kind of work, so that a failover does not wait for a dump.

use super::services::Work;
use crate::sandbox::ThreadKind;
use crate::threads::Threads;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;

/// What work is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkKind {
    /// The steps of a failover.
    Restore,
    /// A dump.
    Dump,
    /// Releasing the memory of a session that has ended.
    Release,
}

/// Resolves when the work is done, also if it panicked.
pub(super) type Done = oneshot::Receiver<()>;

/// See the module. Its own threads end when it is dropped and what was given to them is done.
pub(super) struct Background {
    restore: Sender<Work>,
    dump: Sender<Work>,
    release: Sender<Work>,
    /// Starts threads for work; none where it may have none of its own.
    threads: Option<Threads>,
}

impl Background {
    /// Starts the threads that do work where no other can be started.
    ///
    /// # Errors
    /// If they cannot be started.
    pub(super) fn start(threads: &Threads) -> io::Result<Self> {
        Ok(Self {
            restore: worker("colo-restore", threads)?,
            dump: worker("colo-dump", threads)?,
            release: worker("colo-release", threads)?,
            threads: Some(threads.clone()),
        })
    }

    /// Does the work on another thread.
    pub(super) fn run(&self, kind: WorkKind, work: impl FnOnce() + Send + 'static) -> Done {
        let (done, when_done) = oneshot::channel::<()>();
        let work: Work = Box::new(move || {
            // Dropped when the work has returned or panicked.
            let _done = done;
            work();
        });
        if let Some(work) = self.start_thread(work) {
            let worker = match kind {
                WorkKind::Restore => &self.restore,
                WorkKind::Dump => &self.dump,
                WorkKind::Release => &self.release,
            };
            // It ends only after this is dropped.
            let _ = worker.send(work);
        }
        when_done
    }

    /// Does the work on a thread of its own, or returns it.
    fn start_thread(&self, work: Work) -> Option<Work> {
        let Some(threads) = &self.threads else {
            return Some(work);
        };
        // A closure that no thread was started for is dropped.
        let shared = Arc::new(Mutex::new(Some(work)));
        let of_thread = shared.clone();
        let take = |work: &Mutex<Option<Work>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = threads.start(ThreadKind::Background, "colo-background", move || {
            if let Some(work) = take(&of_thread) {
                work();
            }
        });
        thread.err().and_then(|_| take(&shared))
    }
}

fn worker(name: &str, threads: &Threads) -> io::Result<Sender<Work>> {
    let (sender, work) = channel::<Work>();
    threads.start(ThreadKind::Background, name, move || {
        for piece in work {
            // The panic hook has reported it, and the next piece is another session's.
            let _ = catch_unwind(AssertUnwindSafe(piece));
        }
    })?;
    Ok(sender)
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// One kind of work that does not end delays no other, and a panic only its own piece.
    #[test]
    fn without_threads_the_kinds_do_not_wait_for_each_other() {
        let background = Background {
            threads: None,
            ..Background::start(&Threads::free()).unwrap()
        };
        let (end_dump, dump_ends) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let mut dump = background.run(WorkKind::Dump, move || assert!(dump_ends.recv().is_err()));
        let panicked = background.run(WorkKind::Restore, || panic!("as the test wants"));
        let restored = background.run(WorkKind::Restore, move || tell.send(7).unwrap());
        assert!(panicked.blocking_recv().is_err());
        assert!(
            restored.blocking_recv().is_err(),
            "nothing is sent, it is dropped"
        );
        assert_eq!(told.recv(), Ok(7));
        assert!(
            dump.try_recv() == Err(oneshot::error::TryRecvError::Empty),
            "it goes on"
        );
        drop(end_dump);
        assert!(dump.blocking_recv().is_err());
    }
}
