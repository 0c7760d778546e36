//! What a session's main channel and its link share: locked a few times a checkpoint, never per packet.

use crate::canary::{self, Canary};
use crate::link::{Barriers, HandoverError, Hello, LinkError, ToGuard, Wanted};
use crate::ring::Waker;
use crate::units::CheckpointId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The guard of a session, in its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GuardStatus {
    /// The operator's name for the guest.
    pub name: String,
    /// Whether the guard's link is up: if so, output of the guest is held until it is committed.
    pub linked: bool,
}

/// Whether the guard ends the protection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Leave {
    #[default]
    No,
    /// It has begun to.
    Leaving,
    /// It has: the guest runs on.
    Left,
}

#[derive(Debug, Default)]
struct State {
    barriers: Barriers,
    /// Counts links: one that was replaced has no say any more.
    link: u64,
    guard: Option<GuardStatus>,
    leave: Leave,
    end: Option<String>,
    /// What has become of handing the guest over; none while that is under way.
    handed_over: Option<Result<CheckpointId, HandoverError>>,
}

impl State {
    /// The guest is not handed over, if it was to be.
    fn give_up_handover(&mut self, error: HandoverError) {
        self.handed_over.get_or_insert(Err(error));
    }

    /// The link has ended.
    fn link_ended(&mut self, why: &str) {
        let why = why.to_owned();
        self.give_up_handover(match self.barriers.awaits_end() {
            true => HandoverError::Unknown(why),
            false => HandoverError::GivenUp(why),
        });
    }
}

/// See the module.
#[derive(Debug)]
pub(in crate::receiver) struct SessionOutput {
    state: Mutex<State>,
    /// The link's task has something to send.
    changed: Notify,
    /// The main channel may go on.
    main: Waker,
    /// A handing over has ended.
    handed_over: Notify,
}

/// Which of a session's links calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) struct LinkNumber(u64);

/// What a link's task waits for, besides something to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::receiver) enum Awaited {
    Nothing,
    /// An answer, without which the guest does not run on.
    Answer,
    /// The guard's word that a checkpoint may begin, for which the primary asks.
    Begin,
    /// The end of the primary, which takes as long as its memory needs to be freed.
    PrimaryEnd,
}

