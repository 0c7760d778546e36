//! An error of the kernel, as a value that can be compared and serialized.

use serde::Serialize;
use std::io;
use thiserror::Error;

/// What a system call has returned, by its number. It is serialized as its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{}", io::Error::from_raw_os_error(*.0))]
pub struct OsError(pub i32);

impl From<&io::Error> for OsError {
    /// An error that has no number becomes EIO.
    fn from(error: &io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Serialize for OsError {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
