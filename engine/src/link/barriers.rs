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
    /// The end of a QEMU that was not to end.
    #[error("it says that the primary has ended, which it was not told to end")]
    NotLast,
}

/// Why a guest cannot be handed over.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HandoverError {
    /// Nobody beside the primary can end it.
    #[error("no guard of it is linked, and only `colo-ring guard` beside the primary can end that")]
    NoGuard,
    /// One at a time.
    #[error("it is being handed over already")]
    UnderWay,
    /// The guard cannot end its QEMU.
    #[error("its guard cannot end the primary: {0}. The guest runs on there")]
    Refused(String),
    /// The session or the link ended before the guard was told to end the primary.
    #[error("it was given up before the last checkpoint: {0}")]
    GivenUp(String),
    /// The guard was told to end the primary, and did not answer.
    #[error(
        "whether its primary has ended is unknown: {0}. Make sure that it has, then call failover without --planned"
    )]
    Unknown(String),
}

/// How far the handing over of a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Handover {
    /// The guard is to be asked.
    Wanted,
    Asked,
    /// The guard can end its QEMU: the next checkpoint is the last.
    Ready,
    /// This checkpoint is the last.
    Last(CheckpointId),
    /// The guard was told so, and ends its QEMU.
    Told(CheckpointId),
    /// The primary has ended.
    Done(CheckpointId),
}

impl Handover {
    fn last(self) -> Option<CheckpointId> {
        match self {
            Self::Wanted | Self::Asked | Self::Ready => None,
            Self::Last(checkpoint) | Self::Told(checkpoint) | Self::Done(checkpoint) => Some(checkpoint),
        }
    }
}

/// How far one checkpoint is on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Round {
    checkpoint: CheckpointId,
    is_barrier_sent: bool,
    is_placed: bool,
    is_committed: bool,
    is_commit_sent: bool,
}

/// The state of a link that belongs to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Attached {
    /// The last checkpoint for which a barrier was asked on this link.
    round: Option<Round>,
    handover: Option<Handover>,
    /// The guard says when a checkpoint begins.
    keeps: bool,
    /// The next one may begin.
    may_begin: bool,
}

/// The barriers of one session. Without a link nothing is asked for, and every checkpoint may be acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Barriers {
    attached: Option<Attached>,
    /// The primary asks for a checkpoint, whichever link there is, and its guest runs until it is answered.
    is_requested: bool,
    /// The guard's gates are open, until its first line.
    is_open: bool,
}

impl Barriers {
    /// A link belongs to the session from now on, in place of the one before. The next checkpoint whose transfer begins is the
    /// first that waits for it. `is_open`: its guard holds nothing before its first line ([`Wanted::Next`](super::Wanted::Next)).
    pub fn attach(&mut self, is_open: bool) {
        self.is_open = is_open;
        self.attached = Some(Attached {
            round: None,
            handover: None,
            keeps: false,
            may_begin: false,
        });
    }

    /// The link is lost.
    pub fn detach(&mut self) {
        self.attached = None;
    }

    /// Whether the link was lost before its guard has held anything. Then nothing is acknowledged: the guest's output would leave at once.
    #[must_use]
    pub fn is_unguarded(&self) -> bool {
        self.is_open && self.attached.is_none() && !canary::is_set(Canary::UnguardedBeginning)
    }

    /// Whether a link belongs to the session.
    #[cfg(test)]
    pub(super) fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    /// From now on the guard says when a checkpoint begins ([`Self::begin`]): the primary's requests wait for that.
    pub fn keep(&mut self) {
        if let Some(attached) = &mut self.attached {
            attached.keeps = true;
        }
    }

    /// The primary asks for a checkpoint.
    pub fn request(&mut self) {
        self.is_requested = true;
    }

    /// Whether the primary's request may be answered, so that its guest stops.
    #[must_use]
    pub fn may_begin(&self) -> bool {
        self.attached.is_none_or(|attached| {
            let is_last = attached.handover == Some(Handover::Ready);
            !attached.keeps || attached.may_begin || is_last
        })
    }

    /// The guard wants the checkpoint that follows this one; none if no barrier was asked for on this link. One that has begun meanwhile
    /// has in it what the guard wants it for.
    pub fn begin(&mut self, after: Option<CheckpointId>) {
        if let Some(attached) = &mut self.attached
            && attached.round.map(|round| round.checkpoint) == after
        {
            attached.may_begin = true;
        }
    }

    /// The primary's request has waited for as long as the guard allows.
    pub fn begin_now(&mut self) {
        if let Some(attached) = &mut self.attached
            && !canary::is_set(Canary::EndlessKeep)
        {
            attached.may_begin = true;
        }
    }

    /// Whether a request of the primary waits for [`Self::begin`].
    #[must_use]
    pub fn keeps_request(&self) -> bool {
        self.is_requested && !self.may_begin()
    }

