//! How a session can end, for an operator.

use super::rendezvous::GateClosed;
use crate::units::CheckpointId;
use crate::wire::WireError;
use thiserror::Error;

/// Bytes on the main channel that end the session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("main channel, byte {position}: {error}")]
pub struct SessionError {
    /// Where the element began, counted from the channel's first byte.
    pub position: u64,
    /// What is wrong.
    pub error: WireError,
}

impl SessionError {
    pub(super) fn at(position: u64, error: WireError) -> Self {
        Self { position, error }
    }
}

/// What is wrong with a packet on a multifd channel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChannelError {
    /// The packet itself.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Every channel begins with a SYNC without pages (spec §8.2).
    #[error("the channel's first packet is not a SYNC without pages")]
    NoFirstSync,
    /// The method changes within a session (spec §9).
    #[error("a payload compressed with {seen}, where those before it were compressed with {pinned}")]
    OtherMethod {
        /// The packet's method.
        seen: &'static str,
        /// That of the session's first payload, on whichever channel.
        pinned: &'static str,
    },
    /// Pages after the last sync of a round (spec §10, quiet channels).
    #[error("pages after the last sync of a checkpoint, before the next one was answered")]
    GateClosed,
}

impl From<GateClosed> for ChannelError {
    fn from(_: GateClosed) -> Self {
        Self::GateClosed
    }
}

/// What the loss of the primary means (spec §14.1). A crash, a cut connection and a deliberate takeover look alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Ending {
    /// Before the initial state was complete.
    #[error(
        "the primary went away before its initial state was complete; nothing can be restored here, and its guest, \
         if it still runs, continues there"
    )]
    InPrecopy,
    /// After the initial state, before any checkpoint, from a primary that may not do COLO at all (spec §5).
    #[error(
        "the primary went away after its initial state and before any checkpoint. A plain migration, without the \
         capability x-colo, completes like this: then its guest is stopped there (`cont` resumes it) and stored here \
         (`colo-ring failover` starts it). If the migration was cancelled or lost instead, the guest may run there"
    )]
    PlainMigration,
    /// With nothing in flight.
    #[error("the primary went away; the last committed checkpoint is {last}")]
    BetweenCheckpoints {
        /// What is kept.
        last: CheckpointId,
    },
    /// During a checkpoint, which is dropped.
    #[error("the primary went away during a checkpoint, which is dropped; the last committed one is {last}")]
    DuringCheckpoint {
        /// What is kept.
        last: CheckpointId,
    },
}
