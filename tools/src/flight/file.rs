//! A flight recorder's file: the one in a RAM directory, or one that `slow --save` has written.

use colo_ring::store::{FLIGHT_CHECKPOINTS, FlightError, FlightLog, ring_bytes};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Bytes of a recorder at most: of twice as many checkpoints as there are.
const FILE_BYTES_MAX: u64 = ring_bytes(2 * FLIGHT_CHECKPOINTS);

/// Why a flight recorder's file was not read.
#[derive(Debug, Error)]
pub enum FlightFileError {
    /// The system's error.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in it.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FlightError,
    },
}

/// Whether a file begins as one.
///
/// # Errors
/// If it cannot be read.
pub fn is_one(path: &Path) -> Result<bool, FlightFileError> {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
    match read {
        Ok(_) => Ok(FlightLog::is_one(&start)),
        Err(source) => Err(FlightFileError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Reads one.
///
/// # Errors
/// If it cannot be read, or is none. Damaged records are counted.
pub fn read(path: &Path) -> Result<FlightLog, FlightFileError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|source| FlightFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    FlightLog::parse(&bytes).map_err(|source| FlightFileError::Content {
        path: path.to_owned(),
        source,
    })
}
