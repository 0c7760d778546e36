//! The state of the control thread and what changes it, but for requests (`requests.rs`).

use super::ControlContext;
use super::connections::Connections;
use super::protocol::Response;
use super::socket::Reply;
use super::watch::Watch;
use crate::receiver::background::{Done, WorkKind};
use crate::receiver::end::SessionEnd;
use crate::receiver::kept_checkpoint::KeptCheckpoint;
use crate::receiver::live_session::LiveSession;
use crate::receiver::status::{GuestBlock, SessionStatus};
use crate::receiver::{Event, Outcome, ReceiverError};
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
    pub(super) began: Instant,
    /// Whether it makes progress.
    pub(super) watch: Watch,
    /// Clients that wait for its end.
    pub(super) end_asked: Vec<Reply>,
}

/// A session that has ended and left a checkpoint.
pub(super) struct Kept {
    pub(super) checkpoint: Arc<KeptCheckpoint>,
    /// As the session was at its end; its blocks are the checkpoint's.
    status: SessionStatus,
}

/// What the control thread knows: connections that are not complete, sessions, and what is reported of past ones.
pub(super) struct ControlState {
    pub(super) context: ControlContext,
    pub(super) connections: Connections,
    pub(super) live: Vec<Live>,
    pub(super) kept: Vec<Kept>,
    /// Sessions that left no checkpoint, and discarded ones.
    pub(super) past: Vec<SessionStatus>,
    pub(super) next: u32,
    pub(super) ended_sessions: u64,
    /// Work of other threads that is under way.
    pub(super) background: JoinSet<()>,
}

impl ControlState {
    pub(super) fn warn(&self, text: String) {
        self.context.services.warn(text);
    }

    /// Since the receiver's start.
    pub(super) fn uptime(&self) -> Duration {
        self.context.services.shared().started.elapsed()
    }

    pub(super) fn take_recovered(&mut self) {
        let (recovered, next) = std::mem::take(&mut self.context.recovered);
        self.next = next;
        for checkpoint in recovered {
            let summary = self.context.recorder.session(checkpoint.session);
            let status = SessionStatus::recovered(&checkpoint, summary, self.uptime());
            self.kept.push(Kept {
                status: SessionStatus {
                    blocks: Vec::new(),
                    ..status
                },
                checkpoint: Arc::new(checkpoint),
            });
        }
    }

    /// Takes the sessions whose connections and tenants are all dropped off the live ones: nothing writes to their memory any more
    /// but what a failed core has leaked with it.
    pub(super) fn reap_ended_sessions(&mut self) {
        while let Some(position) = self.live.iter().position(|live| live.session.is_over()) {
            let Live {
                session, end_asked, ..
            } = self.live.remove(position);
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
            let summary = self.context.recorder.end_session(session.id);
            let status = SessionStatus::of(&session, summary);
            (self.context.events)(Event::Ended(Box::new(status.clone())));
            if session.end().is_some_and(SessionEnd::may_hold_the_only_copy) {
                self.keep_the_only_copy(session.id);
            } else {
                self.ended_sessions += 1;
            }
            let ended = Response::SessionEnded {
                ended: session.id,
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
                    self.kept.push(Kept {
                        checkpoint,
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
    fn keep_the_only_copy(&self, id: u32) {
        let goes_on = match self.context.options.once {
            true => ". This receiver keeps running although it was started with --once",
            false => "",
        };
        self.warn(format!(
            "session {id} is kept until `colo-ring failover --session {id}` starts its guest here or `colo-ring discard` \
             gives it up{goes_on}"
        ));
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
        let status = kept.status.clone().with(&kept.checkpoint, self.uptime());
        self.remember(status);
        Some(kept)
    }

    pub(super) fn status_of(&self, live: &Live) -> SessionStatus {
        let summary = self.context.recorder.session(live.session.id);
        SessionStatus {
            stalled_ms: live.watch.stalled_ms(Instant::now()),
            ..SessionStatus::of(&live.session, summary)
        }
    }

    pub(super) fn status_of_kept(&self, kept: &Kept) -> SessionStatus {
        SessionStatus {
            blocks: GuestBlock::all(&kept.checkpoint.image),
            ..kept.status.clone().with(&kept.checkpoint, self.uptime())
        }
    }

    /// Live sessions and kept checkpoints, by their numbers.
    pub(super) fn session_statuses(&self) -> Vec<SessionStatus> {
        let kept = self.kept.iter().map(|kept| self.status_of_kept(kept));
        let live = self.live.iter().map(|live| self.status_of(live));
        let mut statuses: Vec<_> = kept.chain(live).collect();
        statuses.sort_by_key(|status| status.session);
        statuses
    }

    /// Appends to the interval logs. A full disk costs measurements, never a session.
    pub(super) fn log_interval(&mut self) {
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

    /// Keeps a checkpoint's files in the RAM directory for the next receiver.
    fn keep_files(&self, checkpoint: &KeptCheckpoint) {
        if checkpoint.image.keep_files() {
            checkpoint.disks.keep_files();
        } else {
            return;
        }
        if let Some(directory) = &self.context.options.store.ram_dir {
            let (session, directory) = (checkpoint.session, directory.display());
            (self.context.events)(Event::Note(format!(
                "session {session}: its last checkpoint stays in {directory}; a receiver with this --ram-dir offers it \
                 again"
            )));
        }
    }

    /// Ends the receiver, when its sessions have ended.
    pub(super) async fn close(mut self) -> Result<Outcome, ReceiverError> {
        drop(self.context.disk_server.take());
        // Only then are checkpoints whole in their images.
        while self.background.join_next().await.is_some() {}
        let mut sessions = std::mem::take(&mut self.past);
        sessions.append(&mut self.session_statuses());
        sessions.sort_by_key(|session| session.session);
        self.kept
            .iter()
            .for_each(|kept| self.keep_files(&kept.checkpoint));
        self.kept.clear();
        self.live.clear();
        let uptime = self.uptime();
        self.context.plane.stop();
        drop(self.context.workers);
        let report = self.context.recorder.finish(uptime)?;
        Ok(Outcome { sessions, report })
    }
}
