//! What a session's main channel and its link share: locked a few times a checkpoint, never per packet.

use crate::link::{Barriers, Hello, LinkError, ToGuard};
use crate::ring::Waker;
use crate::units::CheckpointId;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The guard of a session, in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardStatus {
    /// The operator's name for the guest.
    pub name: String,
    /// Whether the guard's link is up: if so, output of the guest is held until it is committed.
    pub linked: bool,
}

#[derive(Debug, Default)]
struct State {
    barriers: Barriers,
    /// Counts links: one that was replaced has no say any more.
    link: u64,
    guard: Option<GuardStatus>,
    end: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(in crate::receiver) struct SessionOutput {
    state: Mutex<State>,
    /// The link's task has something to send.
    changed: Notify,
    /// The main channel may go on.
    main: Waker,
}

/// Which of a session's links calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct LinkNumber(u64);

/// What a link's task does next.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::receiver) enum Next {
    Send(ToGuard),
    /// Wait: whether for an answer, which may not take for ever.
    Wait {
        for_answer: bool,
    },
    /// The session has ended, for this reason.
    Ended(String),
    /// Another link has taken its place.
    Replaced,
}

impl SessionOutput {
    /// Of a session without a guard.
    pub(in crate::receiver) fn new(main: Waker) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            main,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guard's link belongs to the session from now on.
    pub(in crate::receiver) fn attach(&self, hello: &Hello) -> LinkNumber {
        let mut state = self.lock();
        state.link += 1;
        state.barriers.attach(hello.releases_in_pause);
        state.guard = Some(GuardStatus {
            name: hello.name.clone(),
            linked: true,
        });
        let link = LinkNumber(state.link);
        drop(state);
        // The one before, if there is one, sees that it was replaced; what the main channel waits for on it, it need not wait for.
        self.changed.notify_waiters();
        self.main.wake();
        link
    }

    /// The link is lost. Whether the session had it still.
    pub(in crate::receiver) fn detach(&self, link: LinkNumber) -> bool {
        let mut state = self.lock();
        if state.link != link.0 {
            return false;
        }
        state.barriers.detach();
        if let Some(guard) = &mut state.guard {
            guard.linked = false;
        }
        drop(state);
        self.main.wake();
        true
    }

    /// The primary's guest is stopped for this checkpoint.
    pub(in crate::receiver) fn ask(&self, checkpoint: CheckpointId) {
        self.lock().barriers.ask(checkpoint);
        self.changed.notify_one();
    }

    /// The checkpoint is committed.
    pub(in crate::receiver) fn committed(&self, checkpoint: CheckpointId) {
        self.lock().barriers.committed(checkpoint);
        self.changed.notify_one();
    }

    /// Whether the checkpoint may be acknowledged.
    pub(in crate::receiver) fn may_acknowledge(&self, checkpoint: CheckpointId) -> bool {
        self.lock().barriers.may_acknowledge(checkpoint)
    }

    /// The session has ended.
    pub(in crate::receiver) fn end(&self, reason: String) {
        self.lock().end = Some(reason);
        self.changed.notify_one();
    }

    /// Whether the session has ended.
    pub(in crate::receiver) fn has_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// What the link's task does next.
    pub(in crate::receiver) fn next(&self, link: LinkNumber) -> Next {
        let mut state = self.lock();
        if state.link != link.0 {
            return Next::Replaced;
        }
        if let Some(message) = state.barriers.next_message() {
            return Next::Send(message);
        }
        match &state.end {
            Some(reason) => Next::Ended(reason.clone()),
            None => Next::Wait {
                for_answer: state.barriers.awaits_answer(),
            },
        }
    }

    /// Waits until [`Self::next`] may say something else.
    pub(in crate::receiver) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The guard has drawn a line.
    ///
    /// # Errors
    /// If it was not asked to.
    pub(in crate::receiver) fn placed(
        &self,
        link: LinkNumber,
        checkpoint: CheckpointId,
    ) -> Result<(), LinkError> {
        self.answered(link, |barriers| barriers.placed(checkpoint))
    }

    /// The guard has let go of a checkpoint's frames.
    ///
    /// # Errors
    /// If it was not committed.
    pub(in crate::receiver) fn released(
        &self,
        link: LinkNumber,
        checkpoint: CheckpointId,
    ) -> Result<(), LinkError> {
        self.answered(link, |barriers| barriers.released(checkpoint))
    }

    fn answered(
        &self,
        link: LinkNumber,
        take: impl FnOnce(&mut Barriers) -> Result<(), LinkError>,
    ) -> Result<(), LinkError> {
        let mut state = self.lock();
        if state.link != link.0 {
            return Ok(());
        }
        take(&mut state.barriers)?;
        drop(state);
        self.main.wake();
        Ok(())
    }

    /// The guard, if there is or was one.
    pub(in crate::receiver) fn guard(&self) -> Option<GuardStatus> {
        self.lock().guard.clone()
    }
}
