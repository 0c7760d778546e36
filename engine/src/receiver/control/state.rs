//! The state of the control thread and what changes it, but for requests (`requests.rs`).

use super::ControlContext;
use super::admission::Pending;
use super::connections::Connections;
use super::make_room::Lack;
use super::protocol::Response;
use super::socket::Reply;
use super::watch::Watch;
use crate::net::{Listener, Peer};
use crate::receiver::assemble::Arrival;
use crate::receiver::background::{Done, WorkKind};
use crate::receiver::end::SessionEnd;
use crate::receiver::guest::SessionTitle;
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use crate::receiver::live_session::LiveSession;
use crate::receiver::outlet::Stopping;
use crate::receiver::remark::Remark;
use crate::receiver::silence::Question;
use crate::receiver::status::{GuestBlock, SessionState, SessionStatus};
use crate::receiver::{Event, Outcome, ReceiverError};
use crate::store::KeptFiles;
use crate::units::CheckpointId;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How long sessions may take to end when the receiver does.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Ended sessions without a checkpoint that stay in reports.
const ENDED_KEPT: usize = 1024;

/// A session whose connections and tenants are not all dropped.
pub(super) struct Live {
    pub(super) session: Arc<LiveSession>,
    /// The core that drives its main channel: a position among the plane's cores.
    pub(super) home_core: usize,
    pub(super) suppressed: Option<(u64, Instant)>,
    /// The last silence that its main channel has asked for, and until when it has to last.
    pub(super) silent_until: Option<(Question, Instant)>,
    /// Where its connections come from.
    pub(super) peer: Peer,
    /// When its main channel was accepted.
    pub(super) main_arrival: Arrival,
    /// Since it has asked for its admission: what it waits for.
    pub(super) admission: Option<Pending>,
    pub(super) began: Instant,
    /// Whether it makes progress.
    pub(super) watch: Watch,
    /// Whether older checkpoints of its guest were looked for.
    pub(super) has_replaced: bool,
    /// Clients that wait for its end.
    pub(super) end_asked: Vec<Reply>,
    /// Clients that discard its checkpoint, asked since it has ended.
    pub(super) discard_asked: Vec<Reply>,
}

/// A session that has ended and left a checkpoint.
pub(super) struct Kept {
    pub(super) checkpoint: Arc<KeptCheckpoint>,
    /// Whether its guest may exist nowhere else: only an operator gives it up.
    pub(super) is_only_copy: bool,
    /// As the session was at its end; its blocks are the checkpoint's.
    status: SessionStatus,
}

/// What the control thread knows: connections that are not complete, sessions, and what is reported of past ones.
pub(super) struct ControlState {
    pub(super) context: ControlContext,
    pub(super) listeners: Vec<Rc<Listener>>,
    pub(super) connections: Connections,
    pub(super) live: Vec<Live>,
    pub(super) kept: Vec<Kept>,
    /// Sessions that left no checkpoint, and discarded ones.
    pub(super) past: Vec<SessionStatus>,
    pub(super) ended_sessions: u64,
    /// Work of other threads that is under way.
    pub(super) background: JoinSet<()>,
    /// For that work.
    pub(super) stopping: Stopping,
    /// When sessions were looked at.
    pub(super) ticked: Instant,
}

impl ControlState {
    pub(super) fn warn(&self, remark: impl Into<Remark>) {
        self.context.services.warn(remark.into());
    }

    /// Since the receiver's start.
    pub(super) fn uptime(&self) -> Duration {
        self.context.services.shared().started.elapsed()
    }

    pub(super) fn take_recovered(&mut self) {
        for checkpoint in std::mem::take(&mut self.context.recovered) {
            self.context.services.shared().guests.add(&checkpoint.guest);
            let summary = self.context.recorder.session(checkpoint.session);
            let status = SessionStatus::recovered(&checkpoint, summary, self.uptime());
            self.kept.push(Kept {
                status: SessionStatus {
                    blocks: Vec::new(),
                    ..status
                },
                // How its session ended is not known, but a migration without COLO ends with this one.
                is_only_copy: checkpoint.number() == Some(CheckpointId(0)),
                checkpoint: Arc::new(checkpoint),
            });
        }
    }

