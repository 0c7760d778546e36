//! Copying a session's flight recorder to a file that a client has opened.

use super::kept_checkpoint::KeptCheckpoint;
use crate::store::NoFlight;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use thiserror::Error;

/// A recorder that was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedFlight {
    /// The session.
    #[serde(rename = "recorder")]
    pub session: u32,
}

/// Why a flight recorder was not copied.
#[derive(Debug, Error)]
pub enum FlightCopyError {
    /// Another number of files than the request needs.
    #[error("the recorder is copied to one open file that comes with the request, and {0} came")]
    Files(usize),
    /// A pipe, for example: a reader that does not read would hold the thread, and the end of the receiver.
    #[error("the recorder is copied to a regular file, and something else was opened")]
    NotRegular,
    /// There is none.
    #[error(transparent)]
    None(#[from] NoFlight),
    /// The file was not written.
    #[error("the copy of the recorder: {0}")]
    File(#[from] io::Error),
}

/// Copies the recorder of a checkpoint's session, while that may go on.
///
/// # Errors
/// See [`FlightCopyError`]. Something may have been written then.
pub(super) fn copy_flight(
    checkpoint: &KeptCheckpoint,
    files: Vec<OwnedFd>,
) -> Result<CopiedFlight, FlightCopyError> {
    let [file] = <[OwnedFd; 1]>::try_from(files).map_err(|files| FlightCopyError::Files(files.len()))?;
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(FlightCopyError::NotRegular);
    }
    let flight = checkpoint.image.flight()?;
    let mut out = BufWriter::new(file);
    flight.write_to(&mut out)?;
    out.flush()?;
    Ok(CopiedFlight {
        session: checkpoint.session,
    })
}
