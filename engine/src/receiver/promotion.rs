//! The promotion of a session's checkpoint, as a state machine: one failover wins.
//!
//! ```text
//!          claim                    whole stream written            promoted
//!  Here ──────────────► Claimed ────────────────────────► Given ───────────────► Promoted
//!   ▲                      │                                │  ▲                 (memory is given up)
//!   │ release, or its      │                                │  │ its client disconnected without a report:
//!   │ client disconnected  │                                │  │ whether a guest runs from it is unknown
//!   └──────────────────────┘                                │  │
//!   ▲                         release: no guest has run     │  │
//!   └───────────────────────────────────────────────────────┘  └─ Given, unreported ── claim with retry ──► Claimed
//! ```
//!
//! A claim belongs to a client of the control socket and ends with its connection, so that a killed failover does not
//! block the next. Once the whole stream has been written a guest may run from it, and only the operator can know that
//! none does.

use thiserror::Error;

/// Why a checkpoint cannot be promoted, dumped or discarded now.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PromotionError {
    /// It was given away, and what became of it is unknown.
    #[error(
        "its checkpoint was given to {0} before, and it is unknown whether a guest runs from it. If one does, \
         `colo-ring discard` ends this; if you have made sure that none does or ever did, --retry restores it again"
    )]
    Unreported(String),
    /// A guest may run on its memory itself.
    #[error(
        "its memory itself was given to {0} before, and it is unknown whether a guest runs on it and changes it: a dump would be of no \
         checkpoint. If you have made sure that none does or ever did, `colo-ring failover --retry` restores it, to a file too"
    )]
    MayRun(String),
    /// Another client has claimed it.
    #[error("another failover of it is under way")]
    ClaimedByOther,
    /// A client has claimed it.
    #[error("a failover of it is under way")]
    InProgress,
    /// A guest runs from it.
    #[error("it was promoted: its guest runs elsewhere")]
    Promoted,
    /// The client has no claim.
    #[error("this client has not claimed it")]
    NotClaimed,
    /// The client has not restored it.
    #[error("this client has not restored it")]
    NotGiven,
}

/// A client of the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientId(pub(super) u64);

impl ClientId {
    /// The process itself, which never disconnects.
    pub(super) const OWN: Self = Self(0);
}

/// What a QEMU was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// A copy of the checkpoint.
    Copy,
    /// The image itself, which its guest changes.
    Image,
}

/// The state of a checkpoint's promotion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Promotion {
    /// None is in progress, and no guest runs from it.
    #[default]
    Here,
    /// A failover is in progress; nothing was given yet.
    Claimed(ClientId),
    /// The whole stream was written to `to`. `by` is the client that will report the result; none if it has disconnected.
    Given {
        by: Option<ClientId>,
        to: String,
        memory: Given,
    },
    /// A guest runs from it: it must never be used again.
    Promoted,
}

impl Promotion {
    /// Claims the checkpoint. With `retry` also one that was given away with unknown result.
    ///
    /// # Errors
    /// If it is not free.
    pub(super) fn claim(&mut self, by: ClientId, retry: bool) -> Result<(), PromotionError> {
        match self {
            Self::Here => {}
            Self::Given { by: None, .. } if retry => {}
            Self::Given { by: None, to, .. } => return Err(PromotionError::Unreported(to.clone())),
            Self::Claimed(_) | Self::Given { .. } => return Err(PromotionError::ClaimedByOther),
            Self::Promoted => return Err(PromotionError::Promoted),
        }
        *self = Self::Claimed(by);
        Ok(())
    }

    /// Checks that this client has claimed the checkpoint and not yet given it away.
    ///
    /// # Errors
    /// If it has not.
    pub(super) fn check_claimed(&self, by: ClientId) -> Result<(), PromotionError> {
        match self {
            Self::Claimed(claimed) if *claimed == by => Ok(()),
            _ => Err(PromotionError::NotClaimed),
        }
    }

    /// It was given away by an earlier receiver, whose record does not say in which form: perhaps the image itself.
    pub(super) fn was_given(&mut self, to: &str) {
        *self = Self::Given {
            by: None,
            to: to.to_owned(),
            memory: Given::Image,
        };
    }

    /// The whole stream was written to `to`.
    pub(super) fn given(&mut self, by: ClientId, to: String, memory: Given) {
        if *self == Self::Claimed(by) {
            *self = Self::Given {
                by: Some(by),
                to,
                memory,
            };
        }
    }

    /// The failover has failed. `may_have_run`: whether a guest may have run from what was given.
    ///
    /// # Errors
    /// If this client has no claim.
    pub(super) fn release(&mut self, by: ClientId, may_have_run: bool) -> Result<(), PromotionError> {
        match self {
            Self::Claimed(claimed) if *claimed == by => *self = Self::Here,
            Self::Given { by: giver, .. } if *giver == Some(by) => match may_have_run {
                true => *giver = None,
                false => *self = Self::Here,
            },
            _ => return self.check_claimed(by),
        }
        Ok(())
    }

    /// A guest runs from what this client has given.
    ///
    /// # Errors
    /// If it has given nothing.
    pub(super) fn promoted(&mut self, by: ClientId) -> Result<(), PromotionError> {
        match self {
            Self::Given { by: giver, .. } if *giver == Some(by) => {
                *self = Self::Promoted;
                Ok(())
            }
            _ => Err(PromotionError::NotGiven),
        }
    }