    /// The primary's guest is stopped for this checkpoint.
    pub fn ask(&mut self, checkpoint: CheckpointId) {
        self.is_requested = false;
        if let Some(attached) = &mut self.attached {
            if attached.handover == Some(Handover::Ready) {
                attached.handover = Some(Handover::Last(checkpoint));
            }
            attached.may_begin = false;
            attached.round = Some(Round {
                checkpoint,
                is_barrier_sent: false,
                is_placed: false,
                is_committed: canary::is_set(Canary::EarlyCommitted),
                is_commit_sent: false,
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
            return !self.is_unguarded();
        };
        // A link that came after the guest was stopped has no part in this checkpoint.
        let Some(round) = attached.round.filter(|round| round.checkpoint == checkpoint) else {
            return true;
        };
        if attached.handover.and_then(Handover::last).is_some() && !canary::is_set(Canary::TwoGuests) {
            return false;
        }
        round.is_placed || canary::is_set(Canary::EarlyLoaded)
    }

    /// The next message to the guard, if there is one to be sent now.
    pub fn next_message(&mut self) -> Option<ToGuard> {
        let attached = self.attached.as_mut()?;
        if attached.handover == Some(Handover::Wanted) {
            attached.handover = Some(Handover::Asked);
            return Some(ToGuard::Handover);
        }
        if let Some(Handover::Last(checkpoint)) = attached.handover
            && attached.round.is_some_and(|round| round.is_commit_sent)
        {
            attached.handover = Some(Handover::Told(checkpoint));
            return Some(ToGuard::Last { checkpoint });
        }
        let round = attached.round.as_mut()?;
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
            round: Some(round),
            handover,
            ..
        }) = self.attached
        else {
            return false;
        };
        matches!(handover, Some(Handover::Told(_))) || (round.is_barrier_sent && !round.is_placed)
    }

    /// The guard has drawn the line.
    ///
    /// # Errors
    /// If it was not asked to.
    pub fn placed(&mut self, checkpoint: CheckpointId) -> Result<(), LinkError> {
        let round = self.round(checkpoint).filter(|round| round.is_barrier_sent);
        round.ok_or(LinkError::NotAsked(checkpoint))?.is_placed = true;
        self.is_open = false;
        Ok(())
    }

    /// The guest is to go on here: its guard is asked for a last checkpoint and the end of the primary.
    ///
    /// # Errors
    /// If there is no guard, or it is asked already.
    pub fn begin_handover(&mut self) -> Result<(), HandoverError> {
        let attached = self.attached.as_mut().ok_or(HandoverError::NoGuard)?;
        match attached.handover {
            None => attached.handover = Some(Handover::Wanted),
            Some(_) => return Err(HandoverError::UnderWay),
        }
        Ok(())
    }

    /// The guest stays where it is, unless its last checkpoint has begun. Whether that is so.
    pub fn cancel_handover(&mut self) -> bool {
        let Some(attached) = &mut self.attached else {
            return true;
        };
        let is_cancelled = attached.handover.and_then(Handover::last).is_none();
        if is_cancelled {
            attached.handover = None;
        }
        is_cancelled
    }

    /// The session has ended: a guard that was not told to end the primary must not be told any more.
    pub fn session_ended(&mut self) {
        if let Some(attached) = &mut self.attached
            && !matches!(attached.handover, Some(Handover::Told(_) | Handover::Done(_)))
        {
            attached.handover = None;
        }
    }

    /// The guard can end the primary. One that was asked in vain says it in vain.
    pub fn handover_ready(&mut self) {
        if let Some(attached) = &mut self.attached
            && attached.handover == Some(Handover::Asked)
        {
            attached.handover = Some(Handover::Ready);
        }
    }

    /// The guard cannot end the primary. Whether that ends a handing over.
    pub fn handover_refused(&mut self) -> bool {
        let handover = self
            .attached
            .as_mut()
            .and_then(|attached| attached.handover.take());
        handover.is_some()
    }

    /// The guard has ended the primary. Returns the last checkpoint.
    ///
    /// # Errors
    /// If it was not told to.
    pub fn primary_ended(&mut self) -> Result<CheckpointId, LinkError> {
        match &mut self.attached {
            Some(Attached {
                handover: Some(handover @ Handover::Told(_)),
                ..
            }) => {
                let checkpoint = handover.last().ok_or(LinkError::NotLast)?;
                *handover = Handover::Done(checkpoint);
                Ok(checkpoint)
            }
            _ => Err(LinkError::NotLast),
        }
    }

    /// Whether the guard was told to end the primary, and has not answered.
    #[must_use]
    pub fn awaits_end(&self) -> bool {
        let handover = self.attached.and_then(|attached| attached.handover);
        matches!(handover, Some(Handover::Told(_)))
    }

    fn round(&mut self, checkpoint: CheckpointId) -> Option<&mut Round> {
        let round = self.attached.as_mut()?.round.as_mut()?;
        (round.checkpoint == checkpoint).then_some(round)
    }
}
