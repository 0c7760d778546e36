//! What the control socket is answered: the status, dumps, and the steps of a failover.

use super::protocol::{ClaimedCheckpoint, Request, Response};
use super::socket::{ClientEvent, PendingRequest};
use super::state::{ControlState, SessionEntry};
use crate::net::Listener;
use crate::receiver::dump::dump;
use crate::receiver::guest::Guest;
use crate::receiver::promotion::{ClientId, Promotion};
use crate::receiver::restore::{RestoreRequest, restore};
use crate::receiver::status::{STATUS_SCHEMA, STATUS_VERSION, SessionState, StatusReport};
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::oneshot;

type Reply = oneshot::Sender<Result<Response, String>>;

impl ControlState {
    pub(super) fn handle_client_event(&mut self, client_event: ClientEvent, listeners: &[Rc<Listener>]) {
        match client_event {
            ClientEvent::Request(asked) => self.answer(asked, listeners),
            ClientEvent::Disconnected(by) => self
                .entries
                .iter()
                .for_each(|entry| entry.guest.promotion().left(by)),
        }
    }

    fn answer(&mut self, asked: PendingRequest, listeners: &[Rc<Listener>]) {
        let PendingRequest { by, request, reply } = asked;
        let answer = match request {
            Request::Status => Ok(Response::Status(Box::new(self.status(listeners)))),
            Request::Discard { session } => match self.discard(session) {
                Ok(entry) => return give_up(entry, reply, Response::Discarded { discarded: session }),
                Err(error) => Err(error),
            },
            Request::Dump { session, directory } => match self.idle(session) {
                // It takes as long as the disk; the answer goes out from there.
                Ok(guest) => {
                    return respond_in_background(reply, move || {
                        dump(&guest, &directory).map(Response::Dumped)
                    });
                }
                Err(error) => Err(error),
            },
            Request::Claim {
                session,
                force,
                retry,
            } => self.claim(session, by, force, retry),
            Request::Restore(what) => match self.claimed(&what, by) {
                Ok(guest) => {
                    return respond_in_background(reply, move || {
                        restore(&guest, by, &what).map(Response::Restored)
                    });
                }
                Err(error) => Err(error),
            },
            Request::Release {
                session,
                may_have_run,
            } => self.release(session, by, may_have_run),
            Request::Promoted { session } => match self.promoted(session, by) {
                Ok(entry) => return give_up(entry, reply, Response::Promoted { promoted: session }),
                Err(error) => Err(error),
            },
        };
        // Whoever asked may be gone.
        let _ = reply.send(answer);
    }

