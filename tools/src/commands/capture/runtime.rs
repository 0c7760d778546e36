//! The proxy's runtime.

use std::future::Future;
use std::io;

/// Submission entries, tokio-uring's own default.
const ENTRIES: u32 = 256;

/// A runtime of the calling thread: tokio-uring's, or tokio's where io_uring is unavailable: the kernel lacks it, it is
/// disabled, or its memory exceeds `ulimit -l`.
pub(super) enum Runtime {
    Uring(Box<tokio_uring::Runtime>),
    Readiness(tokio::runtime::Runtime),
}

impl Runtime {
    /// The best available, and the error of io_uring if that is not it.
    ///
    /// # Errors
    /// If neither can be made.
    pub(super) fn new() -> io::Result<(Self, Option<io::Error>)> {
        // Probed first: tokio-uring 0.5 leaks what it has allocated by the time that it finds io_uring unavailable. The
        // probing ring is dropped before the next one is made: both may count against one limit.
        let uring = colo_ring::ring::try_set_up(ENTRIES)
            .and_then(|()| tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES)));
        let error = match uring {
            Ok(runtime) => return Ok((Self::Uring(Box::new(runtime)), None)),
            Err(error) => error,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok((Self::Readiness(runtime), Some(error)))
    }

    /// Whether tasks wait with io_uring: see [`super::stream::Stream::new`].
    pub(super) fn is_uring(&self) -> bool {
        matches!(self, Self::Uring(_))
    }

    /// Runs `main` to its end. It may spawn local tasks.
    pub(super) fn block_on<F: Future>(self, main: F) -> F::Output {
        match self {
            Self::Uring(runtime) => runtime.block_on(main),
            Self::Readiness(runtime) => tokio::task::LocalSet::new().block_on(&runtime, main),
        }
    }
}
