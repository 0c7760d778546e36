//! What tasks wait with.
#![forbid(unsafe_code)]

use std::future::Future;
use std::io;

/// A runtime of the calling thread: tokio-uring's, or of readiness where io_uring is not to be had: the kernel has none, it
/// is disabled, or its memory does not fit `ulimit -l`.
pub struct Runtime(Kind);

/// Submission entries, tokio-uring's own default.
const ENTRIES: u32 = 256;

enum Kind {
    Uring(Box<tokio_uring::Runtime>),
    Readiness(tokio::runtime::Runtime),
}

impl Runtime {
    /// The best that is to be had, and why it is not io_uring, if it is not: to be told.
    ///
    /// # Errors
    /// If neither is.
    pub fn new() -> io::Result<(Self, Option<io::Error>)> {
        // Asked first: where there is no io_uring, tokio-uring 0.5 does not free what it has made until it finds out.
        // The ring that finds it out is gone before the next one is made: both may count against one limit.
        let uring = io_uring::IoUring::new(ENTRIES)
            .map(drop)
            .and_then(|()| tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES)));
        let error = match uring {
            Ok(runtime) => return Ok((Self(Kind::Uring(Box::new(runtime))), None)),
            Err(error) => error,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok((Self(Kind::Readiness(runtime)), Some(error)))
    }

    /// Whether tasks wait with io_uring; [`super::Stream`] and [`super::Listener`] want to know.
    pub fn is_uring(&self) -> bool {
        matches!(self.0, Kind::Uring(_))
    }

    /// Runs `main` to its end. It may spawn local tasks.
    pub fn block_on<F: Future>(self, main: F) -> F::Output {
        match self.0 {
            Kind::Uring(runtime) => runtime.block_on(main),
            Kind::Readiness(runtime) => tokio::task::LocalSet::new().block_on(&runtime, main),
        }
    }
}
