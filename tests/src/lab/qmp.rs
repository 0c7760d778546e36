//! The monitor of a QEMU of the laboratory: the command's own client, with the laboratory's errors.

pub use colo_ring_tools::qmp::{Event, Qmp};

use super::LabError;
use colo_ring_tools::qmp::QmpError;

impl From<QmpError> for LabError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Refused { command, description } => Self::Refused {
                command,
                reply: description,
            },
            other => Self::Ended {
                what: "QEMU's monitor".into(),
                detail: other.to_string(),
            },
        }
    }
}
