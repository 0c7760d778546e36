//! Errors of the monitor's client.

use colo_ring::text::elapsed;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// Why QEMU's monitor could not be used.
#[derive(Debug, Error)]
pub enum QmpError {
    /// No process listens there.
    #[error(
        "cannot connect to QEMU's monitor {}: {source}; QEMU needs -qmp unix:{},server=on,wait=off",
        .path.display(), .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Connected, but no greeting came.
    #[error(
        "QEMU's monitor {} sent no greeting; it serves one client at a time: is another one connected?", .0.display()
    )]
    Busy(PathBuf),
    /// Something else listens there.
    #[error("{} is not QEMU's QMP monitor: it sent {said:?} (a human monitor has mode=readline)", .path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The beginning of what it said.
        said: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own words.
        description: String,
    },
    /// The connection ended.
    #[error("QEMU closed its monitor at {command}: it has ended, or another client has ended it")]
    Closed {
        /// The command that was not answered.
        command: String,
    },
    /// QEMU does not answer.
    #[error("QEMU did not answer {command} within {}", elapsed(*.limit))]
    Timeout {
        /// The command.
        command: String,
        /// How long it was waited for.
        limit: Duration,
    },
}

impl QmpError {
    /// What QEMU said, if it refused a command.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { description, .. } => Some(description),
            _ => None,
        }
    }
}
