//! Which records may follow which: the same rules for writer and reader.

use super::{ConnectionId, Direction, Event};
use schemars::JsonSchema;
use serde::Serialize;
use thiserror::Error;

/// What a whole recording has, as its last record says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Totals {
    /// Records before that one.
    pub records: u64,
    /// Connections that were opened.
    pub connections: u64,
    /// Bytes that the primary sent.
    pub bytes_to_secondary: u64,
    /// Bytes that the secondary sent.
    pub bytes_to_primary: u64,
}

/// Why a record does not fit those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum OrderError {
    /// Connections are numbered in the order of their opening.
    #[error("connection {seen} was opened where {expected} is the next number")]
    Number {
        /// The number that came.
        seen: ConnectionId,
        /// The number that is next.
        expected: usize,
    },
    /// Not opened yet.
    #[error("connection {0} was not opened")]
    NotOpened(ConnectionId),
    /// Nothing follows an end.
    #[error("connection {0} has ended in that direction")]
    Ended(ConnectionId),
    /// Nothing follows the last record.
    #[error("the capture was finished")]
    Finished,
    /// The last record counts differently.
    #[error("{expected:?} were announced at the end, but these are here: {seen:?}")]
    Totals {
        /// What is here.
        seen: Totals,
        /// What was announced.
        expected: Totals,
    },
}

/// What was recorded so far.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Which directions of each connection have ended. Connections come one by one, so its length follows the
    /// records that are really there.
    ended: Vec<[bool; 2]>,
    totals: Totals,
    finished: bool,
}

impl Order {
    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    /// Takes the next record, if it fits.
    pub(super) fn take(&mut self, event: &Event<'_>) -> Result<(), OrderError> {
        if self.finished {
            return Err(OrderError::Finished);
        }
        match *event {
            Event::Open { connection, .. } => self.open(connection)?,
            Event::Data {
                connection,
                direction,
                bytes,
            } => {
                self.running(connection, direction)?;
                let total = match direction {
                    Direction::ToSecondary => &mut self.totals.bytes_to_secondary,
                    Direction::ToPrimary => &mut self.totals.bytes_to_primary,
                };
                *total += bytes.len() as u64;
            }
            Event::End {
                connection,
                direction,
                ..
            } => *self.running(connection, direction)? = true,
            Event::Note(_) => {}
            Event::Finish(expected) => {
                let seen = self.totals;
                if seen != expected {
                    return Err(OrderError::Totals { seen, expected });
                }
                self.finished = true;
                return Ok(());
            }
        }
        self.totals.records += 1;
        Ok(())
    }

    fn open(&mut self, connection: ConnectionId) -> Result<(), OrderError> {
        let expected = self.ended.len();
        if usize::from(connection.0) != expected {
            return Err(OrderError::Number {
                seen: connection,
                expected,
            });
        }
        self.ended.push([false; 2]);
        self.totals.connections += 1;
        Ok(())
    }

    fn running(&mut self, connection: ConnectionId, direction: Direction) -> Result<&mut bool, OrderError> {
        let ended = self.ended.get_mut(usize::from(connection.0));
        match ended.map(|ended| &mut ended[direction.index()]) {
            None => Err(OrderError::NotOpened(connection)),
            Some(true) => Err(OrderError::Ended(connection)),
            Some(running) => Ok(running),
        }
    }
}
