//! Handles clients' requests: the status, dumps, and the steps of a failover.

use super::error::RequestError;
use super::protocol::{ClaimedCheckpoint, Request, Response};
use super::socket::{ClientEvent, PendingRequest, Reply};
use super::state::{ControlState, Kept, Live};
use crate::net::Listener;
use crate::receiver::background::WorkKind;
use crate::receiver::dump::{dump, dump_ended};
use crate::receiver::end::SessionEnd;
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use crate::receiver::live_session::LiveSession;
use crate::receiver::promotion::{ClientId, Promotion, PromotionError};
use crate::receiver::restore::restore;
use crate::receiver::services::Services;
use crate::receiver::status::{STATUS_SCHEMA, STATUS_VERSION, SessionState, SessionStatus, StatusReport};
use std::rc::Rc;
use std::sync::Arc;

impl ControlState {
    pub(super) fn handle_client_event(&mut self, event: ClientEvent, listeners: &[Rc<Listener>]) {
        match event {
            ClientEvent::Request(pending) => self.handle_request(pending, listeners),
            ClientEvent::Disconnected(client) => {
                for live in &self.live {
                    let claimed = |checkpoint: &Arc<KeptCheckpoint>| {
                        checkpoint.promotion().check_claimed(client).is_ok()
                    };
                    if live.session.checkpoint().is_some_and(claimed) {
                        live.session.output.cancel_handover();
                    }
                }
                for checkpoint in self.checkpoints() {
                    checkpoint.promotion().disconnected(client);
                }
            }
        }
    }