    fn status(&self, listeners: &[Rc<Listener>]) -> StatusReport {
        let options = &self.context.options;
        StatusReport {
            schema: STATUS_SCHEMA.into(),
            schema_version: STATUS_VERSION,
            listen: listeners
                .iter()
                .map(|listener| listener.address().to_string())
                .collect(),
            backend: options.backend.name().into(),
            ring: self.context.plane.features().map(|features| features.to_string()),
            cores: options.cores.clone(),
            placement: self.context.placement.clone(),
            uptime_ms: u64::try_from(self.context.services.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            ram_held_bytes: self.context.budget.held(),
            ram_limit_bytes: self.context.budget.limit(),
            sessions: self.entries.iter().map(|entry| self.status_of(entry)).collect(),
        }
    }

    fn position(&self, session: u32) -> Result<usize, String> {
        let position = self.entries.iter().position(|entry| entry.guest.id == session);
        position.ok_or_else(|| self.no_session(session))
    }

    fn guest(&self, session: u32) -> Result<Arc<Guest>, String> {
        Ok(self.entries[self.position(session)?].guest.clone())
    }

    /// Why there is nothing of a session: it left no checkpoint, or it was promoted or discarded.
    fn no_session(&self, session: u32) -> String {
        let past = self.past.iter().find(|status| status.session == session);
        match past {
            Some(status) if status.state == SessionState::Promoted => format!(
                "session {session} was promoted at checkpoint {}: its guest runs elsewhere, and nothing of it is kept here",
                status.checkpoint.unwrap_or(0)
            ),
            Some(status) if status.checkpoint.is_some() => format!("session {session} was discarded"),
            Some(status) => format!(
                "session {session} left no checkpoint: {}",
                status.end.as_deref().unwrap_or("it ended")
            ),
            None => format!("there is no session {session}; `colo-ring status` lists them"),
        }
    }

    /// A session that no failover is at.
    fn idle(&self, session: u32) -> Result<Arc<Guest>, String> {
        let guest = self.guest(session)?;
        guest
            .promotion()
            .check_idle()
            .map_err(|why| format!("session {session}: {why}"))?;
        Ok(guest)
    }

    fn discard(&mut self, session: u32) -> Result<SessionEntry, String> {
        self.idle(session)?;
        let position = self.position(session)?;
        if self.entries[position].summary.is_none() {
            return Err(format!("session {session} is running: its primary is connected"));
        }
        let status = self.status_of(&self.entries[position]);
        Ok(self.forget(position, status))
    }

    fn claim(&mut self, session: u32, by: ClientId, force: bool, retry: bool) -> Result<Response, String> {
        let entry = &self.entries[self.position(session)?];
        let guest = &entry.guest;
        let status = self.status_of(entry);
        let (Some(record), Some(checkpoint)) = (guest.record.get(), status.checkpoint) else {
            return Err(format!(
                "session {session} is in precopy: there is nothing to resume, and its guest runs on the primary"
            ));
        };
        let age_ms = status.checkpoint_age_ms.unwrap_or(0);
        if guest.end().is_none() && !force {
            return Err(format!(
                "the primary of session {session} ({}) is connected, and its last checkpoint is {age_ms} ms old: its guest \
                 runs there. If it is to be resumed here nevertheless, make sure that the primary is off (--fence) \
                 and give --force, which closes the session",
                guest.peer
            ));
        }
        let claimed = guest.promotion().claim(by, retry);
        claimed.map_err(|why| format!("session {session}: {why}"))?;
        Ok(Response::Claimed(ClaimedCheckpoint {
            session,
            checkpoint,
            checkpoint_age_ms: age_ms,
            peer: guest.peer.clone(),
            end: status.end,
            machine: record.machine_type.clone(),
            blocks: status.blocks,
        }))
    }

    fn claimed(&self, request: &RestoreRequest, by: ClientId) -> Result<Arc<Guest>, String> {
        let guest = self.guest(request.session)?;
        guest.promotion().check_claimed(by)?;
        Ok(guest)
    }

    fn release(&self, session: u32, by: ClientId, may_have_run: bool) -> Result<Response, String> {
        let guest = self.guest(session)?;
        let mut promotion = guest.promotion();
        promotion.release(by, may_have_run)?;
        if let Some(committed) = guest.committed().filter(|_| *promotion == Promotion::Here) {
            committed.set_given(false);
        }
        Ok(Response::Released {
            released: session,
            promotion: promotion.words(),
        })
    }

    /// A guest runs from what was given: nothing of it may stay here.
    fn promoted(&mut self, session: u32, by: ClientId) -> Result<SessionEntry, String> {
        let position = self.position(session)?;
        self.entries[position].guest.promotion().promoted(by)?;
        // It was over before the stream was written.
        self.reap_ended_sessions();
        let position = self.position(session)?;
        let status = self.status_of(&self.entries[position]);
        Ok(self.forget(position, status))
    }
}

/// Answers from a thread that may wait for disks and sockets.
fn respond_in_background(reply: Reply, answer: impl FnOnce() -> Result<Response, String> + Send + 'static) {
    tokio::task::spawn_blocking(move || {
        // Whoever asked may be gone.
        let _ = reply.send(answer());
    });
}

/// Gives a session's memory up, which takes seconds for a large guest; the answer says that it is done.
fn give_up(entry: SessionEntry, reply: Reply, answer: Response) {
    respond_in_background(reply, move || {
        // Here, and not when the last one lets go of them: who gives back a cache of it at this moment holds them a little
        // longer, and a receiver that is killed meanwhile would leave what the answer says is gone.
        if let Some(committed) = entry.guest.committed() {
            committed.remove_files();
        }
        drop(entry);
        Ok(answer)
    });
}
