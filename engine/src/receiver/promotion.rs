//! Whose the checkpoint of a session is: a state machine, so that one failover wins.
//!
//! ```text
//!          claim                    whole stream written            promoted
//!  Here ──────────────► Claimed ────────────────────────► Given ───────────────► Promoted
//!   ▲                      │                                │  ▲                 (memory is given up)
//!   │ release, or the      │                                │  │ its conversation ended without a word:
//!   └──────────────────────┘                                │  │ nobody knows whether a guest runs from it
//!   ▲                         release: no guest has run     │  │
//!   └───────────────────────────────────────────────────────┘  └─ Given by nobody ── claim with retry ──► Claimed
//! ```
//!
//! A claim belongs to a conversation on the control socket and ends with it, so that a failover that is killed
//! blocks nobody. Once the whole stream has been written a guest may run from it, and only word of mouth can say that
//! none does.
#![forbid(unsafe_code)]

/// A conversation on the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientId(pub(super) u64);

impl ClientId {
    /// That of the process itself, which never ends.
    pub(super) const OWN: Self = Self(0);
}

/// Whose the checkpoint is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Promotion {
    /// The receiver's.
    #[default]
    Here,
    /// A failover is under way; nothing was given yet.
    Claimed(ClientId),
    /// The whole stream was written. Who wrote it is to say what became of it; `None` if it cannot any more.
    Given { by: Option<ClientId>, to: String },
    /// A guest runs from it: nothing may ever be done with it again.
    Promoted,
}

impl Promotion {
    /// Claims the checkpoint. With `retry` also one that was given away and of which nobody has said what became.
    pub(super) fn claim(&mut self, by: ClientId, retry: bool) -> Result<(), String> {
        match self {
            Self::Here => {}
            Self::Given { by: None, .. } if retry => {}
            Self::Given { by: None, to } => {
                return Err(format!(
                    "its checkpoint was given to {to} before, and nobody has said whether a guest runs from it. If one \
                     does, `colo-ring discard` ends this; if you have made sure that none does or ever did, --retry \
                     gives it again"
                ));
            }
            Self::Claimed(_) | Self::Given { .. } => {
                return Err("another failover of it is under way".to_owned());
            }
            Self::Promoted => return Err("it was promoted: its guest runs elsewhere".to_owned()),
        }
        *self = Self::Claimed(by);
        Ok(())
    }

    /// Whether this conversation has claimed the checkpoint and not yet given it away.
    pub(super) fn check_claimed(&self, by: ClientId) -> Result<(), String> {
        match self {
            Self::Claimed(claimed) if *claimed == by => Ok(()),
            _ => Err("it was not claimed by this conversation".to_owned()),
        }
    }

    /// It was given away, and who did it is gone.
    pub(super) fn was_given(&mut self, to: &str) {
        let to = to.to_owned();
        *self = Self::Given { by: None, to };
    }

    /// The whole stream was written to `to`.
    pub(super) fn given(&mut self, by: ClientId, to: String) {
        if *self == Self::Claimed(by) {
            *self = Self::Given { by: Some(by), to };
        }
    }

    /// The failover is over without success. `may_have_run`: whether a guest may have run from what was given.
    pub(super) fn release(&mut self, by: ClientId, may_have_run: bool) -> Result<(), String> {
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

    /// A guest runs from what this conversation has given.
    pub(super) fn promoted(&mut self, by: ClientId) -> Result<(), String> {
        match self {
            Self::Given { by: giver, .. } if *giver == Some(by) => {
                *self = Self::Promoted;
                Ok(())
            }
            _ => Err("nothing was given by this conversation".to_owned()),
        }
    }

    /// A conversation is over.
    pub(super) fn left(&mut self, by: ClientId) {
        match self {
            Self::Claimed(claimed) if *claimed == by => *self = Self::Here,
            Self::Given { by: giver, .. } if *giver == Some(by) => *giver = None,
            _ => {}
        }
    }

    /// Whether the checkpoint may be read or given up: no failover is under way, and no guest runs on its memory.
    pub(super) fn check_idle(&self) -> Result<(), String> {
        match self {
            Self::Here | Self::Given { by: None, .. } => Ok(()),
            Self::Claimed(_) | Self::Given { .. } => Err("a failover of it is under way".to_owned()),
            Self::Promoted => Err("it was promoted: its guest runs elsewhere".to_owned()),
        }
    }

    /// In words, if there is something to say.
    pub(super) fn words(&self) -> Option<String> {
        match self {
            Self::Here => None,
            Self::Claimed(_) => Some("a failover is under way".to_owned()),
            Self::Given { by: Some(_), to } => Some(format!("it was given to {to}, which is loading it")),
            Self::Given { by: None, to } => Some(format!(
                "it was given to {to}; nobody has said whether a guest runs from it"
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
        promotion.given(ONE, "unix:/q".into());
        promotion
    }

    #[test]
    fn one_failover_wins() {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        assert!(
            promotion
                .claim(TWO, true)
                .unwrap_err()
                .contains("another failover")
        );
        assert!(promotion.check_claimed(TWO).is_err() && promotion.check_claimed(ONE).is_ok());
        assert!(promotion.release(TWO, false).is_err());
        // Not before it has given it to somebody.
        assert!(promotion.promoted(ONE).is_err());
        promotion.given(TWO, "unix:/x".into());
        assert_eq!(promotion, Promotion::Claimed(ONE));
        promotion.given(ONE, "unix:/q".into());
        for retry in [false, true] {
            assert!(
                promotion
                    .claim(TWO, retry)
                    .unwrap_err()
                    .contains("another failover")
            );
        }
        assert!(promotion.promoted(TWO).is_err());
        promotion.promoted(ONE).unwrap();
        for retry in [false, true] {
            assert!(promotion.claim(TWO, retry).unwrap_err().contains("was promoted"));
        }
        assert!(promotion.check_idle().is_err() && promotion.release(ONE, false).is_err());
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
    fn a_failover_that_dies_blocks_nobody_and_starts_no_second_guest() {
        let mut promotion = Promotion::Here;
        promotion.claim(ONE, false).unwrap();
        promotion.left(TWO);
        promotion.left(ONE);
        assert_eq!(promotion, Promotion::Here);
        for end in [
            |p: &mut Promotion| p.left(ONE),
            |p: &mut Promotion| p.release(ONE, true).unwrap(),
        ] {
            let mut promotion = given();
            end(&mut promotion);
            let refused = promotion.claim(TWO, false).unwrap_err();
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
