//! A session that goes into a capture file instead of to a secondary: the answers of a secondary are recorded, too.
//!
//! Time is that of the schedule. It does not advance within a checkpoint and during precopy, so that one set of options
//! makes one sequence of records.

use super::SynthError;
use crate::capture_file::{CaptureError, CaptureWriter, ConnectionId, Direction, EndKind, Event};
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The recording, shared by its connections.
#[derive(Clone)]
pub(super) struct Recording(Arc<Mutex<State>>);

struct State {
    /// None once it is finished.
    writer: Option<CaptureWriter>,
    now: Duration,
    connections: u16,
}

impl State {
    fn write(&mut self, event: Event<'_>) -> Result<(), CaptureError> {
        let writer = self.writer.as_mut().ok_or(CaptureError::Ended)?;
        writer.write(self.now, event)
    }
}

impl Recording {
    pub(super) fn new(writer: CaptureWriter) -> Self {
        Self(Arc::new(Mutex::new(State {
            writer: Some(writer),
            now: Duration::ZERO,
            connections: 0,
        })))
    }

    // A thread that panicked while it held this fails whatever uses it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a connection, called `label`.
    pub(super) fn open(&self, label: &str) -> Result<RecordedConnection, SynthError> {
        let mut state = self.state();
        let connection = ConnectionId(state.connections);
        state.write(Event::Open { connection, label })?;
        state.connections += 1;
        let recording = self.clone();
        Ok(RecordedConnection {
            recording,
            connection,
        })
    }

    pub(super) fn now(&self) -> Duration {
        self.state().now
    }

    /// Lets time pass until `then`.
    pub(super) fn pass(&self, then: Duration) {
        self.state().now = then;
    }

    /// Ends all connections, as a primary that is killed does, and the file.
    pub(super) fn finish(&self) -> Result<(), SynthError> {
        let mut state = self.state();
        for connection in (0..state.connections).map(ConnectionId) {
            for direction in Direction::ALL {
                let how = EndKind::Eof;
                state.write(Event::End {
                    connection,
                    direction,
                    how,
                })?;
            }
        }
        let writer = state.writer.take().ok_or(CaptureError::Ended)?;
        writer.finish()?;
        Ok(())
    }
}

/// One connection of it.
#[derive(Clone)]
pub(crate) struct RecordedConnection {
    recording: Recording,
    connection: ConnectionId,
}

impl RecordedConnection {
    /// Records what the primary sends. An error carries a [`CaptureError`].
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        self.data(Direction::ToSecondary, &bytes)
            .map_err(io::Error::other)
    }

    /// Records what the secondary answers.
    pub(super) fn answer(&self, bytes: &[u8]) -> Result<(), CaptureError> {
        self.data(Direction::ToPrimary, bytes)
    }

    fn data(&self, direction: Direction, bytes: &[u8]) -> Result<(), CaptureError> {
        self.recording.state().write(Event::Data {
            connection: self.connection,
            direction,
            bytes,
        })
    }
}

impl std::fmt::Debug for RecordedConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "recorded connection {}", self.connection)
    }
}
