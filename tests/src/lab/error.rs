//! What can go wrong in the laboratory.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// A failure of the laboratory; its text is what a failing test shows.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The laboratory was not made.
    #[error("there is no laboratory ({file} is missing): run scripts/qemu-lab")]
    Missing {
        /// The file looked for.
        file: PathBuf,
    },
    /// The test guest cannot be assembled.
    #[error("the test guest cannot be assembled (apt-get install binutils): {detail}")]
    Guest {
        /// What `as` or `ld` said.
        detail: String,
    },
    /// A file, process or socket operation failed.
    #[error("{what}: {source}")]
    Io {
        /// The operation.
        what: String,
        /// Its error.
        source: io::Error,
    },
    /// QEMU refused a QMP command.
    #[error("QEMU refused {command}: {reply}")]
    Refused {
        /// The QMP command.
        command: String,
        /// QEMU's error description.
        reply: String,
    },
    /// Something did not happen in time.
    #[error("timed out after {limit:?} waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The user wants an end.
    #[error("interrupted")]
    Interrupted,
    /// A process or a session ended where it should have gone on.
    #[error("{what}: {detail}")]
    Ended {
        /// What ended.
        what: String,
        /// What it left: exit status, event, the end of its log.
        detail: String,
    },
    /// A QEMU that nothing here has killed.
    #[error("QEMU itself has crashed: {status}")]
    QemuCrashed {
        /// Its exit status, with the signal.
        status: ExitStatus,
    },
    /// An answer is not of the documented form.
    #[error("{what} is not as documented: {detail}")]
    Malformed {
        /// Whose answer.
        what: String,
        /// What is missing or wrong.
        detail: String,
    },
    /// Memory differs where it must be the same.
    #[error("{pages} of {pages_total} pages differ, the first at {first:#x}: {detail}")]
    RamDiffers {
        /// Number of pages that differ.
        pages: u64,
        /// Number of pages compared.
        pages_total: u64,
        /// Guest-physical address of the first one.
        first: u64,
        /// The ranges that differ.
        detail: String,
    },
}

impl LabError {
    /// Wraps an [`io::Error`] with the operation that failed, for `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
