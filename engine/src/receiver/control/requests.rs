//! Handles clients' requests: the status, dumps, and the steps of a failover.

use super::error::RequestError;
use super::protocol::{ClaimedCheckpoint, Request, Response};
use super::socket::{ClientEvent, PendingRequest, Reply};
use super::state::{ControlState, Kept, Live};
use crate::net::Listener;
use crate::receiver::Event;
use crate::receiver::background::WorkKind;
use crate::receiver::dump::{DumpDisks, contents, dump};
use crate::receiver::end::SessionEnd;
use crate::receiver::flight::copy_flight;
use crate::receiver::guest::{GuestIdentity, SessionTitle};
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use crate::receiver::live_session::LiveSession;
use crate::receiver::promotion::{ClientId, Promotion, PromotionError};
use crate::receiver::remark::Remark;
use crate::receiver::restore::restore;
use crate::receiver::services::Services;
use crate::receiver::status::{STATUS_SCHEMA, STATUS_VERSION, SessionState, StatusReport, TlsStatus};
use std::rc::Rc;
use std::sync::Arc;

impl ControlState {
    pub(super) fn handle_client_event(&mut self, event: ClientEvent, listeners: &[Rc<Listener>]) {
        match event {
            ClientEvent::Request(pending) => self.handle_request(pending, listeners),
            ClientEvent::Limits(limits) => self.context.options.limits = limits,
            ClientEvent::Guests(rules) => self.context.services.shared().guests.set_rules(rules),
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
        let PendingRequest {
            by,
            request,
            files,
            reply,
        } = pending;
        let response = match request {
            Request::Status => Ok(Response::Status(Box::new(self.status(listeners)))),
            Request::Find { guest, runs } => self.find(&guest, runs),
            Request::Discard { session } => return self.discard(session, reply),
            Request::End { session } => match self.end(session) {
                Ok(live) => return live.end_asked.push(reply),
                Err(error) => Err(error),
            },
            Request::Contents { session } => self.readable(session).map(|checkpoint| {
                let disks = self.dump_disks(session);
                Response::Contents(contents(&checkpoint, disks))
            }),
            Request::Dump { session, disks } => match self.readable(session) {
                Ok(checkpoint) => {
                    let can_copy = self.dump_disks(session);
                    return self.respond_in_background(WorkKind::Dump, reply, move || {
                        let dumped = dump(&checkpoint, files, disks, can_copy)?;
                        Ok(Response::Dumped(dumped))
                    });
                }
                Err(error) => Err(error),
            },
            Request::Recorder { session } => match self.checkpoint(session).cloned() {
                Ok(checkpoint) => {
                    return self.respond_in_background(WorkKind::Dump, reply, move || {
                        Ok(Response::Recorder(copy_flight(&checkpoint, files)?))
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
                    let title = self.title(session);
                    return drop(tokio::task::spawn_local(async move {
                        let handed_over = live.output.wait_handed_over().await;
                        let response = handed_over.map(|checkpoint| Response::HandedOver {
                            handed_over: session,
                            checkpoint: checkpoint.0,
                        });
                        // The client may have disconnected.
                        let _ = reply.send(response.map_err(|source| RequestError::Handover {
                            session: title,
                            source,
                        }));
                    }));
                }
                Err(error) => Err(error),
            },
            Request::Restore(request) => match self.claimed(request.session, by) {
                Ok(checkpoint) => {
                    let live = self.live(request.session).map(|live| live.session.clone());
                    let stopping = self.stopping.clone();
                    return self.respond_in_background(WorkKind::Restore, reply, move || {
                        let report = restore(&checkpoint, live.as_deref(), by, &request, files, &stopping)?;
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
                    self.given_up(&kept, true);
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
            tls: options.tls.as_deref().map(TlsStatus::of),
            uptime_ms: u64::try_from(self.uptime().as_millis()).unwrap_or(u64::MAX),
            ram_held_bytes: self.context.budget.used(),
            ram_limit_bytes: self.context.budget.limit(),
            intervals_lost: self.context.recorder.intervals_lost(),
            disks: self
                .context
                .disks
                .as_ref()
                .map_or_else(Vec::new, |disks| disks.unbound()),
            sessions: self.session_statuses(),
        }
    }

    /// The checkpoints of all sessions that have one.
    fn checkpoints(&self) -> impl Iterator<Item = &Arc<KeptCheckpoint>> {
        let kept = self.kept.iter().map(|kept| &kept.checkpoint);
        kept.chain(self.live.iter().filter_map(|live| live.session.checkpoint()))
    }

    /// Whether a session's disks can be copied.
    fn dump_disks(&self, session: u32) -> DumpDisks {
        match self.live(session) {
            Some(_) => DumpDisks::Live,
            None => DumpDisks::Copied,
        }
    }

    fn live(&self, session: u32) -> Option<&Live> {
        self.live.iter().find(|live| live.session.id == session)
    }

    fn title(&self, session: u32) -> SessionTitle {
        self.context.services.shared().guests.title(session)
    }

    /// The session of a guest that the operator calls so. `runs`: of those that run.
    fn find(&self, guest: &str, runs: bool) -> Result<Response, RequestError> {
        if let Ok(session) = guest.parse() {
            let found = self.title(session);
            return Ok(Response::Found { found });
        }
        let live = self.live.iter().map(|live| &live.session.guest);
        let kept = self.kept.iter().map(|kept| &kept.checkpoint.guest);
        let (live, kept): (Vec<_>, Vec<_>) = (live.collect(), kept.collect());
        let known = match runs {
            // Where none runs, what is said of one that is kept says why.
            true if live.iter().any(|known| known.is_meant_by(guest)) => live,
            true | false => [live, kept].concat(),
        };
        let sessions = |is_meant: &dyn Fn(&GuestIdentity) -> bool| -> Vec<u32> {
            let meant = known.iter().filter(|known| is_meant(known));
            meant.map(|known| known.session()).collect()
        };
        // Anyone's guard can claim a name, and anyone's stream a UUID: what the operator's rules say comes first.
        let mut meant = sessions(&|known| known.is_named_by_rule(guest));
        if meant.is_empty() {
            meant = sessions(&|known| known.is_meant_by(guest));
        }
        // One that is gone is found, too: why there is nothing of it is then said.
        let past = || {
            let mut past = self.past.iter().rev();
            past.find(|status| {
                let is_uuid = |uuid: &String| uuid.eq_ignore_ascii_case(guest);
                status.guest.as_deref() == Some(guest) || status.uuid.as_ref().is_some_and(is_uuid)
            })
        };
        let found = match (&meant[..], past()) {
            ([session], _) => self.title(*session),
            ([], Some(status)) => status.title(),
            ([], None) => return Err(RequestError::NoGuest(guest.to_owned())),
            (several, _) => {
                let shown = several.iter().map(|session| self.shown(*session));
                return Err(RequestError::Ambiguous {
                    guest: guest.to_owned(),
                    sessions: shown.collect::<Vec<_>>().join(", "),
                });
            }
        };
        Ok(Response::Found { found })
    }

    /// A session with its state, for a choice.
    fn shown(&self, session: u32) -> String {
        let live = self.live(session).map(|live| self.status_of(live));
        let status = live.or_else(|| self.kept(session).map(|kept| self.status_of_kept(kept)));
        let Some(status) = status else {
            return session.to_string();
        };
        let state = status.state.name();
        match status.checkpoint {
            Some(checkpoint) => format!("{session} ({state}, checkpoint {checkpoint})"),
            None => format!("{session} ({state})"),
        }
    }

    /// A session's checkpoint.
    fn checkpoint(&self, session: u32) -> Result<&Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoints().find(|known| known.session == session);
        let checkpoint = checkpoint.filter(|checkpoint| checkpoint.number().is_some());
        checkpoint.ok_or_else(|| match self.live(session) {
            Some(_) => RequestError::NoCheckpoint(self.title(session)),
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
                session: status.title(),
                checkpoint: checkpoint.unwrap_or(0),
            },
            (_, Some(_)) => RequestError::WasDiscarded(status.title()),
            (_, None) => RequestError::LeftNothing {
                session: status.title(),
                end: status.end.clone().unwrap_or_default(),
            },
        }
    }

    /// A session's checkpoint, of which no failover is in progress.
    fn idle(&self, session: u32) -> Result<Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint
            .promotion()
            .check_idle()
            .map_err(of(self.title(session)))?;
        Ok(checkpoint.clone())
    }

    /// The same, whose memory no guest can change.
    fn readable(&self, session: u32) -> Result<Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint
            .promotion()
            .check_readable()
            .map_err(of(self.title(session)))?;
        Ok(checkpoint.clone())
    }

    /// Gives up the checkpoint of a session that has ended. Its client is answered when its connections and memory are released.
    pub(super) fn discard(&mut self, session: u32, reply: Reply) {
        let is_ending = |live: &&mut Live| live.session.id == session && live.session.end().is_some();
        if let Some(live) = self.live.iter_mut().find(is_ending) {
            return live.discard_asked.push(reply);
        }
        match self.take_discarded(session) {
            Ok(kept) => {
                self.given_up(&kept, false);
                let discarded = Response::Discarded { discarded: session };
                self.release_kept(WorkKind::Release, kept, reply, discarded);
            }
            // The client may have disconnected.
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    fn take_discarded(&mut self, session: u32) -> Result<Kept, RequestError> {
        match self.idle(session) {
            Err(RequestError::NoCheckpoint(_)) => return Err(RequestError::Running(self.title(session))),
            idle => idle?,
        };
        self.take_kept(session)
            .ok_or(RequestError::Running(self.title(session)))
    }

    /// Ends a running session. Its client is answered when it is over.
    fn end(&mut self, session: u32) -> Result<&mut Live, RequestError> {
        if self.kept(session).is_some() {
            return Err(RequestError::HasEnded(self.title(session)));
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
            Err(RequestError::NoCheckpoint(_)) => return Err(RequestError::Precopy(self.title(session))),
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
                session: self.title(session),
                peer: status.peer,
                age_ms,
            });
        }
        checkpoint
            .promotion()
            .claim(by, retry)
            .map_err(of(self.title(session)))?;
        Ok(Response::Claimed(ClaimedCheckpoint {
            session,
            checkpoint: status.checkpoint.unwrap_or(0),
            checkpoint_age_ms: age_ms,
            guest: status.guest,
            uuid: status.uuid,
            listener: status.listener,
            peer: status.peer,
            end: status.end,
            machine: checkpoint.description.machine_type.clone(),
            blocks: status.blocks,
            disks: status.disks,
        }))
    }

    fn claimed(&self, session: u32, by: ClientId) -> Result<Arc<KeptCheckpoint>, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        checkpoint
            .promotion()
            .check_claimed(by)
            .map_err(of(self.title(session)))?;
        Ok(checkpoint.clone())
    }

    /// Asks the guard of a session that this client has claimed.
    fn begin_handover(&self, session: u32, by: ClientId) -> Result<Arc<LiveSession>, RequestError> {
        self.claimed(session, by)?;
        let live = self
            .live(session)
            .ok_or(RequestError::NotConnected(self.title(session)))?;
        let begun = live.session.output.begin_handover();
        begun.map_err(|source| RequestError::Handover {
            session: self.title(session),
            source,
        })?;
        Ok(live.session.clone())
    }

    fn release(&self, session: u32, by: ClientId, may_have_run: bool) -> Result<Response, RequestError> {
        let checkpoint = self.checkpoint(session)?;
        let mut promotion = checkpoint.promotion();
        promotion
            .release(by, may_have_run)
            .map_err(of(self.title(session)))?;
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
        checkpoint
            .promotion()
            .promoted(by)
            .map_err(of(self.title(session)))?;
        // It was over before the stream was written.
        self.reap_ended_sessions();
        self.take_kept(session)
            .ok_or(RequestError::Running(self.title(session)))
    }

    fn given_up(&self, kept: &Kept, is_promoted: bool) {
        let session = kept.checkpoint.guest.title();
        (self.context.events)(Event::GivenUp { session, is_promoted });
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
            let title = checkpoint.guest.title();
            let text = format!(
                "session {title}: {error}. Its checkpoint is given up all the same: that base is not at a checkpoint, and must \
                 be mirrored again in full"
            );
            services.warn(Remark::of(&title, text));
        }
        // Else a kill between the two removals would leave records of disks that say that a checkpoint needs them, which is gone.
        checkpoint.disks.give_up();
        // Removed now, and not with the last reference to the image: the thread that ends the session may hold one, and a
        // receiver killed meanwhile would leave files of a session that the response says is gone.
        checkpoint.image.remove_files();
        checkpoint.disks.remove_files();
        let disks = checkpoint.disks.weak();
        drop(checkpoint);
        disks.wait_closed();
    }
}

fn of(session: SessionTitle) -> impl FnOnce(PromotionError) -> RequestError {
    move |source| RequestError::Promotion { session, source }
}
