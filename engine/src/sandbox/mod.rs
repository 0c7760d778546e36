//! What the threads of a receiver may do, reduced to what they use: system calls by seccomp, files by Landlock, and capabilities.
//!
//! | step | when | what |
//! |---|---|---|
//! | [`Sandbox::begin`] | before the process has a second thread | no new privileges; calls of an intruder end the process |
//! | [`Sandbox::confine_files`] | sockets are bound, threads that open files not started | no file but those of the operator's directories; no TCP port; no connection |
//! | [`Sandbox::enter`] | each thread, once it has what it works with | the capabilities and system calls of its kind |
//!
//! Each step is inherited by the threads that are started after it, and none can be taken back. Threads that start while the receiver
//! runs are started by one thread for all others ([`crate::threads`]), so that the others need no right to.
//!
//! # What a refused call does
//! * A call that no rule of `calls.rs` allows to the thread's kind fails with EPERM, and the kernel logs it (`audit`: the thread's
//!   name and the call's number). The process goes on: it holds the memory of all guests, and the likely cause is a system library that has
//!   learned a new call.
//! * A call that no receiver makes for any reason, and by which an intruder leaves the process (`calls.rs`, `FATAL`), ends it: to run another
//!   program, to debug another process, to mount, to load code into the kernel. Whoever makes it executes code here already and could end the
//!   process anyway; guests run on at their primaries.
//! * A file that is not allowed: EACCES.

mod calls;
mod capabilities;
mod files;
mod filters;
mod kinds;

pub use calls::{Rule, rules};
pub use capabilities::spare_capabilities;
pub use files::{Directories, FileAccess, FileRule, FilesError};
pub use kinds::ThreadKind;

use filters::Filters;
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// Why a step was not done.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The privileges of the process.
    #[error("giving up the right to new privileges: {0}")]
    Privileges(io::Error),
    /// A thread's capabilities.
    #[error("giving up capabilities: {0}")]
    Capabilities(io::Error),
    /// A filter of system calls.
    #[error("a filter of system calls: {0}")]
    Filter(io::Error),
    /// The access to files.
    #[error("access to files: {0}")]
    Files(#[from] FilesError),
}

/// Confines the threads of a receiver, or none. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Sandbox(Option<Arc<Filters>>);

impl Sandbox {
    /// Confines nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// Begins to confine this process, which has one thread. Returns what this host lacks for it beside the sandbox, as texts for the
    /// operator; what is there is used.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn begin() -> Result<(Self, Vec<String>), SandboxError> {
        rustix::thread::set_no_new_privs(true).map_err(|errno| SandboxError::Privileges(errno.into()))?;
        let filters = Filters::compile();
        let mut lacks = Vec::new();
        match filters.begin() {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                lacks.push(
                    "this kernel has no filters of system calls (CONFIG_SECCOMP_FILTER): the receiver's threads may make all of them"
                        .to_owned(),
                );
                return Ok((Self(Some(Arc::new(Filters::none()))), lacks));
            }
            Err(error) => return Err(SandboxError::Filter(error)),
        }
        Ok((Self(Some(Arc::new(filters))), lacks))
    }

    /// What this host lacks to confine a receiver, found by trying it on a thread of its own. Texts for the operator.
    ///
    /// # Errors
    /// If a step fails, or there is no thread.
    pub fn probe() -> Result<Vec<String>, SandboxError> {
        let tried = std::thread::Builder::new().spawn(|| {
            let (sandbox, mut lacks) = Self::begin()?;
            lacks.extend(sandbox.confine_files(&Directories::default().rules())?);
            sandbox.enter(ThreadKind::Worker)?;
            Ok(lacks)
        });
        let panicked = |_| {
            Err(SandboxError::Filter(io::Error::other(
                "the thread that tried it panicked",
            )))
        };
        tried
            .map_err(SandboxError::Filter)?
            .join()
            .unwrap_or_else(panicked)
    }

    /// Whether it confines anything.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// From here on this thread, and those that it starts, can open, make and remove only what these rules allow, bind and connect to no TCP
    /// port, and send no signal to another process. What is open stays open. Returns what this host lacks for it.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn confine_files(&self, rules: &[FileRule]) -> Result<Option<String>, SandboxError> {
        match self.is_on() {
            true => files::confine(rules),
            false => Ok(None),
        }
    }

    /// Confines the calling thread to what its kind may do.
    ///
    /// # Errors
    /// See [`SandboxError`]: it is confined as before then.
    pub fn enter(&self, kind: ThreadKind) -> Result<(), SandboxError> {
        let Some(filters) = &self.0 else {
            return Ok(());
        };
        capabilities::keep(kind.capabilities()).map_err(SandboxError::Capabilities)?;
        filters.enter(kind).map_err(SandboxError::Filter)
    }
}