    /// Responds, or has a background thread respond: what waits for disks, sockets or memory is done there.
    fn handle_request(&mut self, pending: PendingRequest, listeners: &[Rc<Listener>]) {
        let PendingRequest { by, request, reply } = pending;
        let response = match request {
            Request::Status => Ok(Response::Status(Box::new(self.status(listeners)))),
            Request::Discard { session } => match self.discard(session) {
                Ok(kept) => {
                    let discarded = Response::Discarded { discarded: session };
                    return self.release_kept(WorkKind::Release, kept, reply, discarded);
                }
                Err(error) => Err(error),
            },
            Request::End { session } => match self.end(session) {
                Ok(live) => return live.end_asked.push(reply),
                Err(error) => Err(error),
            },
            Request::Dump {
                session,
                directory,
                without_disks,
            } => match self.idle(session) {
                Ok(checkpoint) => {
                    let is_live = self.live(session).is_some();
                    return self.respond_in_background(WorkKind::Dump, reply, move || {
                        let dumped = match is_live {
                            true => dump(&checkpoint, &directory),
                            false => dump_ended(&checkpoint, &directory, without_disks),
                        };
                        Ok(Response::Dumped(dumped?))
                    });
                }
                Err(error) => Err(error),
            },
            Request::Claim {
                session,
                force,
                retry,
            } => self.claim(session, by, force, retry),
            Request::Handover { session } => match self.begin_handover(session, by) {
                Ok(live) => {
                    return drop(tokio::task::spawn_local(async move {
                        let handed_over = live.output.wait_handed_over().await;
                        let response = handed_over.map(|checkpoint| Response::HandedOver {
                            handed_over: session,
                            checkpoint: checkpoint.0,
                        });
                        // The client may have disconnected.
                        let _ =
                            reply.send(response.map_err(|source| RequestError::Handover { session, source }));
                    }));
                }
                Err(error) => Err(error),
            },
            Request::Restore(request) => match self.claimed(request.session, by) {
                Ok(checkpoint) => {
                    let live = self.live(request.session).map(|live| live.session.clone());
                    return self.respond_in_background(WorkKind::Restore, reply, move || {
                        let report = restore(&checkpoint, live.as_deref(), by, &request)?;
                        Ok(Response::Restored(report))
                    });
                }
                Err(error) => Err(error),
            },
            Request::Release {
                session,
                may_have_run,
            } => self.release(session, by, may_have_run),
            Request::Promoted { session } => match self.promoted(session, by) {
                Ok(kept) => {
                    let promoted = Response::Promoted { promoted: session };
                    return self.release_kept(WorkKind::Restore, kept, reply, promoted);
                }
                Err(error) => Err(error),
            },
        };
        // The client may have disconnected.
        let _ = reply.send(response);
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
            uptime_ms: u64::try_from(self.uptime().as_millis()).unwrap_or(u64::MAX),
            ram_held_bytes: self.context.budget.used(),
            ram_limit_bytes: self.context.budget.limit(),
            disks: self
                .context
                .disks
                .as_ref()
                .map_or_else(Vec::new, |disks| disks.unbound()),
            sessions: (self.session_statuses().into_iter())
                .map(SessionStatus::with_few_blocks)
                .collect(),
        }
    }

    /// The checkpoints of all sessions that have one.
    fn checkpoints(&self) -> impl Iterator<Item = &Arc<KeptCheckpoint>> {
        let kept = self.kept.iter().map(|kept| &kept.checkpoint);
        kept.chain(self.live.iter().filter_map(|live| live.session.checkpoint()))
    }

    fn live(&self, session: u32) -> Option<&Live> {
        self.live.iter().find(|live| live.session.id == session)
    }

    /// A session's checkpoint.
    fn checkpoint(&self, session: u32) -> Result<&Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoints().find(|known| known.session == session);
        let checkpoint = checkpoint.filter(|checkpoint| checkpoint.number().is_some());
        checkpoint.ok_or_else(|| match self.live(session) {
            Some(_) => RequestError::NoCheckpoint(session),
            None => self.no_session(session),
        })
    }

    /// Why nothing is left of a session.
    fn no_session(&self, session: u32) -> RequestError {
        let Some(status) = self.past.iter().find(|status| status.session == session) else {
            return RequestError::NoSession(session);
        };
        match (status.state, status.checkpoint) {
            (SessionState::Promoted, checkpoint) => RequestError::WasPromoted {
                session,
                checkpoint: checkpoint.unwrap_or(0),
            },
            (_, Some(_)) => RequestError::WasDiscarded(session),
            (_, None) => RequestError::LeftNothing {
                session,
                end: status.end.clone().unwrap_or_default(),
            },
        }
    }

    /// A session's checkpoint, of which no failover is in progress.
    fn idle(&self, session: u32) -> Result<Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint.promotion().check_idle().map_err(of(session))?;
        Ok(checkpoint.clone())
    }

    fn discard(&mut self, session: u32) -> Result<Kept, RequestError> {
        match self.idle(session) {
            Err(RequestError::NoCheckpoint(_)) => return Err(RequestError::Running(session)),
            idle => idle?,
        };
        self.take_kept(session).ok_or(RequestError::Running(session))
    }

    /// Ends a running session. Its client is answered when it is over.
    fn end(&mut self, session: u32) -> Result<&mut Live, RequestError> {
        if self.kept(session).is_some() {
            return Err(RequestError::HasEnded(session));
        }
        let none = self.no_session(session);
        let live = self.live.iter_mut().find(|live| live.session.id == session);
        let live = live.ok_or(none)?;
        live.session.finish(SessionEnd::Operator);
        Ok(live)
    }

    fn claim(
        &mut self,
        session: u32,
        by: ClientId,
        force: bool,
        retry: bool,
    ) -> Result<Response, RequestError> {
        let checkpoint = match self.checkpoint(session) {
            Err(RequestError::NoCheckpoint(_)) => return Err(RequestError::Precopy(session)),
            checkpoint => checkpoint?,
        };
        let status = match (self.live(session), self.kept(session)) {
            (Some(live), _) => self.status_of(live),
            (None, kept) => kept
                .map(|kept| self.status_of_kept(kept))
                .ok_or(RequestError::NoSession(session))?,
        };
        let age_ms = status.checkpoint_age_ms.unwrap_or(0);
        if status.end.is_none() && !force {
            return Err(RequestError::Connected {
                session,
                peer: status.peer,
                age_ms,
            });
        }
        checkpoint.promotion().claim(by, retry).map_err(of(session))?;
        Ok(Response::Claimed(ClaimedCheckpoint {
            session,
            checkpoint: status.checkpoint.unwrap_or(0),
            checkpoint_age_ms: age_ms,
            peer: status.peer,
            end: status.end,
            machine: checkpoint.description.machine_type.clone(),
            blocks: status.blocks,
            disks: status.disks,
        }))
    }

    fn claimed(&self, session: u32, by: ClientId) -> Result<Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint.promotion().check_claimed(by).map_err(of(session))?;
        Ok(checkpoint.clone())
    }

    /// Asks the guard of a session that this client has claimed.
    fn begin_handover(&self, session: u32, by: ClientId) -> Result<Arc<LiveSession>, RequestError> {
        self.claimed(session, by)?;
        let live = self.live(session).ok_or(RequestError::NotConnected(session))?;
        let begun = live.session.output.begin_handover();
        begun.map_err(|source| RequestError::Handover { session, source })?;
        Ok(live.session.clone())
    }

    fn release(&self, session: u32, by: ClientId, may_have_run: bool) -> Result<Response, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        let mut promotion = checkpoint.promotion();
        promotion.release(by, may_have_run).map_err(of(session))?;
        if *promotion == Promotion::Here {
            checkpoint.image.set_given(false);
        }
        Ok(Response::Released {
            released: session,
            promotion: promotion.description(),
        })
    }

    /// A guest runs from what was given: nothing of it may stay here.
    fn promoted(&mut self, session: u32, by: ClientId) -> Result<Kept, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint.promotion().promoted(by).map_err(of(session))?;
        // It was over before the stream was written.
        self.reap_ended_sessions();
        self.take_kept(session).ok_or(RequestError::Running(session))
    }

    /// Releases a checkpoint's memory, which takes seconds for a large guest, and responds then.
    fn release_kept(&mut self, kind: WorkKind, kept: Kept, reply: Reply, response: Response) {
        let services = self.context.services.clone();
        self.respond_in_background(kind, reply, move || {
            kept.release(&*services);
            Ok(response)
        });
    }

    /// Responds from a thread that may wait for disks and sockets.
    fn respond_in_background(
        &mut self,
        kind: WorkKind,
        reply: Reply,
        respond: impl FnOnce() -> Result<Response, RequestError> + Send + 'static,
    ) {
        self.in_background(kind, move || {
            // The client may have disconnected.
            let _ = reply.send(respond());
        });
    }
}

impl Kept {
    /// Gives the checkpoint up, its memory and its files. Takes as long as the disks' logs need to be applied.
    pub(super) fn release(self, services: &dyn Services) {
        let checkpoint = self.checkpoint;
        // The bases are left at the checkpoint, as the session's end does.
        if let Err(error) = checkpoint.disks.drain() {
            services.warn(format!(
                "session {}: {error}. Its checkpoint is given up all the same: that base is not at a checkpoint, and must be \
                 mirrored again in full",
                checkpoint.session
            ));
        }
        // Removed now, and not with the last reference to the image: the thread that ends the session may hold one, and a
        // receiver killed meanwhile would leave files of a session that the response says is gone.
        checkpoint.image.remove_files();
        checkpoint.disks.remove_files();
        let disks = checkpoint.disks.weak();
        drop(checkpoint);
        disks.wait_closed();
    }
}

fn of(session: u32) -> impl Fn(PromotionError) -> RequestError {
    move |source| RequestError::Promotion { session, source }
}
