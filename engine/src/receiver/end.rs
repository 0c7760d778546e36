//! How a session ended.

use super::guest_memory::MemoryError;
use super::guest_rules::NotAllowed;
use crate::budget::BudgetError;
use crate::disk::DiskError;
use crate::session::{self, Ending, GateClosed, SessionError};
use crate::store::StoreError;
use crate::units::ChannelId;
use crate::wire::WireError;
use std::sync::Arc;
use thiserror::Error;

/// The one reason for which a session ended.
#[derive(Debug, Error)]
pub enum SessionEnd {
    /// The primary's connections ended.
    #[error("{0}")]
    PrimaryLost(Ending),
    /// The main connection broke.
    #[error("{ending} (main channel: {error})")]
    Broken {
        /// The error of this host's kernel.
        error: std::io::Error,
        /// What it means for the guest.
        ending: Ending,
    },
    /// Bytes on the main channel that no primary should send.
    #[error("{0}")]
    MainChannel(#[from] SessionError),
    /// Bytes on a multifd channel that no primary should send.
    #[error("{channel}, packet {packet}, byte {position}: {error}")]
    Channel {
        /// The channel.
        channel: ChannelId,
        /// Its packet, counted from 0.
        packet: u64,
        /// Where the packet began, counted from the channel's first byte.
        position: u64,
        /// What is wrong.
        error: ChannelError,
    },
    /// A RAM round ended while a channel was in the middle of a packet (spec §10, quiet channels).
    #[error("{channel}: a packet goes on after the last sync of a checkpoint")]
    NotQuiet {
        /// The channel.
        channel: ChannelId,
    },
    /// A multifd channel connected that does not fit the session's own, before its first checkpoint.
    #[error(
        "another multifd channel of its guest connected ({channel}), so it is not known which of them have the guest's pages: \
         make --channels and the primary's multifd-channels equal, and let only the primary connect to this port"
    )]
    Contradicted {
        /// What it says that it is.
        channel: ChannelId,
    },
    /// The main channel and the multifd channels name different guests.
    #[error("its main channel has another UUID than its multifd channels: they are of two guests")]
    ForeignChannels,
    /// Only the main channel says which guest it is of, and that one has other identities.
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    /// What was taken for the end of the initial device state was none.
    #[error(
        "main channel, byte {position}: the device state goes on behind what looked like its end, so that the first checkpoint is not \
         whole and is not kept. A guest can bring that about; protect it again"
    )]
    FalseEnd {
        /// Where the rest of it begins.
        position: u64,
    },
    /// The device state has no vmdesc, so its end cannot be known (spec §11.3).
    #[error("main channel: {0}")]
    Suppressed(WireError),
    /// All connections came, but nothing that makes them a migration.
    #[error("the main channel sent no list of RAM blocks within {0:?}")]
    Silent(std::time::Duration),
    /// Its first copy stands still.
    #[error("in its first copy the primary sent next to nothing for {0:?} (--precopy-timeout)")]
    NoProgress(std::time::Duration),
    /// Its first copy stands still, and its memory or its place is needed.
    #[error(
        "in its first copy the primary sent next to nothing for {0:?}, and there was no {1} for another guest"
    )]
    MadeRoom(std::time::Duration, &'static str),
    /// The primary does not read messages to it.
    #[error("the primary does not read its answers: {0}")]
    Answer(std::io::Error),
    /// The guest's memory could not be made, or has no room for what arrives.
    #[error("no memory for this guest: {0}")]
    NoMemory(#[from] MemoryError),
    /// A thread or core does not take a channel.
    #[error("a channel cannot be driven: {0}")]
    NotDriven(std::io::Error),
    /// A disk of the guest is not whole any more.
    #[error("{0}")]
    Disk(Arc<DiskError>),
    /// Its checkpoint is given to a fresh QEMU, so nothing more is received from its primary.
    #[error("its checkpoint was claimed by a failover")]
    Promoted,
    /// Its guard was told to end the primary, so that the guest goes on here.
    #[error("its guest was handed over: its guard ended the primary")]
    HandedOver,
    /// Its guard has ended the protection.
    #[error(
        "its guard ended the protection: the guest runs on at its primary, and is ahead of this checkpoint"
    )]
    Unprotected,
    /// Nothing holds the guest's output.
    #[error(
        "nothing would hold its guest's output: its guard was lost in the first copy, or it is not known which of the guards of guests \
         without a UUID is its own. The guest runs on at its primary, unprotected"
    )]
    GuardLost,
    /// A client of the control socket has ended it.
    #[error("it was ended by the operator")]
    Operator,
    /// The receiver was stopped.
    #[error("the receiver was stopped")]
    Stopped,
    /// It was a session of an earlier receiver.
    #[error("its receiver ended; this one has found its checkpoint in the RAM directory")]
    Recovered,
}

impl SessionEnd {
    /// Whether the session ended in an orderly way: by the end of the primary or of the receiver.
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            Self::PrimaryLost(_)
                | Self::Broken { .. }
                | Self::Promoted
                | Self::HandedOver
                | Self::Unprotected
                | Self::Operator
                | Self::Stopped
                | Self::Recovered
        )
    }

    /// Whether the primary was lost, or had to be given up.
    pub(super) fn is_loss(&self) -> bool {
        !matches!(
            self,
            Self::Promoted
                | Self::HandedOver
                | Self::Unprotected
                | Self::GuardLost
                | Self::Operator
                | Self::Stopped
                | Self::Recovered
        )
    }

    /// What the limit over all guests left too little of for it, if it would have that if others made room. Nothing is gained by that
    /// for one that announces more than there can be.
    pub(super) fn lack(&self) -> Option<&BudgetError> {
        match self {
            Self::NoMemory(MemoryError::Budget(lack) | MemoryError::Store(StoreError::Budget(lack))) => {
                Some(lack).filter(|lack| lack.could_fit())
            }
            _ => None,
        }
    }

    /// Whether what was committed is not a checkpoint.
    pub(super) fn spoils_checkpoint(&self) -> bool {
        matches!(self, Self::FalseEnd { .. } | Self::GuardLost)
    }

    /// Whether this receiver may hold the only copy of the guest (spec §5).
    pub(super) fn may_hold_the_only_copy(&self) -> bool {
        let (Self::PrimaryLost(ending) | Self::Broken { ending, .. }) = self else {
            return false;
        };
        *ending == Ending::PlainMigration
    }
}

/// Why a packet ended the session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChannelError {
    /// The packet breaks the protocol.
    #[error(transparent)]
    Protocol(#[from] session::ChannelError),
    /// There is no memory for its pages.
    #[error("{0}")]
    NoMemory(String),
}

impl From<WireError> for ChannelError {
    fn from(error: WireError) -> Self {
        session::ChannelError::from(error).into()
    }
}

impl From<GateClosed> for ChannelError {
    fn from(error: GateClosed) -> Self {
        session::ChannelError::from(error).into()
    }
}

impl From<BudgetError> for ChannelError {
    fn from(error: BudgetError) -> Self {
        Self::NoMemory(error.to_string())
    }
}

impl From<StoreError> for ChannelError {
    fn from(error: StoreError) -> Self {
        Self::NoMemory(error.to_string())
    }
}

impl From<StoreError> for SessionEnd {
    fn from(error: StoreError) -> Self {
        Self::NoMemory(error.into())
    }
}

impl From<Arc<DiskError>> for SessionEnd {
    fn from(error: Arc<DiskError>) -> Self {
        Self::Disk(error)
    }
}