/// What a link's task does next.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::receiver) enum Next {
    Send(ToGuard),
    /// Wait.
    Wait(Awaited),
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
            handed_over: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guard's link belongs to the session from now on.
    pub(in crate::receiver) fn attach(&self, hello: &Hello) -> LinkNumber {
        let mut state = self.lock();
        state.link += 1;
        state.link_ended("another guard has taken the place of its guard");
        state.leave = Leave::No;
        state.barriers.attach(hello.wants == Wanted::Next);
        state.guard = Some(GuardStatus {
            name: hello.name.clone(),
            linked: true,
        });
        let link = LinkNumber(state.link);
        drop(state);
        self.handed_over.notify_waiters();
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
        state.link_ended("the link to its guard is lost");
        state.barriers.detach();
        if let Some(guard) = &mut state.guard {
            guard.linked = false;
        }
        drop(state);
        self.handed_over.notify_waiters();
        self.main.wake();
        true
    }

    /// The primary asks for a checkpoint. Whether it may begin; if not, the main channel is woken when it may.
    pub(in crate::receiver) fn request(&self) -> bool {
        let mut state = self.lock();
        state.barriers.request();
        let may_begin = state.barriers.may_begin();
        drop(state);
        if !may_begin {
            self.changed.notify_one();
        }
        may_begin
    }

    /// Whether the checkpoint that the primary asks for may begin.
    pub(in crate::receiver) fn may_begin(&self) -> bool {
        self.lock().barriers.may_begin()
    }

    /// The guard says when checkpoints begin.
    pub(in crate::receiver) fn keep(&self, link: LinkNumber) {
        let mut state = self.lock();
        if state.link == link.0 {
            state.barriers.keep();
        }
    }

    /// The guard wants the checkpoint that follows this one.
    pub(in crate::receiver) fn begin(&self, link: LinkNumber, after: Option<CheckpointId>) {
        self.let_begin(link, |barriers| barriers.begin(after));
    }

    /// The primary's request was kept for long enough.
    pub(in crate::receiver) fn begin_now(&self, link: LinkNumber) {
        self.let_begin(link, Barriers::begin_now);
    }

    fn let_begin(&self, link: LinkNumber, let_begin: impl FnOnce(&mut Barriers)) {
        let mut state = self.lock();
        if state.link != link.0 {
            return;
        }
        let was_kept = state.barriers.keeps_request();
        let_begin(&mut state.barriers);
        let is_kept = state.barriers.keeps_request();
        drop(state);
        if was_kept && !is_kept && !canary::is_set(Canary::SilentBegin) {
            self.main.wake();
        }
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

    /// Whether its guard was lost before it has held anything: the session must end.
    pub(in crate::receiver) fn is_unguarded(&self) -> bool {
        self.lock().barriers.is_unguarded()
    }

    /// The session has ended.
    pub(in crate::receiver) fn end(&self, reason: String) {
        let mut state = self.lock();
        // Where the guard ends the primary, that is what has ended the session.
        if !state.barriers.awaits_end() {
            state.barriers.session_ended();
            state.give_up_handover(HandoverError::GivenUp(reason.clone()));
        }
        state.end = Some(reason);
        drop(state);
        self.handed_over.notify_waiters();
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
            Some(reason) if !state.barriers.awaits_end() => Next::Ended(reason.clone()),
            _ if state.barriers.awaits_end() => Next::Wait(Awaited::PrimaryEnd),
            _ if state.barriers.awaits_answer() => Next::Wait(Awaited::Answer),
            _ if state.barriers.keeps_request() => Next::Wait(Awaited::Begin),
            _ => Next::Wait(Awaited::Nothing),
        }
    }

    /// Whether a request of the primary is kept for the guard: until it is answered, the primary sends nothing.
    pub(in crate::receiver) fn is_request_kept(&self) -> bool {
        self.lock().barriers.keeps_request()
    }

    /// For the simulation: whether the link's task waits for nothing but the time of a request that is kept.
    #[cfg(all(test, not(loom), not(miri)))]
    pub(in crate::receiver) fn keeps_request(&self, link: LinkNumber) -> bool {
        let state = self.lock();
        state.link == link.0 && state.barriers.keeps_request()
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
        let mut state = self.lock();
        if state.link != link.0 {
            return Ok(());
        }
        state.barriers.placed(checkpoint)?;
        drop(state);
        self.main.wake();
        Ok(())
    }

    /// The guest is to go on at this receiver: its guard is to have it make a last checkpoint, and to end its primary.
    ///
    /// # Errors
    /// If there is no guard, or it is asked already.
    pub(in crate::receiver) fn begin_handover(&self) -> Result<(), HandoverError> {
        let mut state = self.lock();
        state.barriers.begin_handover()?;
        state.handed_over = None;
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// The client that wanted it is gone: the guest stays where it is, unless its last checkpoint has begun.
    pub(in crate::receiver) fn cancel_handover(&self) {
        let mut state = self.lock();
        if state.barriers.cancel_handover() {
            state.give_up_handover(HandoverError::GivenUp("its client has disconnected".to_owned()));
        }
        drop(state);
        self.handed_over.notify_waiters();
    }

    /// Waits until the guest is handed over, after [`Self::begin_handover`]. Returns the last checkpoint.
    ///
    /// # Errors
    /// If it is not, and why.
    pub(in crate::receiver) async fn wait_handed_over(&self) -> Result<CheckpointId, HandoverError> {
        loop {
            // Before the look: what comes in between wakes it.
            let ended = self.handed_over.notified();
            if let Some(handed_over) = self.lock().handed_over.clone() {
                return handed_over;
            }
            ended.await;
        }
    }

    /// Whether the guard was told to end the primary, or has.
    pub(in crate::receiver) fn ends_primary(&self) -> bool {
        let state = self.lock();
        state.barriers.awaits_end() || matches!(state.handed_over, Some(Ok(_)))
    }

    /// The guard ends the protection now.
    pub(in crate::receiver) fn leaving(&self, link: LinkNumber) {
        let mut state = self.lock();
        if state.link == link.0 {
            state.leave = Leave::Leaving;
        }
    }

    /// The guard has ended the protection, and the guest runs on. One that has not said before that it would has lost its receiver.
    pub(in crate::receiver) fn left(&self, link: LinkNumber) {
        let mut state = self.lock();
        if state.link == link.0 && state.leave == Leave::Leaving {
            state.leave = Leave::Left;
        }
    }

    /// Whether the guard has ended the protection, and the guest runs on.
    pub(in crate::receiver) fn has_left(&self) -> bool {
        self.lock().leave == Leave::Left
    }

    /// Whether the guard is to say whether it has.
    pub(in crate::receiver) fn awaits_left(&self) -> bool {
        let state = self.lock();
        state.leave == Leave::Leaving && state.guard.as_ref().is_some_and(|guard| guard.linked)
    }

    /// The guard can end the primary: the next checkpoint is the last.
    pub(in crate::receiver) fn handover_ready(&self, link: LinkNumber) {
        let mut state = self.lock();
        if state.link == link.0 {
            state.barriers.handover_ready();
        }
        drop(state);
        // A request that was kept is that of the last checkpoint.
        self.main.wake();
    }

    /// The guard cannot end the primary, which runs on.
    pub(in crate::receiver) fn handover_refused(&self, link: LinkNumber, reason: String) {
        let mut state = self.lock();
        if state.link == link.0 && state.barriers.handover_refused() {
            state.give_up_handover(HandoverError::Refused(reason));
        }
        drop(state);
        self.handed_over.notify_waiters();
        self.main.wake();
    }

    /// The guard has ended the primary.
    ///
    /// # Errors
    /// If it was not told to.
    pub(in crate::receiver) fn primary_ended(&self, link: LinkNumber) -> Result<(), LinkError> {
        let mut state = self.lock();
        if state.link != link.0 {
            return Ok(());
        }
        state.handed_over = Some(Ok(state.barriers.primary_ended()?));
        drop(state);
        self.handed_over.notify_waiters();
        Ok(())
    }

    /// The guard, if there is or was one.
    pub(in crate::receiver) fn guard(&self) -> Option<GuardStatus> {
        self.lock().guard.clone()
    }
}