    /// Takes the sessions whose connections and tenants are all dropped off the live ones: nothing writes to their memory any more
    /// but what a failed core has leaked with it.
    pub(super) fn reap_ended_sessions(&mut self) {
        let mut refused = Vec::new();
        while let Some(position) = self.live.iter().position(|live| live.session.is_over()) {
            let Live {
                session,
                end_asked,
                discard_asked,
                ..
            } = self.live.remove(position);
            let lack = session.end().and_then(SessionEnd::lack);
            refused.extend(lack.map(|lack| (session.origin, lack.clone())));
            if let Some(disks) = &self.context.disks {
                disks.session_ended(session.id);
            }
            self.context.services.shared().links.session_ended(session.id);
            // What they have not committed is not needed any more, and applying what is goes on.
            let disks = session.disks().cloned().unwrap_or_default();
            disks.end_session();
            self.context
                .recorder
                .drain(&self.context.services.shared().samples);
            let name = session.guest.name().map(String::from);
            self.context.recorder.name(session.id, name);
            let summary = self.context.recorder.end_session(session.id);
            let status = SessionStatus::of(&session, summary);
            let is_only_copy = session.end().is_some_and(SessionEnd::may_hold_the_only_copy);
            if self.context.options.once && !is_only_copy && self.ended_sessions == 0 {
                (self.context.events)(Event::Ending);
            }
            (self.context.events)(Event::Ended(Box::new(status.clone())));
            if is_only_copy {
                self.make_room_for_only_copy(&session);
                self.keep_the_only_copy(&session.guest.title());
            } else {
                self.ended_sessions += 1;
            }
            let id = session.id;
            let ended = Response::SessionEnded {
                ended: id,
                checkpoint: status.checkpoint,
            };
            let store = session.store().cloned();
            // In the background: releasing a large guest's cache takes seconds.
            match session
                .checkpoint()
                .filter(|checkpoint| checkpoint.number().is_some())
            {
                Some(checkpoint) => {
                    let checkpoint = checkpoint.clone();
                    // Its guest may be protected again already: its primary's host had vanished, say.
                    self.live.iter_mut().for_each(|live| live.has_replaced = false);
                    self.kept.push(Kept {
                        checkpoint,
                        is_only_copy,
                        status: SessionStatus {
                            blocks: Vec::new(),
                            ..status
                        },
                    });
                    // With the session: its memory is credited to the budget when it is free, and never freed here.
                    self.in_background(WorkKind::Release, move || {
                        if let Some(store) = store {
                            store.drop_uncommitted();
                        }
                        // A base that cannot be written keeps its log, and says so when it is needed.
                        let _ = disks.drain();
                        drop(session);
                    });
                }
                None => {
                    self.remember(status);
                    self.in_background(WorkKind::Release, move || {
                        // Before the checkpoint's files go: a kill between must leave no record of a disk that says that a checkpoint needs it.
                        disks.give_up();
                        drop(store);
                        drop(disks);
                        drop(session);
                    });
                }
            }
            for reply in end_asked {
                // The client may have disconnected.
                let _ = reply.send(Ok(ended.clone()));
            }
            discard_asked
                .into_iter()
                .for_each(|reply| self.discard(id, reply));
        }
        for (origin, lack) in refused {
            self.end_standing_first_copies(origin, Lack::Budget(&lack));
        }
    }

    /// Does work on another thread. The receiver does not end before it is done.
    pub(super) fn in_background(&mut self, kind: WorkKind, work: impl FnOnce() + Send + 'static) {
        let done: Done = self.context.background.run(kind, work);
        self.background.spawn_local(async move {
            // Also after a panic, which its hook has reported.
            let _ = done.await;
        });
        // Those that have finished.
        while self.background.try_join_next().is_some() {}
    }

    /// A guest that may exist nowhere else is kept until the operator decides, also with `once`.
    fn keep_the_only_copy(&self, title: &SessionTitle) {
        let goes_on = match self.context.options.once {
            true => ". This receiver keeps running although it was started with --once",
            false => "",
        };
        let text = format!(
            "session {title} is kept until `colo-ring failover --session {id}` starts its guest here or `colo-ring discard` \
             gives it up{goes_on}",
            id = title.session
        );
        self.warn(Remark::of(title, text));
    }

    /// The figures of a session that is gone stay for the report.
    fn remember(&mut self, status: SessionStatus) {
        if self.past.len() == ENDED_KEPT {
            self.past.remove(0);
        }
        self.past.push(status.without_details());
    }

    pub(super) fn kept(&self, session: u32) -> Option<&Kept> {
        self.kept.iter().find(|kept| kept.checkpoint.session == session)
    }

    /// Takes a session's checkpoint out, to be released.
    pub(super) fn take_kept(&mut self, session: u32) -> Option<Kept> {
        let position = self
            .kept
            .iter()
            .position(|kept| kept.checkpoint.session == session)?;
        let kept = self.kept.remove(position);
        let mut status = kept.status.clone().with(&kept.checkpoint, self.uptime());
        if status.state != SessionState::Promoted {
            status.state = SessionState::Discarded;
        }
        self.remember(status);
        Some(kept)
    }

