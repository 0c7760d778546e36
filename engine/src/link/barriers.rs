//! The receiver's side of a session's link: which barrier is asked for, and when a checkpoint may be acknowledged.

use super::message::ToGuard;
use crate::canary::{self, Canary};
use crate::units::CheckpointId;
use thiserror::Error;

/// What a guard should not have said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LinkError {
    /// A barrier that was not asked for.
    #[error("it says that barrier {0} is placed, which was not asked for")]
    NotAsked(CheckpointId),
    /// A release before the commit.
    #[error("it says that checkpoint {0} is released, which was not committed")]
    NotCommitted(CheckpointId),
}

/// How far one checkpoint is on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Round {
    checkpoint: CheckpointId,
    is_barrier_sent: bool,
    is_placed: bool,
    is_committed: bool,
    is_commit_sent: bool,
    is_released: bool,
}

/// The state of a link that belongs to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Attached {
    releases_in_pause: bool,
    /// The last checkpoint for which a barrier was asked on this link.
    round: Option<Round>,
}

/// The barriers of one session. Without a link nothing is asked for, and every checkpoint may be acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Barriers {
    attached: Option<Attached>,
}

impl Barriers {
    /// A link belongs to the session from now on, in place of the one before. The next checkpoint whose transfer begins is the
    /// first that waits for it.
    pub fn attach(&mut self, releases_in_pause: bool) {
        self.attached = Some(Attached {
            releases_in_pause,
            round: None,
        });
    }

    /// The link is lost.
    pub fn detach(&mut self) {
        self.attached = None;
    }

    /// Whether a link belongs to the session.
    #[cfg(test)]
    pub(super) fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    /// The primary's guest is stopped for this checkpoint.
    pub fn ask(&mut self, checkpoint: CheckpointId) {
        if let Some(attached) = &mut self.attached {
            attached.round = Some(Round {
                checkpoint,
                is_barrier_sent: false,
                is_placed: false,
                is_committed: canary::is_set(Canary::EarlyCommitted),
                is_commit_sent: false,
                is_released: false,
            });
        }
    }

    /// This checkpoint is committed.
    pub fn committed(&mut self, checkpoint: CheckpointId) {
        if let Some(round) = self.round(checkpoint) {
            round.is_committed = true;
        }
    }

    /// Whether the primary may get LOADED for that checkpoint, so that its guest runs again.
    #[must_use]
    pub fn may_acknowledge(&self, checkpoint: CheckpointId) -> bool {
        let Some(attached) = self.attached else {
            return true;
        };
        // A link that came after the guest was stopped has no part in this checkpoint.
        let Some(round) = attached.round.filter(|round| round.checkpoint == checkpoint) else {
            return true;
        };
        let is_placed = round.is_placed || canary::is_set(Canary::EarlyLoaded);
        is_placed && (round.is_released || !attached.releases_in_pause)
    }

    /// The next message to the guard, if there is one to be sent now.
    pub fn next_message(&mut self) -> Option<ToGuard> {
        let round = self.attached.as_mut()?.round.as_mut()?;
        let checkpoint = round.checkpoint;
        if !round.is_barrier_sent {
            round.is_barrier_sent = true;
            return Some(ToGuard::Barrier { checkpoint });
        }
        // Not before its line is drawn: a guard that hangs would find both when it goes on, and draw the line too late.
        if round.is_committed && round.is_placed && !round.is_commit_sent {
            round.is_commit_sent = true;
            return Some(ToGuard::Committed { checkpoint });
        }
        None
    }

    /// Whether an answer of the guard is missing without which the primary's guest does not run on.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        let Some(Attached {
            releases_in_pause,
            round: Some(round),
        }) = self.attached
        else {
            return false;
        };
        (round.is_barrier_sent && !round.is_placed)
            || (round.is_commit_sent && releases_in_pause && !round.is_released)
    }

    /// The guard has drawn the line.
    ///
    /// # Errors
    /// If it was not asked to.
    pub fn placed(&mut self, checkpoint: CheckpointId) -> Result<(), LinkError> {
        let round = self.round(checkpoint).filter(|round| round.is_barrier_sent);
        round.ok_or(LinkError::NotAsked(checkpoint))?.is_placed = true;
        Ok(())
    }

    /// The guard has let go of what is before the line.
    ///
    /// # Errors
    /// If the checkpoint is not committed.
    pub fn released(&mut self, checkpoint: CheckpointId) -> Result<(), LinkError> {
        let round = self.round(checkpoint).filter(|round| round.is_commit_sent);
        round.ok_or(LinkError::NotCommitted(checkpoint))?.is_released = true;
        Ok(())
    }

    fn round(&mut self, checkpoint: CheckpointId) -> Option<&mut Round> {
        let round = self.attached.as_mut()?.round.as_mut()?;
        (round.checkpoint == checkpoint).then_some(round)
    }
}