    /// A client has disconnected.
    pub(super) fn disconnected(&mut self, by: ClientId) {
        match self {
            Self::Claimed(claimed) if *claimed == by => *self = Self::Here,
            Self::Given { by: giver, .. } if *giver == Some(by) => *giver = None,
            _ => {}
        }
    }

    /// Checks that the checkpoint may be discarded: no failover is in progress, and no guest is known to run from it. Whether one does after a
    /// failover without a report only the operator can know.
    ///
    /// # Errors
    /// If it may not.
    pub(super) fn check_idle(&self) -> Result<(), PromotionError> {
        match self {
            Self::Here | Self::Given { by: None, .. } => Ok(()),
            Self::Claimed(_) | Self::Given { .. } => Err(PromotionError::InProgress),
            Self::Promoted => Err(PromotionError::Promoted),
        }
    }

    /// Checks that the checkpoint may be read: it may be discarded, and no guest can run on its memory itself.
    ///
    /// # Errors
    /// If it may not.
    pub(super) fn check_readable(&self) -> Result<(), PromotionError> {
        match self {
            Self::Given {
                by: None,
                to,
                memory: Given::Image,
            } => Err(PromotionError::MayRun(to.clone())),
            _ => self.check_idle(),
        }
    }

    /// Whether no guest can have written to its disks: no failover has begun since it was committed, but such that gave it back.
    pub(super) fn is_here(&self) -> bool {
        *self == Self::Here
    }

    /// For the status; none if no promotion was tried.
    pub(super) fn description(&self) -> Option<String> {
        match self {
            Self::Here => None,
            Self::Claimed(_) => Some("a failover is under way".to_owned()),
            Self::Given { by: Some(_), to, .. } => Some(format!("it was given to {to}, which is loading it")),
            Self::Given { by: None, to, .. } => Some(format!(
                "it was given to {to}; it is unknown whether a guest runs from it"
            )),
            Self::Promoted => Some("it was promoted: its guest runs elsewhere".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ClientId = ClientId(1);
    const TWO: ClientId = ClientId(2);

    fn given() -> Promotion {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        promotion.given(ONE, "unix:/q".into(), Given::Copy);
        promotion
    }

    #[test]
    fn one_failover_wins() {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        assert_eq!(promotion.claim(TWO, true), Err(PromotionError::ClaimedByOther));
        assert!(promotion.check_claimed(TWO).is_err() && promotion.check_claimed(ONE).is_ok());
        assert!(promotion.release(TWO, false).is_err());
        // Not before it has given it away.
        assert!(promotion.promoted(ONE).is_err());
        promotion.given(TWO, "unix:/x".into(), Given::Copy);
        assert_eq!(promotion, Promotion::Claimed(ONE));
        promotion.given(ONE, "unix:/q".into(), Given::Copy);
        for retry in [false, true] {
            assert_eq!(promotion.claim(TWO, retry), Err(PromotionError::ClaimedByOther));
        }
        assert!(promotion.promoted(TWO).is_err());
        promotion.promoted(ONE).unwrap();
        for retry in [false, true] {
            assert_eq!(promotion.claim(TWO, retry), Err(PromotionError::Promoted));
        }
        assert!(promotion.check_idle().is_err() && promotion.release(ONE, false).is_err());
    }

    /// A QEMU that maps the image changes it as soon as its guest runs, whether or not that was reported.
    #[test]
    fn what_a_guest_may_change_is_not_read() {
        let mut promotion = given();
        assert_eq!(promotion.check_readable(), Err(PromotionError::InProgress));
        promotion.disconnected(ONE);
        assert_eq!(promotion.check_readable(), Ok(()), "it has a copy");
        let mut mapped = Promotion::Here;
        mapped.claim(ONE, false).unwrap();
        mapped.given(ONE, "unix:/q".into(), Given::Image);
        mapped.disconnected(ONE);
        let mut of_earlier = Promotion::Here;
        of_earlier.was_given("a QEMU");
        for mut promotion in [mapped, of_earlier] {
            let refused = promotion.check_readable().unwrap_err().to_string();
            assert!(refused.contains("would be of no checkpoint"), "{refused}");
            assert!(promotion.check_idle().is_ok(), "it can be discarded");
            // The operator says that none has run.
            promotion.claim(TWO, true).unwrap();
            promotion.release(TWO, false).unwrap();
            assert_eq!(promotion.check_readable(), Ok(()));
        }
    }

    #[test]
    fn a_failed_attempt_leaves_the_checkpoint_here() {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        promotion.release(ONE, false).unwrap();
        assert_eq!(promotion, Promotion::Here);
        let mut promotion = given();
        promotion.release(ONE, false).unwrap();
        assert_eq!(promotion, Promotion::Here);
    }

    #[test]
    fn a_killed_failover_does_not_block_the_next_and_starts_no_second_guest() {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        promotion.disconnected(TWO);
        promotion.disconnected(ONE);
        assert_eq!(promotion, Promotion::Here);
        for end in [
            |p: &mut Promotion| p.disconnected(ONE),
            |p: &mut Promotion| p.release(ONE, true).unwrap(),
        ] {
            let mut promotion = given();
            end(&mut promotion);
            let refused = promotion.claim(TWO, false).unwrap_err().to_string();
            assert!(
                refused.contains("unix:/q") && refused.contains("--retry"),
                "{refused}"
            );
            assert!(promotion.check_idle().is_ok(), "it can be discarded");
            promotion.claim(TWO, true).unwrap();
            assert_eq!(promotion, Promotion::Claimed(TWO));
        }
    }
}