    pub(super) fn status_of(&self, live: &Live) -> SessionStatus {
        let summary = self.context.recorder.session(live.session.id);
        SessionStatus {
            stalled_ms: live.watch.stalled_ms(Instant::now()),
            recent: self.context.recorder.recent(live.session.id),
            ..SessionStatus::of(&live.session, summary)
        }
    }

    pub(super) fn status_of_kept(&self, kept: &Kept) -> SessionStatus {
        SessionStatus {
            blocks: GuestBlock::all(&kept.checkpoint.image),
            ..kept.status.clone().with(&kept.checkpoint, self.uptime())
        }
    }

    /// Live sessions and kept checkpoints, by their numbers: of very many RAM blocks the largest ones.
    pub(super) fn session_statuses(&self) -> Vec<SessionStatus> {
        let kept = self.kept.iter().map(|kept| self.status_of_kept(kept));
        let live = self.live.iter().map(|live| self.status_of(live));
        // One by one: a status with all blocks is large.
        let mut statuses: Vec<_> = kept.chain(live).map(SessionStatus::with_few_blocks).collect();
        statuses.sort_by_key(|status| status.session);
        statuses
    }

    /// Appends to the interval logs. A full disk costs measurements, never a session.
    pub(super) fn log_interval(&mut self) {
        for live in &self.live {
            let name = live.session.guest.name().map(String::from);
            self.context.recorder.name(live.session.id, name);
        }
        self.context
            .recorder
            .drain(&self.context.services.shared().samples);
        if let Err(error) = self
            .context
            .recorder
            .write_interval(self.context.services.shared().started.elapsed())
        {
            self.warn(error.to_string());
        }
    }

    /// Ends all sessions and waits until they are over.
    pub(super) async fn end_all(&mut self, changed: &Notify) {
        self.connections.identifying.abort_all();
        for live in &self.live {
            live.session.finish(SessionEnd::Stopped);
        }
        let all_over = async {
            while self.live.iter().any(|live| !live.session.is_over()) {
                changed.notified().await;
            }
        };
        // A core may hang.
        if tokio::time::timeout(END_TIMEOUT, all_over).await.is_err() {
            self.warn(format!("some connections did not end within {END_TIMEOUT:?}"));
        }
        self.reap_ended_sessions();
    }

    /// Keeps a checkpoint's files in the RAM directory for the next receiver, if it has any.
    fn keep_files(&self, checkpoint: &KeptCheckpoint) -> bool {
        let Some(directory) = &self.context.options.store.ram_dir else {
            return false;
        };
        let (session, directory) = (checkpoint.guest.title(), directory.display());
        let kept = checkpoint.image.keep_files();
        match kept {
            KeptFiles::Kept => {
                checkpoint.disks.keep_files();
                let text = format!(
                    "session {session}: its last checkpoint stays in {directory}; a receiver with this --ram-dir offers it \
                     again"
                );
                (self.context.events)(Event::note(Remark::of(&session, text)));
            }
            KeptFiles::Gone => {
                let text = format!(
                    "session {session}: its last checkpoint is lost: its files were removed from {directory}"
                );
                self.warn(Remark::of(&session, text));
            }
            KeptFiles::NoCheckpoint => {}
        }
        kept == KeptFiles::Kept
    }

    /// Ends the receiver, when its sessions have ended.
    pub(super) async fn close(mut self) -> Result<Outcome, ReceiverError> {
        drop(self.context.disk_server.take());
        self.stopping.begin();
        // Only then are checkpoints whole in their images.
        while self.background.join_next().await.is_some() {}
        let mut sessions = std::mem::take(&mut self.past);
        sessions.append(&mut self.session_statuses());
        sessions.sort_by_key(|session| session.session);
        // Those of sessions that did not end in time are whole as well: as after a kill, what is in slots is still to be copied.
        let live = self.live.iter().filter_map(|live| live.session.checkpoint());
        let kept = self.kept.iter().map(|kept| &kept.checkpoint).chain(live);
        let kept = kept.filter(|checkpoint| self.keep_files(checkpoint));
        let kept = kept.map(|checkpoint| checkpoint.session).collect();
        self.kept.clear();
        self.live.clear();
        let uptime = self.uptime();
        self.context.plane.stop();
        drop(self.context.workers);
        let (report, written) = self.context.recorder.finish(uptime);
        Ok(Outcome {
            sessions,
            kept,
            report,
            written,
        })
    }
}
