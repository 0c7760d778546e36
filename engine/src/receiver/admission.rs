//! Admission: whether a session may commit for the first time.
//!
//! A session begins with the connections that came first, and one more may be on its way: a channel that the receiver does not
//! expect, or the primary's own where a stranger's was taken for it. A primary sends no page before all of its channels are
//! connected, so that all of them are at least in the listener's queue when the session sees the first sync. The session asks
//! then, and the control thread admits it when it has identified every connection that was accepted before. A connection that
//! contradicts the set refuses the session instead: pages of a channel that is missing, or that is not the primary's, are never in
//! a committed image.
//!
//! ```text
//!            core                control                  core
//!  NotAsked ──────► Asked ──────────────► Admitted ──────────────► Committing
//!      └──────────────┴──────── control ──────┴──► Refused
//! ```

use crate::canary::{self, Canary};
use crate::units::ChannelId;
use std::sync::atomic::{AtomicU16, Ordering};

const NOT_ASKED: u16 = 0;
const ASKED: u16 = 1;
const ADMITTED: u16 = 2;
const COMMITTING: u16 = 3;
/// With the number of the channel in its low byte.
const REFUSED: u16 = 0x100;

/// Shared by the driver of the main channel, which asks and commits, and the control thread, which admits or refuses.
#[derive(Debug, Default)]
pub(super) struct Admission(AtomicU16);

impl Admission {
    fn change(&self, from: u16, to: u16) -> bool {
        let changed = self
            .0
            .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
        changed.is_ok()
    }

    /// Asks for it. True for the first time: the control thread has to be notified.
    pub(super) fn ask(&self) -> bool {
        self.change(NOT_ASKED, ASKED)
    }

    /// Whether the session has asked, and the control thread has not decided.
    pub(super) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed) == ASKED
    }

    /// Lets the session commit, if it waits for that. Its main channel has to be woken.
    pub(super) fn admit(&self) {
        self.change(ASKED, ADMITTED);
    }

    /// Whether the control thread has decided.
    pub(super) fn is_decided(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= ADMITTED || canary::is_set(Canary::EarlyAdmission)
    }

    /// Refuses the session because of this channel. False if it is too late, because it commits or was refused before.
    pub(super) fn refuse(&self, channel: ChannelId) -> bool {
        let refused = REFUSED | u16::from(channel.0);
        [NOT_ASKED, ASKED, ADMITTED]
            .into_iter()
            .any(|from| self.change(from, refused))
    }

    /// From now on the session cannot be refused.
    ///
    /// # Errors
    /// The channel for which it was refused.
    pub(super) fn begin_commit(&self) -> Result<(), ChannelId> {
        if canary::is_set(Canary::EarlyAdmission) {
            self.change(ASKED, ADMITTED);
        }
        if self.change(ADMITTED, COMMITTING) || self.has_begun() {
            return Ok(());
        }
        let [_, channel] = self.0.load(Ordering::Relaxed).to_be_bytes();
        Err(ChannelId(channel))
    }

    /// Whether the session has begun to commit.
    pub(super) fn has_begun(&self) -> bool {
        self.0.load(Ordering::Relaxed) == COMMITTING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_refused_or_commits() {
        let admission = Admission::default();
        admission.admit();
        assert!(!admission.is_decided(), "it has not asked");
        assert!(admission.ask() && !admission.ask() && admission.is_asked());
        admission.admit();
        assert!(admission.is_decided() && !admission.has_begun());
        assert_eq!(admission.begin_commit(), Ok(()));
        assert_eq!(admission.begin_commit(), Ok(()));
        assert!(!admission.refuse(ChannelId(7)));

        let admission = Admission::default();
        admission.ask();
        admission.admit();
        assert!(admission.refuse(ChannelId(7)) && !admission.refuse(ChannelId(8)));
        admission.admit();
        assert_eq!(admission.begin_commit(), Err(ChannelId(7)));
        assert!(!admission.has_begun());
    }
}
